"""A planned function of padded arrays under `jax.jit`, for callers with or without padding."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from autoshard._util.tables import time
from autoshard.emitting.bind import check_arguments
from autoshard.emitting.padding import padded, unpadded_like
from autoshard.planning.padding_costs import rewrite_seconds
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees


class PaddedStep:
    """A jitted planned function of padded arrays, which takes arrays with or without padding.

    Arrays without padding are padded at each call, with one warning; with `remembers`, arrays that are not donated are
    padded once, and the padded copy is kept as long as the array. Results come without padding, except those that replace a
    donated argument that was given with its padding, and those that another phase takes over with it.
    """

    def __init__(
        self,
        plan: PlanRecord,
        fn: Callable[..., Any],
        inner: Any,
        placements: Sequence[Any],
        remembers: bool = False,
    ) -> None:
        self._plan, self._inner, self._placements = plan, inner, placements
        self._warned, self._remembers = False, remembers
        self._copies: dict[tuple[int, int], tuple[weakref.ref[Any], Any]] = {}
        functools.update_wrapper(self, fn)

    def remembering(self) -> PaddedStep:
        """The same function, which pads each array once that is not donated."""
        fn = self.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
        return PaddedStep(self._plan, fn, self._inner, self._placements, True)

    def place_others(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments without padding in their places; the others are left for the call."""
        flat, structure = jax.tree_util.tree_flatten(args)
        rows = zip(flat, self._plan.arguments, self._placements, strict=True)
        return jax.tree_util.tree_unflatten(
            structure, [leaf if row.padding else jax.device_put(leaf, place) for leaf, row, place in rows]
        )

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        flat, structure = self._flat(args, keywords)
        given = [self._padded(leaf, at) for at, leaf in enumerate(flat)]
        results, out = jax.tree_util.tree_flatten(self._inner(*jax.tree_util.tree_unflatten(structure, given)))
        program = self._plan.require_program()
        return jax.tree_util.tree_unflatten(out, unpadded_like(self._plan, program, flat, results))

    def lower(self, *args: Any, **keywords: Any) -> Any:
        """`lower` of the jitted function, for the padded arrays."""
        flat, structure = self._flat(args, keywords)
        rows = zip(flat, self._plan.arguments, strict=True)
        given = [jax.ShapeDtypeStruct(row.shape, leaf.dtype) if row.padding else leaf for leaf, row in rows]
        return self._inner.lower(*jax.tree_util.tree_unflatten(structure, given))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def _flat(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[list[Any], Any]:
        fn = self.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
        flat, structure = jax.tree_util.tree_flatten(pytrees.positional(fn, args, keywords))
        check_arguments(self._plan, fn, jax.tree_util.tree_unflatten(structure, flat))
        return flat, structure

    def _padded(self, leaf: Any, at: int) -> Any:
        """An argument with its padding, in its place."""
        row = self._plan.arguments[at]
        if not row.padding or leaf.shape == row.shape:
            return leaf
        if isinstance(leaf, Tracer):
            return padded(leaf, row.padding)
        once = self._remembers and isinstance(leaf, jax.Array) and not row.donated
        if not once:
            self._warn(leaf, at)
            return jax.device_put(padded(leaf, row.padding), self._placements[at])
        key = id(leaf), at
        if key not in self._copies:
            forget = weakref.ref(leaf, lambda _: self._copies.pop(key, None))
            self._copies[key] = forget, jax.device_put(padded(leaf, row.padding), self._placements[at])
        return self._copies[key][1]

    def _warn(self, leaf: Any, at: int) -> None:
        """Says once what the padding of arguments costs at each call."""
        if self._warned:
            return
        self._warned = True
        row, rows = self._plan.arguments[at], self._plan.arguments
        each = [one for one in rows if one.padding and (one.donated or not self._remembers)] or [row]
        seconds = sum(rewrite_seconds(one, self._plan.topology) for one in each)
        every = "to pad all donated arguments" if self._remembers and row.donated else "to pad all arguments"
        warnings.warn(
            f"{row.path} has shape {list(leaf.shape)}, and is padded to {list(row.shape)} at each call; {every} takes at"
            f" least {time(seconds)}. plan.place(...) pads once.",
            stacklevel=5,
        )
