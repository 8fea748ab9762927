"""Operations that are planned as the parts that may be split: an argmax, a linear solve, a product of scaled blocks."""

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


def test_a_linear_solve_is_the_function_that_solves() -> None:
    """Right-hand sides and batches of `jnp.linalg.solve` are split; so is a solver of one's own."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(np.eye(4) * 4 + rng.normal(size=(8, 4, 4)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(8, 4, 8)), jnp.float32)
    assert autoshard.census(jnp.linalg.solve, a, b).conservative == ()
    assert_layouts_do_not_matter(jnp.linalg.solve, a, b, count=2)

    def halved(c: jax.Array, x: jax.Array) -> jax.Array:
        return lax.custom_linear_solve(lambda y: c * y, x, lambda _, y: y / c)

    assert_layouts_do_not_matter(halved, b[0] + 9, b[1], count=2)


SCALED = getattr(lax, "scaled_dot", None)


@pytest.mark.skipif(SCALED is None, reason="this JAX has no scaled_dot")
def test_a_product_of_scaled_blocks_is_split_like_any_other() -> None:
    """Bit for bit the one of one chip where the contracted dimension stays whole."""
    rng = np.random.default_rng(0)
    numbers = (((2,), (2,)), ((0,), (0,)))
    a, b = (jnp.asarray(rng.normal(size=(4, 8, 64)), jnp.float8_e4m3fn) for _ in range(2))
    scales = [jnp.asarray(2.0 ** rng.integers(-2, 3, (4, 8, 2)), jnp.float8_e8m0fnu) for _ in range(2)]

    def product(a: Any, b: Any, s: Any, t: Any) -> Any:
        assert SCALED is not None
        return SCALED(a, b, lhs_scale=s, rhs_scale=t, dimension_numbers=numbers, preferred_element_type=jnp.float32)

    (eqn,) = jax.make_jaxpr(product)(a, b, *scales).eqns
    np.testing.assert_array_equal(jaxpr_as_fun(decompose(eqn))(a, b, *scales)[0], product(a, b, *scales))
    assert autoshard.census(product, a, b, *scales).conservative == ()
    assert_layouts_do_not_matter(product, a, b, *scales, count=2)


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
