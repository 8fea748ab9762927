"""Random numbers split: every layout draws exactly those of the unsharded program."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.rules.random import _counts
from tests.support.effort import examples
from tests.support.layout_strategies import assert_layouts_do_not_matter, mesh_shapes

DIMS = st.sampled_from((1, 2, 3, 4, 6, 8))


def numbers_of(impl: str, lead: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> Any:
    """A function that draws numbers with keys made from words, and the words."""
    words = jax.random.key_data(jax.random.split(jax.random.key(7, impl=impl), lead))

    def fn(words: jax.Array) -> jax.Array:
        draw = lambda key: jax.random.bits(key, shape, dtype)  # noqa: E731
        for _ in lead:
            draw = jax.vmap(draw)
        return draw(jax.random.wrap_key_data(words, impl=impl))

    return fn, words


@examples(12)
@given(
    mesh_shapes(),
    st.lists(DIMS, max_size=2).map(tuple),
    st.lists(DIMS, max_size=3).map(tuple),
    st.sampled_from(("uint8", "uint16", "uint32")),
)
def test_layouts_do_not_change_random_numbers(shape, lead, dims, dtype) -> None:
    fn, words = numbers_of("threefry2x32", lead, dims, dtype)
    assert_layouts_do_not_matter(fn, words, shape=shape, count=3)


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda key: jax.random.bernoulli(key, 0.9, (8, 16)), marks=pytest.mark.long),
        pytest.param(lambda key: jax.random.normal(key, (8, 16)), marks=pytest.mark.long),
        pytest.param(lambda key: jax.random.categorical(key, jnp.zeros((8, 16))), marks=pytest.mark.long),
        pytest.param(lambda key: jax.random.truncated_normal(key, -2, 2, (8, 16)), marks=pytest.mark.long),
        lambda key: jax.vmap(lambda k: jax.random.uniform(k, (16,)))(jax.random.split(key, 8)),
        lambda key: jax.lax.scan(lambda c, k: (c, jax.random.bits(k, (8, 8))), 0, jax.random.split(key, 3))[1],
    ],
    ids=["bernoulli", "normal", "categorical", "truncated_normal", "keys", "loop"],
)
def test_samplers_draw_the_same_under_any_layout(draw) -> None:
    assert_layouts_do_not_matter(lambda words: draw(jax.random.wrap_key_data(words)), jax.random.PRNGKey(3))


class Whole:
    """One chip's shard of an array: `starts` of its dimensions, given by factor, and their sizes."""

    order = ()

    def __init__(self, starts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        self.starts, self.sizes = starts, sizes

    def size(self, factor: int) -> int:
        return self.sizes[factor]

    def start(self, factor: int) -> Any:
        return jnp.int32(self.starts[factor])


LONG = st.sampled_from((1, 3, 1000, 2**16, 2**20, 2**30 + 5))


@pytest.mark.long
@examples(100)
@given(st.lists(st.tuples(LONG, st.integers(0, 2**31)), min_size=1, max_size=4))
def test_indices_have_64_bits(dims: list[tuple[int, int]]) -> None:
    shape = tuple(n for n, _ in dims)
    starts = tuple(start % n for n, start in dims)
    sizes = tuple(min(2, n - start) for n, start in zip(shape, starts, strict=True))
    numbered = tuple((i,) for i in range(len(shape)))
    high, low = _counts(numbered, shape, Whole(starts, sizes))  # pyright: ignore[reportArgumentType]
    found = np.broadcast_to(np.asarray(high), sizes).astype(object) << 32 | np.asarray(low).astype(object)
    want = [sum((s + i) * prod(shape[k + 1 :]) for k, (s, i) in enumerate(zip(starts, at, strict=True)))
            for at in np.ndindex(*sizes)]  # fmt: skip
    assert [int(n) for n in found.ravel()] == [n % 2**64 for n in want]


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_numbers_of_one_sequence_are_replicated(impl: str) -> None:
    fn, words = numbers_of(impl, (), (8, 4), "uint32")
    traced = assert_layouts_do_not_matter(fn, words)
    (op,) = (op for op in traced.program.operations if op.primitive == "random_bits")
    assert all(factor.kind == "whole" for factor in op.factors)


def test_without_partitionable_threefry_numbers_are_replicated() -> None:
    with jax.threefry_partitionable(False):
        fn, words = numbers_of("threefry2x32", (), (8, 4), "uint32")
        traced = assert_layouts_do_not_matter(fn, words)
    (op,) = (op for op in traced.program.operations if op.primitive == "random_bits")
    assert all(factor.kind == "whole" for factor in op.factors)
