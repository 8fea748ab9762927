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
from math import ceil, inf, prod
from typing import NamedTuple

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.asynchronous import (
    is_deferred,
    is_fetched_ahead,
    is_fused_into_reads,
    is_lender,
    lenders,
    static_operands,
)
from costmodels.program.on_chip import sharers
from costmodels.program.program import REDUCED_INSIDE, Operation, Program, Value
from costmodels.program.vector_passes import REGISTER, converted_operands, ends_pass, is_streamed, vector_uses
from search.answer.assignment import Choice, Move, moves, needed_layout, produced_layout, products_behind, steps
from search.answer.check_grouped import GROUPED, GroupedWork, dispatched_seconds, own_splits
from search.answer.check_memory import alive_bytes
from search.formulation.collective_steps import CollectiveStep, emittable, permuted_axes, steps_from
from search.formulation.intra_op import exchange_axes, gathers
from search.formulation.layouts import Layout, divides, layouts, shards
from search.formulation.strategies import LoopedSide


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
        cost = _operation_seconds(program, topology, op, strategy.splits)
        total += runs * (cost.running + cost.start)
        compute, memory = compute + runs * cost.compute, memory + runs * cost.memory
    wire = 0.0
    cheapest = _Cheapest(program, topology)
    for move in moves(program, choice):
        price = cheapest(move)
        if price is None:
            faults.append(f"{program.values[move.value].name}: no collectives lead from {move.source} to {move.target}")
            continue
        hidden = min(price, _beside(program, topology, choice, move)) + _hidden_seconds(program, topology, choice, move)
        wire += (price - hidden) * program.multiplicity(move.region)
    wire += sum(_inside_seconds(program, topology, choice, i) for i in range(len(program.operations)))
    peak, at = _peak(program, topology, choice)
    return Check(total + wire, compute, memory, wire, peak, at, tuple(faults))


def _faults(program: Program, topology: Topology, choice: Choice):
    sizes = topology.axis_sizes
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        used = [axis for split in (*own_splits(op, strategy.splits), *strategy.carried) for axis in split]
        if len(set(used)) != len(used):
            yield f"{op.name}: an axis is used twice in {strategy}"
        for factor, split in zip(op.factors, strategy.splits, strict=True):
            if factor.size % prod(sizes[axis] for axis in split) or (split and factor.kind == "whole"):
                yield f"{op.name}: a factor of size {factor.size} ({factor.kind}) cannot be split over {split}"
            if (
                factor.kind == "gathered"
                and split
                and factor.size < _new_elements(op) * prod(sizes[axis] for axis in split)
            ):
                yield (
                    f"{op.name}: a piece of {factor.size} over {split} has fewer elements"
                    f" than the {_new_elements(op)} of the result"
                )
    for value, layout in choice.hubs.items():
        if not divides(program.values[value].shape, layout, sizes):
            yield f"{program.values[value].name}: {layout} does not divide {program.values[value].shape}"
    for argument, result in program.donated:
        given = produced_layout(program, choice, program.operations[program.arguments[argument]].outputs[0].value)
        taken = needed_layout(program, choice, program.results[result], 0)
        if given != taken:
            yield f"donated argument {argument} has {given}, its result {taken}"


def _new_elements(op: Operation) -> int:
    """The number of elements that the results have along factors that no operand has."""
    given = {i for use in op.inputs for dim in use.dims for i in dim}
    return prod(op.factors[i].size for i in {i for use in op.outputs for dim in use.dims for i in dim} - given)


class _OnChip(NamedTuple):
    """Seconds of one run of an operation: compute, HBM, the longest of its resources, and its start."""

    compute: float = 0.0
    memory: float = 0.0
    running: float = 0.0
    start: float = 0.0


def _operation_seconds(program: Program, topology: Topology, op: Operation, splits) -> _OnChip:
    """Seconds of one run on one chip (derived in `costmodels.operations`)."""
    if not op.flops_per_point and not op.traffic:
        return _OnChip()
    chip, sizes = topology.chip, topology.axis_sizes
    local = [
        factor.size / prod(sizes[axis] for axis in split) for factor, split in zip(op.factors, splits, strict=True)
    ]
    matmul, groups = op.op_class == "matmul", _grouped(op, local, topology)
    arrays, hidden = groups.hidden if groups else (0, 0.0)
    moved = arrays * hidden * program.values[op.outputs[0].value].itemsize if groups else 0.0
    for index, use in zip(op.traffic, map(op.use, op.traffic), strict=True):
        each = use.stored_itemsize or program.values[use.value].itemsize
        bytes_ = each * (groups.elements(index) if groups else prod(local[i] for dim in use.dims for i in dim))
        moved += 0.0 if 0 < sharers(program, use.value) * bytes_ <= chip.on_chip_bytes else bytes_
    memory = moved / chip.reached_hbm_bytes_per_second
    stored = (arrays - 1) * hidden if arrays else 0.0
    stored += sum(prod(local[i] for dim in op.use(k).dims for i in dim) for k in vector_uses(program, op))
    between = groups.between_seconds(chip, program.values[op.outputs[0].value].itemsize) if groups else 0.0
    vector = stored / (chip.vector_elements_per_second or inf)
    if not matmul:
        work = op.flops_per_point * prod(local) / chip.vector_flops_per_second
        if topology.pricing.asynchronous:
            if not is_fused_into_reads(program, op):
                return _OnChip(work, memory, max(work, memory))
            read = sum(program.values[u.value].itemsize * prod(local[i] for d in u.dims for i in d) for u in op.inputs)
            return _OnChip(work, memory, max(work - read / chip.reached_hbm_bytes_per_second, 0.0))
        looped = prod(factor.size for factor in op.factors) >= REGISTER and ends_pass(program, op)
        return _OnChip(work, memory, max(work, memory, vector), looped * chip.vector_overhead_seconds)
    work = _matrix_work(op, local, topology) / chip.reached_matmul_flops_per_second(op.dtype)
    start = chip.op_overhead_seconds
    if topology.pricing.asynchronous:
        hidden = start * bool(static_operands(program, op))
        return _OnChip(work, memory, max(work + hidden, memory), start - hidden + between)
    start += is_streamed(program, op) * chip.stream_overhead_seconds
    converted = sum(prod(local[i] for dim in op.use(k).dims for i in dim) for k in converted_operands(program, op))
    core, read = max(work, converted / (chip.converted_elements_per_second or inf)), memory + vector
    if chip.prefetch_bytes and is_fetched_ahead(program, op):
        start = max(max(core, vector) + start, read) - max(core, read)
    return _OnChip(work, memory, max(core, read), start + between)


def _beside(program: Program, topology: Topology, choice: Choice, move: Move) -> float:
    """Seconds of the products at the ends of a reshard that hide it asynchronously."""
    ends: list[tuple[int, LoopedSide]] = []
    if move.operation is not None and move.operand is not None:
        ends.append((move.operation, move.operand))
    if move.operation is None or (move.value not in choice.hubs and move.operand is not None):
        ends.append((program.producers[move.value][0], "result"))
    found = 0.0
    for i, which in ends if topology.pricing.asynchronous else ():
        op, strategy = program.operations[i], choice.strategies[i]
        if op.op_class != "matmul" or op.region != move.region:
            continue
        cost = _operation_seconds(program, topology, op, strategy.splits)
        work, moved, whole = cost.compute, cost.memory, cost.running + cost.start
        core, static = work + topology.chip.op_overhead_seconds, static_operands(program, op)
        spare = max(min(moved - core, _ahead_seconds(program, topology, op, strategy.splits)), 0.0)
        if which in static or (which == "result" and is_deferred(program, i)):
            found += (whole - spare) / (len(static) + is_deferred(program, i))
        elif bool(produced_layout(program, choice, op.outputs[0].value).partial) == (which == "result"):
            spare = max(spare - (_lent(program, topology, i) if is_lender(program, i) else 0.0), 0.0)
            spare += sum(_lent(program, topology, k) for k in lenders(program, i))
            spare = min(spare, topology.chip.prefetch_bytes / topology.chip.reached_hbm_bytes_per_second)
            found += spare if which == "result" else spare / (len(op.inputs) - len(static))
    return found


def _lent(program: Program, topology: Topology, i: int) -> float:
    """HBM seconds beyond the core's of a matmul whose weight is split over all chips and whose rows are not."""
    op, chip = program.operations[i], topology.chip
    none = [()] * len(op.factors)
    work = _matrix_work(op, [factor.size for factor in op.factors], topology) / topology.size
    core = work / chip.reached_matmul_flops_per_second(op.dtype) + chip.op_overhead_seconds
    return max(_ahead_seconds(program, topology, op, none, topology.size) - core, 0.0)


def _ahead_seconds(program: Program, topology: Topology, op: Operation, splits, chips: int = 1) -> float:
    """HBM seconds of the operands that are known before the step, up to the room for copies ahead."""
    pieces = [prod(topology.axis_sizes[axis] for axis in split) for split in splits]
    local = [factor.size / n for factor, n in zip(op.factors, pieces, strict=True)]
    bytes_, groups = 0.0, _grouped(op, local, topology)
    for k in static_operands(program, op):
        if k in op.traffic:
            each = op.inputs[k].stored_itemsize or program.values[op.inputs[k].value].itemsize
            bytes_ += each * (groups.elements(k) if groups else prod(local[i] for d in op.inputs[k].dims for i in d))
    return min(bytes_ / chips, topology.chip.prefetch_bytes) / topology.chip.reached_hbm_bytes_per_second


def _hidden_seconds(program: Program, topology: Topology, choice: Choice, move: Move) -> float:
    """Seconds of a reshard that overlap with the products that its collectives are looped with."""
    if not topology.pricing.looped:
        return 0.0
    path, found = steps(program, topology, move), 0.0
    for step, product in zip(path, products_behind(program, topology, choice, move, path), strict=True):
        if product is not None:
            payload = step.payload(program.values[move.value].bytes, topology.axis_sizes)
            if topology.pricing.bandwidth == "per-axis":
                found += _ring_saves(program, topology, choice, move, step, product, payload)
                continue
            op, strategy = program.operations[product], choice.strategies[product]
            whole = _operation_seconds(program, topology, op, strategy.splits).running
            sent, none = (float(seconds_on(topology, step.kind, step.axes, each)) for each in (payload, 0.0))
            alone = whole / prod(topology.axis_sizes[axis] for axis in step.axes)
            found += (sent - none) + whole - alone - max(sent - none, whole - alone)
    return found


def _ring_saves(
    program: Program,
    topology: Topology,
    choice: Choice,
    move: Move,
    step: CollectiveStep,
    product: int,
    payload: float,
) -> float:
    """Seconds that a ring over the first axis saves: the last arrival of a hop that the rest of the matmul waits for."""
    op, strategy, axis = program.operations[product], choice.strategies[product], topology.axis(step.axes[0])
    chips, gathers_ = axis.size, step.kind == "all-gather"
    use = op.outputs[0] if strategy.looped == "result" else op.inputs[int(strategy.looped or 0)]
    cut = use.dims[step.source_dim if gathers_ else step.target_dim][0]
    splits = [(*axes, axis.name) if i == cut else axes for i, axes in enumerate(strategy.splits)]
    cost, one = (_operation_seconds(program, topology, op, each) for each in (strategy.splits, splits))
    piece = one.running + one.start
    closing = 1 if axis.kind == "switch" or axis.ring else chips - 1
    hop = payload / chips / axis.bytes_per_second + closing * axis.hop_seconds + axis.launch_seconds
    arrivals = [k // 2 + 1 if axis.ring and chips > 3 else k + 1 for k in range(chips - 1)]  # in hops, of each piece
    taken = max([chips * piece, *(hop * at + piece * (chips - 1 - k) for k, at in enumerate(arrivals))])
    taken += float(seconds_on(topology, step.kind, step.axes[1:], payload / chips))
    if not gathers_:
        arrays = 2 * (chips - 1) if chips < 4 else 3
        chip, elements = topology.chip, payload / chips / program.values[move.value].itemsize
        passes = arrays * elements / chip.vector_elements_per_second if chip.vector_elements_per_second else 0.0
        taken += max(passes, (arrays + 1) * payload / chips / chip.reached_hbm_bytes_per_second)
    alone = float(seconds_on(topology, step.kind, step.axes, payload))
    saved = alone + cost.running + cost.start - taken
    return saved if saved > 1e-9 * alone else 0.0


def _grouped(op: Operation, local: list[float], topology: Topology) -> GroupedWork | None:
    """The work of a matmul of grouped rows; None for any other operation."""
    is_grouped = op.op_class == "matmul" and op.primitive in GROUPED
    return GroupedWork(op, local, topology.pricing.expert_load) if is_grouped else None


def _matrix_work(op: Operation, local: list[float], topology: Topology) -> float:
    """FLOPs of the matrix unit, in whole tiles (derived in `costmodels.operations`)."""
    tile, least = topology.chip.matrix_tile, topology.chip.load_rows
    if groups := _grouped(op, local, topology):
        return groups.flops(tile, least)
    if len(op.inputs) != 2:
        return op.flops_per_point * prod(local)
    places = [[any(i in dim for dim in use.dims) for use in (*op.inputs, *op.outputs[:1])] for i in range(len(local))]
    size = {"batch": 1.0, "rows": 1.0, "columns": 1.0, "summed": 1.0}
    for n, (left, right, result) in zip(local, places, strict=True):
        size["summed" if not result else "batch" if left == right else "rows" if left else "columns"] *= n
    rows, columns = size["rows"], size["columns"]
    streamed = min(max(a, least) * tile * ceil(b / tile) for a, b in ((rows, columns), (columns, rows)))
    return op.flops_per_point * size["batch"] * tile * ceil(size["summed"] / tile) * streamed


def _inside_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    op = program.operations[i]
    total = dispatched_seconds(program, topology, op, choice.strategies[i].splits)
    for factor, axes in zip(op.factors, choice.strategies[i].splits, strict=True):
        if factor.kind in REDUCED_INSIDE and axes:
            value = op.outputs[0].value
            local = program.values[value].bytes / shards(produced_layout(program, choice, value), topology.axis_sizes)
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


def _peak(program: Program, topology: Topology, choice: Choice) -> tuple[float, int]:
    """The most bytes alive at any point, and that point."""
    alive = alive_bytes(program, topology, choice)
    peak = max(alive, default=0.0)
    return peak, alive.index(peak) if alive else 0
