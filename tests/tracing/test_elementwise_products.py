"""Matmuls that sum over nothing are planned as multiplications of elements."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun

import autoshard
from autoshard.tracing.rewrites.elementwise_products import is_elementwise_product, multiplication
from tests.support.layout_strategies import assert_layouts_do_not_matter

SIZES = dict(zip("abcxyz", (2, 3, 5, 4, 1, 1), strict=True))


@settings(deadline=None)
@given(
    st.permutations("abx"),
    st.permutations("abcyz"),
    st.sampled_from(((jnp.bfloat16, None), (jnp.bfloat16, jnp.float32), (jnp.float32, None), (jnp.int8, jnp.int32))),
    st.integers(0, 2**16),
)
def test_a_product_that_sums_over_nothing_multiplies_elements(left, right, types, seed):
    """`y` and `z` are summed on both sides, and have one element."""
    left, (dtype, made) = [*left, "y", "z"], types
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.integers(-9, 9, [SIZES[c] for c in dims]), dtype) for dims in (left, right)]
    summed = tuple(left.index(c) for c in "yz"), tuple(right.index(c) for c in "yz")
    batch = [c for c in left if c in right and c not in "yz"]
    shared = tuple(map(left.index, batch)), tuple(map(right.index, batch))

    def product(x, y):
        return lax.dot_general(x, y, (summed, shared), preferred_element_type=made)

    (eqn,) = jax.make_jaxpr(product)(*arrays).eqns
    assert is_elementwise_product(eqn)
    found = multiplication(eqn)
    assert all(each.primitive.name != "dot_general" for each in found.eqns)
    (result,), expected = jaxpr_as_fun(found)(*arrays), product(*arrays)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    ("shapes", "made"), [(((4, 3), (3, 4)), None), (((4, 3), (3, 1)), None)], ids=["matrix", "column"]
)
def test_a_product_that_sums_is_left_alone(shapes, made):
    (eqn,) = jax.make_jaxpr(lambda x, y: lax.dot(x, y, preferred_element_type=made))(*map(jnp.ones, shapes)).eqns
    assert not is_elementwise_product(eqn)


def test_gates_and_outer_products_cost_as_much_as_multiplications():
    gate, x, rows = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 512), (64, 512, 256), (4096,)))

    def by_einsum(gate, x, rows):
        return jnp.einsum("bt,btd->btd", gate, x), jnp.einsum("i,j->ij", rows, rows)

    def by_hand(gate, x, rows):
        return gate[..., None] * x, rows[:, None] * rows

    plans = [autoshard.search(fn, gate, x, rows, topology="v5e:2x4") for fn in (by_einsum, by_hand)]
    assert plans[0].estimate.seconds == plans[1].estimate.seconds


def test_layouts_do_not_matter():
    gate, x = jnp.arange(32.0).reshape(4, 8), jnp.arange(128.0).reshape(8, 4, 4)
    assert_layouts_do_not_matter(lambda g, x: jnp.einsum("ht,thd->htd", g, x), gate, x, count=6)
