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
from autoshard.emitting.padded_step import PaddedStep
from autoshard.emitting.sharding import shardings
from autoshard.errors import AutoshardError
from autoshard.planning.carriage import WAYS, Carry
from autoshard.planning.records import PlanRecord, predecessors
from autoshard.tracing import pytrees

Formats = Literal["plan", "default"]
"""The orders of dimensions to compile with: the plan's, or the device's defaults."""


def jit_plan(
    plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh, formats: Formats = "plan", carry: Carry | None = None
) -> Any:
    """`jax.jit` of a function as planned, as a `Step`, or as a `PaddedStep` if the plan has padding.

    **Raises:** `AutoshardError` for other `formats` or ways to carry the plan, and for constraints before they are chosen.
    """
    if formats not in ("plan", "default"):
        raise AutoshardError(f"formats must be 'plan' or 'default', got {formats!r}.")
    carry = carry or default_way(plan)
    _check_way(plan, carry)
    with_orders = formats == "plan" and has_orders(plan, mesh)
    step = Step(plan, fn, mesh, with_orders, carry)
    if not plan.padding:
        return step
    places = flat_formats(plan, mesh)[0] if with_orders else jax.tree_util.tree_leaves(shardings(plan, mesh)[0])
    return PaddedStep(plan, fn, step, places)


def _check_way(plan: PlanRecord, carry: str) -> None:
    """Raises for other ways to carry a plan, for constraints before they are chosen, and for padding that only we add."""
    if carry not in WAYS:
        raise AutoshardError(f"carry must be 'manual', 'constraints' or 'specs', got {carry!r}.")
    if carry == "constraints" and plan.carriage is None:
        raise AutoshardError(
            f"carry='constraints' needs constraints, and none are chosen for {plan.name!r} yet: call"
            " plan = autoshard.carry(plan, fn, *args)."
        )
    refuse_padding(plan, carry)


def refuse_padding(plan: PlanRecord, way: str) -> None:
    """Raises for a plan with padding in any other way than the manual one: only our own program adds padding and masks it."""
    if way != "manual" and plan.padding:
        raise AutoshardError(
            f"carry must be 'manual' for {plan.name!r}, whose plan pads dimensions, got {way!r}. Search with padding=False"
            " (--no-padding) to carry a plan by specs or constraints."
        )


def default_way(plan: PlanRecord) -> Carry:
    """The way to carry a plan whose program is the fastest of those that were compiled; manual if none was."""
    return plan.carriage.fastest if plan.carriage else "manual"


def _jit_plan(
    plan: PlanRecord,
    fn: Callable[..., Any],
    mesh: Mesh,
    ins: Any,
    outs: Any,
    orders: Sequence[Order] = (),
    carry: Carry = "manual",
) -> Any:
    placement = {}
    if plan.in_tree.unknown_class is None:
        placement["in_shardings"] = ins
    if plan.out_tree.unknown_class is None:
        placement["out_shardings"] = outs
    options = bind.compiler_options(plan, mesh) or None
    if carry == "specs":
        run = bind.checked(plan, fn)
    else:
        constraints = plan.carriage.constraints if carry == "constraints" and plan.carriage else None
        run = bind.bind_plan(plan, fn, mesh, orders, keep_padding=True, constraints=constraints)
    return jax.jit(run, donate_argnums=plan.donate_argnums, compiler_options=options, **placement)


class Step:
    """A jitted planned function whose arguments have shardings and formats, with the methods of a `jax.jit` function.

    Arrays with other shardings are moved, and arrays in another order are accepted: the function is compiled for their
    orders. Both warn once of the cost. A donated array keeps its order in the result. Under JAX transformations the function
    runs without formats, which JAX cannot transform.
    """

    def __init__(
        self, plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh, ordered: bool, carry: Carry = "manual"
    ) -> None:
        self._plan, self._mesh, self._ordered, self._moves = plan, mesh, ordered, False
        self._carry: Carry = carry
        self._planned = flat_formats(plan, mesh)
        self._jitted = (
            self._jit_with({}, {}, fn) if ordered else _jit_plan(plan, fn, mesh, *shardings(plan, mesh), carry=carry)
        )
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
            traced = any(isinstance(leaf, Tracer) for leaf in flat)
            if traced and self._ordered:
                return jit_plan(self._plan, fn, self._mesh, "default", self._carry)(*args)
            misplaced = [] if traced else _misplaced(flat, self._planned[0])
            others = _find_reordered(flat, self._planned[0]) if self._ordered and not traced else {}
            if not others and not misplaced:
                raise
        args = self._moved(args, misplaced)
        return (self._step_for(others, fn, args) if others else self._jitted)(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted, name)

    def _moved(self, args: tuple[Any, ...], misplaced: Sequence[int]) -> tuple[Any, ...]:
        """The arguments with these in their planned shardings."""
        if not misplaced:
            return args
        if not self._moves:
            self._moves = True
            which = self._which(misplaced)
            warnings.warn(
                f"{which} has another sharding than the plan: each call moves it between chips. plan.place(...) moves it"
                " once.",
                stacklevel=3,
            )
        flat, structure = jax.tree_util.tree_flatten(args)
        wanted = [self._planned[0][at].sharding for at in misplaced]
        for at, leaf in zip(misplaced, jax.device_put([flat[at] for at in misplaced], wanted), strict=True):
            flat[at] = leaf
        return jax.tree_util.tree_unflatten(structure, flat)

    def _which(self, positions: Iterable[int]) -> str:
        """The arrays at these positions, by the path of the first."""
        paths = [self._plan.arguments[at].path for at in positions]
        return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"

    def _step_for(self, others: Mapping[int, Format], fn: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The function compiled for the arrays' present orders."""
        key = tuple(others.items())
        if key not in self._as_they_are:
            if not self._as_they_are:
                self._warn(others)
            donated = bind.trace_as_planned(self._plan, fn, args).program.donated
            over = predecessors(self._plan.arguments, self._plan.results, donated)
            results = {result: others[at] for result, at in over.items() if at in others}
            self._as_they_are[key] = self._jit_with(others, results, fn)
        return self._as_they_are[key]

    def _jit_with(self, arguments: Mapping[int, Format], results: Mapping[int, Format], fn: Callable[..., Any]) -> Any:
        """The function jitted with the planned formats, except these."""
        ins, outs = (
            [others.get(at, each) for at, each in enumerate(planned)]
            for others, planned in zip((arguments, results), self._planned, strict=True)
        )
        plan, orders = self._plan, [_order_of(each) for each in ins]
        return _jit_plan(
            plan, fn, self._mesh, plan.in_tree.rebuild(ins), plan.out_tree.rebuild(outs), orders, self._carry
        )

    def _warn(self, others: Iterable[int]) -> None:
        arrays = [self._plan.arguments[at] for at in others]
        moved = sum(array.bytes_per_chip for array in arrays)
        seconds = 2 * moved / self._plan.topology.chip.reached_hbm_bytes_per_second
        warnings.warn(
            f"The order of dimensions of {self._which(others)} in memory differs from the plan: each call may copy"
            f" {size(moved)} on each chip, which takes {time(seconds)}. plan.place(...) copies once.",
            stacklevel=4,
        )


def _order_of(found: Format) -> Order:
    """The order of dimensions of a format; empty for the device's default."""
    return tuple(found.layout.major_to_minor) if isinstance(found.layout, Layout) else ()


def _misplaced(flat: Sequence[Any], formats: Sequence[Format]) -> list[int]:
    """The positions of the arrays that JAX would have to move to their planned shardings."""
    if len(flat) != len(formats):
        return []
    return [
        at
        for at, (leaf, wanted) in enumerate(zip(flat, formats, strict=True))
        if isinstance(leaf, jax.Array)
        and leaf.committed
        and not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)  # pyright: ignore[reportArgumentType]
    ]


def _find_reordered(flat: Sequence[Any], formats: Sequence[Format]) -> dict[int, Format]:
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
