"""Operations along a split dimension: equal to the whole, compiled as planned, priced alike by everything that prices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import Array, lax
from jax.sharding import PartitionSpec

import autoshard
from autoshard.auditing import hlo_collectives
from autoshard.emitting.program import emit
from autoshard.explaining.formulas import formulas_of
from costmodels.machine.topology import parse_topology
from costmodels.program.program import Operation
from search.answer.assignment import choice_of
from search.answer.check import check
from search.formulation.intra_op import intra_op_collectives, payload
from search.formulation.strategies import Strategy, strategy_space
from search.solve import search
from tests.support.effort import examples, mostly_long
from tests.support.emitting.einsum_graphs import differences
from tests.support.layout_strategies import (
    assert_equal,
    assert_layouts_do_not_matter,
    cpu_topology,
    mesh_of,
    op_steps,
    problem_of,
    quick,
    random_states,
    traced_on,
)
from tests.support.rules.calls import Call, best, calls, parts, reduced_again, running
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct


@pytest.mark.long
@examples(16)
@given(call=st.sampled_from([running, best, parts, reduced_again]).flatmap(calls), seed=st.integers(0, 2**16))
def test_split_they_are_the_whole_and_as_planned(call: Call, seed: int) -> None:
    topology, args = cpu_topology("2x2x2"), call.operands
    fn = lambda *xs: call.fn(*(x * np.asarray(1, x.dtype) for x in xs))  # noqa: E731
    traced = traced_on(topology, fn, *args)
    at = next((step.operation for step in op_steps(traced.block) if step.eqn.primitive.name == call.primitive), None)
    assume(at is not None)
    assert at is not None
    problem = problem_of(traced, topology)
    node = problem.of_operation[at]
    states = enumerate(problem.nodes[node].states)
    split = [s for s, each in states if _along(traced.program.operations[at], each) and not any(each.carried)]
    assume(split)
    rng = np.random.default_rng(seed)
    states = random_states(problem, rng, {node: int(rng.choice(split))})
    assert states is not None
    choice = choice_of(problem, states)
    mesh = mesh_of(topology)
    flat = [*map(jnp.asarray, args), *traced.constants]
    run = jax.jit(emit(traced, choice, topology, mesh), compiler_options=quick()).lower(*flat).compile()
    assert_equal(run(*flat), jax.jit(fn)(*args))
    compiled = hlo_collectives.collectives(run.as_text() or "", topology.axis_sizes)
    assert differences(traced.program, topology, choice, compiled) == []
    checked = check(traced.program, topology, choice)
    assert checked.faults == ()
    assert checked.seconds == pytest.approx(problem.objective(states), rel=1e-9)
    formulas = formulas_of(traced.program, autoshard.trace_symbolic(fn, *args).dimensions, topology, choice)
    assert formulas.at(formulas.total.seconds) == pytest.approx(checked.seconds, rel=1e-9)


@pytest.mark.parametrize("parts", mostly_long([2, 3, 4, 6], 6))
def test_parts_are_exchanged_over_axes_in_any_order(parts: int) -> None:
    """On eight chips, where who sends to whom is not who gets from whom."""
    joined = lambda xs: lax.concatenate([x * 2 for x in xs], 0)  # noqa: E731
    apart = lambda x: lax.split(x * 2, [16] * parts, 0)  # noqa: E731
    x = jnp.arange(16.0 * parts)
    for fn, arg in ((joined, list(apart(x))), (apart, x)):
        topology, traced = cpu_topology("2x2x2"), trace(fn, arg)
        operations = traced.program.operations

        def zxy(operation: int, strategy: Strategy, operations: Any = operations) -> bool:
            pairs = zip(operations[operation].factors, strategy.splits, strict=True)
            return all(axes == ("z", "x", "y") for factor, axes in pairs if factor.kind == "exchanged")

        choice = search(traced.program, topology, allow=zxy).choice
        planned = jax.jit(emit(traced, choice, topology, mesh_of(topology)))(*jax.tree.leaves(arg))
        assert_equal(planned, fn(arg))


def _along(op: Operation, strategy: Any) -> bool:
    return any(
        axes and f.kind in ("gathered", "exchanged") for f, axes in zip(op.factors, strategy.splits, strict=True)
    )


@pytest.mark.parametrize("dtype", mostly_long([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("at", [0, 5, 15])
def test_a_split_maximum_keeps_what_is_no_number(dtype: Any, at: int) -> None:
    """The host's own maximum over chips would lose it, unless it is the first chip's."""
    x = jnp.asarray(np.linspace(-3, 3, 16), dtype).at[at].set(jnp.nan).reshape(2, 8)
    fn = lambda x: (jnp.max(x), jnp.max(x, 1), jnp.min(x, 1), jnp.argmax(x, 1), jnp.argmin(x))  # noqa: E731
    topology, traced = cpu_topology("2x4"), trace(fn, x)
    operations = traced.program.operations

    def split(operation: int, strategy: Strategy) -> bool:
        pairs = zip(operations[operation].factors, strategy.splits, strict=True)
        return all(axes for factor, axes in pairs if factor.kind in ("max", "min"))

    choice = search(traced.program, topology, allow=split).choice
    planned = jax.jit(emit(traced, choice, topology, mesh_of(topology)))(x)
    for found, expected in zip(planned, fn(x), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def _operation(fn: Any, *args: Any, primitive: str) -> tuple[Any, Operation]:
    program = trace(fn, *args).program
    return program, next(op for op in program.operations if op.primitive == primitive)


def test_a_piece_holds_as_many_as_are_asked_for() -> None:
    """Of 16 the best 4 are found in pieces of 4 and more."""
    _, op = _operation(lambda x: lax.top_k(x, 4), S((3, 16), jnp.float32), primitive="top_k")
    space = strategy_space(op, (("x", 2), ("y", 4)))
    assert {float(count) for count in space.shards[:, 1]} == {1.0, 2.0, 4.0}


@pytest.mark.parametrize(("topology", "steps"), [("v4:4x4x4", [("yz", 16), ("x", 64)]), ("v4:2x2x4", [("xyz", 16)])])
def test_totals_are_gathered_as_the_compiler_does(topology: str, steps: list[tuple[str, int]]) -> None:
    """Over all axes of 64 chips at once a gather compiles to something else: it is two."""
    program, op = _operation(lambda x: lax.cumsum(x, 0), S((512, 8), jnp.float32), primitive="cumsum")
    on = parse_topology(topology)
    strategies = strategy_space(op, tuple(on.axis_sizes.items())).strategies
    strategy = next(each for each in strategies if each.splits[0] == ("x", "y", "z") and not any(each.carried))
    found = [
        (each.kind, "".join(each.axes), payload(program, op, strategy, each, on))
        for each in intra_op_collectives(op, strategy, on)
    ]
    assert found == [("all-gather", axes, chips * 8 * 4) for axes, chips in steps]


def test_the_best_of_a_split_vocabulary_are_found_without_gathering_logits() -> None:
    def sampled(hidden: Array, table: Array) -> Any:
        return lax.top_k(hidden @ table.T, 40)

    plan = autoshard.search(sampled, S((64, 1024), jnp.bfloat16), S((131072, 1024), jnp.bfloat16), topology="v5e:4x4")
    assert plan.proof.status == "OPTIMAL"
    assert [each.kind for each in plan.estimate.collectives] == ["all-gather"] * 2
    assert {each.bytes for each in plan.estimate.collectives} == {16 * 64 * 40 * 2, 16 * 64 * 40 * 4}
    assert plan.in_specs[1][0] is not None, "the vocabulary is split"


@pytest.mark.long
def test_words_are_chosen_in_a_loop_whatever_the_layout() -> None:
    """Greedy in one, of the three likeliest in the other: each word depends on the one before."""

    def written(table: Array, mixing: Array, first: Array) -> Any:
        def step(word: Array, _: None) -> tuple[Array, Any]:
            scores = jnp.tanh(table[word] @ mixing) @ table.T
            best, words = lax.top_k(scores, 3)
            return jnp.argmax(scores, -1).astype(word.dtype), (best, words, jnp.cumsum(jax.nn.softmax(best, -1), -1))

        return lax.scan(step, first, None, length=4)

    rng = np.random.default_rng(0)
    table, mixing = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in ((16, 8), (8, 8)))
    assert_layouts_do_not_matter(written, table, mixing, jnp.asarray([3, 5]), count=4)


def _spread(x: Any) -> Any:
    return autoshard.pin(x, PartitionSpec(None, ("x", "y")))


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("fn", "gathered"),
    [
        pytest.param(lambda x: _spread(lax.cumsum(_spread(x * 2), 1, reverse=True)), [1], marks=pytest.mark.long),
        (lambda x: lax.top_k(_spread(x * 2), 1), [1, 1]),
        pytest.param(lambda x: lax.top_k(_spread(x * 2), 40), [40, 40], marks=pytest.mark.long),
        pytest.param(lambda x: jnp.prod(_spread(x * 2), 1), [1], marks=pytest.mark.long),
    ],
)
def test_the_tpu_compiler_leaves_the_gathers_as_they_are(fn: Any, gathered: list[int]) -> None:
    x = S((3, 2**18), jnp.float32)
    plan = autoshard.search(fn, x, topology="v5e:4x4")
    sent = [(each.kind, each.bytes) for each in plan.estimate.collectives]
    assert sent == [("all-gather", 16 * 3 * 4 * k) for k in gathered]
    audit = autoshard.audit(plan, fn, x, target="tpu")
    assert [each for each in audit.differences if each.kind not in ("peak memory", "slower than planned")] == []


@pytest.mark.tpu
@pytest.mark.parametrize("parts", [2, 5])
def test_the_tpu_compiler_leaves_exchanges_as_they_are(parts: int) -> None:
    """Two parts: all blocks move along both axes. Five: those of the first and the last round along one."""

    def fused(x: Array, w: Array) -> Any:
        return [_spread(part) for part in jnp.split(x @ w, parts, -1)]

    args = (S((64, 4096), jnp.bfloat16), S((4096, 4096 * parts), jnp.bfloat16))
    plan = autoshard.search(fused, *args, topology="v5e:4x4")
    axes = ["xy", "xy"] if parts == 2 else ["x", "xy", "xy", "xy", "x"]
    sent = [(each.kind, "".join(each.axes), each.bytes) for each in plan.estimate.collectives]
    assert sent == [("collective-permute", each, 64 * 4096 * 2 / 16) for each in axes]
    audit = autoshard.audit(plan, fused, *args, target="tpu")
    assert [each for each in audit.differences if each.kind not in ("peak memory", "slower than planned")] == []
