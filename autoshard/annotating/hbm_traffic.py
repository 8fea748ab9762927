"""HBM traffic of fused operations: the operands and results that pass through HBM, and their width there.

A chain of fused operations reads its sources and writes its sinks. Its intermediates stay on the chip. Six rules follow the
compilers:

- Elementwise work on stored arrays that only matmuls read, such as weights times their scales, is part of these matmuls
  (`costmodels.program.operand_chains`). They read the stored arrays.
- Views (broadcasts, reshapes, transpositions) and casts have no traffic of their own. A read through a cast has the
  width in HBM: int8 weights that are cast for a matmul are read as int8. A result whose uses are all casts is written
  at the widest of their widths.
- Operations that can run at once read an array once, as parts of one kernel, such as the updates of an optimizer.
- A slice computed by arithmetic is written directly into its stack.
- A stack that a loop updates in place is copied before the loop if its old contents are used elsewhere.
- A sum must end before its result can be used. Operations after it read the values of the chain before it again: a softmax
  reads its logits for the sum and for the quotient. It does not read them again for the maximum, which compilers find in
  the same pass (the TPU compiler as a `reduce-window`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from autoshard.tracing.blocks import Traced
from costmodels.program.on_chip import CARRY
from costmodels.program.operand_chains import operand_chains, read_itemsize
from costmodels.program.program import Operation, Output, Program, Use
from costmodels.program.views import CAST, is_view, uses_through
from search.collector import seldom_collected
from search.memory.views import IN_PLACE, is_slice_of_stack, is_whole_slice


@seldom_collected()
def annotate_traffic(traced: Traced) -> Traced:
    """Gives the operations of a traced function their HBM traffic."""
    return dataclasses.replace(traced, program=with_traffic(traced.program))


def with_traffic(program: Program) -> Program:
    """Gives fused operations their HBM traffic, and all operations the widths of their operands and results."""
    operations, depths = list(program.operations), _Depths(program)
    passes, read = _passes(program), set[tuple[int, tuple[int, int]]]()
    for i, op in enumerate(operations):
        traffic = op.traffic
        if op.op_class == "fused":
            chain = op.flops_per_point and not _is_view(program, op) and i not in operand_chains(program)
            reads = {k: (source, passes[i]) for k, source in _reads(program, depths, i)} if chain else {}
            new = {key: k for k, key in reversed(reads.items()) if key not in read}
            traffic = (*sorted(new.values()), *(_writes(program, op) if chain else ()))
            read.update(new)
        elif _writes_slice(program, op) and _is_made_for(program, op.inputs[1].value):
            traffic = ()
        elif op.primitive == CARRY and _is_copied(program, op):
            traffic = (0, Output(1))
        inputs = tuple(_with_hbm_width(program, use, k in traffic, read=True) for k, use in enumerate(op.inputs))
        outputs = tuple(
            _with_hbm_width(program, use, Output(k) in traffic, read=False) for k, use in enumerate(op.outputs)
        )
        if (traffic, inputs, outputs) != (op.traffic, op.inputs, op.outputs):
            operations[i] = dataclasses.replace(op, traffic=traffic, inputs=inputs, outputs=outputs)
    return dataclasses.replace(program, operations=tuple(operations))


def _writes_slice(program: Program, op: Operation) -> bool:
    """Whether an operation writes a whole slice into a stack."""
    if op.primitive != "dynamic_update_slice" or len(op.inputs) < 2:
        return False
    return is_whole_slice(*(program.values[use.value].shape for use in op.inputs[:2]))


def _is_made_for(program: Program, value: int) -> bool:
    """Whether arithmetic makes an array for one use; further uses must be fused operations."""
    while sum(program.operations[at].op_class != "fused" for at, _ in program.consumers[value]) <= 1:
        op = _producer(program, value)
        if not (_is_view(program, op) and op.inputs):
            return op.op_class in ("fused", "matmul") and bool(op.inputs)
        value = op.inputs[0].value
    return False


def _is_copied(program: Program, carry: Operation) -> bool:
    """Whether the array that a loop updates in place is also used with its old contents."""
    begins = [use.value for use in carry.inputs if use.region == carry.region]
    after = [use.value for use in carry.inputs if use.region != carry.region]
    if not begins or not after or _producer(program, after[0]).primitive not in (*IN_PLACE, CARRY):
        return False
    op = _producer(program, begins[0])
    given = {program.operations[program.arguments[argument]].outputs[0].value for argument, _ in program.donated}
    return (op.op_class == "source" and begins[0] not in given) or len(program.consumers[begins[0]]) > 1


def _reads(program: Program, depths: _Depths, i: int) -> Iterator[tuple[int, int]]:
    """The operands of an operation in a chain that are not on the chip, each with the array that it is a view or cast of."""
    for k, use in enumerate(program.operations[i].inputs):
        source = _producer_through_casts(program, use.value)
        if not _is_fused_result(program, source) or depths.reread(source, i):
            yield k, source


def _passes(program: Program) -> list[tuple[int, int]]:
    """Per operation the most unfused operations on a path to it, and the reductions since; equal ones can be one kernel."""
    passes, made = list[tuple[int, int]](), dict[int, tuple[int, int]]()
    for op in program.operations:
        level, reductions = max((made.get(use.value, (0, 0)) for use in op.inputs), default=(0, 0))
        passes.append((level, reductions))
        for use in op.outputs:
            further = (level, reductions + _reduces(program, op, use))
            made[use.value] = further if op.op_class == "fused" else (level + 1, 0)
    return passes


def _writes(program: Program, op: Operation) -> list[Output]:
    return [Output(k) for k, use in enumerate(op.outputs) if _leaves(program, use.value)]


def _is_view(program: Program, op: Operation) -> bool:
    """Whether an operation is a view, or a cast whose result stays in its block."""
    if op.op_class != "fused" or not op.inputs:
        return False
    return is_view(op) or (op.primitive == CAST and not _leaves_region(program, op.outputs[0].value))


def _leaves_region(program: Program, value: int) -> bool:
    """Whether a value leaves the program, or crosses into, out of or around a region."""
    return any(program.operations[at].op_class in ("sink", "boundary") for at, _ in program.consumers.get(value, ()))


def _producer(program: Program, value: int) -> Operation:
    return program.operations[program.producers[value][0]]


def _is_fused_result(program: Program, value: int) -> bool:
    return _producer(program, value).op_class == "fused"


def _producer_through_casts(program: Program, value: int) -> int:
    """The operand behind any number of views and casts."""
    while _is_view(program, op := _producer(program, value)):
        value = op.inputs[0].value
    return value


def _leaves(program: Program, value: int) -> bool:
    """Whether an operation outside a fused chain uses a value, directly or through views."""
    uses = uses_through(program, value, lambda at: _is_view(program, program.operations[at]))
    return any(program.operations[at].op_class != "fused" for at, _ in uses)


class _Depths:
    """The number of reductions, without maxima and minima, before each value in its chain."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.before: list[int] = []
        self.made: dict[int, int] = {}
        for op in program.operations:
            fused = op.op_class == "fused"
            depth = max((self.made.get(use.value, 0) for use in op.inputs), default=0) if fused else 0
            self.before.append(depth)
            for use in op.outputs:
                self.made[use.value] = depth + _ends_chain(program, op, use) if fused else 0

    def reread(self, value: int, operation: int) -> bool:
        """Whether a value of the chain must be read again, because a reduction ends between it and its use."""
        if _reduces(self.program, _producer(self.program, value), _producer(self.program, value).outputs[0]):
            return False  # a reduction's result is small
        return self.made[value] < self.before[operation]


def _ends_chain(program: Program, op: Operation, result: Use) -> bool:
    """Whether operations after a reduction read again what is before it: not after a maximum or a minimum alone."""
    kept = {factor for dim in result.dims for factor in dim}
    lost = {factor for use in op.inputs for dim in use.dims for factor in dim if factor not in kept}
    extreme = bool(lost) and all(op.factors[factor].kind in ("max", "min") for factor in lost)
    return _reduces(program, op, result) and not extreme


def _reduces(program: Program, op: Operation, result: Use) -> bool:
    """Whether a chain ends here: elements are reduced, sliced, or concatenated from several arrays."""
    if any(factor.kind == "exchanged" for factor in op.factors):
        return True
    if is_slice_of_stack(program, op):
        return False
    kept = {factor for dim in result.dims for factor in dim}
    return any(factor not in kept for use in op.inputs for dim in use.dims for factor in dim)


def _with_hbm_width(program: Program, use: Use, moves: bool, read: bool) -> Use:
    """The use with its width in HBM."""
    own = program.values[use.value].itemsize
    size = (_width_read(program, use.value) if read else _width_written(program, use.value)) if moves else own
    return dataclasses.replace(use, stored_itemsize=size) if size != own else use


def _width_read(program: Program, value: int) -> float:
    source = _producer_through_casts(program, value)
    if program.producers[source][0] in operand_chains(program):
        return read_itemsize(program, value)
    in_hbm = _producer(program, source).op_class not in ("fused", "matmul")
    stored = program.values[source].itemsize
    return stored if in_hbm else min(stored, program.values[value].itemsize)


def _width_written(program: Program, value: int) -> float:
    """The widest type that any use needs, seen through casts."""
    users = [program.operations[at] for at, _ in program.consumers.get(value, ())]
    own = program.values[value].itemsize
    casts = [op for op in users if op.primitive == CAST and _is_view(program, op)]
    if not users or len(casts) < len(users):
        return own
    return min(own, max(program.values[op.outputs[0].value].itemsize for op in casts))
