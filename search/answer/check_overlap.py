"""The checker's seconds of a reshard that its neighbours hide: asynchronously, or in rings."""

from __future__ import annotations

from math import prod

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.asynchronous import is_deferred, is_lender, lenders, static_operands
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, Move, produced_layout, products_behind, steps
from search.answer.check_operations import grouped_work, matrix_work, operation_seconds, stored_itemsize
from search.formulation.collective_steps import CollectiveStep
from search.formulation.strategies import LoopedSide


def seconds_beside(program: Program, topology: Topology, choice: Choice, move: Move) -> float:
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
        cost = operation_seconds(program, topology, op, strategy.splits)
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
    work = matrix_work(op, [factor.size for factor in op.factors], topology) / topology.size
    core = work / chip.reached_matmul_flops_per_second(op.dtype) + chip.op_overhead_seconds
    return max(_ahead_seconds(program, topology, op, none, topology.size) - core, 0.0)


def _ahead_seconds(program: Program, topology: Topology, op: Operation, splits, chips: int = 1) -> float:
    """HBM seconds of the operands that are known before the step, up to the room for copies ahead."""
    pieces = [prod(topology.axis_sizes[axis] for axis in split) for split in splits]
    local = [factor.size / n for factor, n in zip(op.factors, pieces, strict=True)]
    bytes_, groups = 0.0, grouped_work(op, local, topology)
    for k in static_operands(program, op):
        if k in op.traffic:
            each = stored_itemsize(program, op.inputs[k])
            bytes_ += each * (groups.elements(k) if groups else prod(local[i] for d in op.inputs[k].dims for i in d))
    return min(bytes_ / chips, topology.chip.prefetch_bytes) / topology.chip.reached_hbm_bytes_per_second


def looped_seconds(program: Program, topology: Topology, choice: Choice, move: Move) -> float:
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
            whole = operation_seconds(program, topology, op, strategy.splits).running
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
    cost, one = (operation_seconds(program, topology, op, each) for each in (strategy.splits, splits))
    piece = one.running + one.start
    if gathers_:  # pieces that are written to their places, or added up, take longer
        is_kept = any(cut in dim for dim in op.outputs[0].dims)
        piece *= 1 + (topology.chip.piece_loss if is_kept else topology.chip.summed_piece_loss)
    closing = 1 if axis.kind == "switch" or axis.ring else chips - 1
    hop = payload / chips / axis.bytes_per_second + closing * axis.hop_seconds + axis.launch_seconds
    arrivals = [k // 2 + 1 if axis.ring and chips > 3 else k + 1 for k in range(chips - 1)]  # in hops, of each piece
    taken = max([chips * piece, *(hop * at + piece * (chips - 1 - k) for k, at in enumerate(arrivals))])
    taken += float(seconds_on(topology, step.kind, step.axes[1:], payload / chips))
    if not gathers_:
        arrays = 2 * (chips - 1) if chips < 4 else 2 if chips % 2 == 0 else 3
        chip, elements = topology.chip, payload / chips / program.values[move.value].itemsize
        passes = arrays * elements / chip.vector_elements_per_second if chip.vector_elements_per_second else 0.0
        taken += max(passes, (arrays + 1) * payload / chips / chip.reached_hbm_bytes_per_second)
    alone = float(seconds_on(topology, step.kind, step.axes, payload))
    saved = alone + cost.running + cost.start - taken
    return saved if saved > 1e-9 * alone else 0.0
