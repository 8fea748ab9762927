"""The orders of dimensions in memory that a plan gives its arrays, and the operations that read them so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from autoshard._util.tables import size, table
from autoshard.explaining.layer_groups import group_arrays
from autoshard.planning.records import ArrayPlan, PlanRecord
from search.answer.orders import Reader, is_same_order, readers
from search.formulation.layouts import local_shape
from search.formulation.tpu_tiles import default_order

_SOURCES = {
    "rule": "as most of what reads an argument wants it",
    "compiler": "as the compiler chooses (Layout.AUTO)",
    "given": "as given",
}


def order_text(plan: PlanRecord, array: ArrayPlan) -> str:
    """The dimensions from major to minor in memory, `0,2,1`; empty where that is the device's default."""
    sizes = local_shape(array.shape, array.layout, plan.topology.axis_sizes)
    if not array.order or is_same_order(array.order, _default_order(plan, array), sizes):
        return ""
    return ",".join(map(str, array.order))


def orders_section(plan: PlanRecord, width: int) -> Iterator[str]:
    """A table of the arrays that have another order than the device's default; layers alike are one row."""
    sources = {array.path: at for at, array in enumerate(plan.arguments)}
    rows = []
    for group, first, count in _other_orders(plan):
        many = f"{group.path} × {count}" if count > 1 else group.path
        rows.append((many, order_text(plan, first), _default_text(plan, first), *_readers(plan, first, sources)))
    if rows:
        source = _SOURCES.get(plan.emission.formats, plan.emission.formats)
        yield f"Orders in memory, major to minor: {source}"
        headers = ("path", "order", "by default", "read so by", "read otherwise, per chip")
        yield from (f"  {line}" for line in table(headers, rows, "/<<~>", width - 2))


def _other_orders(plan: PlanRecord) -> Iterator[tuple[ArrayPlan, ArrayPlan, int]]:
    """The arrays with another order than by default: their group, the first of it, and how many they are."""
    every = [array for array in (*plan.arguments, *plan.results) if order_text(plan, array)]
    for group, count in group_arrays(every):
        first = next(each for each in every if (each.shape, each.order) == (group.shape, group.order))
        yield group, first, count


def _default_text(plan: PlanRecord, array: ArrayPlan) -> str:
    return ",".join(map(str, _default_order(plan, array)))


def _default_order(plan: PlanRecord, array: ArrayPlan) -> tuple[int, ...]:
    """The order in which the plan's kind of chip stores an array by default."""
    sizes = local_shape(array.shape, array.layout, plan.topology.axis_sizes)
    if plan.topology.chip.kind != "tpu" or 0 in sizes:
        return tuple(range(len(sizes)))
    return default_order(sizes, array.bytes_per_chip / prod(sizes))


def _readers(plan: PlanRecord, array: ArrayPlan, sources: Mapping[str, int]) -> tuple[str, str]:
    """The operation that reads most of an argument in its order, and the bytes that others read of it in another one."""
    if plan.program is None or array.path not in sources:
        return "", ""
    source = plan.program.arguments[sources[array.path]]
    found = list(readers(plan.program, plan.choice, plan.topology, source))
    most = max((each for each in found if each.order == array.order), key=_bytes, default=None)
    others = sum(each.bytes for each in found if each.order not in (array.order, None))
    name = plan.program.operations[most.operation].name if most else ""
    return name, size(others) if others else ""


def _bytes(each: Reader) -> float:
    return each.bytes
