"""Regimes and remedies: what a plan waits for, by the numbers of its price; what-ifs, priced and re-solved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.comparing.what_if import batch_of, state_values, weight_values
from autoshard.explaining.bottlenecks import regimes
from autoshard.explaining.roofline import draw, save_roofline
from autoshard.planning.infeasibility import double as twice_the_chips
from costmodels.bottlenecks import REGIMES, Work, regime, split_by_bottleneck
from costmodels.machine.collectives import seconds_on
from costmodels.machine.conventions import Pricing
from costmodels.machine.topology import complete_axes, parse_topology
from costmodels.program.what_if import NotDoubled, double_dimension, with_itemsize
from examples import palm
from search.answer.check import check
from tests.support.cli import run
from tests.support.paths import PALM, TINY
from tests.support.tracing import trace

SECONDS = st.floats(0, 10, allow_subnormal=False)


@given(SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_the_regime_is_the_longest_side(compute: float, memory: float, vector: float, wire: float, overhead: float):
    sides = dict(zip(REGIMES, (compute, memory, vector, wire, overhead), strict=True))
    found = regime(compute, memory, vector, wire, overhead)
    assert found == "" if not any(sides.values()) else sides[found] == max(sides.values())


@given(st.floats(1, 1e15), st.floats(1, 1e12), st.floats(1e9, 1e15), st.floats(1e9, 1e13))
def test_on_the_chip_the_ridge_parts_compute_from_hbm(flops: float, moved: float, rate: float, bandwidth: float):
    compute, memory = flops / rate, moved / bandwidth
    work = Work("op", flops, moved, compute, memory, 0.0, 0.0, max(compute, memory))
    assert work.intensity == flops / moved
    assert work.ridge == pytest.approx(rate / bandwidth, rel=1e-9)
    if abs(work.intensity / work.ridge - 1) > 1e-6:
        assert work.regime == ("compute" if work.intensity > work.ridge else "HBM")
    assert work.of_roofline == 1.0 and work.of_flops <= 1.0


@pytest.fixture(scope="module")
def workload() -> autoshard.Workload:
    return palm.decode("8b", batch=16, context=512, layers=2)


@pytest.fixture(scope="module")
def plan(workload: autoshard.Workload) -> autoshard.Plan:
    return autoshard.search(
        workload.fn, *workload.args, topology="v4:2x2", donate_argnums=workload.donate_argnums, name=workload.name
    )


@pytest.fixture(scope="module")
def remedies(plan: autoshard.Plan, workload: autoshard.Workload) -> autoshard.Remedies:
    return autoshard.remedies(plan, workload.fn, *workload.args)


def test_what_a_step_waits_for_adds_up_to_the_step(plan: autoshard.Plan):
    found = regimes(plan)
    assert sum(found.seconds.values()) == pytest.approx(plan.estimate.seconds, rel=1e-9)
    assert found.step.total_seconds == pytest.approx(plan.estimate.seconds, rel=1e-9)
    assert found.seconds[found.regime] == max(found.seconds.values())
    assert found.step.flops == pytest.approx(sum(op.flops for op in plan.operations))
    assert split_by_bottleneck(found.works) == found.seconds


def test_overhead_is_what_an_operation_costs_beyond_its_roofline(workload: autoshard.Workload):
    topology = parse_topology("v4:2x2")
    slow = replace(topology, chip=topology.chip.override({"op_overhead_seconds": 1e-3}, "test"))
    plan = autoshard.search(workload.fn, *workload.args, topology=slow, donate_argnums=workload.donate_argnums)
    found = regimes(plan)
    matmuls = sum(op.count for op in plan.operations if op.matmul)
    started = sum(op.overhead_seconds for op in plan.operations)
    assert found.regime == "overhead" and found.seconds["overhead"] == pytest.approx(started)
    assert (matmuls - 1) * 1e-3 < started < matmuls * 1e-3  # the one outside the loop reads its weights while it starts


def test_latency_is_what_the_collectives_cost_without_bytes(plan: autoshard.Plan):
    found = regimes(plan)
    wire = sum(each.seconds for each in plan.estimate.collectives)
    assert 0 < found.latency_seconds <= wire * (1 + 1e-9)


# --- programs that are changed


def test_weights_and_state_are_told_apart(workload: autoshard.Workload):
    program = trace(workload.fn, *workload.args, donate_argnums=workload.donate_argnums).program

    def arguments(values: frozenset[int]) -> set[str]:
        sources = [program.operations[at].outputs[0].value for at in program.arguments]
        return {program.values[value].name for value in sources if value in values}

    layers = {f"params['layers']['{name}']" for name in ("wi_gate", "wi_up", "wk", "wo", "wo_ffn", "wq", "wv")}
    assert arguments(weight_values(program)) == layers | {"params['embedding']"}
    assert arguments(state_values(program)) == {"cache['k']", "cache['v']"}


def test_a_program_of_twice_the_batch_is_the_program_traced_with_it():
    once, twice = (palm.decode("tiny", batch=n, context=24) for n in (8, 16))
    small, large = (trace(w.fn, *w.args, donate_argnums=w.donate_argnums).program for w in (once, twice))
    batch = batch_of(small)
    assert batch is not None
    grown = double_dimension(small, *batch)
    assert [value.shape for value in grown.values] == [value.shape for value in large.values]
    assert [op.factors for op in grown.operations] == [op.factors for op in large.operations]


def test_a_program_with_int8_weights_moves_as_many_bytes_as_one_that_has_them():
    def step(weight, x):
        return jax.lax.dot_general(x, weight.astype(x.dtype), (((1,), (0,)), ((), ())))

    x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    wide, narrow = (jax.ShapeDtypeStruct((64, 32), dtype) for dtype in (jnp.bfloat16, jnp.int8))
    program = trace(step, wide, x).program
    changed = with_itemsize(program, weight_values(program), 1.0)
    assert changed.values[0].itemsize == 1.0
    assert [v.itemsize for i, v in enumerate(changed.values) if changed.source_name(i) == "x"] == [2.0]
    assert trace(step, narrow, x).program.values[0].bytes == changed.values[0].bytes


def test_a_dimension_that_is_tied_to_a_fixed_one_is_not_doubled():
    def fn(x):
        return x + jnp.concatenate([x[:4], x[:4]])

    program = trace(fn, jax.ShapeDtypeStruct((8, 3), jnp.float32)).program
    with pytest.raises(NotDoubled, match="cuts or joins arrays along it"):
        double_dimension(program, 0, 0)


# --- remedies


@pytest.mark.long
def test_remedies_are_never_slower_than_the_plan_and_re_solving_never_than_keeping(remedies: autoshard.Remedies):
    names = [each.name for each in remedies.remedies]
    assert {"int8 weights", "int8 cache", "twice the batch", "twice the chips", "twice the HBM bandwidth"} <= set(names)
    for each in remedies.remedies:
        assert each.seconds is not None and each.proven, each
        if each.kept_seconds is not None and each.resolved_seconds is not None:
            assert each.resolved_seconds <= each.kept_seconds * (1 + 1e-9), each
        if each.sequences == 1 and each.chips == 1:
            assert each.seconds <= remedies.seconds * (1 + 1e-9), each
        if each.sequences == 2 and each.kept_seconds is not None:
            assert each.kept_seconds <= 2 * remedies.seconds * (1 + 1e-9)


@pytest.mark.long
def test_a_remedy_is_what_a_search_of_the_changed_problem_finds(remedies: autoshard.Remedies):
    twice = palm.decode("8b", batch=32, context=512, layers=2)
    found = autoshard.search(twice.fn, *twice.args, topology="v4:2x2", donate_argnums=twice.donate_argnums)
    (remedy,) = [each for each in remedies.remedies if each.name == "twice the batch"]
    assert remedy.resolved_seconds == pytest.approx(found.estimate.seconds, rel=1e-5)


def test_a_looped_einsum_hides_no_more_than_there_is_on_either_side(plan: autoshard.Plan, remedies: autoshard.Remedies):
    (remedy,) = [each for each in remedies.remedies if each.name == "looped collective einsums"]
    split = [c for c in plan.estimate.collectives if c.kind in ("all-gather", "reduce-scatter")]
    assert remedy.kept_seconds is not None and remedy.resolved_seconds is not None
    hidden = remedy.before_seconds - remedy.kept_seconds
    assert 0 <= hidden <= min(sum(c.seconds for c in split), sum(op.seconds for op in plan.operations if op.matmul))


@pytest.mark.parametrize("columns", [4096, 32_768])
def test_a_gather_hides_behind_the_product_that_takes_it(columns: int):
    """`x @ w`, with `x` in pieces of its features and `w` in pieces of its columns: `x` is gathered. As in the paper."""

    def product(x, w):
        return autoshard.pin(
            autoshard.pin(x, P(None, ("x", "y"))) @ autoshard.pin(w, P(None, ("x", "y"))), P(None, ("x", "y"))
        )

    args = (jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, columns), jnp.bfloat16))
    usual = parse_topology("v4:2x2")
    slow = tuple(replace(axis, bytes_per_second=axis.bytes_per_second / 2) for axis in usual.axes)
    plain = autoshard.search(product, *args, topology=replace(usual, axes=slow, pricing=Pricing("total")))
    where = replace(plain.topology, pricing=Pricing("total", "looped"))
    plan = autoshard.search(product, *args, topology=where)
    (gather,), (left,) = plain.estimate.collectives, plan.estimate.collectives
    (matmul,) = [op for op in plan.operations if op.matmul]
    wire = gather.seconds - float(seconds_on(where, "all-gather", gather.axes, 0.0))
    hidden = min(wire, (matmul.seconds - matmul.overhead_seconds) * 3 / 4)
    assert (left.kind, left.axes, left.bytes) == (gather.kind, gather.axes, gather.bytes)
    assert gather.seconds - left.seconds == pytest.approx(hidden)
    assert (hidden == pytest.approx(wire)) == (columns == 32_768)
    assert [text for text in plan.warnings if "hidden by rings of permutes" in text]
    assert not [text for text in plain.warnings if "ring" in text]


def test_operations_are_helped_by_what_shortens_them(remedies: autoshard.Remedies):
    for work, under in remedies.operations:
        assert all(seconds < work.total_seconds for _, seconds in under)
        bound = (
            work.regime == "HBM" and work.intensity < work.ridge / 2 and work.vector_seconds < work.memory_seconds / 2
        )
        if bound and work.communication_seconds == 0:
            # By twice the HBM bandwidth, or by another name where that does the same: int8 for a product that reads weights
            # and nothing else.
            halved = work.seconds - work.memory_seconds / 2
            assert any(seconds == pytest.approx(halved) for _, seconds in under)


def test_the_price_before_is_the_plans(
    plan: autoshard.Plan, workload: autoshard.Workload, remedies: autoshard.Remedies
):
    program = trace(workload.fn, *workload.args, donate_argnums=workload.donate_argnums).program
    assert remedies.seconds == check(program, plan.topology, plan.choice).seconds
    assert remedies.seconds == pytest.approx(plan.estimate.seconds)


def test_twice_the_chips_are_the_same_chips():
    """Whatever was measured of them, and set for one axis, stays."""
    topology = parse_topology("cpu:2x2")
    chip = topology.chip.override({"bus.egress_bytes_per_second": 7e9, "collective_overhead_seconds": 1e-4}, "test")
    own = complete_axes(replace(topology, chip=chip))
    own = replace(own, axes=(replace(own.axes[0], bytes_per_second=3e9), own.axes[1]))
    wider = twice_the_chips(own)
    assert wider is not None and wider.shape == (2, 4) and wider.chip.constants == chip.constants
    assert [axis.bytes_per_second for axis in wider.axes] == [3e9, 7e9]
    assert {axis.launch_seconds for axis in wider.axes} == {1e-4}


def test_another_function_is_refused(plan: autoshard.Plan):
    other = palm.decode("8b", batch=8, context=512, layers=2)
    with pytest.raises(autoshard.PlanMismatchError, match="is for other arguments"):
        autoshard.remedies(plan, other.fn, *other.args)


# --- the command line


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert run("search", PALM, "-t", "cpu:2x2", *TINY, "-o", path).exit_code == 0
    return path


def test_explain_prints_regimes_and_remedies(plan_file: Path):
    found = run("explain", plan_file, "--regimes")
    assert found.exit_code == 0 and found.stdout == str(autoshard.load(plan_file).regimes())
    assert max(map(len, found.stdout.splitlines())) <= 120
    priced = run("explain", plan_file, PALM, *TINY, "--remedies", "--time-limit", "0")
    assert priced.exit_code == 0 and "int8 weights" in priced.stdout and "By operation" in priced.stdout
    assert max(map(len, priced.stdout.splitlines())) <= 120
    data = json.loads(run("explain", plan_file, PALM, *TINY, "--remedies", "--time-limit", "0", "--json").stdout)
    assert all(each["resolved_seconds"] is None for each in data["remedies"])
    assert json.loads(run("explain", plan_file, "--regimes", "--json").stdout)["step"]["regime"] in REGIMES


def test_remedies_need_the_function(plan_file: Path):
    found = run("explain", plan_file, "--remedies")
    assert found.exit_code == 2 and "--remedies needs the plan's workload" in found.stderr


@pytest.mark.long
@pytest.mark.parametrize("ending", [".png", pytest.param(".svg", marks=pytest.mark.slow), ".html"])
def test_a_roofline_has_a_panel_for_every_plan(plan_file: Path, tmp_path: Path, ending: str):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roofline{ending}"
    found = run("roofline", plan_file, plan_file, "-o", path)
    assert found.exit_code == 0 and found.stderr == f"Wrote {path}.\n" and path.stat().st_size > 10_000
    plan = autoshard.load(plan_file)
    assert len(draw([plan, plan]).axes) == 2
    if ending == ".html":
        assert "http-equiv" not in path.read_text() and "bound by" in path.read_text()


@pytest.mark.long
def test_names_on_a_roofline_do_not_overlap(plan: autoshard.Plan):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    (axes,) = draw([plan]).axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]


def test_a_roofline_is_written_as_something_known(plan: autoshard.Plan, tmp_path: Path):
    with pytest.raises(autoshard.AutoshardError, match=r"must end in \.png, \.svg, \.pdf, \.html, got \.gif"):
        save_roofline([plan], tmp_path / "roofline.gif")
