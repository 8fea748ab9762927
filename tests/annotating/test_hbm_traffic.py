"""Arrays are read from HBM as often as compilers read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard
from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.tracing.trace import trace

X = jax.ShapeDtypeStruct((64, 256), jnp.float32)
MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def normalised(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def updated(x: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, ...]:
    return x - first / (jnp.sqrt(second) + 1e-6), 0.9 * first + x, 0.9 * second + x * x


READS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "a square": (lambda x: x * x, (X,), 1),
    "an activation": (lambda x: jax.nn.gelu(x), (X,), 1),
    "updates of an optimizer": (updated, (X, X, X), 1),
    "a norm reads again after its sum": (normalised, (X,), 2),
    "an index reads again after its maximum": (lambda x: jnp.argmax(x, -1), (X,), 2),
    "a residual sum reads again after the matmul": (lambda x, w: x + jax.nn.softmax(x) @ w, (X, MATRIX), 3),
    "a sum reads it apart from a matmul": (lambda x, w: (w @ (2 * x).T, jnp.sum(x)), (X, MATRIX), 1),
    "a matmul reads what is work on its operand": (lambda x, w: x + jnp.tanh(x) @ w, (X, MATRIX), 1),
}


@pytest.mark.parametrize("name", READS)
def test_the_first_argument_is_read_once_a_pass(name: str) -> None:
    fn, args, expected = READS[name]
    program = annotate_traffic(trace(fn, *args)).program
    value = program.operations[program.arguments[0]].outputs[0].value
    read = [op for op in program.operations for k in op.traffic if isinstance(k, int) and op.inputs[k].value == value]
    assert len(read) == expected


def test_joined_arrays_are_read_and_written() -> None:
    """On v5e the compiler takes 450 µs to join two arrays of 32 MiB, which passes 67 Mi elements through the vector unit."""
    half = jax.ShapeDtypeStruct((8, 1024, 2048), jnp.bfloat16)
    plan = autoshard.search(lambda x, y: jnp.concatenate((x, y), 1), half, half, topology="v5e:1x1")
    assert 350e-6 < plan.estimate.seconds < 550e-6


def test_unequal_parts_cost_as_much_as_their_elements() -> None:
    def joined(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.concatenate((x, y), 0)

    first, last = jax.ShapeDtypeStruct((1, 4096), jnp.float32), jax.ShapeDtypeStruct((4095, 4096), jnp.float32)
    half = jax.ShapeDtypeStruct((2048, 4096), jnp.float32)
    seconds = [
        autoshard.search(joined, *args, topology="v5e:1x1").estimate.seconds for args in ((first, last), (half, half))
    ]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.01)
