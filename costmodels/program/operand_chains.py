"""Elementwise work on stored arrays that a matmul does while it reads them: weights times their scales, masks of weights.

A compiler computes such an operand tile by tile and writes it nowhere, also if it is large. Each matmul that reads it does the
work again. In the cycles of libtpu 0.0.42, a matmul of 16 rows with 64 Mi int8 weights times their scales takes 124 µs on v5e,
little more than the reading of the weights, and one with the sum of two such arrays in bfloat16 435 µs.
"""

from __future__ import annotations

from math import prod

from costmodels.program.analysis import cached_analysis
from costmodels.program.grouped import grouped
from costmodels.program.program import Operation, Program, Use
from costmodels.program.views import CAST, is_view

_STORED = ("loop_slice", "loop_constant")
"""Primitives of loops whose results are arrays in memory."""
_SMALL = 1 / 8
"""The most elements of an operand that may come from anywhere, relative to those of the result: scales, offsets."""
_LONGEST = 8
"""The most operations of a chain: longer ones are left to the vector unit's own loops."""


@cached_analysis
def operand_chains(program: Program) -> frozenset[int]:
    """The operations that are elementwise work on stored arrays, and whose results only matmuls read.

    Between the work and a matmul there may be casts and transpositions. What is reshaped first is written.
    """
    lengths = _chain_lengths(program)
    inside: set[int] = set()
    for i in reversed(range(len(program.operations))):
        op = program.operations[i]
        users = [at for use in op.outputs for at, _ in program.consumers.get(use.value, ())]
        is_link = lengths[i] or op.primitive in (CAST, "transpose")
        if is_link and all(at in inside or _multiplies(program.operations[at]) for at in users):
            inside.add(i)
    chains: set[int] = set()
    for i in sorted(inside):
        op = program.operations[i]
        long = [_origin(program, use.value) for use in op.inputs if lengths[i] and not _is_small(program, op, use)]
        used = any(program.consumers.get(use.value) for use in op.outputs)
        if long and used and all(not lengths[at] or at in chains for at in long):
            chains.add(i)
    return frozenset(chains)


def _chain_lengths(program: Program) -> list[int]:
    """Per operation the number of elementwise ones between stored arrays and its result; 0 for anything else."""
    lengths: list[int] = []
    found: dict[int, int | None] = {}  # per value: 0 if it is stored, the length if a chain makes it, else None
    for op in program.operations:
        before = [found.get(use.value) for use in op.inputs]
        length: int | None = None
        if op.op_class == "source" or op.primitive in _STORED:
            length = 0
        elif _is_passed(op):
            length = before[0]
        elif _is_elementwise(op):
            long = [n for use, n in zip(op.inputs, before, strict=True) if not _is_small(program, op, use)]
            if long and None not in long:
                length = 1 + max(n for n in long if n is not None)
        length = None if length is not None and length > _LONGEST else length
        found |= dict.fromkeys((use.value for use in op.outputs), length)
        lengths.append((length or 0) * _is_elementwise(op))
    return lengths


def read_itemsize(program: Program, value: int) -> float:
    """The bytes that are read of stored arrays for an element of the result of a chain."""
    producer = program.producers[value][0]
    op, elements = program.operations[producer], prod(program.values[value].shape)
    if producer not in operand_chains(program) and not _is_passed(op):
        return program.values[value].itemsize
    read = op.inputs[:1] if _is_passed(op) else op.inputs
    each = ((read_itemsize(program, use.value), prod(program.values[use.value].shape)) for use in read)
    return sum(size * count for size, count in each) / max(elements, 1)


def _is_elementwise(op: Operation) -> bool:
    """Whether an operation has FLOPs for each element of its only result, and no operand a dimension that it lacks."""
    if op.op_class != "fused" or not op.flops_per_point or len(op.outputs) != 1 or _is_passed(op):
        return False
    kept = {factor for dim in op.outputs[0].dims for factor in dim}
    used = {factor for use in op.inputs for dim in use.dims for factor in dim}
    return bool(op.inputs) and used <= kept and all(factor.kind == "parallel" for factor in op.factors)


def _is_small(program: Program, op: Operation, use: Use) -> bool:
    """Whether an operand has few elements, before it is broadcast, of those of the result."""
    value = program.operations[_origin(program, use.value)].outputs[0].value
    return prod(program.values[value].shape) <= _SMALL * prod(program.values[op.outputs[0].value].shape)


def _origin(program: Program, value: int) -> int:
    """The operation that makes what a value is a view or a cast of."""
    while _is_passed(op := program.operations[at := program.producers[value][0]]):
        value = op.inputs[0].value
    return at


def _is_passed(op: Operation) -> bool:
    """Whether an operation is a view or a cast."""
    return bool(op.inputs) and (is_view(op) or (op.op_class == "fused" and op.primitive == CAST))


def _multiplies(op: Operation) -> bool:
    return op.op_class == "matmul" and grouped(op) is None and len(op.inputs) == 2
