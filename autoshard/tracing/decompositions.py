"""Equations that are planned as several, because only the parts can be split where the whole cannot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.rule import inexact

EXPANDED = ("argmax", "argmin")


def expanded(eqn: Any) -> Any:
    """The closed jaxpr of what an equation computes, from operations that may be split.

    The place of an extreme is the first at which the extreme stands: a maximum and a minimum over places, each with an
    all-reduce of as many numbers as the result has where the dimension is split. In one operation the dimension would have to
    be gathered: all logits for one token.
    """
    (aval,) = (v.aval for v in eqn.invars)
    (axis,), dtype = eqn.params["axes"], eqn.params["index_dtype"]
    reduced = lax.reduce_max if eqn.primitive.name == "argmax" else lax.reduce_min

    def places(x: Any) -> Any:
        others = [i for i in range(x.ndim) if i != axis]
        extreme = lax.broadcast_in_dim(reduced(x, axes=(axis,)), x.shape, others)
        here = lax.eq(x, extreme)
        if inexact(x):
            here = lax.bitwise_or(here, lax.ne(x, x))  # one that is no number comes before any extreme
        place = lax.broadcasted_iota(dtype, x.shape, axis)
        past = lax.full(x.shape, x.shape[axis], dtype)
        return lax.reduce_min(lax.select_n(here, past, place), axes=(axis,))

    return jax.make_jaxpr(places)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))


def expandable(eqn: Any) -> bool:
    """Whether an equation is one that `expanded` knows, of arrays that it can take apart."""
    if eqn.primitive.name not in EXPANDED or len(eqn.params["axes"]) != 1:
        return False
    (aval,), dtype = [v.aval for v in eqn.invars], eqn.params["index_dtype"]
    (axis,) = eqn.params["axes"]
    counts = jnp.issubdtype(dtype, np.integer) and aval.shape[axis] <= jnp.iinfo(dtype).max
    return bool(counts) and aval.dtype != bool and not jnp.issubdtype(aval.dtype, np.complexfloating)
