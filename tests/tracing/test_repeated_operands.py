"""Matmuls of repeated operands are planned as matmuls of the operands themselves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxpr_as_fun

from autoshard.tracing.equations import rebuild_jaxpr
from autoshard.tracing.rewrites.repeated_operands import group_repeats

GROUPS, KEPT = 3, 2


def rewritten(fn: Any, *args: Any) -> Any:
    """The jaxpr of a function without repeated operands, closed."""
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr = closed.jaxpr
    return closed.replace(jaxpr=rebuild_jaxpr(jaxpr, jaxpr.invars, jaxpr.outvars, group_repeats(jaxpr, jaxpr.eqns)))


def largest_operand(closed: Any) -> int:
    """The most elements that an operand of a matmul has."""
    return max(v.aval.size for eqn in closed.eqns if eqn.primitive.name == "dot_general" for v in eqn.invars)


def repeat(array: Any, axis: int, how: str) -> Any:
    """An array with a dimension repeated `GROUPS` times, element by element or as a whole."""
    if how == "repeat":
        return jnp.repeat(array, GROUPS, axis=axis)
    if how == "tile":
        return jnp.tile(array, [GROUPS if dim == axis else 1 for dim in range(array.ndim)])
    expanded = jnp.expand_dims(array, axis + 1)
    shape = (*array.shape[: axis + 1], GROUPS, *array.shape[axis + 1 :])
    return jnp.broadcast_to(expanded, shape).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


@settings(deadline=None)
@given(
    st.permutations("bthd"),
    st.permutations("bshd"),
    st.permutations("bhts"),
    st.sampled_from(("repeat", "tile", "broadcast")),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_product_of_a_repeated_operand_is_the_same(q_dims, k_dims, out, how, is_first, is_cast, seed):
    sizes = {"b": 2, "t": 5, "s": 7, "h": KEPT, "d": 4}
    rng = np.random.default_rng(seed)
    q = rng.normal(size=[sizes[c] * (GROUPS if c == "h" else 1) for c in q_dims]).astype(np.float32)
    k = rng.normal(size=[sizes[c] for c in k_dims]).astype(np.float32)
    terms = ["".join(q_dims), "".join(k_dims)]
    equation = ",".join(terms[::-1] if is_first else terms) + "->" + "".join(out)

    def product(q: Any, k: Any) -> Any:
        many = repeat(k, k_dims.index("h"), how)
        many = many.astype(jnp.bfloat16).astype(jnp.float32) if is_cast else many
        return jnp.einsum(equation, *((many, q) if is_first else (q, many)))

    found = rewritten(product, q, k)
    assert largest_operand(found) == max(q.size, k.size)
    np.testing.assert_allclose(jaxpr_as_fun(found)(q, k)[0], product(q, k), rtol=1e-5, atol=1e-5)


def test_an_operand_that_is_broadcast_along_a_batch_dimension_is_read_once():
    rows, matrix = jnp.ones((6, 5, 4)), jnp.arange(12.0).reshape(4, 3)

    def product(rows: Any, matrix: Any) -> Any:
        return jnp.einsum("btd,bdf->btf", rows, jnp.broadcast_to(matrix, (6, 4, 3)))

    found = rewritten(product, rows, matrix)
    assert largest_operand(found) == rows.size
    np.testing.assert_allclose(jaxpr_as_fun(found)(rows, matrix)[0], product(rows, matrix))


@pytest.mark.parametrize("equation", ["bthd,bshd->bts", "bthd,bsgd->bthsg"], ids=["summed", "free"])
def test_a_repeated_dimension_that_is_no_batch_dimension_is_left_alone(equation):
    q, k = jnp.ones((2, 5, 6, 4)), jnp.ones((2, 7, 2, 4))

    def product(q: Any, k: Any) -> Any:
        return jnp.einsum(equation, q, repeat(k, 2, "repeat"))

    before = jax.make_jaxpr(product)(q, k)
    assert [eqn.primitive for eqn in rewritten(product, q, k).eqns] == [eqn.primitive for eqn in before.eqns]


def test_a_repeated_array_that_something_else_reads_is_kept():
    def product(q: Any, k: Any) -> Any:
        many = repeat(k, 0, "repeat")
        return jnp.einsum("hd,hd->h", q, many), many

    q, k = jnp.ones((6, 4)), jnp.ones((2, 4))
    found = rewritten(product, q, k)
    assert found.out_avals[1].shape == (6, 4)
    assert jaxpr_as_fun(found)(q, k)[1].shape == (6, 4)
