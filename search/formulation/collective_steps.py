"""Single collectives between layouts, and the graph of layouts that they span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress, permutations, product
from math import lcm, prod
from operator import itemgetter
from typing import NamedTuple, overload

import numpy as np

from costmodels.machine.topology import Topology
from search.formulation.axis_renaming import Groups, images
from search.formulation.layouts import Axes, Layout, divides, layouts, local_shape, shards
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
        return self.target if self.pays_target else self.source

    @property
    def pays_target(self) -> bool:
        """Whether the payload is a shard of the target."""
        return self.kind in ("all-gather", "slice")


def steps_from(layout: Layout, sizes: Mapping[str, int]) -> Iterator[CollectiveStep]:
    """Every single step that leaves a layout; the caller checks divisibility."""
    yield from _moves(layout)
    yield from _reductions(layout)
    yield from _slices(layout, sizes)


def _with_dim(dims: tuple[Axes, ...], i: int, axes: Axes) -> tuple[Axes, ...]:
    return (*dims[:i], axes, *dims[i + 1 :])


def _moves(layout: Layout) -> Iterator[CollectiveStep]:
    """The minor axes of a dimension are gathered, or exchanged for those of another one."""
    for i, dim in enumerate(layout.dims):
        for keep in range(len(dim)):
            axes, rest = dim[keep:], _with_dim(layout.dims, i, dim[:keep])
            yield CollectiveStep("all-gather", axes, layout, Layout(rest, layout.partial), i)
            for j, other in enumerate(rest):
                if i != j:
                    target = Layout(_with_dim(rest, j, (*other, *axes)), layout.partial)
                    yield CollectiveStep("all-to-all", axes, layout, target, i, j)


def _reductions(layout: Layout) -> Iterator[CollectiveStep]:
    for count in range(1, len(layout.partial) + 1):
        for chosen in permutations(layout.partial, count):
            rest = tuple(axis for axis in layout.partial if axis not in chosen)
            if chosen == tuple(sorted(chosen)):
                yield CollectiveStep("all-reduce", chosen, layout, Layout(layout.dims, rest))
            for i, dim in enumerate(layout.dims):
                target = Layout(_with_dim(layout.dims, i, (*dim, *chosen)), rest)
                yield CollectiveStep("reduce-scatter", chosen, layout, target, target_dim=i)


def _slices(layout: Layout, sizes: Mapping[str, int]) -> Iterator[CollectiveStep]:
    for axis, size in sizes.items():
        if size > 1 and axis not in layout.axes and axis not in layout.partial:
            for i, dim in enumerate(layout.dims):
                target = Layout(_with_dim(layout.dims, i, (*dim, axis)), layout.partial)
                yield CollectiveStep("slice", (axis,), layout, target, target_dim=i)


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


REWRITTEN_KINDS = ("all-gather", "reduce-scatter")
"""The collectives that a TPU's compiler may rewrite into something else."""


def emittable(step: CollectiveStep, shape: Sequence[int], itemsize: float, topology: Topology) -> bool:
    """Whether the compiler keeps a step as it is; a step that it would rewrite into something else is never planned."""
    if step.kind not in REWRITTEN_KINDS or topology.chip.kind != "tpu":
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


@dataclass(frozen=True)
class StepsOf(Sequence[CollectiveStep]):
    """Steps `number` of a larger graph, between layouts of this one; `place` gives the dimensions their places.

    They are made when they are looked at: with four mesh axes, five dimensions have 157,865, of which plans take a few.
    """

    steps: Sequence[CollectiveStep]
    number: np.ndarray
    layouts: tuple[Layout, ...]
    source: np.ndarray
    target: np.ndarray
    place: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.number)

    @overload
    def __getitem__(self, k: int) -> CollectiveStep: ...

    @overload
    def __getitem__(self, k: slice) -> tuple[CollectiveStep, ...]: ...

    def __getitem__(self, k: int | slice) -> CollectiveStep | tuple[CollectiveStep, ...]:
        if isinstance(k, slice):
            return tuple(map(self.__getitem__, range(len(self))[k]))
        step = self.steps[self.number[k]]
        ends = self.layouts[self.source[k]], self.layouts[self.target[k]]
        return CollectiveStep(step.kind, step.axes, *ends, self.place[step.source_dim], self.place[step.target_dim])


class StepGraph(NamedTuple):
    """Layouts of a shape and the steps between them; arrays that divide in the same way share them.

    `fraction` is a step's payload over the array's bytes; `partial` has a bit for each axis that a layout is partial
    over; `images` are the layouts with axes of equal cost renamed (`[renamings, layouts]`). `groups` are the kinds and
    axes of steps, `group` a step's place among them; `shards` tells apart layouts with different shapes of a shard, and
    `target_dim` is that of the steps.
    """

    layouts: tuple[Layout, ...]
    index: Mapping[Layout, int]
    steps: Sequence[CollectiveStep]
    source: np.ndarray
    target: np.ndarray
    fraction: np.ndarray
    partial: np.ndarray
    images: np.ndarray
    groups: tuple[tuple[str, Axes], ...]
    group: np.ndarray
    shards: np.ndarray
    target_dim: np.ndarray

    def among(self, kept: np.ndarray) -> StepGraph:
        """The graph of some layouts, selected by a mask that renaming axes does not change."""
        number, at = np.cumsum(kept) - 1, np.flatnonzero(kept)
        steps = np.flatnonzero(kept[self.source] & kept[self.target])
        found = tuple(self.layouts[i] for i in at.tolist())
        source, target = number[self.source[steps]], number[self.target[steps]]
        same = (*range(len(found[0].dims)), -1)
        return StepGraph(
            found,
            {layout: i for i, layout in enumerate(found)},
            StepsOf(self.steps, steps, found, source, target, same),
            source,
            target,
            self.fraction[steps],
            self.partial[at],
            number[self.images[:, at]],
            self.groups,
            self.group[steps],
            self.shards[at],
            self.target_dim[steps],
        )

    def members(self) -> Iterator[tuple[str, Axes, np.ndarray]]:
        """The steps by kind and axes, on which their seconds depend besides the bytes."""
        for at, (kind, axes) in enumerate(self.groups):
            members = np.flatnonzero(self.group == at)
            if len(members):
                yield kind, axes, members


@lru_cache(maxsize=512)
def step_graph(divisors: tuple[int, ...], sizes: Sizes, partial: bool, alike: Groups) -> StepGraph:
    """The graph of an array's layouts, a part of that of all arrays with as many dimensions that can be split.

    **Arguments:**

    - `divisors`: per dimension the greatest common divisor of its size and the number of chips.
    """
    most, table = lcm(*divisors), dict(sizes)
    dims = tuple(i for i, n in enumerate(divisors) if n > 1)
    whole = _spread(_whole_graph((most,) * len(dims), sizes, alike), dims, len(divisors))
    kept = [divides(divisors, layout, table) and (partial or not layout.partial) for layout in whole.layouts]
    return whole if all(kept) else whole.among(np.array(kept, dtype=bool))


def _spread(graph: StepGraph, dims: tuple[int, ...], rank: int) -> StepGraph:
    """The graph of arrays of a rank whose other dimensions are never split."""
    if len(dims) == rank:
        return graph
    inside = {dim: i for i, dim in enumerate(dims)}
    found = tuple(
        Layout(tuple(layout.dims[inside[dim]] if dim in inside else () for dim in range(rank)), layout.partial)
        for layout in graph.layouts
    )
    place = (*dims, -1)
    return graph._replace(
        layouts=found,
        index={layout: i for i, layout in enumerate(found)},
        steps=StepsOf(graph.steps, np.arange(len(graph.steps)), found, graph.source, graph.target, place),
        target_dim=np.array(place, dtype=np.intp)[graph.target_dim],
    )


@lru_cache(maxsize=128)
def _whole_graph(divisors: tuple[int, ...], sizes: Sizes, alike: Groups) -> StepGraph:
    """The graph of all layouts and partial sums of arrays with these divisors."""
    table, names = dict(sizes), [axis for axis, _ in sizes]
    found = layouts(divisors, sizes, True)
    index = {layout: i for i, layout in enumerate(found)}
    counts = [_counts(layout, table) for layout in found]
    ends = [
        (step, i, index[step.target])
        for i, layout in enumerate(found)
        for step in steps_from(layout, table)
        if step.target in index
    ]
    ends += _permutes(found, counts, table)
    ends.sort(key=itemgetter(2))
    steps = tuple(step for step, _, _ in ends)
    source, target = (np.array([end[side] for end in ends], dtype=np.intp) for side in (1, 2))
    groups: dict[tuple[str, Axes], int] = {}
    local: dict[tuple[int, ...], int] = {}
    part = np.array([1.0 / prod(count) for count in counts])
    gains = np.array([step.pays_target for step in steps], dtype=bool)
    return StepGraph(
        found,
        index,
        steps,
        source,
        target,
        part[np.where(gains, target, source)],
        np.array([sum(1 << names.index(axis) for axis in layout.partial) for layout in found], dtype=np.int64),
        images(index, alike),
        group=np.array([groups.setdefault((s.kind, tuple(sorted(s.axes))), len(groups)) for s in steps], dtype=np.intp),
        groups=tuple(groups),
        shards=np.array([local.setdefault(count, len(local)) for count in counts], dtype=np.intp),
        target_dim=np.array([step.target_dim for step in steps], dtype=np.intp),
    )


def rewritten_steps(graph: StepGraph, shape: Sequence[int], itemsize: float, topology: Topology) -> np.ndarray:
    """The steps of a graph that are not `emittable`: this depends on kind, axes, the shard and the scattered dimension."""
    found = [np.zeros(0, dtype=np.intp)]
    for kind, _, members in graph.members():
        if kind in REWRITTEN_KINDS:
            looks = graph.shards[graph.target[members]] * (len(shape) + 1) + graph.target_dim[members] + 1
            _, first, same = np.unique(looks, return_index=True, return_inverse=True)
            kept = [emittable(graph.steps[k], shape, itemsize, topology) for k in members[first].tolist()]
            found.append(members[~np.array(kept, dtype=bool)[same]])
    return np.concatenate(found)


def _counts(layout: Layout, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The number of shards along each dimension."""
    return tuple(prod(sizes[axis] for axis in dim) for dim in layout.dims)


def _permutes(
    found: Sequence[Layout], counts: Sequence[tuple[int, ...]], sizes: Mapping[str, int]
) -> list[tuple[CollectiveStep, int, int]]:
    """Exchanges of whole shards between chips: two layouts with the same number of shards in every dimension."""
    alike: dict[tuple, list[int]] = {}
    for i, layout in enumerate(found):
        if prod(counts[i]) > 1:
            alike.setdefault((counts[i], layout.partial), []).append(i)
    names, none = sorted(sizes), (-1, 0)
    places = [_places(layout, sizes) for layout in found]
    number: dict[tuple[int, int], int] = {}
    at = np.array([[number.setdefault(each.get(axis, none), len(number)) for axis in names] for each in places])
    axes_of = [tuple(compress(names, bits)) for bits in product((False, True), repeat=len(names))]
    bit = 1 << np.arange(len(names))[::-1]
    steps = []
    for group in alike.values():
        moved = (at[group, None, :] != at[None, group, :]) @ bit
        for i, row in zip(group, moved.tolist(), strict=True):
            steps += [
                (CollectiveStep("collective-permute", axes_of[which], found[i], found[j]), i, j)
                for j, which in zip(group, row, strict=True)
                if i != j
            ]
    return steps


def permuted_axes(a: Layout, b: Layout, sizes: Mapping[str, int]) -> Axes:
    """The axes whose coordinates a permutation between two layouts changes.

    The coordinates of a dimension's axes, major to minor, form a shard's number along it. An axis that has the same
    place in that number in both layouts separates shards that keep its coordinate.
    """
    before, after = _places(a, sizes), _places(b, sizes)
    return tuple(sorted(axis for axis in {*before, *after} if before.get(axis) != after.get(axis)))


def _places(layout: Layout, sizes: Mapping[str, int]) -> Places:
    """Axis to the dimension that it splits, and the number of shards that one step along it advances."""
    return {
        axis: (i, prod(sizes[minor] for minor in dim[k + 1 :]))
        for i, dim in enumerate(layout.dims)
        for k, axis in enumerate(dim)
    }
