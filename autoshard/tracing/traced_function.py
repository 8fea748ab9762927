"""A traced function of pytrees, with the facts about its arguments that a plan keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.errors import AutoshardError, TraceError
from autoshard.tracing import pytrees
from autoshard.tracing.blocks import Traced
from autoshard.tracing.pytrees import Nesting, nesting_of
from autoshard.tracing.trace import trace


@dataclass(frozen=True)
class TracedFunction:
    """A traced function and its call.

    **Attributes:**

    - `in_tree`, `out_tree`: the structures of the arguments and of the results.
    - `donate_argnums`: the donated positions, in order.
    - `weak`: per flat argument, whether it is a Python scalar.
    - `flat`: shapes and types of the flat arguments that it was traced with.
    """

    traced: Traced
    in_tree: Nesting
    out_tree: Nesting
    donate_argnums: tuple[int, ...]
    weak: tuple[bool, ...]
    flat: tuple[Any, ...]


def trace_function(
    fn: Callable[..., Any],
    args: Sequence[Any],
    donate_argnums: int | Sequence[int] = (),
    name: str = "",
    strict: bool = False,
    chains: bool = False,
) -> TracedFunction:
    """Traces a function with arguments of these shapes and types; `chains` is as for `trace`.

    **Raises:** `TraceError`, `UnsupportedPrimitiveError`; `AutoshardError` for a donated position out of range.
    """
    flat, donated = abstract(fn, args), _positions(donate_argnums, len(args))
    avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type) for leaf in flat]
    nested = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tuple(args)), avals)
    traced = trace(fn, *nested, donate_argnums=donated, name=name, strict=strict, chains=chains)
    results = jax.tree_util.tree_unflatten(traced.out_tree, [0] * traced.out_tree.num_leaves)
    weak = tuple(leaf.weak_type for leaf in flat)
    return TracedFunction(traced, nesting_of(tuple(args)), nesting_of(results), donated, weak, tuple(avals))


def _positions(donate_argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The positions of donated arguments, in order; negative ones count from the end."""
    given = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    if any(not -count <= at < count for at in given):
        raise AutoshardError(
            f"donate_argnums={donate_argnums} is out of range for {count} arguments (expected 0 to {count - 1})."
        )
    return tuple(sorted({at % count for at in given}))


def abstract(fn: Callable[..., Any], args: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """The shapes and types of the flat arguments.

    **Raises:** `TraceError` for an argument that is not an array.
    """
    leaves = jax.tree_util.tree_leaves(tuple(args))
    found = [_aval(leaf) for leaf in leaves]
    if None in found:
        at = found.index(None)
        path, leaf = pytrees.argument_paths(fn, args)[at], leaves[at]
        head = re.match(r"\w*", path)[0]  # pyright: ignore[reportOptionalSubscript]
        raise TraceError(
            f"{path} must be an array, got {leaf!r} ({type(leaf).__name__}); declare it static (static_argnames='{head}') in"
            " the decorator, bind it beforehand with functools.partial, or register its class as a pytree."
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
