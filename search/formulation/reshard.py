"""Reshards as the cheapest sequence of single collectives.

Every layout of an array is a node of a graph; every single collective (all-gather of the minor axes of a dimension,
reduce-scatter or all-reduce of partial sums, all-to-all between two dimensions, permutation of equal shards, local
slice) is an edge priced by the torus model. The price of a reshard is the length of the shortest path, the plan's
collectives are the steps of that path, and the emitted program runs exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import gcd, prod

import numpy as np

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from search.formulation.all_pairs import FORBIDDEN, Edges, all_pairs
from search.formulation.axis_renaming import Groups
from search.formulation.collective_steps import CollectiveStep, StepGraph, emittable, step_graph
from search.formulation.layouts import Axes, Layout
from search.formulation.overlap import LOOPED_KINDS, Ends, StepLoops, ends_of
from search.formulation.strategies import Sizes


@dataclass(frozen=True)
class ReshardTable:
    """The price of every reshard of one array, in seconds: `seconds[i, j]` from layout `i` to layout `j`.

    Where collectives may be looped with products, `loops` has the seconds to hide. Of equally cheap paths, the one
    whose last gather, then whose first scatter, has the most to hide is taken.
    """

    graph: StepGraph
    step_seconds: np.ndarray
    array_bytes: float
    loops: StepLoops | None = None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts, in the order of the table's rows and columns."""
        return self.graph.layouts

    @property
    def index(self) -> Mapping[Layout, int]:
        """Layout to its row."""
        return self.graph.index

    @cached_property
    def seconds(self) -> np.ndarray:
        """Shortest paths between all pairs; `FORBIDDEN` if no steps lead from one to the other."""
        edges = Edges(self.graph.source, self.graph.target, self.step_seconds)
        found = all_pairs(edges, self.graph.partial, self.graph.images)
        return np.minimum(found, FORBIDDEN, out=found)

    @cached_property
    def ends(self) -> Ends:
        """The steps at the ends of each path that a product may hide; none if nothing is looped."""
        return ends_of(self.graph, self.step_seconds, self.seconds, self.loops)

    def path(self, source: Layout, target: Layout) -> tuple[CollectiveStep, ...]:
        """The steps of the cheapest reshard; empty if the layouts are equal."""
        start, end = self.index[source], self.index[target]
        if self.seconds[start, end] >= FORBIDDEN:
            raise ValueError(f"no collectives lead from {source} to {target}")
        if self.loops is None:
            return self._between(source, target)
        first, last = (self.graph.steps[k] if k >= 0 else None for k in (table[start, end] for table in self.ends[:2]))
        middle = self._between(first.target if first else source, last.source if last else target)
        return tuple(step for step in (first, *middle, last) if step is not None)

    def _between(self, source: Layout, target: Layout) -> tuple[CollectiveStep, ...]:
        end, steps, at = self.index[target], [], source
        while at != target:
            leaving = np.flatnonzero(self.graph.source == self.index[at])
            cost = self.step_seconds[leaving] + self.seconds[self.graph.target[leaving], end]
            step = self.graph.steps[leaving[int(np.argmin(cost))]]
            steps.append(step)
            at = step.target
        return tuple(steps)


def _divided(shape: Sequence[int], topology: Topology, partial: bool) -> tuple[tuple[int, ...], Sizes, bool, Groups]:
    """The key of the graph of an array's layouts."""
    divisors = tuple(gcd(n, topology.size) for n in shape)
    return divisors, tuple(topology.axis_sizes.items()), partial, topology.symmetries()


@dataclass(frozen=True)
class _On:
    """A topology that equals another with the same `key`, which is all that a table depends on."""

    key: tuple
    topology: Topology = field(compare=False)


@lru_cache(maxsize=1024)
def _table(shape: tuple[int, ...], itemsize: float, on: _On, partial: bool) -> ReshardTable:
    array_bytes, topology = float(itemsize * prod(shape)), on.topology
    divided = _divided(shape, topology, partial)
    graph = step_graph(*divided)
    price = np.zeros(len(graph.steps))
    loops = StepLoops(np.zeros(len(price)), np.ones(len(price))) if topology.pricing.looped else None
    for kind, axes, members in _alike(*divided):
        payload = array_bytes * graph.fraction[members]
        price[members] = step_seconds(kind, axes, payload, topology)
        if loops is not None and kind in LOOPED_KINDS:
            loops.wire_seconds[members] = wire_seconds(kind, axes, payload, topology)
            loops.pieces[members] = prod(topology.axis_sizes[axis] for axis in axes)
    if topology.chip.kind == "tpu":
        price[_other_in_programs(shape, itemsize, _On(divided[1:], topology), partial)] = np.inf
    return ReshardTable(graph, price, array_bytes, loops)


@lru_cache(maxsize=512)
def _alike(
    divisors: tuple[int, ...], sizes: Sizes, partial: bool, alike: Groups
) -> tuple[tuple[str, Axes, np.ndarray], ...]:
    """The steps of a graph by kind and axes, on which their price depends besides the bytes."""
    groups: dict[tuple[str, Axes], list[int]] = {}
    for i, step in enumerate(step_graph(divisors, sizes, partial, alike).steps):
        groups.setdefault((step.kind, tuple(sorted(step.axes))), []).append(i)
    return tuple((kind, axes, np.array(members)) for (kind, axes), members in groups.items())


@lru_cache(maxsize=1024)
def _other_in_programs(shape: tuple[int, ...], itemsize: float, on: _On, partial: bool) -> np.ndarray:
    """The steps of a table that a TPU's compiler rewrites into something else."""
    steps = step_graph(*_divided(shape, on.topology, partial)).steps
    return np.flatnonzero([not emittable(step, shape, itemsize, on.topology) for step in steps])


def wire_seconds(kind: str, axes: Axes, payload: np.ndarray | float, topology: Topology) -> np.ndarray | float:
    """Seconds of communication of a collective, without latency and launch."""
    return seconds_on(topology, kind, axes, payload) - seconds_on(topology, kind, axes, 0.0)


def step_seconds(kind: str, axes: Axes, payload: np.ndarray | float, topology: Topology) -> np.ndarray | float:
    """Seconds of one step: a collective by the torus model; a slice by reading and writing its result in HBM."""
    if kind == "slice":
        return 2 * payload / topology.chip.reached_hbm_bytes_per_second
    return seconds_on(topology, kind, axes, payload)


def reshard_table(shape: tuple[int, ...], itemsize: float, topology: Topology, partial: bool) -> ReshardTable:
    """The prices of all reshards of an array of this shape.

    Two shapes with the same divisibility by the chip count share their layouts and steps, and differ only in prices.
    """
    chip = topology.chip
    key = (
        topology.axes,
        topology.pricing,
        topology.total_bytes_per_second,
        chip.reached_hbm_bytes_per_second,
        chip.kind,
    )
    return _table(shape, itemsize, _On(key, topology), partial)
