"""Groups of equal rows of an unrolled model: `params['layers'][*]['wq']` for the `wq` of all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import TypeVar

from autoshard._util.paths import shared_name, unnumbered
from autoshard.planning.records import ArrayPlan, OperationPlan, PlannedCollective

T = TypeVar("T")


_ROUNDED = 6
"""The significant digits in which equal costs agree."""


def operations_alike(operations: Iterable[OperationPlan]) -> list[OperationPlan]:
    """The operations, with those of the same plan merged: their runs and times are summed."""

    def key(op: OperationPlan) -> Hashable:
        each = (_rounded(op.seconds / op.count), _rounded(op.collective_seconds / op.count))
        return (unnumbered(op.name), op.einsum, op.sizes, op.strategy, op.splits, each)

    return [
        replace(
            group[0],
            name=shared_name(op.name for op in group),
            count=sum(op.count for op in group),
            seconds=sum(op.seconds for op in group),
            collective_seconds=sum(op.collective_seconds for op in group),
        )
        for group in _grouped(operations, key)
    ]


def collectives_alike(collectives: Iterable[PlannedCollective]) -> list[PlannedCollective]:
    """The collectives, with those of the same kind, axes, bytes and array name merged: their runs and times are summed."""
    return [
        replace(
            group[0],
            count=sum(each.count for each in group),
            seconds=sum(each.seconds for each in group),
            where=shared_name(each.where for each in group),
        )
        for group in _grouped(
            collectives, lambda each: (each.kind, frozenset(each.axes), _rounded(each.bytes), unnumbered(each.where))
        )
    ]


def arrays_alike(arrays: Iterable[ArrayPlan]) -> list[tuple[ArrayPlan, int]]:
    """Arrays that differ in the number of their layer alone as one, with the sum of their bytes; and how many they are."""

    def kind(each: ArrayPlan) -> Hashable:
        return unnumbered(each.path), each.shape, each.dtype, each.layout, each.donated, each.order

    groups = _grouped(arrays, kind)
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


def _grouped(found: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _rounded(number: float) -> str:
    return f"{number:.{_ROUNDED}g}"
