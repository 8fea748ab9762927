"""Products with a row of zeros: the same numbers, and matmuls where the TPU compiler would have made sums."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import autoshard
from autoshard.emitting.tpu_workarounds.vector_matmul import ROW_OF_ZEROS, product
from tests.support.effort import examples

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


def equation(expression: str, left: Any, right: Any) -> Any:
    """The one product that an einsum is."""
    found = jax.make_jaxpr(lambda a, b: jnp.einsum(expression, a, b))(left, right)
    (eqn,) = (each for each in _equations(found.jaxpr) if each.primitive.name == "dot_general")
    return eqn


def _equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        yield from _equations(inner.jaxpr) if inner is not None else (eqn,)


@st.composite
def products(draw: st.DrawFn) -> tuple[Any, np.ndarray, np.ndarray]:
    """A product of random dimensions, many of one element, in random order, and its operands."""
    letters = {group: draw(st.sampled_from(["", group, group + group.upper()])) for group in "blrc"}
    sizes = {letter: draw(st.sampled_from([1, 1, 2, 3])) for group in letters.values() for letter in group}
    sides = [draw(st.permutations(letters["b"] + letters["c"] + letters[free])) for free in "lr"]
    shapes = [[sizes[c] for c in side] for side in sides]
    left, right = (np.arange(1, 1 + prod(shape), dtype=np.float32).reshape(shape) for shape in shapes)
    contracted, batch = ([tuple(map(side.index, letters[group])) for side in sides] for group in "cb")
    numbers = ((contracted[0], contracted[1]), (batch[0], batch[1]))
    return jax.make_jaxpr(lambda a, b: lax.dot_general(a, b, numbers))(left, right).jaxpr.eqns[0], left, right


@pytest.mark.long
@examples(75)
@given(products())
def test_a_row_of_zeros_changes_no_number(case: tuple[Any, np.ndarray, np.ndarray]) -> None:
    eqn, left, right = case
    found, right_ones = (
        product(eqn, jnp.asarray(left), jnp.asarray(right)),
        eqn.primitive.bind(left, right, **eqn.params),
    )
    assert found.shape == eqn.outvars[0].aval.shape
    np.testing.assert_allclose(np.asarray(found), np.asarray(right_ones), rtol=1e-6)


def padded(expression: str, left: tuple[int, ...], right: tuple[int, ...], dtype: Any = bf16) -> bool:
    eqn = equation(expression, S(left, dtype), S(right, dtype))
    return " pad[" in str(jax.make_jaxpr(lambda a, b: product(eqn, a, b))(S(left, dtype), S(right, dtype)))


def test_vectors_that_meet_matrices_get_a_row_of_zeros() -> None:
    assert padded("bqhd,bkhd->bhqk", (4, 1, 2, 8), (4, 16, 2, 8))
    assert padded("bhd,bkhd->bhk", (4, 2, 8), (4, 16, 2, 8))
    assert padded("bte,ef->btf", (1, 1, 8), (8, 16))
    assert padded("fe,e->f", (16, 8), (8,))
    assert not padded("bte,ef->btf", (2, 1, 8), (8, 16))
    assert not padded("be,be->b", (2, 8), (2, 8))
    assert not padded("bte,ef->btf", (1, 1, 8), (8, 16), jnp.int8)


def attention(q: Any, k: Any, v: Any) -> Any:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=f32)).astype(bf16)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def in_heads(x: Any, weights: Any) -> Any:
    return jnp.einsum("be,ehd->bhd", x, weights)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (attention, [(64, 1, 2, 128), (64, 2048, 2, 128), (64, 2048, 2, 128)]),
        (in_heads, [(1, 4096), (4096, 4, 256)]),
        (jnp.matmul, [(1, 4096), (4096, 4096)]),
    ],
)
def test_the_tpu_compiler_makes_matmuls_of_vectors(fn: Any, shapes: list[tuple[int, ...]]) -> None:
    args = [S(shape, bf16) for shape in shapes]
    plan = autoshard.search(fn, *args, topology="v5e:1x1")
    found = autoshard.audit(plan, fn, *args, target="tpu")
    assert found.ok, str(found)
    assert found.flops == pytest.approx(found.planned_flops)
    assert found.compute_seconds is not None
    assert found.compute_seconds < 1.2 * plan.estimate.seconds


@pytest.mark.parametrize(("fn", "shapes"), [(in_heads, [(1, 64), (64, 4, 32)]), (jnp.matmul, [(1, 64), (64, 64)])])
def test_rows_of_zeros_are_no_work_on_host_devices_either(fn: Any, shapes: list[tuple[int, ...]]) -> None:
    args = [S(shape, f32) for shape in shapes]
    plan = autoshard.search(fn, *args, topology="v5e:2x2")
    found = autoshard.audit(plan, fn, *args, target="host")
    assert found.ok and found.flops == found.planned_flops, str(found)


def test_programs_for_others_have_none() -> None:
    args = [S((1, 64), f32), S((64, 64), f32)]
    plan = autoshard.search(jnp.matmul, *args, topology="cpu:2x2")
    assert ROW_OF_ZEROS not in plan.jit(jnp.matmul).lower(*args).as_text(debug_info=True)
