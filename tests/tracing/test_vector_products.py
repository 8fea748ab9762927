"""Products that the vector unit computes are planned as multiplications and sums of elements."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun

import autoshard
from autoshard.tracing.rewrites.vector_products import elementwise_form, is_vector_product
from tests.support.layout_strategies import assert_layouts_do_not_matter

SIZES = dict(zip("abcxyuv", (2, 3, 5, 4, 6, 1, 1), strict=True))
TYPES = ((jnp.bfloat16, None), (jnp.bfloat16, jnp.float32), (jnp.float32, None), (jnp.int8, jnp.int32))


def dimensions(left: list[str], right: list[str], summed: str) -> Any:
    """The dimension numbers of a product over the `summed` dimensions, where all others that both operands have are batches."""
    batch = [c for c in left if c in right and c not in summed]
    return tuple((tuple(map(left.index, dims)), tuple(map(right.index, dims))) for dims in (summed, batch))


@settings(deadline=None)
@given(
    st.sampled_from((("abxu", "abcuv", "u"), ("abxuv", "abcuv", "uv"), ("abx", "abx", "ab"), ("abxyv", "baxyu", "by"))),
    st.sampled_from(TYPES),
    st.randoms(use_true_random=False),
)
def test_a_product_that_is_no_matmul_multiplies_elements(terms, types, random):
    """Of the summed dimensions `u` and `v` have one element; the last two products are of vectors."""
    left, right, summed = list(terms[0]), list(terms[1]), terms[2]
    random.shuffle(left)
    random.shuffle(right)
    dtype, made = types
    rng = np.random.default_rng(random.randrange(2**16))
    arrays = [jnp.asarray(rng.integers(-9, 9, [SIZES[c] for c in dims]), dtype) for dims in (left, right)]

    def product(x, y):
        return lax.dot_general(x, y, dimensions(left, right, summed), preferred_element_type=made)

    (eqn,) = jax.make_jaxpr(product)(*arrays).eqns
    assert is_vector_product(eqn)
    found = elementwise_form(eqn)
    assert all(each.primitive.name != "dot_general" for each in found.eqns)
    (result,), expected = jaxpr_as_fun(found)(*arrays), product(*arrays)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("terms", ["ab,bc->ac", "ab,b->a", "axb,ab->ax"])
def test_a_matmul_and_a_product_with_a_vector_are_left_alone(terms):
    shapes = ([SIZES[c] for c in dims] for dims in terms.split("->")[0].split(","))
    (eqn,) = jax.make_jaxpr(lambda x, y: jnp.einsum(terms, x, y))(*map(jnp.ones, shapes)).eqns
    assert not is_vector_product(eqn)


@pytest.mark.parametrize(
    ("terms", "by_hand", "shapes"),
    [
        ("bt,btd->btd", lambda gate, x: gate[..., None] * x, ((64, 512), (64, 512, 256))),
        ("i,j->ij", lambda left, right: left[:, None] * right, ((4096,), (4096,))),
        ("btd,btd->bt", lambda x, y: (x * y).sum(-1), ((64, 512, 256), (64, 512, 256))),
    ],
    ids=["gates", "outer product", "inner products"],
)
def test_such_a_product_costs_as_much_as_by_hand(terms, by_hand, shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    by_einsum = autoshard.search(lambda x, y: jnp.einsum(terms, x, y), *args, topology="v5e:2x4")
    other = autoshard.search(by_hand, *args, topology="v5e:2x4")
    assert by_einsum.estimate.seconds == other.estimate.seconds


def test_layouts_do_not_matter():
    gate, x = jnp.arange(32.0).reshape(4, 8), jnp.arange(128.0).reshape(8, 4, 4)

    def both(gate, x):
        return jnp.einsum("ht,thd->htd", gate, x), jnp.einsum("thd,dth->d", x, x.transpose(2, 0, 1))

    assert_layouts_do_not_matter(both, gate, x, count=6)
