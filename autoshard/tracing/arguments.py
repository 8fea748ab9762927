"""Shapes and types of the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from autoshard.errors import TraceError
from autoshard.tracing import pytrees


def abstract(fn: Callable[..., Any], args: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """The shapes and types of the flat arguments.

    **Raises:** `TraceError` for an argument that is not an array.
    """
    leaves = jax.tree_util.tree_leaves(tuple(args))
    found = [_aval(leaf) for leaf in leaves]
    if None in found:
        at = found.index(None)
        path, leaf = pytrees.argument_paths(fn, args)[at], leaves[at]
        raise TraceError(
            f"{path} must be an array, got {leaf!r} ({type(leaf).__name__}); bind it beforehand with functools.partial."
        )
    return found


def _aval(leaf: Any) -> Any:
    """The shape and type of one leaf as JAX reads it; `None` if JAX does not accept it."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        weak = getattr(leaf, "weak_type", False)  # key arrays lack the attribute
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)
    try:
        return jax.eval_shape(lambda array: array, leaf)
    except TypeError:
        return None
