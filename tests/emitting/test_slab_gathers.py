"""Look-ups of slabs by one index: the same values as `jax.numpy`, in and out of bounds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from autoshard.emitting.tpu_workarounds.slab_gathers import look_up
from tests.support.effort import examples

SLAB = (8, 128)


def rewritten(operand: Any, indices: Any, eqn: Any) -> Any:
    return look_up(eqn.primitive, operand, indices, dict(eqn.params))


@st.composite
def gathers(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """A gather of slabs behind batch, indexed and whole dimensions in random order, with its operands."""
    roles = draw(st.permutations(draw(st.sampled_from(["i", "ii", "bi", "bii", "wi", "wbi", "bwi", "wwbi"]))))
    sizes = [draw(st.integers(1, 3)) for _ in roles]
    rows = draw(st.integers(1, 4))
    batch = [n for n, role in zip(sizes, roles, strict=True) if role == "b"]
    indexed = [i for i, role in enumerate(roles) if role == "i"]
    operand = np.random.default_rng(0).normal(size=(*sizes, *SLAB)).astype(np.float32)
    indices = np.array(
        draw(st.lists(st.integers(-2, 3), min_size=(n := int(np.prod([*batch, rows, len(indexed)]))), max_size=n)),
        np.int32,
    ).reshape(*batch, rows, len(indexed))
    whole = [i for i, role in enumerate(roles) if role == "w"]
    places = sorted(draw(st.permutations(range(len(whole) + len(batch) + 1)))[: len(whole)])
    rank = len(whole) + len(batch) + 1 + len(SLAB)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(*places, *range(rank - len(SLAB), rank)),
        collapsed_slice_dims=tuple(indexed),
        start_index_map=tuple(indexed),
        operand_batching_dims=tuple(i for i, role in enumerate(roles) if role == "b"),
        start_indices_batching_dims=tuple(range(len(batch))),
    )
    window = tuple(n if role == "w" else 1 for n, role in zip(sizes, roles, strict=True)) + SLAB
    mode = draw(st.sampled_from(["clip", "fill"]))

    def gather(operand: Any, indices: Any) -> Any:
        return lax.gather(operand, indices, numbers, window, mode=mode)

    return gather, operand, indices


@pytest.mark.long
@given(gathers())
@examples(60)
def test_one_index_finds_the_same_slabs(drawn: tuple[Any, Any, Any]) -> None:
    gather, operand, indices = drawn
    (eqn,) = (each for each in jax.make_jaxpr(gather)(operand, indices).jaxpr.eqns if each.primitive.name == "gather")
    np.testing.assert_array_equal(rewritten(operand, indices, eqn), gather(operand, indices))


def test_indices_of_a_byte_find_slabs_among_more() -> None:
    numbers = lax.GatherDimensionNumbers((0, 2, 3), (1,), (1,))
    operand = np.random.default_rng(0).normal(size=(2, 300, *SLAB)).astype(np.float32)
    indices = np.array([[7], [255]], np.uint8)

    def gather(operand: Any, indices: Any) -> Any:
        return lax.gather(operand, indices, numbers, (2, 1, *SLAB), mode="promise_in_bounds")

    (eqn,) = jax.make_jaxpr(gather)(operand, indices).jaxpr.eqns
    np.testing.assert_array_equal(rewritten(operand, jnp.asarray(indices), eqn), operand[:, [7, 255]])


def reshapes_before_gathers(fn: Any, *args: Any) -> bool:
    """Whether the look-up of a function's gather goes by one index."""
    (eqn,) = (each for each in jax.make_jaxpr(fn)(*args).jaxpr.eqns if each.primitive.name == "gather")
    operand, indices = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
    found = jax.make_jaxpr(lambda a, b: rewritten(a, b, eqn))(operand, indices).jaxpr.eqns
    return any(each.primitive.name == "reshape" and each.invars[0].aval.shape == operand.shape for each in found)


def test_only_slabs_behind_several_dimensions_are_found_by_one_index() -> None:
    at = jax.ShapeDtypeStruct((2,), jnp.int32)
    stack = jax.ShapeDtypeStruct((4, 3, *SLAB), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((3, *SLAB), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((4, 3, 256), jnp.bfloat16)

    def second(x: Any, i: Any) -> Any:
        numbers = lax.GatherDimensionNumbers((0, *range(2, x.ndim)), (1,), (1,))
        return lax.gather(x, i[:, None], numbers, (x.shape[0], 1, *x.shape[2:]), mode="promise_in_bounds")

    def first(x: Any, i: Any) -> Any:
        numbers = lax.GatherDimensionNumbers(tuple(range(1, x.ndim)), (0,), (0,))
        return lax.gather(x, i[:, None], numbers, (1, *x.shape[1:]), mode="promise_in_bounds")

    assert reshapes_before_gathers(second, stack, at)
    assert not reshapes_before_gathers(first, table, at)
    assert not reshapes_before_gathers(second, rows, at)
