"""Single collectives between layouts, and the graph of layouts that they span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import permutations
from math import prod
from typing import NamedTuple

import numpy as np

from costmodels.machine.topology import Topology
from search.formulation.axis_renaming import Groups, images
from search.formulation.layouts import Axes, Layout, layouts, local_shape, shards
from search.formulation.strategies import Sizes

Places = Mapping[str, tuple[int, int]]
"""Axis to a dimension, and the number of shards along it that one step on the axis advances."""


class CollectiveStep(NamedTuple):
    """One collective (or a local slice) between two layouts.

    `source_dim` is the dimension that loses `axes` (all-gather, all-to-all), `target_dim` the one that gains them
    (reduce-scatter, all-to-all, slice); -1 where there is none.
    """

    kind: str
    axes: Axes
    source: Layout
    target: Layout
    source_dim: int = -1
    target_dim: int = -1

    def payload(self, array_bytes: float, sizes: Mapping[str, int]) -> float:
        """Bytes by the collectives' convention: the gathered result of an all-gather, the local operand otherwise."""
        return array_bytes / shards(self.payload_layout, sizes)

    @property
    def payload_layout(self) -> Layout:
        """The layout of which the payload is one chip's shard."""
        return self.target if self.kind in ("all-gather", "slice") else self.source


def steps_from(layout: Layout, sizes: Mapping[str, int]) -> Iterator[CollectiveStep]:
    """Every single step that leaves a layout; the caller checks divisibility."""
    yield from _gathers(layout)
    yield from _exchanges(layout)
    yield from _reductions(layout)
    yield from _slices(layout, sizes)


def _with(layout: Layout, changes: Mapping[int, Axes], partial: Axes | None = None) -> Layout:
    dims = tuple(changes.get(i, dim) for i, dim in enumerate(layout.dims))
    return Layout(dims, layout.partial if partial is None else partial)


def _gathers(layout: Layout) -> Iterator[CollectiveStep]:
    for i, dim in enumerate(layout.dims):
        for keep in range(len(dim)):
            yield CollectiveStep("all-gather", dim[keep:], layout, _with(layout, {i: dim[:keep]}), source_dim=i)


def _exchanges(layout: Layout) -> Iterator[CollectiveStep]:
    for i, dim in enumerate(layout.dims):
        for keep in range(len(dim)):
            for j, other in enumerate(layout.dims):
                if i != j:
                    target = _with(layout, {i: dim[:keep], j: (*other, *dim[keep:])})
                    yield CollectiveStep("all-to-all", dim[keep:], layout, target, source_dim=i, target_dim=j)


def _reductions(layout: Layout) -> Iterator[CollectiveStep]:
    for count in range(1, len(layout.partial) + 1):
        for chosen in permutations(layout.partial, count):
            rest = tuple(axis for axis in layout.partial if axis not in chosen)
            if chosen == tuple(sorted(chosen)):
                yield CollectiveStep("all-reduce", chosen, layout, _with(layout, {}, rest))
            for i, dim in enumerate(layout.dims):
                target = _with(layout, {i: (*dim, *chosen)}, rest)
                yield CollectiveStep("reduce-scatter", chosen, layout, target, target_dim=i)


def _slices(layout: Layout, sizes: Mapping[str, int]) -> Iterator[CollectiveStep]:
    for axis, size in sizes.items():
        if size > 1 and axis not in layout.axes and axis not in layout.partial:
            for i, dim in enumerate(layout.dims):
                yield CollectiveStep("slice", (axis,), layout, _with(layout, {i: (*dim, axis)}), target_dim=i)


WHOLE_SLICE_GATHER_CHIPS = 64
"""The chip count from which an all-gather over all axes of a slice is compiled to something else.

Measured ahead of time with libtpu 0.0.42 and 0.0.50 (v4 4x4x4 and 4x4x8, v5e 4x4 to 8x16): over all axes of a slice at
once, a reduce-scatter compiles to an all-reduce and a slice. From 64 chips on, an all-gather compiles to an all-reduce
of zero-padded arrays with twice the bytes. Over fewer axes, in any order, both compile to themselves.
"""


SCATTER_ROWS, SCATTER_LANES, SCATTER_LANE_BYTES = 8, 128, 512
"""The least shard that a reduce-scatter must leave on a chip, in the two minor dimensions (without those of size 1).

The least is 8 rows, and a multiple of 512 bytes of lanes if it scatters these. Measured as above, 8 KiB to 64 MiB in
bfloat16 and float32: with less, or with one dimension only, it compiles to an all-reduce and a slice. Behind a minor
dimension of less than 128 lanes the compiler may well use the scattered dimension as lanes, and the same holds for it.

Two more cases are measured and planned all the same. Over two axes of two chips each (v4 2x2x2), of 8 MiB or more,
rows are scattered with padding and a few of them (72 KiB of 16 MiB) then moved to their owners. The same may happen to
a dimension that is neither the first nor one of the two minor ones (12 KiB of 8 MiB). Two serial scatters, or blocks
that are copied into their order before, would be exact and take up to twice as long. Audits list the excess bytes.
"""


def emittable(step: CollectiveStep, shape: Sequence[int], itemsize: float, topology: Topology) -> bool:
    """Whether the compiler keeps a step as it is; a step that it would rewrite into something else is never planned."""
    if step.kind not in ("all-gather", "reduce-scatter") or topology.chip.kind != "tpu":
        return True
    split = [axis for axis, size in topology.axis_sizes.items() if size > 1]
    over_all = len(split) > 1 and set(step.axes) == set(split)
    if step.kind == "all-gather":
        return not (over_all and topology.size >= WHOLE_SLICE_GATHER_CHIPS)
    return not over_all and _tiles(step, shape, itemsize, topology)


def _tiles(step: CollectiveStep, shape: Sequence[int], itemsize: float, topology: Topology) -> bool:
    local = local_shape(shape, step.target, topology.axis_sizes)
    kept = [i for i, n in enumerate(local) if n > 1 or i == step.target_dim]
    if len(kept) < 2 or local[kept[-2]] < SCATTER_ROWS:
        return False
    as_lanes = step.target_dim == kept[-1] or local[kept[-1]] < SCATTER_LANES
    return not as_lanes or local[step.target_dim] * itemsize % SCATTER_LANE_BYTES == 0


class StepGraph(NamedTuple):
    """Layouts of a shape and the steps between them; arrays that divide in the same way share them.

    `fraction` is a step's payload over the array's bytes; `partial` has a bit for each axis that a layout is partial
    over; `images` are the layouts with axes of equal cost renamed (`[renamings, layouts]`).
    """

    layouts: tuple[Layout, ...]
    index: Mapping[Layout, int]
    steps: tuple[CollectiveStep, ...]
    source: np.ndarray
    target: np.ndarray
    fraction: np.ndarray
    partial: np.ndarray
    images: np.ndarray


@lru_cache(maxsize=512)
def step_graph(divisors: tuple[int, ...], sizes: Sizes, partial: bool, alike: Groups) -> StepGraph:
    table, names = dict(sizes), [axis for axis, _ in sizes]
    found = layouts(divisors, sizes, partial)
    index = {layout: i for i, layout in enumerate(found)}
    steps = [step for layout in found for step in steps_from(layout, table) if step.target in index]
    steps += _permutes(found, table)
    steps.sort(key=lambda step: index[step.target])
    return StepGraph(
        found,
        index,
        tuple(steps),
        np.array([index[step.source] for step in steps], dtype=np.intp),
        np.array([index[step.target] for step in steps], dtype=np.intp),
        _fractions(steps, found, table),
        np.array([sum(1 << names.index(axis) for axis in layout.partial) for layout in found], dtype=np.int64),
        images(index, alike),
    )


def _permutes(found: tuple[Layout, ...], sizes: Mapping[str, int]) -> list[CollectiveStep]:
    """Exchanges of whole shards between chips: two layouts with the same number of shards in every dimension."""
    alike: dict[tuple, list[tuple[Layout, Places]]] = {}
    for layout in found:
        counts = tuple(prod(sizes[axis] for axis in dim) for dim in layout.dims)
        if prod(counts) > 1:
            alike.setdefault((counts, layout.partial), []).append((layout, _places(layout, sizes)))
    pairs = ((a, b) for group in alike.values() for a in group for b in group if a is not b)
    return [CollectiveStep("collective-permute", _moved(at, to), a, b) for (a, at), (b, to) in pairs]


def permuted_axes(a: Layout, b: Layout, sizes: Mapping[str, int]) -> Axes:
    """The axes whose coordinates a permutation between two layouts changes.

    The coordinates of a dimension's axes, major to minor, form a shard's number along it. An axis that has the same
    place in that number in both layouts separates shards that keep its coordinate.
    """
    return _moved(_places(a, sizes), _places(b, sizes))


def _moved(before: Places, after: Places) -> Axes:
    return tuple(sorted(axis for axis in {*before, *after} if before.get(axis) != after.get(axis)))


def _places(layout: Layout, sizes: Mapping[str, int]) -> Places:
    """Axis to the dimension that it splits, and the number of shards that one step along it advances."""
    return {
        axis: (i, prod(sizes[minor] for minor in dim[k + 1 :]))
        for i, dim in enumerate(layout.dims)
        for k, axis in enumerate(dim)
    }


def _fractions(steps: Sequence[CollectiveStep], found: Sequence[Layout], sizes: Mapping[str, int]) -> np.ndarray:
    """Per step the payload as a part of the array."""
    parts = {layout: 1.0 / shards(layout, sizes) for layout in found}
    return np.array([parts[step.payload_layout] for step in steps])
