"""Reshards as the cheapest sequence of single collectives.

Every layout of an array is a node of a graph; every single collective (all-gather of the minor axes of a dimension,
reduce-scatter or all-reduce of partial sums, all-to-all between two dimensions, permutation of equal shards, local
slice) is an edge priced by the torus model. The price of a reshard is the length of the shortest path, the plan's
collectives are the steps of that path, and the emitted program runs exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from search.formulation.all_pairs import FORBIDDEN, Edges, all_pairs
from search.formulation.collective_steps import CollectiveStep, StepGraph, rewritten_steps, step_graph
from search.formulation.layouts import Axes, Layout
from search.formulation.overlap import LOOPED_KINDS, Ends, StepLoops, ends_of
from search.formulation.rings import StepRings, are_rings, column_of, no_rings, ring_of


class TableKey(NamedTuple):
    """The array that a table is for; `partial` if it may be a partial sum."""

    shape: tuple[int, ...]
    itemsize: float
    partial: bool


@dataclass(frozen=True)
class ReshardTable:
    """The price of every reshard of one array, in seconds: `seconds[i, j]` from layout `i` to layout `j`.

    Where collectives may be looped with products, `loops` has the seconds to hide. Of equally cheap paths, the one
    whose last gather, then whose first scatter, has the most to hide is taken. `key` tells the tables of one topology
    apart.
    """

    key: TableKey
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
        return _distances(_Priced((id(self.graph), self.step_seconds.tobytes()), self.graph, self.step_seconds))

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
            return self._find_steps(source, target)
        first, last = (self.graph.steps[k] if k >= 0 else None for k in (table[start, end] for table in self.ends[:2]))
        middle = self._find_steps(first.target if first else source, last.source if last else target)
        return tuple(step for step in (first, *middle, last) if step is not None)

    def _find_steps(self, source: Layout, target: Layout) -> tuple[CollectiveStep, ...]:
        end, steps, at = self.index[target], [], source
        while at != target:
            leaving = np.flatnonzero(self.graph.source == self.index[at])
            cost = self.step_seconds[leaving] + self.seconds[self.graph.target[leaving], end]
            step = self.graph.steps[leaving[int(np.argmin(cost))]]
            steps.append(step)
            at = step.target
        return tuple(steps)


@dataclass(frozen=True)
class _Priced:
    """A graph with the seconds of its steps, as the `key` tells them apart: arrays of other shapes may have the same."""

    key: tuple
    graph: StepGraph = field(compare=False)
    step_seconds: np.ndarray = field(compare=False)


@lru_cache(maxsize=1024)
def _distances(priced: _Priced) -> np.ndarray:
    graph = priced.graph
    found = all_pairs(Edges(graph.source, graph.target, priced.step_seconds), graph.partial, graph.images)
    return np.minimum(found, FORBIDDEN, out=found)


@dataclass(frozen=True)
class _On:
    """A topology that equals another with the same `key`, which is all that a table depends on."""

    key: tuple
    topology: Topology = field(compare=False)


@lru_cache(maxsize=1024)
def _table(shape: tuple[int, ...], itemsize: float, on: _On, partial: bool) -> ReshardTable:
    array_bytes, topology = float(itemsize * prod(shape)), on.topology
    divisors = tuple(gcd(n, topology.size) for n in shape)
    graph = step_graph(divisors, tuple(topology.axis_sizes.items()), partial, topology.symmetries())
    price = np.zeros(len(graph.steps))
    loops = StepLoops(np.zeros(len(price)), np.ones(len(price))) if topology.pricing.looped else None
    for kind, axes, members in graph.members():
        payload = array_bytes * graph.fraction[members]
        price[members] = step_seconds(kind, axes, payload, topology)
        if loops is not None and kind in LOOPED_KINDS:
            loops.wire_seconds[members] = wire_seconds(kind, axes, payload, topology)
            loops.pieces[members] = prod(topology.axis_sizes[axis] for axis in axes)
    if loops is not None and are_rings(topology.pricing):
        loops = loops._replace(rings=_step_rings(graph, array_bytes, itemsize, topology))
    if topology.chip.kind == "tpu":
        price[rewritten_steps(graph, shape, itemsize, topology)] = np.inf
    return ReshardTable(TableKey(shape, itemsize, partial), graph, price, array_bytes, loops)


def _step_rings(graph: StepGraph, array_bytes: float, itemsize: float, topology: Topology) -> StepRings:
    """The steps of a graph as rings; their axes are major to minor."""
    groups: dict[tuple[str, Axes, int], list[int]] = {}
    for k, step in enumerate(graph.steps):
        if step.kind in LOOPED_KINDS:
            dim = step.source_dim if step.kind == "all-gather" else step.target_dim
            groups.setdefault((step.kind, (step.axes[0], *sorted(step.axes[1:])), dim), []).append(k)
    found = no_rings(len(graph.steps))
    for (kind, axes, dim), members in groups.items():
        ring = ring_of(kind, axes, array_bytes * graph.fraction[members], itemsize, topology)
        for held, each in zip(found, (*ring, column_of(dim, topology.axis_sizes[axes[0]], topology)), strict=True):
            held[members] = each
    return found


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
        chip.vector_elements_per_second,
        chip.kind,
    )
    return _table(shape, itemsize, _On(key, topology), partial)
