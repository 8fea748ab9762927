"""Groups of equal rows of an unrolled model: `params['layers'][*]['wq']` for the `wq` of all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import TypeVar

from autoshard._util.paths import shared_name, star_numbers
from autoshard.planning.records import ArrayPlan, OperationPlan, PlannedCollective

T = TypeVar("T")


_ROUNDED = 6
"""The significant digits in which equal costs agree."""


def group_operations(operations: Iterable[OperationPlan]) -> list[OperationPlan]:
    """The operations, with those of the same plan merged: their runs and times are summed."""

    def key(op: OperationPlan) -> Hashable:
        each = (_round(op.seconds / op.count), _round(op.collective_seconds / op.count))
        return (star_numbers(op.name), op.einsum, op.sizes, op.strategy, op.splits, each)

    return [
        replace(
            group[0],
            name=shared_name(op.name for op in group),
            count=sum(op.count for op in group),
            seconds=sum(op.seconds for op in group),
            collective_seconds=sum(op.collective_seconds for op in group),
        )
        for group in _group(operations, key)
    ]


def group_collectives(collectives: Iterable[PlannedCollective]) -> list[PlannedCollective]:
    """The collectives, with those of the same kind, axes, bytes and array name merged: their runs and times are summed."""
    return [
        replace(
            group[0],
            count=sum(each.count for each in group),
            seconds=sum(each.seconds for each in group),
            hidden_seconds=sum(each.hidden_seconds for each in group),
            where=shared_name(each.where for each in group),
        )
        for group in _group(
            collectives, lambda each: (each.kind, frozenset(each.axes), _round(each.bytes), star_numbers(each.where))
        )
    ]


def group_arrays(arrays: Iterable[ArrayPlan]) -> list[tuple[ArrayPlan, int]]:
    """Groups of arrays that differ only in their layer's number: one array with the sum of their bytes, and their number."""

    def kind(each: ArrayPlan) -> Hashable:
        return star_numbers(each.path), each.shape, each.dtype, each.layout, each.donated, each.order

    groups = _group(arrays, kind)
    return [
        (
            replace(
                group[0],
                path=shared_name(each.path for each in group),
                bytes_per_chip=sum(each.bytes_per_chip for each in group),
            ),
            len(group),
        )
        for group in groups
    ]


def type_of(array: ArrayPlan, count: int = 1) -> str:
    """`bfloat16[4096,128] × 32, donated`."""
    many = f" × {count}" if count > 1 else ""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]{many}{', donated' if array.donated else ''}"


def _group(found: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _round(number: float) -> str:
    return f"{number:.{_ROUNDED}g}"
