"""What goes round a loop: what stays on the chip is what the TPU compiler keeps there, and shares the room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import autoshard
from autoshard.auditing.hlo_costs import compiled_costs
from autoshard.emitting import targets
from autoshard.sweep.lower_bounds import lower_bound
from costmodels.machine import chip, parse_topology
from costmodels.operations import price
from costmodels.program import Program
from costmodels.program.on_chip import sharers
from search import Limits, search
from tests.support.effort import examples
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


class Case(NamedTuple):
    """A function with its arguments, whether what it carries stays on the chip, and the arguments that are donated."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    stays: bool
    donated: tuple[int, ...] = ()


def normed(x: Any) -> Any:
    wide = x.astype(f32)
    return (wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def layer(x: Any, w: Any) -> Any:
    up, down = w
    return x + jnp.tanh(normed(x) @ up) @ down


def layers(x: Any, weights: Any) -> Any:
    return lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]


def unrolled(x: Any, weights: Any) -> Any:
    for w in zip(*weights, strict=True):
        x = layer(x, w)
    return x


def plain_layers(x: Any, weights: Any) -> Any:
    """No norm, no cast: products read what goes round as it is."""
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, weights)[0]


def layers_every_round(x: Any, weights: Any) -> Any:
    """A loop in a loop."""
    return lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, layers(c[1], weights)), (0, x))[1]


def saved(x: Any, weights: Any) -> Any:
    """What enters each round is stacked as well, as training does."""
    return lax.scan(lambda x, w: (layer(x, w), x), x, weights)


def sums(start: Any, batches: Any) -> Any:
    """A sum of products, as of gradients; `start` says how it begins."""
    return lax.scan(lambda g, x: (g + (x.T @ x).astype(f32), None), start, batches)[0]


def steps(weights: Any, batches: Any) -> Any:
    """Weights that every round changes."""

    def step(w: Any, x: Any) -> Any:
        return w - 0.1 * (x.T @ (x @ w.astype(bf16))).astype(f32), None

    return lax.scan(step, weights, batches)[0]


def carried_weights(weights: Any, x: Any) -> Any:
    """Weights that go round as they are."""
    return lax.fori_loop(0, 8, lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, weights))[0]


STREAM, STACK = S((1024, 2048), bf16), (S((8, 2048, 2048), bf16),) * 2
BATCHES, SQUARE = S((8, 256, 1024), bf16), S((1024, 1024), f32)
EACH = ([S((2048, 2048), bf16)] * 4,) * 2
CASES = {
    "a residual": Case(layers, (STREAM, STACK), True),
    "a residual that is not cast": Case(plain_layers, (STREAM, STACK), True),
    "a residual without a loop": Case(unrolled, (STREAM, EACH), True),
    "a residual of loops in loops": Case(layers_every_round, (STREAM, STACK), True),
    "a donated residual": Case(layers, (STREAM, STACK), False, (0,)),
    "a sum": Case(sums, (SQUARE, BATCHES), True),
    "a donated sum": Case(sums, (SQUARE, BATCHES), False, (0,)),
    "weights that change": Case(steps, (SQUARE, BATCHES), True),
    "donated weights that change": Case(steps, (SQUARE, BATCHES), False, (0,)),
    "weights that go round": Case(carried_weights, (S((2048, 2048), bf16), S((256, 2048), bf16)), False),
}


@pytest.mark.long
@pytest.mark.tpu
@pytest.mark.parametrize("name", CASES)
def test_bytes_through_hbm_are_the_compiled_ones(name: str) -> None:
    """But for the first argument, which is brought in and out once if it stays on the chip meanwhile."""
    case = CASES[name]
    plan = autoshard.search(case.fn, *case.args, topology="v5e:1x1", donate_argnums=case.donated)
    devices = targets.tpu_devices(plan.topology.name, plan.topology.shape, plan.topology.chip.name)
    mesh = targets.mesh_of(devices, plan.topology.axis_sizes)
    found = compiled_costs(plan.jit(case.fn, mesh=mesh).lower(*case.args).compile().as_text()).hbm_bytes
    once = 2 * case.args[0].size * case.args[0].dtype.itemsize if case.stays else 0
    ours = sum(op.bytes for op in plan.operations)
    assert 0.88 * ours <= found <= 1.06 * (ours + once)


def moved(program: Program, kept: float) -> float:
    """Bytes of a step on one v5e that keeps arrays of so many bytes: what the formulas say, which the checker agrees with."""
    v5e = replace(chip("v5e"), on_chip_bytes=kept)
    costed = [op for op in program.operations if op.flops_per_point or op.traffic]
    costs = [price(program, op, np.ones((1, len(op.factors))), v5e) for op in costed]
    runs = [program.multiplicity(op.region) for op in costed]
    checked = search(program, replace(parse_topology("v5e:1"), chip=v5e), Limits()).check
    assert checked.memory_seconds == pytest.approx(
        sum(n * cost.memory_seconds[0] for n, cost in zip(runs, costs, strict=True))
    )
    return sum(n * cost.bytes[0] for n, cost in zip(runs, costs, strict=True))


def totals(rounds: int, sides: list[int]) -> Program:
    """Running sums of squares of these sides, all in one loop: each round reads one square of each, and adds it."""

    def fn(start: Any, added: Any) -> Any:
        return lax.scan(lambda c, x: ([a + b for a, b in zip(c, x, strict=True)], None), start, added)[0]

    return trace(fn, [S((n, n), f32) for n in sides], [S((rounds, n, n), f32) for n in sides]).program


@examples(25)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from((8, 16)), st.floats(0, 4096))
def test_what_goes_round_a_loop_shares_the_room(rounds: int, count: int, side: int, kept: float) -> None:
    each = 4 * side * side
    stays = count * each <= kept
    assert moved(totals(rounds, [side] * count), kept) == rounds * count * (each if stays else 3 * each)


def test_a_counter_takes_no_room() -> None:
    def fn(x: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] * 2.0 + c[1]), (0, x))[1]

    program = trace(fn, S((16, 16), f32)).program
    assert moved(program, 1024) < 1024 < moved(program, 1023)


def attended(x: Any, cache: Any) -> Any:
    """A cache that is updated in place."""

    def body(c: Any, _: Any) -> Any:
        x, cache = c
        cache = lax.dynamic_update_slice(cache, jnp.tanh(x)[None], (0, 0))
        return (x + (cache @ x) @ cache, cache), None

    return lax.scan(body, (x, cache), None, length=4)[0]


def turned(x: Any, y: Any) -> Any:
    """Two arrays that change places: no round makes them anew."""
    return lax.fori_loop(0, 4, lambda _, c: (c[1], c[0]), (x, y))[0] + x


@pytest.mark.parametrize(
    ("fn", "shapes", "stay"),
    [
        (attended, ((16,), (64, 16)), {(16,)}),
        (turned, ((8, 8), (8, 8)), set()),
        (carried_weights, ((8, 8), (4, 8)), {(4, 8)}),
        (saved, ((4, 8), ((3, 8, 8), (3, 8, 8))), {(4, 8)}),
        (layers_every_round, ((4, 8), ((3, 8, 8), (3, 8, 8))), {(4, 8)}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_no_round_makes_by_arithmetic_does_not_stay(fn: Any, shapes: Any, stay: set[tuple[int, ...]]) -> None:
    args = jax.tree_util.tree_map(lambda shape: S(shape, f32), shapes, is_leaf=lambda leaf: isinstance(leaf[0], int))
    program = trace(fn, *args).program
    carries = [op for op in program.operations if op.primitive == "loop_carry" and op.factors]
    inner = {use.value: program.values[use.value].shape for op in carries for use in op.outputs[:1]}
    assert {shape for value, shape in inner.items() if sharers(program, value)} == stay


def test_no_bound_counts_what_may_stay_beside_many_others() -> None:
    program, v5e = totals(2, [256] + [2] * 12), parse_topology("v5e:2x2")
    chip = replace(v5e.chip, vector_elements_per_second=0.0, vector_overhead_seconds=0.0)  # HBM alone
    kept, read = (lower_bound(program, replace(v5e, chip=replace(chip, on_chip_bytes=each))) for each in (1.0, 0.0))
    assert kept.seconds == pytest.approx(read.seconds / 3, rel=0.01)
