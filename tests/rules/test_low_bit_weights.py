"""Weights of 4 and 8 bits with scales per channel or group, dequantised where they are used."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import PartitionSpec as P

import autoshard
from tests.support.layout_strategies import assert_layouts_do_not_matter

GROUP = 4
TYPES = [jnp.int4, jnp.int8, jnp.float8_e4m3fn]


def per_channel(x: Array, w: Array, s: Array) -> Array:
    return x @ (w.astype(x.dtype) * s[None])


def per_channel_after(x: Array, w: Array, s: Array) -> Array:
    return (x @ w.astype(x.dtype)) * s


def per_group(x: Array, w: Array, s: Array) -> Array:
    groups = w.shape[0]
    return jnp.einsum("bgi,gif->bf", x.reshape(x.shape[0], groups, -1), w.astype(x.dtype) * s[:, None])


def per_group_of_rows(x: Array, w: Array, s: Array) -> Array:
    groups, columns = s.shape
    return x @ (w.astype(x.dtype).reshape(groups, -1, columns) * s[:, None]).reshape(w.shape)


def per_group_after(x: Array, w: Array, s: Array) -> Array:
    groups = w.shape[0]
    return (jnp.einsum("bgi,gif->bgf", x.reshape(x.shape[0], groups, -1), w.astype(x.dtype)) * s[None]).sum(1)


Case = tuple[Callable[..., Array], Callable[[int, int], tuple[tuple[int, ...], tuple[int, ...]]]]
CASES: dict[str, Case] = {
    "channel": (per_channel, lambda e, f: ((e, f), (f,))),
    "channel, after": (per_channel_after, lambda e, f: ((e, f), (f,))),
    "group": (per_group, lambda e, f: ((e // GROUP, GROUP, f), (e // GROUP, f))),
    "group of rows": (per_group_of_rows, lambda e, f: ((e, f), (e // GROUP, f))),
    "group, after": (per_group_after, lambda e, f: ((e // GROUP, GROUP, f), (e // GROUP, f))),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", TYPES, ids=lambda each: np.dtype(each).name)
@pytest.mark.parametrize("name", CASES)
def test_layouts_do_not_matter(name: str, dtype: type) -> None:
    fn, shapes = CASES[name]
    weights, scales = shapes(32, 16)
    random = np.random.default_rng(0)
    x, w, s = random.standard_normal((4, 32)), random.integers(-7, 8, weights), random.uniform(0.5, 2, scales)
    given = jnp.asarray(x, jnp.float32), jnp.asarray(w, dtype), jnp.asarray(s, jnp.float32)
    assert_layouts_do_not_matter(fn, *given, count=3)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda each: np.dtype(each).name)
@pytest.mark.parametrize("name", CASES)
def test_scales_are_split_with_their_weights(name: str, dtype: type) -> None:
    fn, shapes = CASES[name]
    weights, scales = shapes(1024, 4096)
    given = [
        jax.ShapeDtypeStruct(*each) for each in (((8, 1024), jnp.bfloat16), (weights, dtype), (scales, jnp.bfloat16))
    ]
    columns = P(*[None] * (len(weights) - 1), ("x", "y"))
    by_columns = autoshard.search(fn, *given, topology="v5e:2x4", pins={"w": columns})
    assert by_columns.in_specs[2] == P(*[None] * (len(scales) - 1), ("x", "y"))
    assert not by_columns.estimate.collectives
    moved = sum(op.bytes for op in by_columns.operations if op.primitive in ("mul", "dot_general"))
    if (
        "after" not in name
    ):  # weights and scales are read as they are stored, and the dequantised weights are not written
        stored = prod(weights) * (0.5 if dtype == jnp.int4 else 1) + 2 * prod(scales)
        assert moved == pytest.approx(stored / 8 + 2 * 8 * (1024 + 4096 / 8), rel=1e-9)
    if len(scales) > 1:
        by_rows = autoshard.search(fn, *given, topology="v5e:2x4", pins={"w": P("x")})
        assert by_rows.in_specs[2][0] == "x"
