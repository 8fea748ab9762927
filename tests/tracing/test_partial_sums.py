"""Partial sums across loops: whatever a loop adds up is reduced once, and no layout changes the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import autoshard
from tests.support.effort import mostly_long, tries
from tests.support.layout_strategies import (
    assert_equal,
    cpu_topology,
    problem_of,
    random_choice,
    run_planned,
    traced_on,
)

ROUNDS = 4


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("be,bf->ef", x, y)


def scan_from_zeros(x, y):
    return lax.scan(lambda c, z: (c + product(*z), None), jnp.zeros((4, 8)), (x, y))[0]


def scan_from_the_first(x, y):
    return lax.scan(lambda c, z: (c + product(*z), None), product(x[0], y[0]), (x[1:], y[1:]))[0]


def python_sum(x, y):
    return sum(product(x[i], y[i]) for i in range(ROUNDS))


def while_from_zeros(x, y):
    def body(carry):
        i, c = carry
        return i + 1, c + product(x[i], y[i])

    return lax.while_loop(lambda carry: carry[0] < ROUNDS, body, (0, jnp.zeros((4, 8))))[1]


def losses(x, y):
    """A scalar that begins as a literal zero, and one that does not."""
    return lax.scan(lambda c, z: ((c[0] + jnp.sum(z[0] * 2), c[1] + jnp.sum(z[1])), None), (0.0, 1.0), (x, y))[0]


def stacked(x, y):
    return 2.0 * lax.scan(lambda c, z: (c, product(*z)), 0, (x, y))[1]


def nested(x, y):
    """Gradients of layers, a stack per microbatch, added up over the microbatches."""

    def microbatch(total, z):
        layers = lax.scan(lambda c, w: (c, product(z[0] * w, z[1])), 0, jnp.arange(1.0, 4.0))[1]
        return total + layers, None

    return lax.scan(microbatch, jnp.zeros((3, 4, 8)), (x, y))[0]


def updated(x, y):
    """A stack of sums, each written where it was read."""

    def body(total, z):
        i, x, y = z
        mine = lax.dynamic_index_in_dim(total, i % 2, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, mine + product(x, y), i % 2, 0), None

    return lax.scan(body, jnp.zeros((2, 4, 8)), (jnp.arange(ROUNDS), x, y))[0]


def used_inside(x, y):
    """A running sum of which every iteration needs the value."""
    return lax.scan(lambda c, z: (c + product(*z), jnp.tanh(c)), jnp.zeros((4, 8)), (x, y))


def not_linear(x, y):
    return lax.scan(lambda c, z: (jnp.tanh(c + product(*z)), None), jnp.zeros((4, 8)), (x, y))[0]


FUNCTIONS = [
    scan_from_zeros,
    scan_from_the_first,
    python_sum,
    while_from_zeros,
    losses,
    stacked,
    nested,
    updated,
]


def arrays() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(ROUNDS, 8, n)), jnp.float32) for n in (4, 8))  # pyright: ignore[reportReturnType]


def boundaries(problem: Any) -> list[int]:
    """The nodes of loop carries and stacks that may be partial sums."""
    return [
        k
        for k, node in enumerate(problem.nodes)
        if not node.is_hub
        and problem.program.operations[node.of].op_class == "boundary"
        and problem.program.operations[node.of].linear
    ]


@pytest.mark.parametrize("fn", mostly_long(FUNCTIONS, *FUNCTIONS[:3]), ids=lambda fn: fn.__name__)
def test_partial_sums_through_loops_change_nothing(fn: Callable[..., Any]) -> None:
    args, topology, rng = arrays(), cpu_topology("2x2x2"), np.random.default_rng(0)
    traced = traced_on(topology, fn, *args)
    problem = problem_of(traced, topology)
    found = []
    for node in boundaries(problem):
        partial = [s for s, state in enumerate(problem.nodes[node].states) if any(state.carried)]
        for state in rng.choice(partial, tries(8)):
            found += [] if (choice := random_choice(problem, rng, {node: int(state)})) is None else [choice]
    assert found or fn is python_sum
    unsharded = jax.jit(fn)(*args)
    for planned in run_planned(traced, topology, found[: tries(12)], *args) if found else ():
        assert_equal(planned, unsharded)


@pytest.mark.parametrize("fn", [not_linear, used_inside], ids=lambda fn: fn.__name__)
def test_what_every_iteration_needs_is_not_carried_as_a_partial_sum(fn: Callable[..., Any]) -> None:
    topology = cpu_topology("2x2")
    assert not boundaries(problem_of(traced_on(topology, fn, *arrays()), topology))


@pytest.mark.parametrize(
    "fn", [scan_from_zeros, scan_from_the_first, python_sum, while_from_zeros, nested], ids=lambda fn: fn.__name__
)
def test_one_reduction_for_all_iterations(fn: Callable[..., Any]) -> None:
    batch = P(None, ("x", "y"))
    args = arrays()
    plan = autoshard.search(fn, *args, topology="cpu:2x4", pins={"x": batch, "y": batch})
    reductions = [each for each in plan.estimate.collectives if each.kind in ("all-reduce", "reduce-scatter")]
    assert sum(each.count for each in reductions) == 1, reductions
    audit = autoshard.audit(plan, fn, *args, target="host")
    assert audit.ok, audit.differences
    assert_equal(jax.tree.leaves(plan.jit(fn)(*args)), jax.jit(fn)(*args))


def test_without_room_for_the_partial_sums_every_iteration_reduces() -> None:
    """Whole gradients are eight times a chip's shares. A single one lies where its product is; shares save room for three."""
    x = jax.ShapeDtypeStruct((ROUNDS, 8192, 1024), jnp.float32)
    batch = P(None, ("x", "y"))

    def fn(x: Any, y: Any) -> Any:
        added = lambda c, x, y: (c[0] + product(x, y), c[1] + product(y, x), c[2] + product(x, x))  # noqa: E731
        zeros = jnp.zeros((1024, 1024))
        return lax.scan(lambda c, z: (added(c, *z), None), (zeros, zeros, zeros), (x, y))[0]

    roomy, tight = (
        autoshard.search(fn, x, x, topology="v5e:2x4", pins={"x": batch, "y": batch}, memory_bytes=each * 2**20)
        for each in (64, 55)
    )
    counts = [max(each.count for each in plan.estimate.collectives) for plan in (roomy, tight)]
    assert counts[0] == 1 and counts[1] == ROUNDS and roomy.estimate.seconds < tight.estimate.seconds
