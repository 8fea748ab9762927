"""Layouts: the sharding of one array over the mesh.

A `Layout` gives, for each dimension, the ordered tuple of mesh axes that split it (major to minor, as in a
`PartitionSpec`), and the axes over which the array is still a partial sum. `Layout((("x",), ("y", "z")), ())` is
Pope et al.'s $E_x F_{yz}$.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

Axes = tuple[str, ...]


class Layout(NamedTuple):
    """The mesh axes that split each dimension, major to minor, and those over which the array is a partial sum."""

    dims: tuple[Axes, ...]
    partial: Axes = ()

    @property
    def axes(self) -> Axes:
        """The axes that split some dimension."""
        return tuple(axis for dim in self.dims for axis in dim)

    def __str__(self) -> str:
        dims = ",".join("".join(dim) or "-" for dim in self.dims)
        return f"[{dims}]" + (f"+partial-{''.join(self.partial)}" if self.partial else "")


def replicated_layout(rank: int) -> Layout:
    """The layout that splits nothing."""
    return Layout(((),) * rank)


def shards(layout: Layout, sizes: Mapping[str, int]) -> int:
    """The number of distinct shards of the array."""
    return prod(sizes[axis] for axis in layout.axes)


def local_shape(shape: Sequence[int], layout: Layout, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one chip's shard."""
    return tuple(n // prod(sizes[axis] for axis in dim) for n, dim in zip(shape, layout.dims, strict=True))


def divides(shape: Sequence[int], layout: Layout, sizes: Mapping[str, int]) -> bool:
    """Whether every dimension divides evenly. JAX silently drops a constraint that does not, so none is ever planned."""
    return all(n % prod(sizes[axis] for axis in dim) == 0 for n, dim in zip(shape, layout.dims, strict=True))


def assignments(axes: Sequence[str], bins: int, unordered: int) -> Iterator[tuple[tuple[Axes, ...], tuple[Axes, ...]]]:
    """Every way to give each axis to none or one of `bins` ordered tuples or one of `unordered` sets.

    Inserting each axis at every position of a tuple yields every order exactly once.
    """
    if not axes:
        yield ((),) * bins, ((),) * unordered
        return
    last = axes[-1]
    for ordered, sets in assignments(axes[:-1], bins, unordered):
        yield ordered, sets
        for i, chosen in enumerate(ordered):
            for at in range(len(chosen) + 1):
                yield (*ordered[:i], (*chosen[:at], last, *chosen[at:]), *ordered[i + 1 :]), sets
        for i, chosen in enumerate(sets):
            yield ordered, (*sets[:i], (*chosen, last), *sets[i + 1 :])


@lru_cache(maxsize=4096)
def layouts(shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...], partial: bool) -> tuple[Layout, ...]:
    """Every layout of an array of this shape, the replicated one first.

    **Arguments:**

    - `sizes`: the mesh axes with their sizes; axes of size 1 are left out of every layout.
    - `partial`: whether partial sums are among them.
    """
    table = dict(sizes)
    axes = [axis for axis, size in sizes if size > 1]
    found = (
        Layout(dims, tuple(sorted(sets[0])) if partial else ())
        for dims, sets in assignments(axes, len(shape), int(partial))
    )
    return tuple(layout for layout in found if divides(shape, layout, table))
