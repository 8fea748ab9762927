"""The judge of compiled programs: on texts whose cost is added up by hand, and on a real TPU program."""

from __future__ import annotations

import dataclasses
import importlib.util
import textwrap

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from autoshard.auditing.collective_times import price_collective
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.emitting import targets
from benchmarks.contestants import EXPERTS
from benchmarks.hand_layouts import argument_specs, hand_layouts, sizes_of
from benchmarks.judge import judge
from benchmarks.peers import CASES, NOT_PEERS, summary, verdicts
from costmodels.machine import parse_topology
from costmodels.machine.collectives import seconds, wire_bytes
from examples import llama, palm

CUBE = parse_topology("v4:4x4x4")
LINK, HOP, LAUNCH = 45e9, 1e-6, 1e-6
"""v4: bytes per second one way over one link, seconds per hop, and to start a collective."""

REDUCER = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%same (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  ROOT %n = f32[1024]{0} negate(%x)
}
"""


def program(entry: str, before: str = "") -> str:
    """A module whose entry holds these lines; `%p` is f32[1024] (4 KiB)."""
    body = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    return f"""HloModule jit_f, num_partitions=64
{REDUCER}{before}
ENTRY %main (p: f32[1024]) -> f32[1024] {{
  %p = f32[1024]{{0:T(1024)}} parameter(0)
{body}
}}
"""


def cycles(number: int) -> str:
    return f'backend_config={{"estimated_cycles":"{number}"}}'


def loop(name: str, rounds: int, body: str, result: str) -> tuple[str, str]:
    """A loop's computations, and the line that runs it on %state."""
    computations = f"""
%{name}_test (c: (s32[], f32[1024])) -> pred[] {{
  %c = (s32[], f32[1024]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant({rounds})
  ROOT %more = pred[] compare(%i, %n), direction=LT
}}

%{name}_body (c: (s32[], f32[1024])) -> (s32[], f32[1024]) {{
  %c = (s32[], f32[1024]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[1024]{{0}} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
{textwrap.indent(textwrap.dedent(body).strip(), "  ")}
  ROOT %next = (s32[], f32[1024]) tuple(%j, %{result})
}}
"""
    line = f"(s32[], f32[1024]) while(%state), condition=%{name}_test, body=%{name}_body"
    return computations, line


START = """
%zero = s32[] constant(0)
%state = (s32[], f32[1024]) tuple(%zero, %p)
"""


# --- what is added up


def test_cycles_over_the_clock_and_collectives_add_up():
    text = program(f"""
        %f = f32[1024]{{0}} fusion(%p), kind=kLoop, calls=%same, {cycles(1050)}
        ROOT %g = f32[4096]{{0}} all-gather(%f), replica_groups=[16,4]<=[64], dimensions={{0}}
    """)
    verdict = judge(text, CUBE)
    assert verdict.compute_seconds == pytest.approx(1e-6)
    # A ring of 4 brings three quarters of 16 KiB over two links, and is two hops long.
    assert verdict.wire_seconds == pytest.approx(0.75 * 16384 / (2 * LINK) + 2 * HOP + LAUNCH)
    assert verdict.wire_bytes == 0.75 * 16384
    assert verdict.step_seconds == verdict.compute_seconds + verdict.wire_seconds
    assert verdict.overlapped_seconds == verdict.step_seconds  # nothing was started asynchronously
    assert verdict.replayed_seconds == pytest.approx(verdict.step_seconds)


def test_loops_multiply_what_is_in_them_and_nest():
    inner = f"""
        %w = f32[1024]{{0}} fusion(%x), kind=kLoop, calls=%same, {cycles(100)}
        %r = f32[1024]{{0}} all-reduce(%w), replica_groups=[16,4]<=[64], to_apply=%add
    """
    inner_computations, run_inner = loop("inner", 3, inner, "r")
    outer = f"""
        %zero = s32[] constant(0)
        %state = (s32[], f32[1024]) tuple(%zero, %x)
        %w = f32[1024]{{0}} fusion(%x), kind=kLoop, calls=%same, {cycles(10)}
        %done = {run_inner}
        %y = f32[1024]{{0}} get-tuple-element(%done), index=1
    """
    outer_computations, run_outer = loop("outer", 5, outer, "y")
    text = program(
        f"{START}%done = {run_outer}\nROOT %y = f32[1024]{{0}} get-tuple-element(%done), index=1",
        inner_computations + outer_computations,
    )
    verdict = judge(text, CUBE)
    assert verdict.compute_seconds == pytest.approx(5 * (10 + 3 * 100) / 1.05e9)
    assert [each.count for each in verdict.sent] == [15]
    assert verdict.wire_seconds == pytest.approx(15 * seconds("all-reduce", [CUBE.axis("z")], 4096))
    assert verdict.notes == ()


def test_an_asynchronous_pair_counts_once_and_may_hide():
    text = program(f"""
        %s = (f32[1024], f32[4096]) all-gather-start(%p), replica_groups=[16,4]<=[64], dimensions={{0}}
        %f = f32[1024]{{0}} fusion(%p), kind=kLoop, calls=%same, {cycles(1_050_000)}
        ROOT %d = f32[4096]{{0}} all-gather-done(%s)
    """)
    verdict = judge(text, CUBE)
    assert [each.count for each in verdict.sent] == [1]
    assert verdict.wire_bytes == 0.75 * 16384
    assert verdict.overlapped_seconds == pytest.approx(1e-3)
    assert verdict.step_seconds > verdict.overlapped_seconds
    assert verdict.replayed_seconds == pytest.approx(1e-3)


def test_a_collective_of_a_tuple_sends_all_of_it_at_once():
    estimated = f"%f = f32[1024]{{0}} fusion(%p), kind=kLoop, calls=%same, {cycles(1)}"
    groups = "replica_groups=[16,4]<=[64], to_apply=%add"
    combined = program(f"{estimated}\nROOT %r = (f32[1024], f32[1024]) all-reduce(%f, %p), {groups}")
    separate = program(
        f"{estimated}\n%q = f32[1024] all-reduce(%f), {groups}\nROOT %r = f32[1024] all-reduce(%p), {groups}"
    )
    together, apart = judge(combined, CUBE), judge(separate, CUBE)
    assert together.wire_bytes == apart.wire_bytes
    assert together.wire_seconds < apart.wire_seconds  # one launch, one way round the ring


def test_work_without_an_estimate_is_counted_and_prefetching_is_measured():
    text = program(f"""
        %f = f32[1024]{{0}} fusion(%p), kind=kLoop, calls=%same, {cycles(1)}
        %c = f32[1024]{{0}} custom-call(%f), custom_call_target="kernel"
        %s = (f32[1024]{{0:T(1024)S(1)}}, f32[1024]{{0:T(1024)}}, u32[]) copy-start(%p)
        %d = f32[1024]{{0:T(1024)S(1)}} copy-done(%s)
        ROOT %g = f32[1024]{{0}} fusion(%d), kind=kLoop, calls=%same
    """)
    verdict = judge(text, CUBE)
    assert verdict.unestimated == {"custom-call": 1, "fusion": 1}
    assert verdict.prefetch_bytes == 4096


def test_a_program_without_estimates_cannot_be_judged():
    with pytest.raises(ValueError, match="only the TPU compiler"):
        judge(program("ROOT %n = f32[1024]{0} negate(%p)"), CUBE)


# --- groups


def compiled(kind: str, groups: str, bytes: int = 1 << 20) -> CompiledCollective:
    return CompiledCollective(kind, None, bytes, 1, "", "", False, kind, groups=groups)


def test_whole_axes_cost_what_the_torus_model_says():
    for groups, names in (("[16,4]<=[64]", "z"), ("[4,16]<=[64]", "yz"), ("{}", "xyz"), ("[16,4]<=[4,16]T(1,0)", "x")):
        axes = [CUBE.axis(name) for name in names]
        sent = price_collective(compiled("all-gather", groups), CUBE)
        assert (sent.axes, sent.priced_as) == (tuple(names), "axes")
        assert sent.seconds == float(seconds("all-gather", axes, float(1 << 20)))
        assert sent.wire_bytes == float(wire_bytes("all-gather", axes, float(1 << 20)))


def test_groups_within_an_axis_are_open_and_interleaved_ones_share_links():
    half, every_other = compiled("all-gather", "[32,2]<=[64]"), compiled("all-gather", "[32,2]<=[32,2]T(0,1)")
    neighbours = price_collective(half, CUBE)
    # Two chips have one link, one hop: half of the result comes over it.
    assert neighbours.seconds == pytest.approx(0.5 * (1 << 20) / LINK + HOP + LAUNCH)
    assert neighbours.priced_as == "box"
    assert price_collective(every_other, CUBE).seconds == neighbours.seconds
    pairs = ",".join(f"{{{4 * row + k},{4 * row + k + 2}}}" for row in range(16) for k in range(2))
    apart = price_collective(compiled("all-gather", f"{{{pairs}}}"), CUBE)
    assert apart.seconds == pytest.approx(0.5 * (1 << 20) / (LINK / 2) + 2 * HOP + LAUNCH)


def test_groups_that_are_no_box_are_priced_as_whole_and_said():
    odd = "{" + ",".join(f"{{{4 * row},{4 * row + 1},{4 * row + 3}}}" for row in range(16)) + "}"
    text = program(f"""
        %f = f32[1024]{{0}} fusion(%p), kind=kLoop, calls=%same, {cycles(1)}
        ROOT %r = f32[1024]{{0}} all-reduce(%f), replica_groups={odd}, to_apply=%add
    """)
    verdict = judge(text, CUBE)
    assert verdict.wire_seconds == pytest.approx(seconds("all-reduce", [CUBE.axis("z")], 4096))
    assert verdict.notes == ("1 collectives over odd groups of 3",)


def test_a_permute_to_the_neighbour_costs_one_link():
    ring = "{" + ",".join(f"{{{d},{d - d % 4 + (d + 1) % 4}}}" for d in range(64)) + "}"
    sent = price_collective(compiled("collective-permute", ring), CUBE)
    assert sent.seconds == pytest.approx((1 << 20) / LINK + HOP + LAUNCH)
    assert (sent.axes, sent.wire_bytes) == (("z",), 1 << 20)


def test_a_permute_that_moves_nothing_is_free():
    nowhere = "{" + ",".join(f"{{{d},{d}}}" for d in range(64)) + "}"
    sent = price_collective(compiled("collective-permute", nowhere), CUBE)
    assert (sent.axes, sent.seconds, sent.wire_bytes) == ((), 0.0, 0.0)


@given(st.permutations(range(64)), st.sampled_from(["v4:4x4x4", "v5e:8x8"]))
def test_no_permute_beats_its_longest_way_or_exceeds_the_costliest(order: list[int], name: str):
    topology = parse_topology(name)
    pairs = "{" + ",".join(f"{{{a},{b}}}" for a, b in enumerate(order)) + "}"
    sent = price_collective(compiled("collective-permute", pairs), topology)
    axes = [topology.axis(axis) for axis in sent.axes]
    assert 0.0 <= sent.seconds <= float(seconds("collective-permute", axes, float(1 << 20)))
    if sent.axes:
        assert sent.seconds >= (1 << 20) / (2 * len(axes) * LINK)  # all links that leave a chip, all busy


# --- real programs


@pytest.mark.long
@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_split_matmul_pays_its_all_reduce_and_less_computation():
    topology = parse_topology("v5e:2x2")
    mesh = targets.mesh_of(targets.tpu_devices("v5e:2x2", (2, 2), "v5e"), topology.axis_sizes)

    def verdict(*specs: PartitionSpec):
        placed = [NamedSharding(mesh, spec) for spec in specs]
        shapes = [jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)]
        step = jax.jit(jnp.dot, in_shardings=placed[:2], out_shardings=placed[2])
        return judge(step.lower(*shapes).compile().as_text() or "", topology)

    whole = verdict(PartitionSpec(), PartitionSpec(), PartitionSpec())
    split = verdict(PartitionSpec(None, "x"), PartitionSpec("x"), PartitionSpec())
    assert whole.sent == ()
    assert whole.compute_seconds == pytest.approx(2 * 1024 * 4096**2 / 197e12, rel=0.25)
    assert split.compute_seconds < 0.75 * whole.compute_seconds
    assert [each.kind for each in split.sent] == ["all-reduce"]
    assert split.wire_bytes == 1024 * 4096 * 2  # bf16; V = 8 MiB, of which a half is sent twice


# --- the hand layouts


EXAMPLES = [case for case in CASES if case.example != EXPERTS]


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.name)
def test_hand_layouts_divide_every_array_and_use_an_axis_once(case):
    module = {"palm": palm, "llama": llama}[case.example]
    sizes = dict(case.sizes) | ({"layers": 2} if case.sizes.get("unrolled") else {})
    args = getattr(module, case.phase)(**sizes).args
    topology = parse_topology(case.topology)
    for layout in hand_layouts(topology, sizes_of(case.example, args)):
        specs = argument_specs(layout, case.example, args, topology)
        leaves = jax.tree_util.tree_leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        for leaf, spec in zip(jax.tree_util.tree_leaves(args), leaves, strict=True):
            axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
            assert len(axes) == len(set(axes)), (layout.name, spec)
            for size, entry in zip(leaf.shape, spec, strict=False):
                chips = 1
                for axis in (entry,) if isinstance(entry, str) else entry or ():
                    chips *= topology.axis_sizes[axis]
                assert size % chips == 0, (layout.name, spec, leaf.shape)


def test_an_array_without_a_role_is_named():
    args = ({"layers": {"surprise": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)}},)
    with pytest.raises(ValueError, match="0/layers/surprise of palm has no role"):
        sizes_of("palm", args)


# --- the table


def row(contestant: str, step: float | None, fits: bool = True) -> dict:
    return {"contestant": contestant, "step_ms": step, "fits": fits, "why": "no reason"}


def test_a_case_is_held_against_the_best_peer_that_fits():
    case = dataclasses.replace(CASES[0], name="case")
    rows = [row("ours", 10.0), row("our specs alone", 1.0), row("AutoSharding", 40.0), row("1D", 5.0, fits=False)]
    made = summary(case, [*rows, row("2D", 20.0), row("3D", None, fits=False)], "", 1.0)
    assert (made["best_peer"], made["reference"], made["ours"]) == ("2D", 20.0, 10.0)
    assert (made["ours / best peer"], made["ours / AutoSharding"]) == (0.5, 0.25)
    worst, auto, best = verdicts([made, {**made, "ours / best peer": 2.0, "ours / AutoSharding": None}])
    assert (worst["ours"], worst["met"]) == (2.0, False)
    assert (auto["ours"], auto["cases"], auto["met"]) == (0.25, 1, True)
    assert best["ours"] == pytest.approx(1.0)
    assert "our specs alone" in NOT_PEERS


def test_a_case_that_stopped_says_why_and_compares_nothing():
    made = summary(CASES[0], [], "not done in 900 s", 900.0)
    assert (made["ours"], made["best_peer"], made["why"]) == (None, None, "not done in 900 s")
    assert [each["met"] for each in verdicts([made])] == [False, False, False]
