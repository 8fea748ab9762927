"""Decompositions of equations into several that can be split where the whole cannot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.rule import inexact

EXPANDED = ("argmax", "argmin")


def expanded(eqn: Any) -> Any:
    """A closed jaxpr of the same function as an equation, from operations that may be split.

    An `argmax` is the first index at which the maximum stands: a maximum, and a minimum over indices. Where the dimension
    is split, each needs an all-reduce of the result's size. A single operation would have to gather the dimension, such as
    all logits for one token.
    """
    (aval,) = (v.aval for v in eqn.invars)
    (axis,), dtype = eqn.params["axes"], eqn.params["index_dtype"]
    reduced = lax.reduce_max if eqn.primitive.name == "argmax" else lax.reduce_min

    def places(x: Any) -> Any:
        others = [i for i in range(x.ndim) if i != axis]
        extreme = lax.broadcast_in_dim(reduced(x, axes=(axis,)), x.shape, others)
        here = lax.eq(x, extreme)
        if inexact(x):
            here = lax.bitwise_or(here, lax.ne(x, x))  # a NaN counts as the extreme
        place = lax.broadcasted_iota(dtype, x.shape, axis)
        past = lax.full(x.shape, x.shape[axis], dtype)
        return lax.reduce_min(lax.select_n(here, past, place), axes=(axis,))

    return jax.make_jaxpr(places)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))


def expandable(eqn: Any) -> bool:
    """Whether `expanded` supports an equation and the type of its operand."""
    if eqn.primitive.name not in EXPANDED or len(eqn.params["axes"]) != 1:
        return False
    (aval,), dtype = [v.aval for v in eqn.invars], eqn.params["index_dtype"]
    (axis,) = eqn.params["axes"]
    counts = jnp.issubdtype(dtype, np.integer) and aval.shape[axis] <= jnp.iinfo(dtype).max
    return bool(counts) and aval.dtype != bool and not jnp.issubdtype(aval.dtype, np.complexfloating)
