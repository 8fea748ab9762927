"""Closed-over arrays of the parts of a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from autoshard.tracing.jaxprs import CALLS, INLINED, distinct_arrays, is_held, live_equations
from autoshard.tracing.shard_maps import global_form


def closed_over(jaxpr: Any) -> list[Any]:
    """The arrays that calls, loops and branches inside a jaxpr close over, at any depth."""
    found = []
    for eqn in live_equations(jaxpr):
        for inner, consts in _inner_jaxprs(eqn):
            found += [*(c for c in consts if is_held(c)), *closed_over(inner)]
    return distinct_arrays(found)


def first_equal(arrays: Sequence[Any]) -> list[int]:
    """Per array the position of the first with the same bytes, type and shape: compilers keep one of them.

    Layers that each make their own table, such as rotary positions, close over many equal arrays. Arrays of one repeated
    number are not merged: weights may be initialised so and differ later, when the plan is used.
    """
    firsts: dict[tuple, list[int]] = {}
    found = []
    for i, array in enumerate(arrays):
        alike = firsts.setdefault((jax.typeof(array).shape, jax.typeof(array).dtype), [])
        same = next((k for k in alike if _has_equal_bytes(arrays[k], array)), i)
        if same == i:
            alike.append(i)
        found.append(same)
    return found


def _has_equal_bytes(one: Any, other: Any) -> bool:
    """Whether two arrays hold the same bytes; keys and arrays that are not addressable here only equal themselves."""
    if one is other or not (_is_addressable(one) and _is_addressable(other)) or not one.size:
        return one is other
    with jax.ensure_compile_time_eval():
        first, second = (np.asarray(array.ravel()[:_BEGINNING]).tobytes() for array in (one, other))
    if first != second:
        return False
    numbers = np.asarray(one)
    return numbers.tobytes() == np.asarray(other).tobytes() and bool((numbers != numbers.flat[0]).any())


def _is_addressable(array: Any) -> bool:
    """Whether this process can read all of an array's elements."""
    if isinstance(array, Tracer) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return False
    return isinstance(array, np.ndarray) or getattr(array, "is_fully_addressable", False)


_BEGINNING = 1024
"""The number of elements that are compared first, so that few are fetched from devices."""


def _inner_jaxprs(eqn: Any) -> list[tuple[Any, Sequence[Any]]]:
    """The jaxprs that the tracer walks into at an equation, with the constants they close over."""
    name, params = eqn.primitive.name, eqn.params
    if name == "shard_map":
        inside = [global_form(eqn)]
    elif name in CALLS:
        inside = [next(params[key] for key in INLINED if key in params)]
    elif name == "while":
        inside = [params["cond_jaxpr"], params["body_jaxpr"]]
    else:
        inside = {"scan": [params.get("jaxpr")], "cond": params.get("branches", ())}.get(name, ())
    return [(each.jaxpr, each.consts) if isinstance(each, jex.ClosedJaxpr) else (each, ()) for each in inside]
