"""The checker's price of a reshard: the cheapest sequence of collectives, by Dijkstra's algorithm."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import count
from math import prod

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.program import Program, Value
from search.answer.assignment import Move
from search.formulation.collective_steps import CollectiveStep, emittable, permuted_axes, steps_from
from search.formulation.layouts import Layout, divides, layouts


class CheapestReshard:
    """The seconds of a reshard, `None` if no sequence of collectives makes it. Equal reshards are priced once."""

    def __init__(self, program: Program, topology: Topology) -> None:
        self.program, self.topology = program, topology
        self._known: dict[tuple, float | None] = {}
        self._alike: dict[tuple[int, ...], dict[tuple, list[Layout]]] = {}

    def __call__(self, move: Move) -> float | None:
        array = self.program.values[move.value]
        key = (array.shape, array.itemsize, move.source, move.target)
        if key not in self._known:
            self._known[key] = self._search(array, move.source, move.target)
        return self._known[key]

    def _search(self, array: Value, source: Layout, target: Layout) -> float | None:
        """Shortest path over single steps, by Dijkstra's algorithm."""
        sizes, order = self.topology.axis_sizes, count()
        frontier = [(0.0, next(order), source)]
        done: set[Layout] = set()
        if array.shape not in self._alike:
            self._alike[array.shape] = _layouts_by_shards(array.shape, self.topology)
        while frontier:
            price, _, layout = heapq.heappop(frontier)
            if layout == target:
                return price
            if layout in done:
                continue
            done.add(layout)
            for step in (*steps_from(layout, sizes), *_permutations(layout, self._alike[array.shape], sizes)):
                if step.target in done or not divides(array.shape, step.target, sizes):
                    continue
                if emittable(step, array.shape, array.itemsize, self.topology):
                    whole = price + _step_price(step, array.bytes, self.topology)
                    heapq.heappush(frontier, (whole, next(order), step.target))
        return None


def _permutations(layout: Layout, alike: Mapping[tuple, list[Layout]], sizes: Mapping[str, int]):
    """The permutations that leave a layout: to every layout with the same number of shards in each dimension."""
    for target in alike.get(_cuts(layout, sizes), []):
        if target != layout and layout.axes:
            yield CollectiveStep("collective-permute", permuted_axes(layout, target, sizes), layout, target)


def _cuts(layout: Layout, sizes: Mapping[str, int]) -> tuple:
    return (*(prod(sizes[axis] for axis in dim) for dim in layout.dims), layout.partial)


def _layouts_by_shards(shape: tuple[int, ...], topology: Topology) -> dict[tuple, list[Layout]]:
    """Every layout of a shape, by the number of shards in each dimension."""
    found: dict[tuple, list[Layout]] = {}
    for layout in layouts(shape, tuple(topology.axis_sizes.items()), True):
        found.setdefault(_cuts(layout, topology.axis_sizes), []).append(layout)
    return found


def _step_price(step: CollectiveStep, array_bytes: float, topology: Topology) -> float:
    payload = step.payload(array_bytes, topology.axis_sizes)
    if step.kind == "slice":
        return 2 * payload / topology.chip.reached_hbm_bytes_per_second
    return float(seconds_on(topology, step.kind, step.axes, payload))
