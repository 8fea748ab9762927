"""Convolutions cost as much as the matmuls that they amount to, and windows as much as their elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard
from costmodels.machine.topology import parse_topology

BATCH, SIDE, WIDTH = 16, 32, 256
IMAGE = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, WIDTH), jnp.bfloat16)


def seconds(fn: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> float:
    plan = autoshard.search(fn, *args, topology="v5e:1x1")
    assert not [warning for warning in plan.warnings if "checker" in warning]
    return plan.estimate.seconds


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("taps", [1, 3])
def test_a_convolution_takes_no_longer_than_a_matmul_of_its_patches(taps: int) -> None:
    rows, columns = BATCH * SIDE * SIDE, WIDTH * taps * taps
    kernel = jax.ShapeDtypeStruct((taps, taps, WIDTH, WIDTH), jnp.bfloat16)
    patches, matrix = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, columns), (columns, WIDTH)))
    least = 2 * rows * columns * WIDTH / parse_topology("v5e:1x1").chip.flops_per_second["bfloat16"]
    assert least <= seconds(convolve, IMAGE, kernel) <= seconds(jnp.matmul, patches, matrix)


def test_a_window_reads_its_own_elements_only() -> None:
    """By the compiler's cycles on v5e the maximum takes less time than the copies of its operand and result."""

    def pooled(x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    assert seconds(pooled, IMAGE) <= 2 * seconds(lambda x: x * 2, IMAGE)
    assert seconds(lambda x: jax.grad(lambda x: pooled(x).sum())(x), IMAGE) <= 4 * seconds(lambda x: x * 2, IMAGE)
