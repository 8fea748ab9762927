"""What an unrolled model has many of, as one: `params['layers'][*]['wq']` for the `wq` of all layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import TypeVar

from autoshard.planning.records import ArrayPlan, OperationPlan, PlannedCollective

T = TypeVar("T")

_NUMBER = re.compile(r"(?<=[\[_'\"/])\d+(?=[\]_'\"/])")
"""A number that stands alone in a path, as a list's index or a layer's does, and not that of `w3` or of a line."""

_ROUNDED = 6
"""Significant digits within which two costs are the same."""


def unnumbered(name: str) -> str:
    """A name with a star for each number that may tell layers apart: `[3]`, `['3']`, `['layer_3']`, `block_3/`."""
    return _NUMBER.sub("*", name)


def shared_name(names: Iterable[str]) -> str:
    """The one name of things whose names are alike but for numbers: stars where they differ.

        shared_name(["h_0/mlp_1/", "h_1/mlp_1/"])  # "h_*/mlp_1/"

    **Arguments:**

    - `names`: at least one; with the same `unnumbered`.
    """
    different = list(dict.fromkeys(names))
    numbers = zip(*map(_NUMBER.findall, different), strict=True)
    shown = ("*" if len(set(each)) > 1 else each[0] for each in numbers)
    return _NUMBER.sub(lambda _: next(shown), different[0])


def operations_alike(operations: Iterable[OperationPlan]) -> list[OperationPlan]:
    """Operations that are planned alike as one, with the sums of their runs and times."""

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
    """Collectives of the same kind, axes and bytes for arrays alike as one, with the sums of their runs and times."""
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
    """Arrays of the same shape, type and layout at places alike as one, with the sum of their bytes; and how many they are."""
    groups = _grouped(arrays, lambda each: (unnumbered(each.path), each.shape, each.dtype, each.layout, each.donated))
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
