"""A planned function under `jax.jit`, with the plan's shardings, formats and donations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.core import Tracer
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from autoshard._util.tables import size, time
from autoshard.emitting import bind
from autoshard.emitting.formats import flat_formats, has_orders
from autoshard.emitting.memory_orders import Order
from autoshard.emitting.sharding import shardings
from autoshard.errors import AutoshardError
from autoshard.planning.records import PlanRecord, predecessors
from autoshard.tracing import pytrees

Formats = Literal["plan", "default"]
"""The orders of dimensions to compile with: the plan's, or the device's defaults."""


def jitted(plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh, formats: Formats = "plan") -> Any:
    """`jax.jit` of a function as planned; a `Step` if the plan has orders for these devices.

    **Raises:** `AutoshardError` for other `formats`.
    """
    if formats not in ("plan", "default"):
        raise AutoshardError(f"formats must be 'plan' or 'default', got {formats!r}.")
    if formats == "default" or not has_orders(plan, mesh):
        return _jitted(plan, fn, mesh, *shardings(plan, mesh))
    return Step(plan, fn, mesh)


def _jitted(
    plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh, ins: Any, outs: Any, orders: Sequence[Order] = ()
) -> Any:
    placement = {}
    if plan.in_tree.unknown_class is None:
        placement["in_shardings"] = ins
    if plan.out_tree.unknown_class is None:
        placement["out_shardings"] = outs
    options = bind.compiler_options(plan, mesh) or None
    run = bind.bound(plan, fn, mesh, orders)
    return jax.jit(run, donate_argnums=plan.donate_argnums, compiler_options=options, **placement)


class Step:
    """A jitted planned function whose arguments have formats, with the methods of a `jax.jit` function.

    Arrays in another order are accepted: the function is compiled for their orders, and warns once of the cost. A donated
    one keeps its order in the result. Under JAX transformations the function runs without formats, which JAX cannot
    transform.
    """

    def __init__(self, plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh) -> None:
        self._plan, self._mesh = plan, mesh
        self._planned = flat_formats(plan, mesh)
        self._jitted = self._compiled({}, {}, fn)
        self._as_they_are: dict[tuple[tuple[int, Format], ...], Any] = {}
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        try:
            return self._jitted(*args, **keywords)
        except (ValueError, NotImplementedError):
            # JAX has no more specific error for an array in another order. Nothing has run or been donated yet.
            fn = self.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
            args = pytrees.positional(fn, args, keywords)
            flat = jax.tree_util.tree_leaves(args)
            if any(isinstance(leaf, Tracer) for leaf in flat):
                return jitted(self._plan, fn, self._mesh, "default")(*args)
            others = _in_another_order(flat, self._planned[0])
            if not others:
                raise
        return self._for(others, fn, args)(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted, name)

    def _for(self, others: Mapping[int, Format], fn: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The function compiled for the arrays' present orders."""
        key = tuple(others.items())
        if key not in self._as_they_are:
            if not self._as_they_are:
                self._warn(others)
            donated = bind.traced_as(self._plan, fn, args).program.donated
            over = predecessors(self._plan.arguments, self._plan.results, donated)
            results = {result: others[at] for result, at in over.items() if at in others}
            self._as_they_are[key] = self._compiled(others, results, fn)
        return self._as_they_are[key]

    def _compiled(self, arguments: Mapping[int, Format], results: Mapping[int, Format], fn: Callable[..., Any]) -> Any:
        """The function jitted with the planned formats, except these."""
        ins, outs = (
            [others.get(at, each) for at, each in enumerate(planned)]
            for others, planned in zip((arguments, results), self._planned, strict=True)
        )
        plan, orders = self._plan, [_order_of(each) for each in ins]
        return _jitted(plan, fn, self._mesh, plan.in_tree.rebuild(ins), plan.out_tree.rebuild(outs), orders)

    def _warn(self, others: Iterable[int]) -> None:
        arrays = [self._plan.arguments[at] for at in others]
        moved = sum(array.bytes_per_chip for array in arrays)
        seconds = 2 * moved / self._plan.topology.chip.reached_hbm_bytes_per_second
        which = arrays[0].path if len(arrays) == 1 else f"{arrays[0].path} and {len(arrays) - 1} more"
        warnings.warn(
            f"The order of dimensions of {which} in memory differs from the plan: each call may copy {size(moved)} on each"
            f" chip, which takes {time(seconds)}. plan.place(...) copies once.",
            stacklevel=4,
        )


def _order_of(found: Format) -> Order:
    """The order of dimensions of a format; empty for the device's default."""
    return tuple(found.layout.major_to_minor) if isinstance(found.layout, Layout) else ()


def _in_another_order(flat: Sequence[Any], formats: Sequence[Format]) -> dict[int, Format]:
    """By position, the formats of the arrays whose order of dimensions differs from the plan."""
    if len(flat) != len(formats):
        return {}
    return {
        at: Format(leaf.format.layout, wanted.sharding)  # pyright: ignore[reportAttributeAccessIssue]
        for at, (leaf, wanted) in enumerate(zip(flat, formats, strict=True))
        if isinstance(leaf, jax.Array) and _differs(leaf.format.layout, wanted.layout)  # pyright: ignore
    }


def _differs(found: Any, wanted: Any) -> bool:
    both = isinstance(found, Layout) and isinstance(wanted, Layout)
    return both and found.major_to_minor != wanted.major_to_minor
