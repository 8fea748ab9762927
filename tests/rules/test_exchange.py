"""Rows of tokens sent to the chips of their experts and back: exact for any router, costed and audited as sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil, prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array, lax
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.emitting.program import emit
from autoshard.errors import AutoshardError
from autoshard.rules import ragged
from autoshard.rules.chains.exchange import Chips, Exchange
from autoshard.tracing.trace import trace
from costmodels.machine.conventions import EXPERT_LOAD
from costmodels.program.grouped import CHAIN, OVERFLOW, grouped, rows_for_each
from tests.support.layout_strategies import assert_equal, cpu_topology, mesh_of, problem_of, quick, random_choice

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOSEN = 32, 6, 8, 4, 2
ROWS = TOKENS * CHOSEN


def assigned(
    x: Array, chosen: Array, weights: Array, targets: Array, gate: Array, up: Array, down: Array, *biases: Array
) -> Array:
    """Tokens `[T, E]` through the experts `chosen` `[T, N]`; the result of each is added to one of the `targets` `[T N]`.

    There are no `biases`, or those of the hidden columns and of the results of each expert.
    """
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]
    gated = lax.ragged_dot(rows, gate, sizes)
    gated = gated + biases[0][flat[order]] if biases else gated
    made = lax.ragged_dot(jax.nn.silu(gated) * lax.ragged_dot(rows, up, sizes), down, sizes)
    made = made + biases[1][flat[order]] if biases else made
    made = made * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[targets[order]].add(made)


def arrays() -> list[Array]:
    """Random tokens, weights of their experts, and matrices."""
    rng = np.random.default_rng(0)
    matrices = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    shapes = ((TOKENS, WIDTH), (TOKENS, CHOSEN), *matrices, (EXPERTS, HIDDEN), (EXPERTS, WIDTH))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def call(fn: Any, chosen: np.ndarray, targets: np.ndarray | None = None) -> Any:
    """The function of a router's choice."""
    own = np.arange(ROWS) // CHOSEN
    x, weights, *matrices = arrays()
    return fn(x, jnp.asarray(chosen, jnp.int32), weights, jnp.asarray(own if targets is None else targets), *matrices)


EVEN = np.arange(ROWS).reshape(TOKENS, CHOSEN) % EXPERTS
SAME = np.full((TOKENS, CHOSEN), 2)
LAYOUTS = ((("x", "y"), ("x", "y"), ()), (("y", "x"), ("x",), ()), (("x",), ("x",), ("y",)), (("x", "y"), (), ()))
"""The axes of the tokens, of the experts, and of the hidden columns."""


def emitted(layouts: Sequence[Any] = LAYOUTS) -> tuple[Any, Any]:
    """The function, and a function of its results under these splits on 2×2 chips."""
    abstract = call(lambda *args: jax.eval_shape(lambda *each: each, *args), EVEN)
    topology = cpu_topology("2x2")
    traced = trace(assigned, *abstract, chains=True)
    (at,) = (i for i, op in enumerate(traced.program.operations) if op.primitive == CHAIN)
    groups = grouped(traced.program.operations[at])
    assert groups is not None and groups.tokens is not None and groups.hidden is not None
    problem = problem_of(traced, topology)
    node = problem.of_operation[at]
    places = (groups.tokens, groups.groups, groups.hidden)
    states = [tuple(state.splits[i] for i in places) for state in problem.nodes[node].states]
    rng, runs = np.random.default_rng(0), []
    for layout in layouts:
        choice = random_choice(problem, rng, {node: states.index(layout)})
        assert choice is not None
        runs.append(emit(traced, choice, topology, mesh_of(topology)))
    return jax.jit(assigned), lambda *args: [run(*args) for run in runs]


@lru_cache
def compiled() -> tuple[Any, Any]:
    """The function and its planned forms, compiled once."""
    fn, planned = emitted()
    return fn, jax.jit(planned, compiler_options=quick())


@st.composite
def routers(draw: st.DrawFn) -> np.ndarray:
    """The experts of each token: equally often, by token; or any of all, of a few so that others are empty, or one."""
    if draw(st.booleans()):
        return np.roll(np.arange(ROWS) * EXPERTS // ROWS, draw(st.integers(0, ROWS - 1))).reshape(TOKENS, CHOSEN)
    few = draw(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True))
    return np.array(draw(st.lists(st.sampled_from(few), min_size=ROWS, max_size=ROWS))).reshape(TOKENS, CHOSEN)


@pytest.mark.long
def test_results_are_those_of_one_chip_for_every_router() -> None:
    fn, planned = compiled()

    @given(routers(), st.permutations(range(ROWS)) | st.just(None))
    def check(chosen: np.ndarray, order: Sequence[int] | None) -> None:
        targets = None if order is None else np.asarray(order) % TOKENS
        expected = call(fn, chosen, targets)
        for found in call(planned, chosen, targets):
            assert_equal(found, expected)

    check()


@pytest.mark.long
def test_only_a_router_that_needs_more_room_gathers_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the path for an overflow, results are right where the buffers suffice, and are not where they do not."""
    monkeypatch.setattr(ragged, "run_in_slabs", lambda *_: jnp.full((TOKENS // 4, WIDTH), jnp.nan))
    fn, planned = emitted(LAYOUTS[:2])
    planned = jax.jit(planned, compiler_options=quick())
    for found in call(planned, EVEN):
        assert_equal(found, call(fn, EVEN))
    for (found,) in call(planned, SAME):
        assert np.isnan(found).all()


@pytest.mark.long
@pytest.mark.parametrize("chosen", [EVEN, SAME])
def test_gradients_are_those_of_one_chip(chosen: np.ndarray) -> None:
    fn, planned = emitted(LAYOUTS[:1])

    def loss(run: Any, x: Array, weights: Array, matrices: Any) -> Array:
        targets = jnp.arange(ROWS) // CHOSEN
        return jnp.square(run(x, jnp.asarray(chosen, jnp.int32), weights, targets, *matrices)).sum()

    x, weights, *matrices = arrays()
    both = [
        jax.jit(jax.grad(lambda *args, run=run: loss(run, *args), (0, 1, 2)), compiler_options=quick())(
            x, weights, matrices
        )
        for run in (fn, lambda *args: planned(*args)[0][0])
    ]
    for found, expected in zip(*map(jax.tree.leaves, both), strict=True):
        assert_equal([found], expected)


def _exchange(chosen: np.ndarray, load: float, sharing: tuple[str, ...] = ("x", "y")) -> Exchange:
    flat = np.sort(chosen.reshape(-1))
    numbers = np.argsort(chosen.reshape(-1), kind="stable") // CHOSEN
    parts = 4 if len(sharing) == 2 else 2
    ends = np.searchsorted(flat, np.arange(EXPERTS), side="right")[EXPERTS // parts - 1 :: EXPERTS // parts]
    chips = Chips(("x", "y"), (2, 2), sharing, TOKENS // 4)
    tokens = jnp.asarray(numbers, jnp.int32)
    return Exchange(chips, tokens, tokens, jnp.asarray(ends), jnp.int32(0), load)


@pytest.mark.long
@given(routers(), st.sampled_from((1.0, 1.5, 4.0)), st.sampled_from((("x", "y"), ("x",))))
def test_the_flag_is_whether_any_buffer_is_too_small(chosen: np.ndarray, load: float, sharing: tuple[str, ...]) -> None:
    exchange = _exchange(chosen, load, sharing)
    parts = exchange.chips.parts
    homes, experts = np.arange(ROWS) // CHOSEN // (TOKENS // 4), chosen.reshape(-1) * parts // EXPERTS
    pairs = np.zeros((4, parts), int)
    np.add.at(pairs, (homes, experts), 1)
    beside = homes % 2 if parts == 2 else 0 * homes
    each = np.zeros((4 // parts, parts), int)
    np.add.at(each, (beside, experts), 1)
    assert bool(exchange.fits()) == (pairs.max() <= exchange.sent and each.max() <= exchange.room)
    if load >= parts:
        assert bool(exchange.fits()) == (each.max() <= exchange.room)
        assert exchange.sent == ROWS // 4


def test_a_number_of_no_token_is_an_overflow() -> None:
    exchange = _exchange(EVEN, 4.0)
    assert bool(exchange.fits())
    for wrong in (-1, TOKENS):
        assert not replace(exchange, targets=exchange.targets.at[3].set(wrong)).fits()


def _workload(tokens: int, width: int, hidden: int, experts: int, chosen: int) -> tuple[Any, list[Any]]:
    def layer(x: Array, router: Array, gate: Array, up: Array, down: Array) -> Array:
        best, which = lax.top_k(x @ router, chosen)
        targets = jnp.arange(x.shape[0] * chosen) // chosen
        return assigned(x, which, best, targets, gate, up, down)

    shapes = ((tokens, width), (width, experts), *[(experts, width, hidden)] * 2, (experts, hidden, width))
    return layer, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("capacity", [1.25, 1.5])
def test_few_experts_of_many_tokens_are_reached_by_all_to_alls(capacity: float) -> None:
    tokens, width, experts, chosen = 4096, 2048, 64, 2
    layer, args = _workload(tokens, width, 768, experts, chosen)
    plan = autoshard.search(layer, *args, topology="v5e:4x4", capacity=capacity, padding=False)
    assert plan.proof.status == "OPTIMAL"
    sent = [each for each in plan.estimate.collectives if each.kind == "all-to-all"]
    most = capacity * tokens * chosen / 16 / 16
    each = min(tokens * chosen // 16, 8 * ceil((most + 3 * sqrt(most)) / 8))
    assert [(row.bytes, row.axes) for row in sent] == [(16 * each * width * 2, ("x", "y"))] * 2
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-6)
    (chain,) = (op for op in plan.operations if op.primitive == CHAIN)
    matmuls, pairs = 6 * width * 768 * capacity * tokens * chosen / 16, 2 * tokens * chosen * 16 * 16
    assert chain.flops == pytest.approx(matmuls + pairs, rel=1e-9)
    (text,) = (text for text in plan.warnings if "balanced rows" in text)
    assert f"over xy, in buffers of {capacity:g} times the balanced rows" in text and f"at most {each} rows" in text
    assert not any("checker found a fault" in text for text in plan.warnings)


def test_no_rows_are_sent_with_buffers_for_none() -> None:
    layer, args = _workload(8192, 2048, 768, 64, 2)
    plan = autoshard.search(layer, *args, topology="v5e:4x4", capacity=0, padding=False)
    assert not any("balanced rows" in text for text in plan.warnings)
    assert plan.topology.pricing.expert_load == EXPERT_LOAD


def test_the_capacity_is_a_number_of_at_least_one() -> None:
    layer, args = _workload(64, 8, 8, 4, 2)
    with pytest.raises(AutoshardError, match=r"`capacity` must be 0 or a finite number of at least 1, got 0\.5\."):
        autoshard.search(layer, *args, topology="cpu:2", capacity=0.5)


@given(st.integers(1, 4096), st.sampled_from((1, 2, 16, 64)), st.sampled_from((1, 2, 16)), st.floats(1, 16))
def test_buffers_hold_the_balanced_rows(rows: int, sources: int, parts: int, load: float) -> None:
    sources *= parts
    each = rows_for_each(rows, sources, parts, load)
    assert rows / (sources * parts) <= each <= ceil(rows / sources)
    assert prod((each, sources, parts)) >= rows


@pytest.mark.long
def test_a_saved_plan_is_audited_without_the_path_for_an_overflow(tmp_path: Any) -> None:
    layer, args = _workload(4096, 512, 512, 8, 1)
    args = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in args]
    pins = [P("x"), None, *[P("x")] * 3]
    plan = autoshard.search(layer, *args, topology="cpu:8", pins=pins, padding=False, capacity=1.0)
    assert [each.kind for each in plan.estimate.collectives].count("all-to-all") == 2
    plan.save(tmp_path / "plan.json")
    again = autoshard.load(tmp_path / "plan.json")
    assert again.choice == plan.choice and again.topology.pricing.expert_load == 1.0
    found = autoshard.audit(again, layer, *args)
    assert [each.kind for each in found.collectives].count("all-to-all") == 2
    assert "all-reduce" not in [each.kind for each in found.collectives]
    assert all(OVERFLOW not in each.op_name for each in found.collectives)
    assert all(compiled == pytest.approx(planned, rel=0.01) for planned, compiled in found.wire_bytes().values())
    assert found.ok and "a buffer for rows is too small: 1" in str(found)
