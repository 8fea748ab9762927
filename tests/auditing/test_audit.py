"""The audit: what counts as the plan, what as something else, and that compiled programs are what was planned."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import autoshard
from autoshard import Workload
from autoshard.auditing import bounds, hlo_collectives
from autoshard.auditing.audit import Audit, AuditError, audit, compare
from autoshard.auditing.findings import CompileTarget
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.auditing.matching import pair_collectives
from autoshard.auditing.replay import Costly
from autoshard.auditing.unplanned_time import attribute_time
from autoshard.plan import Plan
from autoshard.planning.records import PlannedCollective
from benchmarks.audits import LIMITS
from costmodels.machine.collectives import seconds
from costmodels.machine.topology import Topology, parse_topology
from examples import palm

V4 = parse_topology("v4:4x4x4")
KIB = 1024


@cache
def slow_host() -> Topology:
    """Eight host devices whose memory is slow beside their links: weights are worth splitting, at any size."""
    topology = parse_topology("cpu:2x2x2")
    chip = topology.chip.override({"hbm_bytes_per_second": 1e7}, "slow, so that tiny weights are split")
    return replace(topology, chip=chip, axes=tuple(replace(axis, launch_seconds=0.0) for axis in topology.axes))


def tiny(phase: str) -> Workload:
    if phase == "decode":
        return palm.decode(size="tiny", batch=8, context=16)
    return palm.prefill(size="tiny", batch=2, length=16)


@cache
def planned(phase: str) -> Plan:
    work = tiny(phase)
    return autoshard.search(
        work.fn, *work.args, topology=slow_host(), donate_argnums=work.donate_argnums, name=work.name
    )


# --- Pairing, on made-up programs


@cache
def plan_of_nothing() -> Plan:
    return autoshard.search(lambda x: x, jax.ShapeDtypeStruct((64, 64), jnp.float32), topology=V4)


def p(kind: str, axes: str, bytes: float, count: int = 1) -> PlannedCollective:
    each = float(seconds(kind, [V4.axis(axis) for axis in axes], bytes))
    return PlannedCollective(kind, tuple(axes), bytes, count, count * each, "w for dot_general")


def c(kind: str, axes: str | None, bytes: int, count: int = 1, spelling: str = "", **more) -> CompiledCollective:
    on = None if axes is None else tuple(axes)
    return CompiledCollective(kind, on, bytes, count, "", "palm.py:1", False, spelling or kind, **more)


def compared(
    monkeypatch, planned, compiled, target: CompileTarget = "tpu", arrays=(), peak: float | None = None
) -> Audit:
    monkeypatch.setattr(hlo_collectives, "collectives", lambda text, axes: tuple(compiled))
    nothing = plan_of_nothing()
    estimate = replace(nothing.estimate, collectives=tuple(planned), peak_bytes=100.0)
    return compare(replace(nothing, estimate=estimate), "", target, peak, arrays)


AG, RS, AR, A2A, CP = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
BIG = p(AR, "xyz", 4096 * KIB, 10)

CASES = {
    "as planned": ([p(AG, "zy", 64, 2)], [c(AG, "yz", 64, 2)], "tpu", []),
    "a loop's first round apart": ([p(AG, "x", 64, 3)], [c(AG, "x", 64, 2), c(AG, "x", 64)], "tpu", []),
    "padded a little": ([p(AG, "x", 10_000)], [c(AG, "x", 10_020)], "tpu", []),
    "axes of one chip": ([p(AG, "x", 64)], [c(AG, "x", 64), c(AG, "", 64)], "tpu", []),
    "combined": (
        [p(AR, "x", 64, 2), p(AR, "x", 64, 2)],
        [c(AR, "x", 128, 2, "combined 2")],
        "tpu",
        [("same plan at lower cost", False)],
    ),
    "in pieces": ([p(A2A, "x", 128)], [c(A2A, "x", 64), c(A2A, "x", 64)], "host", [("same plan", False)]),
    "an all-reduce in its two halves": (
        [p(AR, "x", 64 * KIB)],
        [c(RS, "x", 64 * KIB), c(AG, "x", 64 * KIB)],
        "host",
        [("same plan", False)],
    ),
    "all-reduce and slice, on host devices": (
        [p(RS, "x", 64)],
        [c(AR, "x", 64)],
        "host",
        [("same plan at higher cost", True)],
    ),
    "all-reduce and slice, on a TPU": (
        [p(RS, "x", 4096 * KIB)],
        [c(AR, "x", 4096 * KIB, spelling="scatter by all-reduce")],
        "tpu",
        [("same plan at higher cost", True)],
    ),
    "the same, too small to count": (
        [BIG, p(RS, "x", 64)],
        [c(AR, "xyz", 4096 * KIB, 10), c(AR, "x", 64)],
        "tpu",
        [("same plan at higher cost", False)],
    ),
    "gathered among zeros": (
        [p(AG, "x", 4096 * KIB)],
        [c(AR, "x", 4096 * KIB, spelling="gather by all-reduce")],
        "tpu",
        [("same plan at higher cost", True)],
    ),
    "an all-reduce that gathers nothing": (
        [p(AG, "x", 4096 * KIB)],
        [c(AR, "x", 4096 * KIB)],
        "tpu",
        [("unplanned", True), ("missing", True)],
    ),
    "other axes": ([p(AG, "x", 64)], [c(AG, "y", 64)], "tpu", [("missing", True), ("unplanned", True)]),
    "other bytes": ([p(AG, "x", 64)], [c(AG, "x", 70)], "tpu", [("unplanned", True), ("missing", True)]),
    "too often": ([p(AG, "x", 64)], [c(AG, "x", 64, 2)], "tpu", [("unplanned", True)]),
    "groups that are no axes": ([p(AG, "x", 64)], [c(AG, None, 64)], "tpu", [("unplanned", True), ("missing", True)]),
    "a small permutation": (
        [BIG],
        [c(AR, "xyz", 4096 * KIB, 10), c(CP, "x", 64, 1, "reduce-scatter realignment")],
        "tpu",
        [("unplanned", False)],
    ),
    "a permutation of padded rows": (
        [p(RS, "x", 4096 * KIB, 2)],
        [
            c(RS, "x", 4096 * KIB, 2, "all-reduce-scatter fusion"),
            c(CP, "x", 4 * KIB, 2, "reduce-scatter realignment"),
        ],
        "tpu",
        [("same plan at higher cost", True)],
    ),
    "the same, too cheap to count": (
        [p(RS, "x", 4096 * KIB, 2), BIG],
        [
            c(AR, "xyz", 4096 * KIB, 10),
            c(RS, "x", 4096 * KIB, 2, "all-reduce-scatter fusion"),
            c(CP, "x", 4 * KIB, 2, "reduce-scatter realignment"),
        ],
        "tpu",
        [("same plan at higher cost", False)],
    ),
    "an array gathered for its slices": (
        [],
        [c(AG, "x", 64, only_sliced=True)],
        "tpu",
        [("unplanned", True)],
    ),
    "nothing planned": ([], [c(AG, "x", 64)], "tpu", [("unplanned", True)]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_counts_as_the_plan(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, compiled, target, expected = CASES[case]
    found = compared(monkeypatch, planned, compiled, target)
    assert sorted(said(found)) == sorted(expected)
    assert found.ok == (not any(counts for _, counts in expected))


def said(found: Audit) -> list[tuple[str, bool]]:
    """Kinds of differences and whether they count, without the bytes that leave their bounds by them."""
    return [(each.kind, each.counts) for each in found.differences if each.kind != "bytes on the wire"]


def kinds(found: Audit) -> list[str]:
    return [kind for kind, _ in said(found)]


COLLECTIVES = st.lists(
    st.tuples(
        st.sampled_from([AG, RS, AR, A2A]), st.sampled_from(["x", "y", "xy"]), st.integers(1, 2**24), st.integers(1, 9)
    ),
    max_size=4,
)


@given(COLLECTIVES, COLLECTIVES, st.booleans(), st.sampled_from(["host", "tpu", "gpu"]))
def test_no_program_within_which_bytes_leave_their_bounds_is_as_planned(
    due: list[Any], more: list[Any], twice: bool, target: CompileTarget
) -> None:
    """Compiled are the planned collectives, each reduce-scatter perhaps as an all-reduce, and others."""
    planned = [p(kind, axes, bytes, count) for kind, axes, bytes, count in due]
    compiled = [
        c(AR if twice and kind == RS else kind, axes, bytes, count) for kind, axes, bytes, count in [*due, *more]
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = compared(monkeypatch, planned, compiled, target)
    total = sum(before for before, _ in found.wire_bytes().values())
    for axes, (before, after) in found.wire_bytes().items():
        due_bytes = before - found.saved_bytes().get(axes, 0.0)
        inside = abs(after - due_bytes) <= max(bounds.WIRE * due_bytes, bounds.SMALLEST_WIRE * total)
        assert inside or not found.ok


@pytest.mark.parametrize("target", ["host", "tpu", "gpu"])
def test_differences_of_which_none_counts_do_not_take_bytes_out_of_their_bounds(
    target: CompileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the bytes over x are nothing beside what is sent over all axes, and still not what was planned over x."""
    planned, compiled = [BIG, p(RS, "x", 128 * KIB)], [c(AR, "xyz", 4096 * KIB, 10), c(AR, "x", 128 * KIB)]
    found = compared(monkeypatch, planned, compiled, target)
    assert said(found) == [("same plan at higher cost", False)]
    assert not found.ok
    assert (
        found.differences[0].text == "over x each chip sends 2.000 times the bytes that the plan expects, 96 KiB more"
    )


def test_the_benchmark_has_the_same_bounds() -> None:
    assert LIMITS == {"wire": bounds.WIRE, "unplanned": bounds.NOTICEABLE, "peak": bounds.MEMORY}


def test_host_devices_send_16_bit_floats_as_32_bit_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [p(AG, "x", 64, 3), p(AG, "x", 128)], [c(AG, "x", 128, 3), c(AG, "x", 256)]
    found = compared(monkeypatch, *work, "host", [(0, "bfloat16"), (1, "bfloat16")])
    assert found.ok and [d.kind for d in found.differences] == ["same plan"]
    assert found.differences[0].text == "host devices have no 16-bit collectives: 4 runs send float32 instead"
    assert found.differences[0].bytes == 3 * 64 + 128
    assert not compared(monkeypatch, *work, "host", [(0, "float32"), (1, "float32")]).ok
    assert not compared(monkeypatch, *work, "tpu", [(0, "bfloat16"), (1, "bfloat16")]).ok


def test_one_array_may_be_sent_once_for_several_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [p(AG, "x", 64, 2), p(AG, "x", 64, 2)], [c(AG, "x", 64, 2)]
    assert kinds(compared(monkeypatch, *work, arrays=[(5, ""), (5, "")])) == ["same plan at lower cost"]
    assert kinds(compared(monkeypatch, *work, arrays=[(5, ""), (6, "")])) == ["missing"]


def test_repetitions_are_what_stays_without_a_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [p(AG, "x", 64), p(AG, "x", 64), p(AG, "x", 64)], [c(AG, "x", 64), c(AG, "x", 64)]
    assert [d.kind for d in compared(monkeypatch, *work, arrays=[(5, ""), (5, ""), (6, "")]).differences] == [
        "same plan at lower cost"
    ]


def test_hundreds_in_one_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [*[p(AR, "xyz", 32 * KIB) for _ in range(32)], *[p(AR, "xyz", 8 * KIB) for _ in range(162)]]
    compiled = [c(AR, "xyz", 2320 * KIB, 1, "combined 194")]
    found = compared(monkeypatch, [BIG, *planned], [c(AR, "xyz", 4096 * KIB, 10), *compiled])
    assert [d.kind for d in found.differences] == ["same plan at lower cost"]
    other = compared(monkeypatch, [BIG, p(AR, "xyz", 999 * KIB), *planned], [c(AR, "xyz", 4096 * KIB, 10), *compiled])
    assert sorted(kinds(other)) == ["missing", "same plan at lower cost"]


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=9), st.data())
def test_those_that_were_combined_are_found_among_others(sizes: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=2))
    whole = sum(sizes[i] for i in chosen)
    planned, combined = [p(AR, "x", size) for size in sizes], c(AR, "x", whole, 1, f"combined {len(chosen)}")
    (pair,) = [pair for pair in pair_collectives(planned, [combined], V4) if pair.compiled]
    assert sum(each.bytes for each in pair.planned) == pytest.approx(whole, rel=0.005)
    assert len(pair.planned) <= len(chosen)


def test_what_a_compiled_collective_combines_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice 6 KiB are as much as three times 4: which were combined stands in the program."""
    planned = [p(AR, "x", size * KIB) for size in (6, 6, 4, 4, 4)]
    whole = 12 * KIB
    threes, twos = c(AR, "x", whole, 1, "combined 3"), c(AR, "x", whole, 1, "combined 2")
    guessed = compared(monkeypatch, planned, [threes, twos])
    assert "missing" in {d.kind for d in guessed.differences}
    said = [replace(threes, parts=(4 * KIB,) * 3), replace(twos, parts=(6 * KIB,) * 2)]
    assert {d.kind for d in compared(monkeypatch, planned, said).differences} == {"same plan at lower cost"}


@pytest.mark.parametrize("dtype, kind", (("bf16", ["same plan at lower cost"]), ("f32", ["missing", "unplanned"])))
def test_what_a_matmul_reads_as_bfloat16_may_be_sent_as_such(monkeypatch: pytest.MonkeyPatch, dtype, kind) -> None:
    """Half of the planned bytes are the same plan if they are those of the narrower type."""
    compiled = [replace(c(AG, "x", 4096 * KIB), dtype=dtype)]
    found = compared(monkeypatch, [p(AG, "x", 8192 * KIB)], compiled, arrays=[(1, "float32")])
    assert sorted(kinds(found)) == kind
    assert found.saved_bytes().get(("x",), 0.0) == (4096 * KIB * 3 / 4 if dtype == "bf16" else 0.0)


def test_a_full_rematerialization_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (
        d for d in compared(monkeypatch, [], [c(AG, "x", 64, only_sliced=True)]).differences if d.kind == "unplanned"
    )
    assert found.text == (
        "all-gather over x of 64 B, palm.py:1: not in the plan, and only slices of it are used (an involuntary full"
        " rematerialization)"
    )


def test_bytes_on_the_wire_that_are_saved_or_unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    once = compared(
        monkeypatch,
        [p(AG, "x", 64, 2), p(AG, "x", 64, 2)],
        [c(AG, "x", 64, 2), c(A2A, "y", 64)],
        arrays=[(5, ""), (5, "")],
    )
    assert once.saved_bytes() == {("x",): 2 * 64 * 3 / 4}
    assert once.unplanned_bytes() == 64 * 3 / 4


@pytest.mark.parametrize(
    ("peak", "kinds"), [(95.0, []), (105.0, []), (94.9, ["peak memory"]), (105.1, ["peak memory"])]
)
def test_peak_memory_within_five_percent(peak: float, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [d.kind for d in compared(monkeypatch, [], [], "tpu", peak=peak).differences] == kinds
    assert not compared(monkeypatch, [], [], "host", peak=peak).differences


def layers(count: int, of: str) -> list[PlannedCollective]:
    """The all-reduces of an unrolled model, one a layer, each at a place of its own."""
    each = p(AR, "x", 4096 * KIB)
    return [replace(each, where=f"params['h']['{i}']['{of}']") for i in range(count)]


def test_what_is_little_in_one_layer_is_much_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [c(AR, "x", 4096 * KIB) for _ in range(200)]
    for more, count in ((1, False), (50, True)):
        found = compared(monkeypatch, layers(200, "up"), [*planned, *[c(AG, "y", 8 * KIB * 8)] * more])
        assert (said(found), found.ok) == ([("unplanned", count)], not count)
        assert any(d.text.startswith("50 times: all-gather over y of 64 KiB") for d in found.differences) == (more > 1)


def test_numbers_may_be_added_up_before_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [p(AR, "x", 64 * KIB), *(p(AR, "x", 4) for _ in range(16))]
    found = compared(monkeypatch, planned, [c(AR, "x", 64 * KIB), c(AR, "x", 4)])
    (only,) = found.differences
    assert only.kind == "missing" and only.share > 0.5 and found.ok
    assert not compared(monkeypatch, planned, [c(AR, "x", 4)] * 16).ok


def test_layers_alike_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [*layers(3, "up"), *layers(2, "down")], [c(AR, "x", 4096 * KIB)] * 4)
    assert [line.split() for line in str(found).splitlines()[5:8]] == [
        "all-reduce x 4 MiB 3 all-reduce 4 MiB 3 params['h']['*']['up']".split(),
        "all-reduce x 4 MiB 1 all-reduce 4 MiB 1 params['h']['0']['down']".split(),
        "all-reduce x 4 MiB 1 nothing params['h']['1']['down']".split(),
    ]


def test_the_report_puts_planned_beside_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(
        monkeypatch,
        [p(AG, "zy", 2048, 118), p(AR, "x", 512, 118), p(AR, "x", 512, 118), p(RS, "z", 4096 * KIB)],
        [c(AG, "yz", 2048, 118), c(AR, "x", 1024, 118, "combined 2"), c(CP, "y", 4096 * KIB)],
        peak=106.0,
    )
    assert str(found) == REPORT


REPORT = """\
<lambda> on v4:4x4x4, compiled for the TPU: NOT as planned

Collectives
  planned         axes  payload  runs  compiled                 payload  runs  planned for
  ──────────────  ────  ───────  ────  ───────────────────────  ───────  ────  ────────────────────────────
  all-gather      yz      2 KiB   118  all-gather                 2 KiB   118  w for dot_general
  2 × all-reduce  x       1 KiB   118  all-reduce (combined 2)    1 KiB   118  w for dot_general and 1 more
  reduce-scatter  z       4 MiB     1  nothing                                 w for dot_general
  nothing         y                    collective-permute         4 MiB     1

Bytes that each chip sends in one step
  axes    planned   compiled   ratio
  ────  ─────────  ─────────  ──────
  y           0 B      4 MiB       -
  z         3 MiB        0 B  0.0000
  yz    221.2 KiB  221.2 KiB  1.0000
  x       177 KiB    177 KiB  1.0000

One chip
                                      planned  compiled   ratio
  ──────────────────────────────────  ───────  ────────  ──────
  peak memory                           100 B     106 B  1.0600
  time of collectives (plan's model)      0 s   1.28 ms       -

Differences
  - bytes on the wire: over y each chip sends what is not planned, 4 MiB more (118.0 % of the bytes on the wire)
  - bytes on the wire: over z each chip sends 0.000 times the bytes that the plan expects, 3 MiB less (88.5 % of the
    bytes on the wire)
  - peak memory: the compiled program needs 1.060 times the planned peak (6.0 % of the planned peak)
  - unplanned: collective-permute over y of 4 MiB, palm.py:1: not in the plan (5.3 % of the time on the wire)
  - missing: reduce-scatter over z of 4 MiB, w for dot_general: not in the compiled program (2.1 % of the time on the
    wire)
  - same plan at lower cost: 2 all-reduces over x of 512 B × 118 compiled as all-reduce over x of 1 KiB × 118 (32.6 % of
    the time on the wire)
"""


# --- Time


SLOW = """\
HloModule jit_f, is_scheduled=true

%turned (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  ROOT %t = f32[64,64]{1,0} transpose(%x), dimensions={1,0}
}

ENTRY %main (x.1: f32[64,64]) -> f32[64,64] {
  %x.1 = f32[64,64]{1,0} parameter(0)
  ROOT %copy_fusion = f32[64,64]{1,0} fusion(%x.1), kind=kLoop, calls=%turned, \
metadata={op_name="jit(f)/layer/transpose" source_file="/home/user/model.py" source_line=7}, \
backend_config={"estimated_cycles":"1050000"}
}
"""


def timed(planned_seconds: float, target: CompileTarget = "tpu") -> Audit:
    """A program of one instruction that takes a millisecond, beside a plan of so many seconds."""
    nothing = plan_of_nothing()
    return compare(replace(nothing, estimate=replace(nothing.estimate, seconds=planned_seconds)), SLOW, target)


@pytest.mark.parametrize(
    ("planned_seconds", "slow"), [(0.99e-3 / bounds.SLOWER, True), (1.01e-3 / bounds.SLOWER, False)]
)
def test_a_step_that_is_much_slower_than_planned_is_said(planned_seconds: float, slow: bool) -> None:
    found = timed(planned_seconds)
    assert found.step_seconds == pytest.approx(1e-3)
    assert (found.is_slow, found.to_dict()["slow"], "times the planned time" in str(found)) == (slow, slow, slow)
    assert found.ok, "the layout is the planned one"
    said_so = [each.text for each in found.differences if each.kind == "slower than planned"]
    assert bool(said_so) == slow
    if slow:
        assert said_so[0].endswith("the most that is not planned: 1.00 ms of transpose at model.py:7 (copy_fusion × 1)")


def test_the_costliest_instructions_are_listed_with_the_users_line() -> None:
    found = timed(1.0)
    (row,) = found.to_dict()["costliest"]
    assert (row["name"], row["source"], row["scope"]) == ("copy_fusion", "model.py:7", "layer/transpose")
    assert row["seconds"] == row["unplanned_seconds"] == pytest.approx(1e-3)
    assert "1.00 ms      1.00 ms     1  copy_fusion  model.py:7  layer/transpose" in str(found)


def test_only_tpu_programs_are_replayed() -> None:
    for target in ("host", "gpu"):
        found = timed(1e-9, target)
        assert (found.replay, found.step_seconds, found.is_slow, found.costs) == (None, None, False, ())


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.booleans()), max_size=8),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 20)),
)
def test_the_planned_time_of_a_line_is_attributed_once(costs: list[Any], due: dict[str, float]) -> None:
    costly = [Costly(str(i), "fusion", at, "", seconds, 1, of) for i, (at, seconds, of) in enumerate(costs)]
    found = attribute_time(costly, due)
    for at in "abc":
        mine = [each for each in found if each.instruction.source == at]
        spent = sum(each.instruction.seconds for each in mine)
        assert sum(each.unplanned_seconds for each in mine) == pytest.approx(
            max(spent - due.get(at, 0.0), 0.0), abs=1e-9
        )
        assert all(0 <= each.unplanned_seconds <= each.instruction.seconds for each in mine)


def test_collectives_are_held_against_the_plan_by_themselves() -> None:
    (found,) = attribute_time([Costly("a", "all-reduce", "model.py:1", "", 1.0, 1, False)], {})
    assert found.unplanned_seconds == 0


# --- Real programs


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_host_devices_run_what_was_planned(phase: str) -> None:
    work = tiny(phase)
    found = audit(planned(phase), work.fn, *work.args)
    assert found.ok, str(found)
    assert {"all-gather", "reduce-scatter", "all-to-all"} <= {each.kind for each in found.collectives}
    assert all(pair.planned and pair.compiled for pair in found.pairs)
    assert found.peak_bytes and found.compute_seconds is None


def test_another_program_is_not_the_plan() -> None:
    work = tiny("prefill")
    text = planned("prefill").jit(work.fn).lower(*work.args).compile().as_text()
    found = compare(planned("decode"), text)
    assert not found.ok and {"missing", "unplanned"} <= {difference.kind for difference in found.differences}


def test_an_audit_as_json() -> None:
    work = tiny("decode")
    data = json.loads(json.dumps(audit(planned("decode"), work.fn, *work.args).to_dict()))
    assert data["ok"] is True and data["plan"] == "palm-tiny-decode" and data["topology"] == "cpu:2x2x2"
    assert {row["kind"] for row in data["planned"]} == {row["kind"] for row in data["compiled"]}
    assert sum(row["planned"] for row in data["wire_bytes"]) > 0


def test_targets_that_cannot_be_had() -> None:
    work = tiny("decode")
    with pytest.raises(
        autoshard.AutoshardError, match="the chip must be one of a100, h100, h200, b200 for the GPU compiler"
    ):
        audit(planned("decode"), work.fn, *work.args, target="gpu")
    with pytest.raises(
        autoshard.AutoshardError, match="the chip must be one of v4, v5p, v5e, v6e for the TPU compiler"
    ):
        audit(planned("decode"), work.fn, *work.args, target="tpu")
    with pytest.raises(autoshard.PlanMismatchError):
        audit(planned("decode"), tiny("prefill").fn, *tiny("prefill").args)


@pytest.mark.long
@pytest.mark.tpu
def test_palm_540b_decode_is_what_the_tpu_compiler_makes_of_it() -> None:
    work = palm.decode()
    plan = autoshard.search(work.fn, *work.args, topology=V4, donate_argnums=work.donate_argnums, name=work.name)
    found = audit(plan, work.fn, *work.args, target="tpu")
    assert found.ok, str(found)
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)
    for planned_bytes, compiled_bytes in found.wire_bytes().values():
        assert compiled_bytes == pytest.approx(planned_bytes, rel=0.01)
    assert found.compute_seconds and found.replay is not None and found.step_seconds is not None
    assert found.replay.floor_seconds < found.replay.core_seconds < found.step_seconds
    assert found.replay.exposed_seconds == pytest.approx(found.collective_seconds, rel=0.01), "decode hides nothing"
    assert all(each.instruction.source.startswith("palm.py:") for each in found.costs[:10])


@pytest.mark.long
@pytest.mark.tpu
def test_arguments_that_are_gathered_behind_matmuls_are_not_copied_ahead_of_all() -> None:
    """Six layers of weights: copies of their pieces would take a tenth of the peak."""
    layers, width, inner = 6, 8192, 28672

    def stack(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
        for up, down in zip(ups, downs, strict=True):
            hidden = autoshard.pin(x @ up, PartitionSpec("y", "x"))
            x = autoshard.pin(hidden @ down, PartitionSpec("y", "x"))
        return x

    def weights(*shape: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * layers

    args = (jax.ShapeDtypeStruct((16384, width), jnp.bfloat16), weights(width, inner), weights(inner, width))
    pins = {"ups.*": PartitionSpec(None, "x"), "downs.*": PartitionSpec(("x", "y"))}
    plan = autoshard.search(stack, *args, topology="v5e:4x4", pins=pins)
    assert {("all-gather", ("y",))} <= {(each.kind, each.axes) for each in plan.estimate.collectives}
    found = audit(plan, stack, *args, target="tpu")
    assert found.ok, str(found)
    hidden = [each for each in found.collectives if "async" in each.spelling]
    assert len(hidden) >= layers - 2, "the compiler still gathers them while matmuls run"


@pytest.mark.tpu
def test_what_fits_is_not_computed_again() -> None:
    """The compiler counts the result of 512 MiB all the time, and would gather twice to make room for it."""
    rows = 8192

    def fn(table: jax.Array, x: jax.Array, up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathered = autoshard.pin(jnp.tanh(x), PartitionSpec())
        mixed = gathered * autoshard.pin(jnp.tanh(gathered @ up) @ down, PartitionSpec())
        few = mixed[:, :8] + table[0, :8]
        return few, jnp.broadcast_to(few[:, :1], (rows, 4 * rows))

    shapes = ((904_000, rows), (rows, rows), (rows, 2 * rows), (2 * rows, rows))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    pins = {"x": PartitionSpec(("x", "y")), **dict.fromkeys(("table", "up", "down"), PartitionSpec())}
    plan = autoshard.search(fn, *args, topology="v5e:2x2", pins=pins)
    found = audit(plan, fn, *args, target="tpu")
    assert found.ok, str(found)
    assert found.unplanned_bytes() == 0


@pytest.mark.tpu
def test_a_program_that_does_not_fit_is_refused_by_the_compiler() -> None:
    topology = parse_topology("v5e:2x2")
    roomy = replace(topology, chip=topology.chip.override({"usable_hbm_bytes": 1e15}, "a wish"))
    plan = autoshard.search(lambda x: x + 1, jax.ShapeDtypeStruct((2**20, 2**15), jnp.float32), topology=roomy)
    with pytest.raises(
        AuditError, match=r"The tpu compiler refused <lambda> for v5e:2x2\. It says: .*RESOURCE_EXHAUSTED"
    ):
        audit(plan, lambda x: x + 1, jax.ShapeDtypeStruct((2**20, 2**15), jnp.float32), target="tpu")
