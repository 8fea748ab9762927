"""Asynchronous copies and collectives as a value of `overlap`: search, checker and formulas agree, and what is hidden."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import autoshard
from autoshard.tracing.trace import trace
from costmodels.machine.conventions import Pricing
from costmodels.machine.topology import Topology, parse_topology
from costmodels.program.asynchronous import is_deferred, is_lender, lenders, static_operands
from search.answer.assignment import choice_of, collectives
from search.answer.check import check
from search.formulation.problem import build
from tests.support.effort import examples
from tests.support.enumeration import assert_search_equals_enumeration
from tests.support.layout_strategies import random_states
from tests.support.programs import MESHES, TOPOLOGIES, programs, small_programs


def asynchronous(text: str | Topology, room: float = 1e6, hbm: float = 1.0, link: float = 1.0) -> Topology:
    """A topology under the overlap "async", with room for copies ahead and faster memory or links."""
    plain = parse_topology(text) if isinstance(text, str) else text
    numbers = {"prefetch_bytes": room, "hbm_bytes_per_second": plain.chip.hbm_bytes_per_second * hbm}
    axes = tuple(
        replace(axis, bytes_per_second=axis.bytes_per_second * link, hop_seconds=axis.hop_seconds / link)
        for axis in plain.axes
    )
    return replace(plain, chip=plain.chip.override(numbers, "a test"), axes=axes, pricing=Pricing(overlap="async"))


def topologies(of=TOPOLOGIES) -> st.SearchStrategy[Topology]:
    rates = st.sampled_from((1e-4, 1.0, 30.0))
    return st.builds(asynchronous, st.sampled_from(of), st.sampled_from((0.0, 64.0, 1e6)), rates, rates)


def exposed(topology: Topology) -> Topology:
    return replace(topology, pricing=Pricing())


@examples(20)
@given(small_programs(), topologies(MESHES), st.floats(0.3, 1.2))
def test_the_search_equals_enumeration(program, topology, part):
    assert_search_equals_enumeration(program, topology, part)


@examples(60)
@given(programs(), topologies(), st.integers(0, 2**31))
def test_the_checker_prices_any_choice_as_the_search_does(program, topology, seed):
    problem = build(program, topology, np.inf)
    states = random_states(problem, np.random.default_rng(seed))
    assume(states is not None)
    assert states is not None
    choice = choice_of(problem, states)
    found, plain = check(program, topology, choice), check(program, exposed(topology), choice)
    assert found.seconds == pytest.approx(problem.objective(states), rel=1e-9)
    assert found.seconds <= plain.seconds * (1 + 1e-9)
    assert (found.compute_seconds, found.memory_seconds) == (plain.compute_seconds, plain.memory_seconds)
    sent = sum(each.seconds for each in collectives(program, topology, choice))
    assert sent <= found.collective_seconds * (1 + 1e-9)


@examples(60)
@given(
    programs(),
    topologies(),
    st.integers(0, 2**31),
    st.sampled_from(("hbm", "link", "room")),
    st.sampled_from((2.0, 9.0)),
)
def test_a_faster_machine_never_costs_more(program, topology, seed, what, factor):
    """Links, memory, and the room for copies ahead."""
    problem = build(program, topology, np.inf)
    states = random_states(problem, np.random.default_rng(seed))
    assume(states is not None)
    assert states is not None
    room = topology.chip.prefetch_bytes
    faster = asynchronous(
        topology, room * factor if what == "room" else room, **{what: factor} if what != "room" else {}
    )
    choice = choice_of(problem, states)
    assert check(program, faster, choice).seconds <= check(program, topology, choice).seconds * (1 + 1e-9)


def _one_product(a, b):
    return autoshard.pin(
        autoshard.pin(a, jax.sharding.PartitionSpec(None, "x")) @ autoshard.pin(b, jax.sharding.PartitionSpec("x")),
        jax.sharding.PartitionSpec(None, "x"),
    )


@pytest.mark.parametrize("room", [0.0, 2e6, 1e9])
def test_a_product_and_its_reduction_take_neither_their_sum_nor_their_maximum(room: float):
    """The reduction runs beside the reads of the weight that the room holds: $a + max(c, m - min(a, p))$."""
    args = (jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    topology = asynchronous("v4:4x1x1", room)
    chip = topology.chip
    plan = autoshard.search(_one_product, *args, topology=topology)
    read = 2 * (256 * 1024 + 1024 * 4096)
    (product,) = (op for op in plan.operations if op.matmul)
    core = 2 * 256 * 1024 * 4096 / chip.reached_matmul_flops_per_second("bfloat16") + chip.op_overhead_seconds
    assert product.compute_seconds + chip.op_overhead_seconds == pytest.approx(core)
    memory = product.memory_seconds
    (alone,) = autoshard.search(_one_product, *args, topology=exposed(topology)).estimate.collectives
    ahead = min(memory - core, min(read, room) / chip.reached_hbm_bytes_per_second)
    assert alone.seconds > 0 and memory > core
    expected = alone.seconds + max(core, memory - min(alone.seconds, ahead))
    assert plan.estimate.seconds == pytest.approx(expected, rel=1e-9)
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(expected, rel=1e-9)
    assert (room == 0.0) == (plan.estimate.seconds == pytest.approx(alone.seconds + memory))


def _block(x, weights):
    hidden = jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])
    return x + hidden @ weights["down"]


def _layers(x, layers):
    return jax.lax.scan(lambda x, layer: (_block(x, layer), None), x, layers)[0]


def _abstract(width: int = 4096, ffn: int = 16_384, layers: int | None = None):
    lead = () if layers is None else (layers,)
    shapes = {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}
    weights = {name: jax.ShapeDtypeStruct((*lead, *shape), jnp.bfloat16) for name, shape in shapes.items()}
    return jax.ShapeDtypeStruct((8, width), jnp.bfloat16), weights


def _by_name(program, *words: str) -> list[int]:
    return [i for i, op in program.matmuls() if any(f"'{word}'" in op.name for word in words)]


def test_the_weights_of_a_block_are_read_ahead_together():
    program = trace(_layers, *_abstract(layers=4)).program
    gate, up, down = (_by_name(program, word)[0] for word in ("gate", "up", "down"))
    assert lenders(program, down) == tuple(sorted((gate, up)))
    assert [is_lender(program, i) for i in (gate, up, down)] == [True, True, False]  # a residual sum feeds two
    assert all(static_operands(program, program.operations[i]) == (1,) for i in (gate, up, down))


def test_layers_of_the_first_argument_are_known_before_the_step():
    x, layers = _abstract(layers=4)
    program = trace(lambda layers, x: _layers(x, layers), layers, x).program
    found = [
        [program.source_name(op.inputs[k].value) for k in static_operands(program, op)] for _, op in program.matmuls()
    ]
    assert sorted(found) == [["layers['down']"], ["layers['gate']"], ["layers['up']"]]


def test_gradients_of_weights_are_deferred_and_activations_are_not():
    def loss(weights, x):
        return jnp.sum(_layers(x, weights).astype(jnp.float32))

    x, weights = _abstract(layers=4)
    program = trace(jax.grad(loss), weights, x).program
    found = [is_deferred(program, i) for i, _ in program.matmuls()]
    assert sum(found) == 3  # gate, up, down
    assert not any(found[at] for at, (_, op) in enumerate(program.matmuls()) if static_operands(program, op))


def test_a_small_reduction_hides_behind_the_block_that_it_ends():
    """A plan with room is faster than one without by the reduction, of which the last matmul alone hides a part."""
    args = _abstract()
    plans = [autoshard.search(_block, *args, topology=asynchronous("v5e:4x4", room)) for room in (0.0, 1e9)]
    exposed_, hidden = (plan.estimate.collective_seconds for plan in plans)
    assert exposed_ > 5e-6 and hidden < 0.05 * exposed_
    for plan in plans:
        assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)
        assert plan.topology.pricing.asynchronous and "asynchronous beside matmuls" in plan.explain()


def test_gathers_of_weights_hide_behind_matmuls():
    """Fully sharded weights of a compute-bound layer cost no more than the arithmetic."""
    width, tokens = 4096, 1 << 16
    x, weights = _abstract(width)
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    spec = jax.sharding.PartitionSpec
    pins = {"weights.*": spec(("x", "y")), "x": spec(("x", "y"))}
    plan = autoshard.search(_block, x, weights, topology=asynchronous("v5e:4x4"), pins=pins)
    serial = autoshard.search(_block, x, weights, topology=exposed(asynchronous("v5e:4x4")), pins=pins)
    assert plan.estimate.collective_seconds < 0.2 * serial.estimate.collective_seconds
    assert plan.estimate.seconds < serial.estimate.seconds


def test_casts_of_weights_run_as_they_arrive():
    """A step on int8 weights takes the time to read them, and its formulas say the same."""
    x, weights = _abstract()
    stored = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.int8) for name, leaf in weights.items()}

    def step(x, weights):
        return _block(x, {name: leaf.astype(jnp.bfloat16) for name, leaf in weights.items()})

    plan = autoshard.search(step, x, stored, topology=asynchronous("v5e:4x4", 1e9))
    casts = [op for op in plan.operations if "convert_element_type weights" in op.name]
    assert len(casts) == 3 and all(op.compute_seconds > 0 and op.seconds == 0 for op in casts)
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)
