"""A traced function of pytrees, with the facts about its arguments that a plan keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.errors import AutoshardError
from autoshard.tracing.arguments import abstract
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
) -> TracedFunction:
    """Traces a function with arguments of these shapes and types.

    **Raises:** `TraceError`, `UnsupportedPrimitiveError`; `AutoshardError` for a donated position out of range.
    """
    flat, donated = abstract(fn, args), _positions(donate_argnums, len(args))
    avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type) for leaf in flat]
    nested = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tuple(args)), avals)
    traced = trace(fn, *nested, donate_argnums=donated, name=name, strict=strict)
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
