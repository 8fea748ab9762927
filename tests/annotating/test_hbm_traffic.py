"""Arrays are read from HBM as often as compilers read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

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
    "a residual sum reads again after the matmul": (lambda x, w: x + jnp.tanh(x) @ w, (X, MATRIX), 2),
}


@pytest.mark.parametrize("name", READS)
def test_the_first_argument_is_read_once_a_pass(name: str) -> None:
    fn, args, expected = READS[name]
    program = annotate_traffic(trace(fn, *args)).program
    value = program.operations[program.arguments[0]].outputs[0].value
    read = [op for op in program.operations for k in op.traffic if isinstance(k, int) and op.inputs[k].value == value]
    assert len(read) == expected
