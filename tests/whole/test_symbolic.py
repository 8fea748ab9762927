"""Plans in closed form, and programs bound to other sizes: what formulas say is what the search prices."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import autoshard
from autoshard.annotating.dimension_names import name_dimensions
from autoshard.annotating.fingerprint import fingerprint
from autoshard.errors import AutoshardError
from autoshard.explaining.formula_sections import formulas
from autoshard.explaining.formulas import formulas_of
from autoshard.plan import loads
from autoshard.planning.files.plan_file import dumps
from costmodels.dimensions import rebound
from costmodels.machine.collectives import seconds_on, wire_bytes
from costmodels.machine.conventions import Pricing
from costmodels.machine.topology import Topology, parse_topology
from costmodels.operations import price
from costmodels.symbols import collective_seconds, dimension, evaluate, rates, volume
from examples import palm
from search.answer.check import check
from search.solve import search
from tests.support.effort import examples, mostly_long
from tests.support.models import Block, arguments, function
from tests.support.strategies import axis_sets, topologies
from tests.support.tracing import trace as plainly_traced

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    gqa = draw(st.sampled_from([(2, 2), (2, 4)]))
    return Block(
        batch=draw(st.sampled_from([2, 4, 6])),
        context=draw(st.sampled_from([4, 6, 8])),
        d_ff=draw(st.sampled_from([8, 16, 24])),
        kv_heads=gqa[0],
        queries_per_kv=gqa[1],
        gated=draw(st.booleans()),
        parallel=draw(st.booleans()),
        scanned=draw(st.booleans()),
        decode=draw(st.booleans()),
    )


@cache
def traced(block: Block) -> autoshard.SymbolicTrace:
    return autoshard.trace_symbolic(function(block), *arguments(block))


@cache
def planned(block: Block, topology: Topology) -> autoshard.Plan:
    return traced(block).search(topology)


def small(text: str) -> st.SearchStrategy[Topology]:
    pricing = st.builds(Pricing, st.sampled_from(["per-axis", "total"]), st.sampled_from([0.0, 0.3, "looped"]))

    # So little memory on the chip that of these small arrays some stay and some do not.
    def built(found: Pricing, kept: float) -> Topology:
        topology = parse_topology(text)
        return replace(topology, pricing=found, chip=topology.chip.override({"on_chip_bytes": kept}, "a test"))

    return st.builds(built, pricing, st.sampled_from([0.0, 64.0, 512.0, 4096.0]))


# --- symbolic = numeric


@pytest.mark.long
@examples(8)
@given(block=blocks(), topology=st.sampled_from(["v4:2x2x1", "2xv5e:2x2", "h100:2x2", "cpu:4"]).flatmap(small))
def test_the_formula_of_the_step_is_its_estimate(block: Block, topology: Topology) -> None:
    plan = planned(block, topology)
    found = formulas(plan)
    assert found.at(found.total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)
    assert found.at(found.total.collective_seconds) == pytest.approx(
        plan.estimate.collective_seconds, rel=1e-9, abs=1e-18
    )
    assert found.at(found.total.flops) == pytest.approx(sum(op.flops for op in plan.operations), rel=1e-9)
    sent = sum(
        each.count * float(wire_bytes(each.kind, [topology.axis(a) for a in each.axes], each.bytes))
        for each in plan.estimate.collectives
    )
    assert found.at(found.total.wire_bytes) == pytest.approx(sent, rel=1e-9)


@pytest.mark.long
@examples(6)
@given(block=blocks(), topology=st.sampled_from(["v4:2x2x1", "v5e:2x4"]).flatmap(small), data=st.data())
def test_formulas_hold_at_other_sizes_than_those_planned(block: Block, topology: Topology, data) -> None:
    """Every operation and every collective of the plan, priced at sizes the plan was not made for."""
    plan = planned(block, topology)
    found, trace = formulas(plan), traced(block)
    names = sorted(set(trace.sizes) - set(trace.fixed))
    sizes = {name: trace.sizes[name] * data.draw(st.sampled_from([1, 2, 3, 8]), label=name) for name in names}
    program = rebound(found.program, found.dimensions, sizes)
    checked = check(program, topology, plan.choice)
    local = found.at(found.total.local_seconds, **sizes)
    assert local == pytest.approx(checked.seconds - checked.collective_seconds, rel=1e-9)
    for i, op in enumerate(program.operations):
        if op.flops_per_point or op.traffic:
            pieces = [[np.prod([topology.axis_sizes[a] for a in axes]) for axes in plan.choice.strategies[i].splits]]
            cost = price(program, op, np.array(pieces, dtype=float).reshape(1, len(op.factors)), topology.chip)
            assert found.at(found.operations[i].flops, **sizes) == pytest.approx(cost.flops[0])
            assert found.at(found.operations[i].hbm_bytes, **sizes) == pytest.approx(cost.bytes[0])
            assert found.at(found.operations[i].seconds, **sizes) == pytest.approx(cost.seconds[0])
    for step in found.steps:
        if step.kind != "slice":
            payload = found.at(step.payload, **sizes)
            expected = float(seconds_on(topology, step.kind, sorted(step.axes), payload))
            assert found.at(step.cost.collective_seconds, **sizes) == pytest.approx(expected, rel=1e-9)


@examples(40)
@given(kind=st.sampled_from(KINDS), axes=axis_sets(), bandwidth=st.sampled_from(["per-axis", "total"]), data=st.data())
def test_the_formula_of_a_collective_is_its_price(kind: str, axes, bandwidth, data) -> None:
    topology = Topology(
        "drawn", parse_topology("v4:2x2x2").chip, axes, Pricing(bandwidth, data.draw(st.sampled_from([0.0, 0.5])))
    )
    payload = data.draw(st.floats(1.0, 1e12))
    names = sorted(axis.name for axis in axes)
    numbers = {**rates(topology, ()), "N": payload}
    found = collective_seconds(kind, names, dimension("N"), topology)
    assert evaluate(found, numbers) == pytest.approx(
        float(seconds_on(topology, kind, names, payload)), rel=1e-9, abs=1e-18
    )
    sent = evaluate(volume(kind, [axis.name for axis in axes if axis.size > 1], dimension("N")), numbers)
    assert sent == pytest.approx(float(wire_bytes(kind, axes, payload)), rel=1e-9, abs=1e-9)


def test_kinds_regions_and_operations_add_up_to_the_step() -> None:
    plan = planned(Block(), parse_topology("v5e:2x4"))
    found = formulas(plan)
    whole = found.at(found.total.seconds)
    assert sum(found.at(cost.seconds) for cost in found.by_kind().values()) == pytest.approx(whole)
    regions = found.by_region()
    assert sum(found.at(found.runs(r) * cost.seconds) for r, cost in regions.items()) == pytest.approx(whole)
    each = (found.of_operation(i) for i in range(len(found.program.operations)))
    assert sum(found.at(cost.seconds) for cost in each) == pytest.approx(whole)


def test_palm_in_closed_form() -> None:
    """PaLM 540B's matmuls: 2 FLOPs per parameter and token, and 4 per head, position and element of it."""
    work = palm.decode()
    trace = autoshard.trace_symbolic(work.fn, *work.args, dims=work.dims, donate_argnums=work.donate_argnums)
    b, d, e, f, h, length, s, v = (dimension(name) for name in ("B", "D", "E", "F", "H", "L", "S", "V"))
    alone = parse_topology("v4:1x1x1")
    choice = search(trace.bind(L=2, E=64, F=64, V=64, S=64, B=8, H=8, D=16).program, alone).choice
    found = formulas_of(trace.program, trace.dimensions, alone, choice).by_kind()["matmul"].flops
    expected = 2 * b * (length * (3 * e * f + 2 * e * h * d + 2 * e * d) + v * e) + 4 * length * b * h * s * d
    assert (found - expected).expand() == 0


# --- other sizes, without tracing again


@pytest.mark.long
@examples(8)
@given(block=blocks(), data=st.data())
@example(Block(), None)
def test_a_bound_program_is_the_one_that_tracing_gives(block: Block, data) -> None:
    trace = traced(block)
    times = {
        name: data.draw(st.integers(1, 4), label=name) if data else 3 for name in ("batch", "d_ff", "vocab", "d_model")
    }
    grown = replace(block, **{name: getattr(block, name) * k for name, k in times.items()})
    fresh = plainly_traced(function(grown), *arguments(grown))
    names = name_dimensions(fresh.program, fresh.argument_values, fresh.paths)
    sizes = {name: size for name, size in names.sizes.items() if name not in trace.fixed}
    assert fingerprint(trace.bind(**sizes).program) == fingerprint(fresh.program)


@examples(8)
@given(
    batch=st.integers(2, 40),
    context=st.integers(2, 300),
    layers=st.integers(2, 9),
    weights=st.sampled_from(["bf16", "int8"]),
)
@pytest.mark.parametrize("phase", mostly_long(("decode", "prefill"), "prefill"))
def test_palm_bound_is_palm_traced(phase: str, batch: int, context: int, layers: int, weights: str) -> None:
    trace = palm_traced(phase, weights)
    sizes = {"batch": batch, "layers": layers, "context" if phase == "decode" else "length": context}
    work = getattr(palm, phase)(size="tiny", weights=weights, **sizes)
    fresh = plainly_traced(work.fn, *work.args, donate_argnums=work.donate_argnums)
    letters = {"B": batch, "L": layers, "S" if phase == "decode" else "T": context}
    assert fingerprint(trace.bind(**letters).program) == fingerprint(fresh.program)


@cache
def palm_traced(phase: str, weights: str) -> autoshard.SymbolicTrace:
    work = getattr(palm, phase)(size="tiny", batch=6, weights=weights)
    trace = autoshard.trace_symbolic(work.fn, *work.args, dims=work.dims, donate_argnums=work.donate_argnums)
    assert not trace.fixed
    return trace


def test_binding_solves_as_tracing_anew_does() -> None:
    trace, grown = traced(Block()), replace(Block(), batch=16, d_ff=64)
    plan = trace.bind(k_1=16, down_1=64).search("v5e:2x4")
    fresh = autoshard.search(function(grown), *arguments(grown), topology="v5e:2x4")
    assert (plan.fingerprint, plan.estimate, plan.choice) == (fresh.fingerprint, fresh.estimate, fresh.choice)
    assert plan.arguments == fresh.arguments


def test_binding_traces_nothing() -> None:
    calls = []

    def fn(x, w):
        calls.append(x.shape)
        return x @ w

    trace = autoshard.trace_symbolic(fn, jnp.ones((4, 8)), jnp.ones((8, 16)), dims={"x": "B E"})
    before = len(calls)
    assert trace.bind(B=64).search("cpu:2").arguments[0].shape == (64, 8)
    assert len(calls) == before


def test_symbolic_shapes_name_dimensions() -> None:
    b, s = jax.export.symbolic_shape("b, 8*s")
    x, w = jax.ShapeDtypeStruct((b, s, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
    trace = autoshard.trace_symbolic(lambda x, w: jax.nn.gelu(x @ w), x, w, dims={"w": "E F"})
    assert list(trace.sizes) == ["b", "s", "E", "F"] and not trace.fixed
    bound = trace.bind(b=4, s=2)
    assert bound.program.values[0].shape == (4, 16, 16)
    ((product, _),) = bound.program.matmuls()
    assert bound.dimensions.factors[product] == ("b", "8*s", "F", "E")


def test_numbers_can_be_given_for_symbolic_shapes() -> None:
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 4), jnp.float32)

    def halves(x):
        return x.reshape(2, x.shape[0] // 2, 4) * 2

    assert autoshard.trace_symbolic(halves, x, sizes={"b": 6}).bind(b=10).program.values[0].shape == (10, 4)
    with pytest.raises(AutoshardError, match="No argument has a symbolic dimension c; the symbolic dimensions are b"):
        autoshard.trace_symbolic(halves, x, sizes={"c": 6})


# --- what cannot be bound


def test_a_size_of_the_functions_own_is_fixed() -> None:
    trace = autoshard.trace_symbolic(lambda x: x + jnp.arange(8.0), jnp.ones((4, 8)), dims={"x": "B S"})
    assert list(trace.fixed) == ["S"]
    assert trace.bind(B=2).sizes["B"] == 2
    with pytest.raises(AutoshardError, match=r"S cannot be bound: the function cannot be traced with S = 16"):
        trace.bind(S=16)


def test_a_structure_that_depends_on_a_size_is_fixed() -> None:
    def fn(x):
        return x * 2 if x.shape[0] < 8 else x * 2 + 1

    trace = autoshard.trace_symbolic(fn, jnp.ones((4, 8)), dims={"x": "B S"})
    assert list(trace.fixed) == ["B"]
    with pytest.raises(AutoshardError, match="with B = 8 the program differs"):
        trace.bind(B=8)


def test_sizes_that_are_equal_by_chance_cannot_part() -> None:
    """Whole rows are written here, which chips may share; at other sizes it would be another program."""

    def fn(cache, new):
        return jax.lax.dynamic_update_slice(cache, new, (0, 0)) * 2

    trace = autoshard.trace_symbolic(fn, jnp.ones((4, 8)), jnp.ones((4, 8)), dims={"cache": "S E", "new": "T E"})
    with pytest.raises(AutoshardError, match="S and T are one dimension of the program"):
        trace.bind(S=12)
    assert trace.bind(S=12, T=12).program.values[1].shape == (12, 8)
    apart = autoshard.trace_symbolic(fn, jnp.ones((9, 8)), jnp.ones((4, 8)), dims={"cache": "S E", "new": "T E"})
    assert not apart.dimensions.relations and apart.bind(S=12).program.values[0].shape == (12, 8)


def test_dimensions_of_one_are_said() -> None:
    trace = autoshard.trace_symbolic(
        lambda x, y: x + y, jnp.ones((1, 8)), jnp.ones((4, 8)), dims={"x": "A E", "y": "B E"}
    )
    with pytest.raises(AutoshardError, match="A cannot be bound: it is 1 here"):
        trace.bind(A=2)
    with pytest.raises(AutoshardError, match="B cannot be bound to 1: JAX treats dimensions of 1 differently"):
        trace.bind(B=1)
    with pytest.raises(AutoshardError, match="must be one of A, E, B, got C"):
        trace.bind(C=2)


def test_sizes_must_keep_the_programs_relations() -> None:
    trace = autoshard.trace_symbolic(lambda x: x.reshape(4, 6, 2) * 2, jnp.ones((4, 12)), dims={"x": "B E"})
    assert "B" in trace.fixed or trace.bind(B=4)
    halves = autoshard.trace_symbolic(lambda x: jnp.split(x, 2, 1)[0], jnp.ones((4, 8)), dims={"x": "B E"})
    with pytest.raises(AutoshardError, match=r"E/2 must be a whole number of 0 or more, got 9/2 with E = 9"):
        halves.bind(E=9)
    twice = autoshard.trace_symbolic(lambda x, y: x + y, jnp.ones((4,)), jnp.ones((4,)), dims={"x": "A", "y": "B"})
    assert twice.bind(A=6, B=6).program.values[0].shape == (6,)
    with pytest.raises(AutoshardError, match="A and B are one dimension of the program, but would be 6 and 4"):
        twice.bind(A=6)


# --- plans that are kept, and words


@pytest.mark.long
def test_a_saved_plan_keeps_its_formulas() -> None:
    plan = planned(Block(), parse_topology("v5e:2x4"))
    again = loads(dumps(plan))
    assert (again.program, again.dimensions) == (plan.program, plan.dimensions)
    assert formulas(again).total == formulas(plan).total
    assert again.explain(symbolic=True) == plan.explain(symbolic=True)


def test_an_older_plan_has_none() -> None:
    plan = replace(planned(Block(), parse_topology("v5e:2x4")), program=None, dimensions=None)
    again = loads(dumps(plan))
    assert again.program is None and "FLOPs per chip and run: 2 ·" in again.explain(symbolic=True)
    with pytest.raises(ValueError, match="lacks the program; search again to get formulas"):
        formulas(again)


def test_a_program_that_is_not_the_one_planned_is_refused() -> None:
    text = dumps(planned(Block(), parse_topology("v5e:2x4")))
    with pytest.raises(autoshard.PlanMismatchError, match="its program does not match its fingerprint"):
        loads(text.replace('"down_1": 16', '"down_1": 32'))


def test_a_plan_explains_itself_in_formulas() -> None:
    def feed_forward(x, wi, wo):
        return jax.nn.gelu(x @ wi) @ wo

    args = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 64, 512), (512, 2048), (2048, 512)))
    plan = autoshard.search(feed_forward, *args, topology="v5e:4x4", dims={"x": "B L E", "wo": "F E"})
    text = plan.explain(symbolic=True)
    assert "dimensions  B = 8, L = 64, E = 512, F = 2,048" in text
    assert "WS-2D    4·B·E·L/X + 4·B·F·L/Y" in text
    assert "WG-XY    4·E·F" in text
    for title in ("Operations, one run", "Kinds of operations, one step", "Whole step", "Shares of the whole program"):
        assert f"\n{title}" in text
    assert "Formulas" not in plan.explain() and "Whole step" not in plan.explain()


@examples(10)
@given(topology=topologies())
def test_every_symbol_of_a_topology_has_a_number(topology: Topology) -> None:
    numbers = rates(topology, ["bfloat16"])
    names = [axis.name for axis in topology.axes]
    for kind in KINDS:
        found = collective_seconds(kind, names, dimension("N"), topology)
        assert {str(symbol) for symbol in found.free_symbols} <= {"N", *numbers}


def test_bound_sizes_that_do_not_divide_are_padded() -> None:
    def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.tanh(x @ up) @ down

    shapes = [jax.ShapeDtypeStruct(each, jnp.float32) for each in ((64, 512), (512, 1024), (1024, 512))]
    trace = autoshard.trace_symbolic(mlp, *shapes, dims={"x": "B E", "up": "E F", "down": "F E"})
    odd = trace.bind(F=1021, E=509)
    assert not trace.search("cpu:4").padding
    assert {(each.size, each.padded) for each in odd.search("cpu:4").padding} >= {(1021, 1024)}
    assert not odd.search("cpu:4", padding=False).padding
    assert odd.search("cpu:4").dimensions is not None
