"""An argmax is planned as the parts that may be split, and is the same number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun

import autoshard
from autoshard.tracing.rewrites.decompositions import can_decompose, decompose
from tests.support.layout_strategies import assert_layouts_do_not_matter

WORDS = st.sampled_from((0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan))


@pytest.mark.parametrize("which", [lax.argmax, lax.argmin])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_place_is_that_of_the_whole(which: Any, axis: int) -> None:
    whole = lambda x: which(x, axis, jnp.int32)  # noqa: E731
    (eqn,) = jax.make_jaxpr(whole)(jnp.zeros((3, 4))).eqns
    assert can_decompose(eqn)
    taken_apart = jax.jit(lambda x: (jaxpr_as_fun(decompose(eqn))(x)[0], whole(x)))

    @given(st.lists(st.lists(WORDS, min_size=4, max_size=4), min_size=3, max_size=3))
    def law(rows: list[list[float]]) -> None:
        np.testing.assert_array_equal(*taken_apart(jnp.asarray(rows, jnp.float32)))

    law()


def test_layouts_do_not_matter() -> None:
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (8, 16)), jnp.float32)
    assert_layouts_do_not_matter(lambda x: (jnp.argmax(x * 2, 1), jnp.argmin(x.astype(jnp.int8), 0)), x, count=6)


@pytest.mark.parametrize("which", [jnp.argmax, jnp.argmin])
def test_booleans_are_split_as_numbers(which: Any) -> None:
    """As of the first token that ends a text; rows without one have index 0."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (8, 16)))
    assert_layouts_do_not_matter(lambda x: (which(x > 3, 1), which(x > 5, 0)), x, count=6)


def test_what_cannot_be_taken_apart_stays() -> None:
    for x, dtype in ((jnp.zeros((4, 300)), jnp.uint8), (jnp.zeros((4, 4), jnp.complex64), jnp.int32)):
        (eqn,) = jax.make_jaxpr(lambda x, dtype=dtype: lax.argmax(x, 1, dtype))(x).eqns
        assert not can_decompose(eqn)


def test_greedy_decoding_does_not_gather_its_logits() -> None:
    bf16 = jnp.bfloat16
    hidden, table = (jax.ShapeDtypeStruct(shape, bf16) for shape in ((64, 1024), (131072, 1024)))

    def next_token(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.argmax(hidden @ table.T, -1)

    plan = autoshard.search(next_token, hidden, table, topology="v5e:4x4")
    logits = 64 * 131072 * 2
    assert plan.proof.status == "OPTIMAL"
    assert all(each.bytes < logits / 100 for each in plan.estimate.collectives)
    assert len(plan.in_specs[1]) and plan.in_specs[1][0] is not None, "the vocabulary is split"
