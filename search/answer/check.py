"""The independent checker: recomputes the cost and the memory of a plan from the program alone.

It shares the definition of a plan (strategies, layouts, steps, looped collectives) and the physical prices with the
solver, but none of its arrays. Costs are plain arithmetic over factors. Dijkstra's algorithm finds the reshards.
`search.answer.check_memory` counts the memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from math import ceil, prod

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.on_chip import sharers
from costmodels.program.program import REDUCED_INSIDE, Operation, Program, Value
from search.answer.assignment import Choice, Move, moves, needed, produced, products_behind, steps
from search.answer.check_memory import alive_bytes
from search.formulation.collective_steps import CollectiveStep, emittable, permuted_axes, steps_from
from search.formulation.intra_op import exchange_axes, gathers
from search.formulation.layouts import Layout, divides, layouts, shards


@dataclass(frozen=True)
class Check:
    """The recomputed cost of a plan: seconds of one step, peak bytes per chip and their place, and the faults found."""

    seconds: float
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    peak_bytes: float
    peak_operation: int
    faults: tuple[str, ...]


def check(program: Program, topology: Topology, choice: Choice) -> Check:
    """Recomputes a plan's cost and memory.

    **Returns:** a `Check`; `faults` names operations that do not divide, layouts that use an axis twice, and reshards
    that no sequence of collectives makes.
    """
    faults = [*_faults(program, topology, choice)]
    total = compute = memory = 0.0
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        runs = program.multiplicity(op.region)
        work, moved, whole = _operation_seconds(program, topology, op, strategy.splits)
        total, compute, memory = total + runs * whole, compute + runs * work, memory + runs * moved
    wire = 0.0
    cheapest = _Cheapest(program, topology)
    for move in moves(program, choice):
        price = cheapest(move)
        if price is None:
            faults.append(f"{program.values[move.value].name}: no collectives lead from {move.source} to {move.target}")
            continue
        wire += (price - _hidden(program, topology, choice, move)) * program.multiplicity(move.region)
    wire += sum(_inside_seconds(program, topology, choice, i) for i in range(len(program.operations)))
    peak, at = _peak(program, topology, choice)
    return Check(total + wire, compute, memory, wire, peak, at, tuple(faults))


def _faults(program: Program, topology: Topology, choice: Choice):
    sizes = topology.axis_sizes
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        used = [axis for split in (*strategy.splits, *strategy.carried) for axis in split]
        if len(set(used)) != len(used):
            yield f"{op.name}: an axis is used twice in {strategy}"
        for factor, split in zip(op.factors, strategy.splits, strict=True):
            if factor.size % prod(sizes[axis] for axis in split) or (split and factor.kind == "whole"):
                yield f"{op.name}: a factor of size {factor.size} ({factor.kind}) cannot be split over {split}"
            if factor.kind == "gathered" and split and factor.size < _made(op) * prod(sizes[axis] for axis in split):
                yield f"{op.name}: a piece of {factor.size} over {split} has fewer elements than the {_made(op)} of the result"
    for value, layout in choice.hubs.items():
        if not divides(program.values[value].shape, layout, sizes):
            yield f"{program.values[value].name}: {layout} does not divide {program.values[value].shape}"
    for argument, result in program.donated:
        given = produced(program, choice, program.operations[program.arguments[argument]].outputs[0].value)
        taken = needed(program, choice, program.results[result], 0)
        if given != taken:
            yield f"donated argument {argument} has {given}, its result {taken}"


def _made(op: Operation) -> int:
    """The number of elements that the results have along factors that no operand has."""
    given = {i for use in op.inputs for dim in use.dims for i in dim}
    return prod(op.factors[i].size for i in {i for use in op.outputs for dim in use.dims for i in dim} - given)


def _operation_seconds(program: Program, topology: Topology, op: Operation, splits) -> tuple[float, float, float]:
    """Compute, HBM and roofline seconds of one run on one chip."""
    if not op.flops_per_point and not op.traffic:
        return 0.0, 0.0, 0.0
    chip, sizes = topology.chip, topology.axis_sizes
    local = [
        factor.size / prod(sizes[axis] for axis in split) for factor, split in zip(op.factors, splits, strict=True)
    ]
    moved = 0.0
    for use in map(op.use, op.traffic):
        each = use.stored_itemsize or program.values[use.value].itemsize
        bytes_ = each * prod(local[i] for dim in use.dims for i in dim)
        moved += 0.0 if 0 < sharers(program, use.value) * bytes_ <= chip.on_chip_bytes else bytes_
    memory = moved / chip.reached_hbm_bytes_per_second
    if op.op_class != "matmul":
        work = op.flops_per_point * prod(local) / chip.vector_flops_per_second
        return work, memory, max(work, memory)
    work = _matrix_work(op, local, chip.matrix_tile) / chip.reached_matmul_flops_per_second(op.dtype)
    return work, memory, max(work, memory) + chip.op_overhead_seconds


def _hidden(program: Program, topology: Topology, choice: Choice, move: Move) -> float:
    """Seconds of a reshard that overlap with the products that its collectives are looped with."""
    if not topology.pricing.looped:
        return 0.0
    path, found = steps(program, topology, move), 0.0
    for step, product in zip(path, products_behind(program, topology, choice, move, path), strict=True):
        if product is not None:
            op, strategy = program.operations[product], choice.strategies[product]
            work, moved, _ = _operation_seconds(program, topology, op, strategy.splits)
            payload = step.payload(program.values[move.value].bytes, topology.axis_sizes)
            sent, none = (float(seconds_on(topology, step.kind, step.axes, each)) for each in (payload, 0.0))
            chips = prod(topology.axis_sizes[axis] for axis in step.axes)
            alone = max(work, moved) / chips
            found += (sent - none) + max(work, moved) - alone - max(sent - none, max(work, moved) - alone)
    return found


def _matrix_work(op: Operation, local: list[float], tile: float) -> float:
    """FLOPs of the matrix unit, in whole tiles (derived in `costmodels.operations`)."""
    if len(op.inputs) != 2:
        return op.flops_per_point * prod(local)
    places = [[any(i in dim for dim in use.dims) for use in (*op.inputs, *op.outputs[:1])] for i in range(len(local))]
    size = {"batch": 1.0, "rows": 1.0, "columns": 1.0, "summed": 1.0}
    for n, (left, right, result) in zip(local, places, strict=True):
        size["summed" if not result else "batch" if left == right else "rows" if left else "columns"] *= n
    rows, columns = size["rows"], size["columns"]
    streamed = min(max(a, tile / 2) * tile * ceil(b / tile) for a, b in ((rows, columns), (columns, rows)))
    return op.flops_per_point * size["batch"] * tile * ceil(size["summed"] / tile) * streamed


def _inside_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    op = program.operations[i]
    total = 0.0
    for factor, axes in zip(op.factors, choice.strategies[i].splits, strict=True):
        if factor.kind in REDUCED_INSIDE and axes:
            value = op.outputs[0].value
            local = program.values[value].bytes / shards(produced(program, choice, value), topology.axis_sizes)
            total += float(seconds_on(topology, "all-reduce", axes, local))
    total += _gathered_seconds(program, topology, choice, i) + _exchanged_seconds(program, topology, choice, i)
    return total * program.multiplicity(op.region)


def _exchanged_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    """Seconds of the permutations within one run of an operation.

    A payload is one part of an operand's or a result's shard.
    """
    op, splits, sizes = program.operations[i], choice.strategies[i].splits, topology.axis_sizes
    total = 0.0
    for f, (factor, axes) in enumerate(zip(op.factors, splits, strict=True)):
        if factor.kind == "exchanged" and axes:
            sides = (op.inputs, op.outputs) if (f,) in op.inputs[0].dims else (op.outputs, op.inputs)
            local = [
                op.factors[k].size / prod(sizes[axis] for axis in splits[k]) for dim in sides[0][0].dims for k in dim
            ]
            sent = program.values[sides[0][0].value].itemsize * prod(local)
            for moved in exchange_axes(len(sides[0]), axes, topology):
                total += float(seconds_on(topology, "collective-permute", moved, sent))
    return total


def _gathered_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    """Seconds of the all-gathers within one run of an operation: of results, or of one element along the factor."""
    op, splits, sizes = program.operations[i], choice.strategies[i].splits, topology.axis_sizes
    pieces = [prod(sizes[axis] for axis in split) for split in splits]
    total = 0.0
    for f, (factor, axes) in enumerate(zip(op.factors, splits, strict=True)):
        if factor.kind != "gathered":
            continue
        for use in op.outputs:
            others = [k for dim in use.dims for k in dim if k != f]
            sent = program.values[use.value].itemsize * prod(op.factors[k].size / pieces[k] for k in others)
            for step in gathers(axes, topology) if axes else ():
                sent *= prod(sizes[axis] for axis in step.axes)
                total += float(seconds_on(topology, step.kind, step.axes, sent))
    return total


class _Cheapest:
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
            self._alike[array.shape] = _alike(array.shape, self.topology)
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


def _alike(shape: tuple[int, ...], topology: Topology) -> dict[tuple, list[Layout]]:
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


def _peak(program: Program, topology: Topology, choice: Choice) -> tuple[float, int]:
    """The most bytes alive at any point, and that point."""
    alive = alive_bytes(program, topology, choice)
    peak = max(alive, default=0.0)
    return peak, alive.index(peak) if alive else 0
