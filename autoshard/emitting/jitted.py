"""A planned function under `jax.jit`: with the plan's shardings, formats and donations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.core import Tracer
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from autoshard._util.tables import size, time
from autoshard.emitting import bind
from autoshard.emitting.formats import flat_formats, has_orders
from autoshard.emitting.sharding import shardings
from autoshard.errors import AutoshardError
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees

Formats = Literal["plan", "default"]
"""The orders of dimensions to compile with: the plan's, or those that the device gives arrays by default."""


def jitted(plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh, formats: Formats = "plan") -> Any:
    """`jax.jit` of a function as planned; where the plan has orders for these devices, a `Step`.

    **Raises:** `AutoshardError` for other `formats`.
    """
    if formats not in ("plan", "default"):
        raise AutoshardError(f"formats must be 'plan' or 'default', got {formats!r}.")
    plain = _jitted(plan, fn, mesh, *shardings(plan, mesh))
    if formats == "default" or not has_orders(plan, mesh):
        return plain
    ins, outs = flat_formats(plan, mesh)
    ordered = _jitted(plan, fn, mesh, plan.in_tree.rebuild(ins), plan.out_tree.rebuild(outs), ordered=True)
    return Step(plan, fn, ordered, plain, ins)


def _jitted(plan: PlanRecord, fn: Callable[..., Any], mesh: Mesh, ins: Any, outs: Any, ordered: bool = False) -> Any:
    placement = {}
    if plan.in_tree.unknown_class is None:
        placement["in_shardings"] = ins
    if plan.out_tree.unknown_class is None:
        placement["out_shardings"] = outs
    options = bind.compiler_options(plan, mesh) or None
    run = bind.bound(plan, fn, mesh, ordered)
    return jax.jit(run, donate_argnums=plan.donate_argnums, compiler_options=options, **placement)


class Step:
    """A jitted planned function whose arguments have formats; it has the methods of what `jax.jit` returns.

    Arrays in another order are relaid at each call, and a warning says so once. Transformed by JAX, it runs without formats,
    which JAX does not transform.
    """

    def __init__(
        self, plan: PlanRecord, fn: Callable[..., Any], ordered: Any, plain: Any, formats: Sequence[Format]
    ) -> None:
        self._plan, self._ordered, self._plain, self._formats = plan, ordered, plain, formats
        self._warned = False
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        try:
            return self._ordered(*args, **keywords)
        except (ValueError, NotImplementedError):
            # JAX says nothing more precise of an array in another order; nothing has run, and nothing is donated yet.
            flat, structure = jax.tree_util.tree_flatten((args, keywords))
            if any(isinstance(leaf, Tracer) for leaf in flat):
                return self._plain(*args, **keywords)
            positional = pytrees.positional(self.__wrapped__, args, keywords)  # pyright: ignore[reportAttributeAccessIssue]
            flat, structure = jax.tree_util.tree_flatten(positional)
            others = _in_another_order(flat, self._formats)
            if not others:
                raise
        self._warn(others)
        for at in others:
            flat[at] = jax.device_put(flat[at], self._formats[at], donate=self._plan.arguments[at].donated)
        return self._ordered(*jax.tree_util.tree_unflatten(structure, flat))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._ordered, name)

    def _warn(self, others: Sequence[int]) -> None:
        if self._warned:
            return
        self._warned = True
        arrays = [self._plan.arguments[at] for at in others]
        moved = sum(array.bytes_per_chip for array in arrays)
        seconds = 2 * moved / self._plan.topology.chip.reached_hbm_bytes_per_second
        which = arrays[0].path if len(arrays) == 1 else f"{arrays[0].path} and {len(arrays) - 1} more"
        warnings.warn(
            f"{which} lie in memory in another order than planned: each call relays {size(moved)} on each chip, which takes"
            f" {time(seconds)} at least. plan.place(...) does it once.",
            stacklevel=3,
        )


def _in_another_order(flat: Sequence[Any], formats: Sequence[Format]) -> list[int]:
    """The positions of the arrays that lie in the planned shards, and in another order."""
    if len(flat) != len(formats):
        return []
    return [at for at, (leaf, wanted) in enumerate(zip(flat, formats, strict=True)) if _differs(leaf, wanted)]


def _differs(leaf: Any, wanted: Format) -> bool:
    if not isinstance(leaf, jax.Array) or not isinstance(wanted.layout, Layout):
        return False
    found = leaf.format.layout  # pyright: ignore[reportAttributeAccessIssue]
    return isinstance(found, Layout) and found.major_to_minor != wanted.layout.major_to_minor
