"""The checker's seconds of an operation: one run of it on a chip, by its kind, and the collectives within all runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, prod
from typing import NamedTuple

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.asynchronous import is_fetched_ahead, is_fused_into_reads, static_operands
from costmodels.program.on_chip import sharers
from costmodels.program.program import REDUCED_INSIDE, Operation, Program, Use
from costmodels.program.vector_passes import (
    REGISTER,
    converted_operands,
    ends_pass,
    is_streamed,
    vector_uses,
    waits_for_reads,
)
from search.answer.assignment import Choice, produced_layout
from search.answer.check_grouped import GROUPED, GroupedWork, dispatched_seconds
from search.formulation.intra_op import exchange_axes, gathers
from search.formulation.layouts import shards


class OnChip(NamedTuple):
    """Seconds of one run of an operation: compute, HBM, the longest of its resources, and its start."""

    compute: float = 0.0
    memory: float = 0.0
    running: float = 0.0
    start: float = 0.0


def operation_seconds(program: Program, topology: Topology, op: Operation, splits: Sequence[Sequence[str]]) -> OnChip:
    """Seconds of one run on one chip (derived in `costmodels.operations`)."""
    if not op.flops_per_point and not op.traffic and not ends_pass(program, op):
        return OnChip()
    sizes = topology.axis_sizes
    local = [
        factor.size / prod(sizes[axis] for axis in split) for factor, split in zip(op.factors, splits, strict=True)
    ]
    memory = _moved_bytes(program, topology, op, local) / topology.chip.reached_hbm_bytes_per_second
    if op.op_class == "matmul":
        return _matmul(program, topology, op, local, memory)
    if topology.pricing.asynchronous:
        return _fused(program, topology, op, local, memory)
    return _vector(program, topology, op, local, memory)


def _elements(use: Use, local: Sequence[float]) -> float:
    """Elements of a chip's piece of an operand or a result."""
    return prod(local[i] for dim in use.dims for i in dim)


def _moved_bytes(program: Program, topology: Topology, op: Operation, local: list[float]) -> float:
    """Bytes through HBM, without those of arrays that all their users find in on-chip memory."""
    groups, moved = grouped_work(op, local, topology), 0.0
    if groups:
        arrays, hidden = groups.hidden
        moved = arrays * hidden * program.values[op.outputs[0].value].itemsize
    for index in op.traffic:
        use = op.use(index)
        bytes_ = stored_itemsize(program, use) * (groups.elements(index) if groups else _elements(use, local))
        moved += 0.0 if 0 < sharers(program, use.value) * bytes_ <= topology.chip.on_chip_bytes else bytes_
    return moved


def stored_itemsize(program: Program, use: Use) -> float:
    """Bytes of an element of an operand or a result as it lies in memory."""
    return use.stored_itemsize or program.values[use.value].itemsize


def _vector_seconds(program: Program, topology: Topology, op: Operation, local: list[float]) -> float:
    """Seconds of the vector unit's passes over what it stores, or over operands that it has to expand."""
    stored, groups = 0.0, grouped_work(op, local, topology)
    if groups:
        arrays, hidden = groups.hidden
        stored = (arrays - 1) * hidden if arrays else 0.0
    stored += sum(_elements(op.use(k), local) for k in vector_uses(program, op))
    return stored / (topology.chip.vector_elements_per_second or inf)


def _vector(program: Program, topology: Topology, op: Operation, local: list[float], memory: float) -> OnChip:
    """An operation of the vector unit. The last of a pass over large arrays pays the pass's overhead."""
    work = op.flops_per_point * prod(local) / topology.chip.vector_flops_per_second
    passes = _vector_seconds(program, topology, op, local)
    is_large = prod(factor.size for factor in op.factors) >= REGISTER
    start = topology.chip.vector_overhead_seconds if is_large and ends_pass(program, op) else 0.0
    read = memory + passes if waits_for_reads(program, op) else max(memory, passes)
    return OnChip(work, memory, max(work, read), start)


def _fused(program: Program, topology: Topology, op: Operation, local: list[float], memory: float) -> OnChip:
    """An operation of the vector unit with asynchronous pricing: fused ones hide behind the reads of their operands."""
    work = op.flops_per_point * prod(local) / topology.chip.vector_flops_per_second
    if not is_fused_into_reads(program, op):
        return OnChip(work, memory, max(work, memory))
    read = sum(program.values[use.value].itemsize * _elements(use, local) for use in op.inputs)
    return OnChip(work, memory, max(work - read / topology.chip.reached_hbm_bytes_per_second, 0.0))


def _matmul(program: Program, topology: Topology, op: Operation, local: list[float], memory: float) -> OnChip:
    """A matrix product. Outside of loops, its weights are read while it starts."""
    chip, groups = topology.chip, grouped_work(op, local, topology)
    between = groups.between_seconds(chip, program.values[op.outputs[0].value].itemsize) if groups else 0.0
    work = matrix_work(op, local, topology) / chip.reached_matmul_flops_per_second(op.dtype)
    start = chip.op_overhead_seconds
    if topology.pricing.asynchronous:
        hidden = start * bool(static_operands(program, op))
        return OnChip(work, memory, max(work + hidden, memory), start - hidden + between)
    start += is_streamed(program, op) * chip.stream_overhead_seconds
    converted = sum(_elements(op.use(k), local) for k in converted_operands(program, op))
    core = max(work, converted / (chip.converted_elements_per_second or inf))
    passes = _vector_seconds(program, topology, op, local)
    read = memory + passes
    if chip.prefetch_bytes and is_fetched_ahead(program, op):
        start = max(max(core, passes) + start, read) - max(core, read)
    return OnChip(work, memory, max(core, read), start + between)


def grouped_work(op: Operation, local: list[float], topology: Topology) -> GroupedWork | None:
    """The work of a matmul of grouped rows; None for any other operation."""
    is_grouped = op.op_class == "matmul" and op.primitive in GROUPED
    return GroupedWork(op, local, topology.pricing.expert_load) if is_grouped else None


def matrix_work(op: Operation, local: list[float], topology: Topology) -> float:
    """FLOPs of the matrix unit, in whole tiles (derived in `costmodels.operations`)."""
    tile, least = topology.chip.matrix_tile, topology.chip.load_rows
    if groups := grouped_work(op, local, topology):
        return groups.flops(tile, least)
    if len(op.inputs) != 2:
        return op.flops_per_point * prod(local)
    places = [[any(i in dim for dim in use.dims) for use in (*op.inputs, *op.outputs[:1])] for i in range(len(local))]
    size = {"batch": 1.0, "rows": 1.0, "columns": 1.0, "summed": 1.0}
    for n, (left, right, result) in zip(local, places, strict=True):
        role = "batch" if left and right else "columns" if right else "rows"  # rows are also where windows stand
        size[role if result else "summed"] *= n
    rows, columns = size["rows"], size["columns"]
    streamed = min(max(a, least) * tile * ceil(b / tile) for a, b in ((rows, columns), (columns, rows)))
    return op.flops_per_point * size["batch"] * tile * ceil(size["summed"] / tile) * streamed


def inside_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    """Seconds of the collectives within all runs of an operation."""
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
