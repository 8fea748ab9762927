"""Chains of grouped matmuls as one operation: experts split through the whole chain, exact for any router."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array, lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.emitting.program import emit
from autoshard.tracing.trace import trace
from costmodels.machine.conventions import PricingError, pricing_from_dict
from costmodels.machine.topology import parse_topology
from costmodels.operations import price
from costmodels.program.grouped import CHAIN, grouped
from tests.support.effort import mostly_long, tries
from tests.support.layout_strategies import assert_equal, cpu_topology, mesh_of, problem_of, quick, random_choices

ROWS, WIDTH, HIDDEN, EXPERTS = 24, 6, 8, 4


def gated(rows: Array, gate: Array, up: Array, down: Array, sizes: Array) -> Array:
    """The three matmuls of each expert, on rows sorted by expert."""
    hidden = jax.nn.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    return lax.ragged_dot(hidden, down, sizes)


def biased(rows: Array, bias: Array, up: Array, down: Array, sizes: Array) -> Array:
    """A bias of each row, and an activation that is not zero at zero."""
    return lax.ragged_dot(jnp.exp(jnp.tanh(lax.ragged_dot(rows, up, sizes) + bias)), down, sizes)


def routed(x: Array, router: Array, gate: Array, up: Array, down: Array) -> Array:
    """Tokens sorted by expert, two experts per token, no capacity."""
    gates, chosen = lax.top_k(jax.nn.softmax(x @ router, -1), 2)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=router.shape[1]).astype(jnp.int32)
    made = gated(x[order // 2], gate, up, down, sizes)
    return jnp.zeros_like(x).at[order // 2].add(made * gates.reshape(-1)[order][:, None].astype(x.dtype))


def _random(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


MATRICES = ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))


@lru_cache
def _runs(which: str, shape: str) -> Any:
    """The program under random layouts and with experts over all chips of the first axes, compiled once."""
    fn = gated if which == "gated" else biased
    first = (EXPERTS, WIDTH, HIDDEN) if which == "gated" else (ROWS, HIDDEN)
    args = (*_random((ROWS, WIDTH), first, *MATRICES[1:]), jnp.zeros(EXPERTS, jnp.int32))
    topology = cpu_topology(shape)
    traced = trace(fn, *args, chains=True)
    (at,) = (i for i, op in enumerate(traced.program.operations) if op.primitive == CHAIN)
    groups = grouped(traced.program.operations[at])
    assert groups is not None
    problem = problem_of(traced, topology)
    rng = np.random.default_rng(0)
    choices = random_choices(problem, rng, 60)
    split = [c for c in choices if c.strategies[at].splits[groups.groups]]
    assert len(split) >= 4
    emitted = [emit(traced, choice, topology, mesh_of(topology)) for choice in split[:4]]
    planned = jax.jit(lambda *args: [run(*args) for run in emitted], compiler_options=quick())
    return jax.jit(fn), planned, args[:-1]


@st.composite
def _sizes(draw: st.DrawFn) -> np.ndarray:
    """Rows of each expert: any, also none; all rows to one expert; rows of no expert at the end."""
    if draw(st.booleans()):
        return np.eye(EXPERTS, dtype=np.int32)[draw(st.integers(0, EXPERTS - 1))] * ROWS
    cuts = sorted(draw(st.lists(st.integers(0, ROWS), min_size=EXPERTS, max_size=EXPERTS)))
    return np.diff([0, *cuts]).astype(np.int32)


@pytest.mark.long
@pytest.mark.parametrize(("which", "shape"), [("gated", "2x4"), ("biased", "2x2")])
def test_experts_over_chips_are_exact_for_every_router(which: str, shape: str) -> None:
    run, planned, args = _runs(which, shape)

    @given(_sizes())
    def check(sizes: np.ndarray) -> None:
        expected = run(*args, jnp.asarray(sizes))
        for found in planned(*args, jnp.asarray(sizes)):
            assert_equal(found, expected)

    check()


BEFORE_THE_SUM = {
    "weights": (True, lambda made, bias: -made * bias),
    "calls": (True, jax.jit(lambda made, bias: (made / (2 + jnp.tanh(bias))).astype(jnp.float32))),
    "a bias": (True, lambda made, bias: 2 * (made + bias)),
    "taken from": (True, lambda made, bias: bias - made),
    "exp": (False, lambda made, bias: jnp.exp(made) * bias),
    "its inverse": (False, lambda made, bias: bias / (3 + made)),
    "a call used twice": (False, jax.jit(lambda made, bias: made * jnp.tanh(made) * bias)),
}
"""Work on the results before they are added by token, and whether it is linear in them or adds to them."""


@pytest.mark.parametrize(
    "work", mostly_long(BEFORE_THE_SUM, "a bias", slow=("exp", "its inverse", "weights", "taken from"))
)
def test_only_linear_work_and_sums_are_split_with_the_sum_by_token(work: str) -> None:
    """Rows of no group and halves of the hidden columns do not make what a whole row makes."""
    linear, between = BEFORE_THE_SUM[work]

    def fn(x: Array, order: Array, up: Array, down: Array, bias: Array, sizes: Array) -> Array:
        made = lax.ragged_dot(jnp.tanh(lax.ragged_dot(x[order // 2], up, sizes)), down, sizes)
        return jnp.zeros_like(x).at[order // 2].add(between(made, bias))

    order = jnp.asarray(np.random.default_rng(0).permutation(ROWS), jnp.int32)
    x, up, down, bias = _random((ROWS // 2, WIDTH), *MATRICES[1:], (ROWS, WIDTH))
    args = x, order, up, down, bias, jnp.asarray([5, 0, 9, 4], jnp.int32)
    topology = cpu_topology("2x2")
    traced = trace(fn, *args, chains=True)
    (at,) = (i for i, op in enumerate(traced.program.operations) if op.primitive == CHAIN)
    groups = grouped(traced.program.operations[at])
    assert groups is not None and (groups.tokens is not None) == linear
    problem, expected = problem_of(traced, topology), jax.jit(fn)(*args)
    choices = random_choices(problem, np.random.default_rng(0), 60)
    split = [c for c in choices if any(c.strategies[at].splits)]
    run = [emit(traced, choice, topology, mesh_of(topology)) for choice in split[: tries(5, least=2)]]
    for found in jax.jit(lambda *args: [each(*args) for each in run], compiler_options=quick())(*args):
        assert_equal(found, expected)


ARGS = ((16, WIDTH), (WIDTH, EXPERTS), *MATRICES)


def _by_experts(fn: Any, *args: Any, topology: str = "cpu:2x4") -> autoshard.Plan:
    experts = P("y")
    return autoshard.search(fn, *args, topology=topology, pins=[None, None, experts, experts, experts])


@pytest.mark.long
def test_a_chain_is_planned_run_saved_and_differentiated(tmp_path: Any) -> None:
    args = _random(*ARGS)
    plan = _by_experts(routed, *args)
    assert CHAIN in [row.primitive for row in plan.operations]
    assert "expert parallel over y" in str(plan.parallelism())
    assert any("no chip has more than 1.5 times the mean rows (expert_load)" in text for text in plan.warnings)
    plan.save(tmp_path / "plan.json")
    again = autoshard.load(tmp_path / "plan.json")
    assert_equal([again.jit(routed)(*args)], routed(*args))
    run = plan.apply(routed, plan.make_mesh())

    def loss(fn: Any, args: Any) -> Array:
        return jnp.square(fn(*args)).sum()

    assert_equal(jax.tree.leaves(jax.jit(jax.grad(partial(loss, run)))(args)), jax.grad(partial(loss, routed))(args))
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-6)


def test_the_first_filling_of_a_buffer_is_outside_of_a_loop() -> None:
    """The compiler copies nothing into on-chip memory ahead of a loop's work."""
    args = _random(*ARGS)
    waiting = [(jax.make_jaxpr(_by_experts(routed, *args).jit(routed))(*args).jaxpr, False)]
    inside = []
    for jaxpr, held in waiting:  # grows during the iteration
        for eqn in jaxpr.eqns:
            inside += [held] * (eqn.primitive.name == "ragged_dot_general")
            below = held or eqn.primitive.name in ("while", "cond")
            waiting += [(each, below) for each in jaxprs_in_params(eqn.params)]
    assert sorted(inside) == [False] * 3 + [True] * 3


@pytest.mark.long
def test_gradients_are_planned() -> None:
    args = _random(*ARGS)

    def step(*args: Any) -> Any:
        return jax.value_and_grad(lambda weights: jnp.square(routed(*args[:2], *weights)).sum())(args[2:])

    plan = _by_experts(step, *args)
    assert_equal(jax.tree.leaves(plan.jit(step)(*args)), jax.jit(step)(*args))


def _matmuls(fn: Any, *args: Any) -> list[str]:
    return [op.primitive for _, op in trace(fn, *args, chains=True).program.matmuls()]


def test_what_is_no_chain_stays_as_it_is() -> None:
    rows, gate, up, down = _random((ROWS, WIDTH), *MATRICES)
    sizes, others = (jnp.asarray(each, jnp.int32) for each in ((6, 6, 6, 6), (24, 0, 0, 0)))
    single = ["ragged_dot_general"]

    def used_twice(rows: Array) -> Any:
        first = lax.ragged_dot(rows, gate, sizes)
        return lax.ragged_dot(jnp.tanh(first), down, sizes), first

    def other_groups(rows: Array) -> Any:
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(rows, gate, sizes)), down, others)

    def normalised(rows: Array) -> Any:
        return lax.ragged_dot(jax.nn.softmax(lax.ragged_dot(rows, gate, sizes)), down, sizes)

    for fn in (used_twice, other_groups, normalised):
        assert _matmuls(fn, rows) == 2 * single
    assert _matmuls(lambda r: gated(r, gate, up, down, sizes), rows) == [CHAIN]
    assert _matmuls(lambda r: gated(gated(r, gate, up, down, sizes), gate, up, down, sizes), rows) == [CHAIN, CHAIN]


@given(st.sampled_from((1, 8, 64, 4096)), st.sampled_from((1, 4, 16)), st.sampled_from((1.0, 1.5, 4.0)))
def test_the_price_is_that_of_rows_tiles_and_touched_experts(rows: int, parts: int, load: float) -> None:
    groups, width, columns = 64, 256, 512
    shapes = ((rows, width), (groups, width, columns), (groups,))
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, (jnp.bfloat16, jnp.bfloat16, jnp.int32), strict=True)]
    program = trace(lax.ragged_dot, *args).program
    op = next(op for _, op in program.matmuls())
    chip = parse_topology("v5e:2x2").chip
    shards = np.ones((1, len(op.factors)))
    shards[0, grouped(op).groups] = parts  # pyright: ignore[reportOptionalMemberAccess]
    cost = price(program, op, shards, chip, load=load)
    most = min(rows, load * rows / parts)
    touched = min(groups / parts, np.ceil(most))
    height = min(128, rows)
    tiles = np.ceil(most / height) + touched * (groups - 1) / groups
    flops = 2 * tiles * max(height, chip.load_rows) * width * columns
    assert cost.compute_seconds[0] == pytest.approx(flops / chip.reached_matmul_flops_per_second("bfloat16"))
    assert cost.bytes[0] == pytest.approx(2 * (rows * width + touched * width * columns + rows * columns))


def test_the_load_is_a_number_of_at_least_one() -> None:
    assert pricing_from_dict({"expert_load": 3}).expert_load == 3
    with pytest.raises(PricingError, match=r"expert_load must be a finite number of at least 1, got 0\.5\."):
        pricing_from_dict({"expert_load": 0.5})


def test_chains_that_the_time_limit_leaves_untried_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS, WIDTH), *MATRICES)]
    sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
    monkeypatch.setattr("autoshard.planning.chains.monotonic", iter((0.0, 100.0)).__next__)
    plan = autoshard.search(gated, *args, sizes, topology="cpu:2", time_limit=50)
    assert not any(row.primitive == CHAIN for row in plan.operations)
    assert any("the time limit left chains" in text for text in plan.warnings)
