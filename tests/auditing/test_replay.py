"""The replay of compiled schedules: programs worked out by hand."""

from __future__ import annotations

import re
import textwrap

import pytest

from autoshard.auditing.replay import Replay, replay, replay_steps
from autoshard.auditing.schedule import Branches, Copy, Label, Wait, Work
from costmodels.machine.collectives import seconds
from costmodels.machine.topology import parse_topology

CUBE = parse_topology("v4:4x4x4")
CLOCK = 1.05e9
HBM = CUBE.chip.reached_hbm_bytes_per_second
MIB = 2**20
GATHERED = 16 * MIB
"""Bytes of f32[4194304], which is what four chips gather of f32[1048576], 4 MiB."""
GROUPS = {"z": "[16,4]<=[64]", "x": "[16,4]<=[4,16]T(1,0)"}


def program(entry: str, before: str = "", parameters: str = "p: f32[1048576]") -> str:
    body = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    return f"""HloModule jit_f, is_scheduled=true, num_partitions=64

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%same (x: f32[1048576]) -> f32[1048576] {{
  %x = f32[1048576]{{0:T(1024)S(1)}} parameter(0)
  ROOT %n = f32[1048576]{{0:T(1024)S(1)}} negate(%x)
}}
{before}
ENTRY %main ({parameters}) -> f32[1048576] {{
  %p = f32[1048576]{{0:T(1024)}} parameter(0)
{body}
}}
"""


def work(name: str, of: str, microseconds: float, where: str = "S(1)") -> str:
    """A fusion of so many microseconds of the core, on arrays on the chip."""
    cycles = round(microseconds * CLOCK / 1e6)
    shape = f"f32[1048576]{{0:T(1024){where}}}"
    return f'%{name} = {shape} fusion(%{of}), kind=kLoop, calls=%same, backend_config={{"estimated_cycles":"{cycles}"}}'


def prefetch(name: str, of: str = "p") -> tuple[str, str]:
    """The start and the end of a copy of 4 MiB from HBM to the chip."""
    on_chip, in_hbm = "f32[1048576]{0:T(1024)S(1)}", "f32[1048576]{0:T(1024)}"
    start = f"%{name}.s = ({on_chip}, {in_hbm}, u32[]{{:S(2)}}) copy-start(%{of})"
    return start, f"%{name} = {on_chip} copy-done(%{name}.s)"


def gather(name: str, of: str, axis: str) -> str:
    return f"%{name} = f32[4194304]{{0:T(1024)S(1)}} all-gather(%{of}), replica_groups={GROUPS[axis]}, dimensions={{0}}"


def started(name: str, of: str, axis: str) -> tuple[str, str]:
    both = "(f32[1048576]{0:T(1024)S(1)}, f32[4194304]{0:T(1024)S(1)})"
    start = f"%{name}.s = {both} all-gather-start(%{of}), replica_groups={GROUPS[axis]}, dimensions={{0}}"
    return start, f"%{name} = f32[4194304]{{0:T(1024)S(1)}} all-gather-done(%{name}.s)"


def lines(*rows: str) -> str:
    return "\n".join(rows)


def replayed(text: str) -> Replay:
    found = replay(text, CUBE)
    assert found is not None
    return found


def microseconds(found: Replay) -> float:
    return found.seconds * 1e6


COPY = 4 * MIB / HBM * 1e6
GATHER = float(seconds("all-gather", [CUBE.axis("z")], float(GATHERED))) * 1e6


def test_the_core_runs_in_order() -> None:
    start, done = prefetch("c")
    found = replayed(program(lines(start, done, work("f", "c", 10), "ROOT " + work("g", "f", 20))))
    assert microseconds(found) == pytest.approx(COPY + 30, rel=1e-4)
    assert (found.copy_seconds * 1e6, found.core_seconds * 1e6) == pytest.approx((COPY, 30), rel=1e-4)


@pytest.mark.parametrize(("beside", "waited"), [(COPY + 1, 0.0), (COPY - 1, 1.0)])
def test_a_copy_hides_behind_work_that_leaves_hbm_alone(beside: float, waited: float) -> None:
    first, second = prefetch("c"), prefetch("d")
    rows = (first[0], first[1], second[0], work("f", "c", beside), second[1], "ROOT " + work("g", "d", 5))
    found = replayed(program(lines(*rows)))
    assert microseconds(found) == pytest.approx(COPY + beside + waited + 5, rel=1e-3)
    assert found.copy_seconds * 1e6 == pytest.approx(COPY + waited, rel=1e-3)


def test_a_copy_gets_of_hbm_what_the_running_instruction_leaves() -> None:
    """A fusion that reads 4 MiB of HBM keeps it busy for a copy's time, and one that writes them, too, for two."""
    start, done = prefetch("c")
    for where, busy in (("S(1)", 1), ("", 2)):
        rows = (start, work("f", "p", 2.5 * COPY, where), done, "ROOT " + work("g", "c", 5))
        waited = max(COPY - (2.5 - busy) * COPY, 0.0)
        assert microseconds(replayed(program(lines(*rows)))) == pytest.approx(2.5 * COPY + waited + 5, rel=1e-3)


def test_copies_are_made_one_after_the_other() -> None:
    first, second = prefetch("c"), prefetch("d")
    found = replayed(program(lines(first[0], second[0], second[1], first[1], "ROOT " + work("f", "d", 5))))
    assert microseconds(found) == pytest.approx(2 * COPY + 5, rel=1e-3)


def test_what_is_not_started_apart_is_waited_for() -> None:
    found = replayed(program(lines(work("f", "p", 10), "ROOT " + gather("g", "f", "z"))))
    assert microseconds(found) == pytest.approx(10 + GATHER, rel=1e-3)
    assert found.exposed_seconds * 1e6 == pytest.approx(GATHER, rel=1e-3)
    assert [each.name for each in found.costliest] == ["g", "f"]


@pytest.mark.parametrize(("axes", "together"), [(("z", "z"), 2), (("z", "x"), 1)])
def test_collectives_on_the_same_links_take_turns(axes: tuple[str, str], together: int) -> None:
    one, other = started("a", "p", axes[0]), started("b", "p", axes[1])
    rows = (one[0], other[0], work("f", "p", 10), one[1], other[1], "ROOT " + work("g", "f", 5))
    found = replayed(program(lines(*rows)))
    assert microseconds(found) == pytest.approx(together * GATHER + 5, rel=1e-3)
    assert found.exposed_seconds * 1e6 == pytest.approx(together * GATHER - 10, rel=1e-3)


CHAIN = """
%starts (x: f32[1048576]) -> (f32[1048576], f32[4194304]) {
  %x = f32[1048576]{0:T(1024)S(1)} parameter(0)
  %g = f32[4194304]{0:T(1024)} all-gather(%x), channel_id=1, replica_groups=[16,4]<=[64], dimensions={0}, CONFIG
  ROOT %c = (f32[1048576]{0}, f32[4194304]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%goes_on (x: f32[1048576]) -> f32[1048576] {
  %x = f32[1048576]{0:T(1024)S(1)} parameter(0)
  %g = f32[4194304]{0:T(1024)S(1)} all-gather(%x), channel_id=1, replica_groups=[16,4]<=[64], dimensions={0}, CONFIG
  ROOT %n = f32[1048576]{0:T(1024)S(1)} negate(%x)
}

%ends (x: f32[1048576]) -> f32[4194304] {
  %x = f32[1048576]{0:T(1024)S(1)} parameter(0)
  %g = f32[4194304]{0:T(1024)} all-gather(%x), channel_id=1, replica_groups=[16,4]<=[64], dimensions={0}, CONFIG
  ROOT %c = f32[4194304]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
""".replace("CONFIG", 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}')


def test_a_collective_that_is_spread_over_fusions_is_sent_once() -> None:
    rows = (
        "%s = (f32[1048576]{0:T(1024)S(1)}, f32[4194304]{0:T(1024)S(1)}) fusion(%p), kind=kCustom, calls=%starts",
        "%q = f32[1048576]{0:T(1024)S(1)} get-tuple-element(%s), index=0",
        work("f", "q", 10).replace("%same", "%goes_on"),
        work("h", "f", 20).replace("%same", "%goes_on"),
        "%e = f32[4194304]{0:T(1024)S(1)} fusion(%h), kind=kCustom, calls=%ends",
        "ROOT " + work("g", "h", 5),
    )
    found = replayed(program(lines(*rows), CHAIN))
    assert found.exposed_seconds * 1e6 == pytest.approx(GATHER - 30, rel=1e-3)
    assert microseconds(found) == pytest.approx(GATHER + 5, rel=1e-3)


def loop(body: str, result: str, test: str, step: int = 1) -> tuple[str, str]:
    carried = "(s32[], f32[1048576]{0:T(1024)S(1)})"
    computations = f"""
%more (c: (s32[], f32[1048576])) -> pred[] {{
  %c = {carried} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
{textwrap.indent(test, "  ")}
}}

%once (c: (s32[], f32[1048576])) -> (s32[], f32[1048576]) {{
  %c = {carried} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[1048576]{{0:T(1024)S(1)}} get-tuple-element(%c), index=1
  %k = s32[] constant({step})
  %j = s32[] add(%i, %k)
{textwrap.indent(body, "  ")}
  ROOT %next = {carried} tuple(%j, %{result})
}}
"""
    entry = lines(
        "%zero = s32[] constant(0)",
        f"%state = {carried} tuple(%zero, %p)",
        f"%w = {carried} while(%state), condition=%more, body=%once KNOWN",
        "ROOT %y = f32[1048576]{0:T(1024)S(1)} get-tuple-element(%w), index=1",
    )
    return computations, entry


LESS = "%n = s32[] constant({})\nROOT %t = pred[] compare(%i, %n), direction=LT"


@pytest.mark.parametrize(
    ("test", "step", "known", "rounds"),
    [
        (LESS.format(7), 1, "", 7),
        (LESS.format(7), 1, ', backend_config={"known_trip_count":{"n":"5"}}', 5),
        (LESS.format(4), 2, "", 2),  # both directions of a ring of eight: four steps of which each does two
        ("%n = s32[] constant(8)\n%o = s32[] constant(1)\n%m = s32[] add(%i, %o)\nROOT %t = pred[] compare(%m, %n), "
         "direction=LT", 2, "", 4),
    ],
    ids=["the condition's constant", "the known trip count", "decomposed, by twos", "decomposed, with an offset"],
)  # fmt: skip
def test_loops_multiply(test: str, step: int, known: str, rounds: int) -> None:
    body = lines(work("f", "x", 10), started("a", "f", "z")[0], work("h", "f", 3), started("a", "f", "z")[1])
    computations, entry = loop(body, "h", test, step)
    found = replayed(program(entry.replace(" KNOWN", known), computations))
    assert microseconds(found) == pytest.approx(rounds * (10 + GATHER), rel=1e-3)
    runs = {each.name: each.runs for each in found.costly if each.seconds > 1e-9}  # not those of the counter
    assert runs == {"f": rounds, "h": rounds, "a.s": rounds}


def test_nested_loops_multiply() -> None:
    inner, run = loop(work("f", "x", 10), "f", LESS.format(3))
    inner = inner.replace("%more", "%more_in").replace("%once", "%once_in")
    body = lines(
        "%zero = s32[] constant(0)",
        "%state = (s32[], f32[1048576]{0:T(1024)S(1)}) tuple(%zero, %x)",
        "%w = (s32[], f32[1048576]{0:T(1024)S(1)}) while(%state), condition=%more_in, body=%once_in",
        "%y = f32[1048576]{0:T(1024)S(1)} get-tuple-element(%w), index=1",
    )
    outer, run = loop(body, "y", LESS.format(4))
    assert microseconds(replayed(program(run.replace(" KNOWN", ""), inner + outer))) == pytest.approx(120, rel=1e-3)


STACK = """
%cut (stack: f32[8,1048576], at: s32[]) -> f32[1048576] {
  %stack = f32[8,1048576]{1,0:T(8,128)} parameter(0)
  %at = s32[] parameter(1)
  %z = s32[] constant(0)
  %slice = f32[1,1048576]{1,0:T(8,128)S(1)} dynamic-slice(%stack, %at, %z), dynamic_slice_sizes={1,1048576}
  ROOT %flat = f32[1048576]{0:T(1024)S(1)} bitcast(%slice)
}
"""


@pytest.mark.parametrize("rounds", [3, 8, 20])
def test_no_step_is_shorter_than_the_bytes_that_it_must_read_once(rounds: int) -> None:
    """A loop that slices a stack of eight layers reads those that it takes, and at most the whole stack."""
    carried = "(s32[], f32[1048576]{0:T(1024)S(1)}, f32[8,1048576]{1,0:T(8,128)})"
    cycles = 'backend_config={"estimated_cycles":"10"}'
    body = lines(
        "%stack = f32[8,1048576]{1,0:T(8,128)} get-tuple-element(%c), index=2",
        f"%f = f32[1048576]{{0:T(1024)S(1)}} fusion(%stack, %i), kind=kLoop, calls=%cut, {cycles}",
    )
    computations, entry = loop(body, "f, %stack", LESS.format(rounds))
    old = "(s32[], f32[1048576]{0:T(1024)S(1)})"
    computations = computations.replace(old, carried)
    entry = entry.replace(old, carried).replace(" KNOWN", "").replace("tuple(%zero, %p)", "tuple(%zero, %p, %q)")
    entry = "%q = f32[8,1048576]{1,0:T(8,128)} parameter(1)\n" + entry
    found = replayed(program(entry, STACK + computations, "p: f32[1048576], q: f32[8,1048576]"))
    read = min(rounds, 8) * 4 * MIB
    assert found.floor_seconds == pytest.approx(read / CUBE.chip.hbm_bytes_per_second, rel=1e-3)
    assert found.seconds == found.floor_seconds > found.core_seconds


UPDATE = """
%put (stack: f32[8,1048576], at: s32[], row: f32[1048576]) -> f32[8,1048576] {
  %stack = f32[8,1048576]{1,0:T(8,128)} parameter(0)
  %at = s32[] parameter(1)
  %z = s32[] constant(0)
  %row = f32[1048576]{0:T(1024)S(1)} parameter(2)
  %flat = f32[1,1048576]{1,0:T(8,128)} bitcast(%row)
  ROOT %new = f32[8,1048576]{1,0:T(8,128)} dynamic-update-slice(%stack, %flat, %at, %z)
}
"""


@pytest.mark.parametrize("rounds", [3, 8, 20])
@pytest.mark.parametrize("donated", [True, False])
def test_the_floor_counts_caches_that_a_loop_updates_in_place(rounds: int, donated: bool) -> None:
    """A loop that reads each layer of a carried stack and writes it back moves it twice; a copy is written whole."""
    carried = "(s32[], f32[1048576]{0:T(1024)S(1)}, f32[8,1048576]{1,0:T(8,128)})"
    cycles = 'backend_config={"estimated_cycles":"10"}'
    stack = "f32[8,1048576]{1,0:T(8,128)}"
    body = lines(
        f"%stack = {stack} get-tuple-element(%c), index=2",
        f"%f = f32[1048576]{{0:T(1024)S(1)}} fusion(%stack, %i), kind=kLoop, calls=%cut, {cycles}",
        f"%new = {stack} fusion(%stack, %i, %f), kind=kLoop, calls=%put, {cycles}",
    )
    computations, entry = loop(body, "f, %new", LESS.format(rounds))
    old = "(s32[], f32[1048576]{0:T(1024)S(1)})"
    computations = computations.replace(old, carried)
    entry = entry.replace(old, carried).replace(" KNOWN", "").replace("tuple(%zero, %p)", "tuple(%zero, %p, %q)")
    entry = re.sub(r"ROOT .*", f"ROOT %out = {stack} get-tuple-element(%w), index=2", entry)
    entry = f"%q = {stack} parameter(1)\n" + entry
    text = program(entry, STACK + UPDATE + computations, "p: f32[1048576], q: f32[8,1048576]")
    if donated:
        first, rest = text.split("\n", 1)
        text = f"{first}, input_output_alias={{ {{}}: (1, {{}}, may-alias) }}\n{rest}"
    moved = min(rounds, 8) * 4 * MIB
    moved += moved if donated else 8 * 4 * MIB
    assert replayed(text).floor_seconds == pytest.approx(moved / CUBE.chip.hbm_bytes_per_second, rel=1e-3)


def test_what_carries_no_estimate_takes_its_bytes() -> None:
    kernel = '%k = f32[1048576]{0:T(1024)} custom-call(%p), custom_call_target="kernel"'
    found = replayed(program(lines(kernel, "ROOT " + work("f", "k", 1))))
    assert found.core_seconds * 1e6 == pytest.approx(2 * COPY + 1, rel=1e-3)


def test_a_kernel_without_cycles_takes_the_time_of_its_own_estimate() -> None:
    """Libtpu 0.0.42 makes attention without masks a kernel, of which it estimates FLOPs but no cycles."""
    estimate = 'backend_config={"cost_estimate":{"flops":"1000000000000","transcendentals":"0"}}'
    kernel = f'%k = f32[1048576]{{0:T(1024)}} custom-call(%p), custom_call_target="tpu_custom_call", {estimate}'
    found = replayed(program(lines(kernel, "ROOT " + work("f", "k", 1))))
    assert found.core_seconds == pytest.approx(1e12 / CUBE.chip.reached_matmul_flops_per_second("bfloat16"), rel=1e-3)


def test_a_program_without_estimates_is_not_replayed() -> None:
    assert replay(program("ROOT %n = f32[1048576]{0} negate(%p)"), CUBE) is None


def test_an_instruction_is_named_by_the_users_line_and_scopes() -> None:
    told = 'metadata={op_name="jit(step)/shard_map/while/body/closed_call/layer/attention/ab,bc->ac/dot_general" '
    told += 'source_file="/home/user/model.py" source_line=7}'
    (found,) = replayed(program("ROOT " + work("f", "p", 10).replace(", backend", f", {told}, backend"))).costliest
    assert (found.source, found.scope) == ("model.py:7", "layer/attention/ab,bc->ac/dot_general")


def test_a_copy_is_named_by_its_array_and_by_the_line_that_uses_it() -> None:
    told = 'metadata={op_name="jit(step)/negate" source_file="/home/user/model.py" source_line=7}'
    start, done = prefetch("c")
    rows = (start, done, "ROOT " + work("f", "c", 1).replace(", backend", f", {told}, backend"))
    named = "%p = f32[1048576]{0:T(1024)} parameter(0), metadata={op_name=\"params[\\'w\\']\"}"
    text = program(lines(*rows)).replace("%p = f32[1048576]{0:T(1024)} parameter(0)", named)
    (copied,) = (each for each in replayed(text).costliest if each.opcode == "copy-start")
    assert (copied.source, copied.scope) == ("model.py:7", "params['w']")


def test_a_queued_copy_goes_on_while_a_shorter_branch_waits_for_the_slowest() -> None:
    """The copy ends within the ten seconds of the slowest branch, whichever branch runs."""
    queued = Label("c", "copy-start", "", "")
    slowest = Work(Label("f", "fusion", "", ""), 10.0, 0.0)
    found = replay_steps((Copy(queued, 5.0), Branches(((slowest,), ())), Wait(queued.name)))
    assert (found.seconds, found.copy_seconds) == (10.0, 0.0)


def test_an_instruction_of_unknown_cycles_takes_the_time_of_its_bytes() -> None:
    text = program("ROOT " + work("f", "p", 10))
    cycles = f'"estimated_cycles":"{round(10 * CLOCK / 1e6)}"'
    assert cycles in text
    found = replayed(text.replace(cycles, f'"estimated_cycles":"{2**63 - 1}"'))
    assert microseconds(found) == pytest.approx(COPY)
