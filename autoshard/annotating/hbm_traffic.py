"""Which operands and results of fused operations pass through HBM, and how wide they lie there.

A chain of fused operations reads its sources and writes its sinks; what it computes in between stays on the chip. Five
rules make it what compilers do:

- Views (broadcasts, reshapes, transpositions) and casts move nothing of their own. Whoever reads through a cast reads
  what lies in HBM: int8 weights that are cast for a matmul are read as int8. A result that is only used cast is written
  as narrow as it is used.
- A slice of a stack that arithmetic makes is written there at once.
- A stack that a loop updates in place is copied before the loop if it is needed afterwards.
- A reduction must end before anything can use it. What the operations after it use of the chain before it is read once
  more: a softmax reads its logits for the maximum, for the sum and for the quotient.
"""

from __future__ import annotations

import dataclasses

from autoshard.tracing.blocks import Traced
from costmodels.program.on_chip import CARRY
from costmodels.program.program import Operation, Program, Use
from costmodels.program.views import CAST, is_view
from search.memory.views import IN_PLACE, is_slice_of_stack, is_whole_slice


def annotate_traffic(traced: Traced) -> Traced:
    """Gives the operations of a traced function their HBM traffic."""
    return dataclasses.replace(traced, program=with_traffic(traced.program))


def with_traffic(program: Program) -> Program:
    """Gives fused operations their HBM traffic, and all operations the width of what they read and write."""
    operations, depths = list(program.operations), _Depths(program)
    for i, op in enumerate(operations):
        traffic = op.traffic
        if op.op_class == "fused":
            chain = op.flops_per_point and not _is_view(program, op)
            traffic = (*_reads(program, depths, i, op), *_writes(program, op)) if chain else ()
        elif _writes_slice(program, op) and _is_made_for(program, op.inputs[1].value):
            traffic = ()
        elif op.primitive == CARRY and _is_copied(program, op):
            traffic = (0, -2)
        inputs = tuple(_stored(program, use, k in traffic, read=True) for k, use in enumerate(op.inputs))
        outputs = tuple(_stored(program, use, -1 - k in traffic, read=False) for k, use in enumerate(op.outputs))
        operations[i] = dataclasses.replace(op, traffic=traffic, inputs=inputs, outputs=outputs)
    return dataclasses.replace(program, operations=tuple(operations))


def _writes_slice(program: Program, op: Operation) -> bool:
    """Whether an operation writes a slice into a stack, all of it."""
    if op.primitive != "dynamic_update_slice" or len(op.inputs) < 2:
        return False
    return is_whole_slice(*(program.values[use.value].shape for use in op.inputs[:2]))


def _is_made_for(program: Program, value: int) -> bool:
    """Whether arithmetic makes an array for one use, and nothing but what is fused with that uses it beside."""
    while sum(program.operations[at].op_class != "fused" for at, _ in program.consumers[value]) <= 1:
        op = _producer(program, value)
        if not (_is_view(program, op) and op.inputs):
            return op.op_class in ("fused", "matmul") and bool(op.inputs)
        value = op.inputs[0].value
    return False


def _is_copied(program: Program, carry: Operation) -> bool:
    """Whether what a loop updates in place is an array that is needed as it was."""
    begins = [use.value for use in carry.inputs if use.region == carry.region]
    after = [use.value for use in carry.inputs if use.region != carry.region]
    if not begins or not after or _producer(program, after[0]).primitive not in (*IN_PLACE, CARRY):
        return False
    op = _producer(program, begins[0])
    given = {program.operations[program.arguments[argument]].outputs[0].value for argument, _ in program.donated}
    return (op.op_class == "source" and begins[0] not in given) or len(program.consumers[begins[0]]) > 1


def _reads(program: Program, depths: _Depths, i: int, op: Operation) -> list[int]:
    return [
        k
        for k, use in enumerate(op.inputs)
        if not _fused(program, source := _seen_through(program, use.value)) or depths.reread(source, i)
    ]


def _writes(program: Program, op: Operation) -> list[int]:
    return [-1 - k for k, use in enumerate(op.outputs) if _leaves(program, use.value)]


def _is_view(program: Program, op: Operation) -> bool:
    """Whether an operation only shows its operand: a view, or a cast of what other operations use."""
    if op.op_class != "fused" or not op.inputs:
        return False
    return is_view(op) or (op.primitive == CAST and not _returned(program, op.outputs[0].value))


def _returned(program: Program, value: int) -> bool:
    """Whether a value leaves the program or goes round a loop as it is."""
    return any(program.operations[at].op_class in ("sink", "boundary") for at, _ in program.consumers.get(value, ()))


def _producer(program: Program, value: int) -> Operation:
    return program.operations[program.producers[value][0]]


def _fused(program: Program, value: int) -> bool:
    return _producer(program, value).op_class == "fused"


def _seen_through(program: Program, value: int) -> int:
    """The value that a view shows."""
    while _is_view(program, op := _producer(program, value)):
        value = op.inputs[0].value
    return value


def _leaves(program: Program, value: int) -> bool:
    """Whether an operation outside a fused chain uses a value, directly or by way of views."""
    users = [program.operations[at] for at, _ in program.consumers.get(value, ())]
    return any(
        any(_leaves(program, use.value) for use in op.outputs) if _is_view(program, op) else op.op_class != "fused"
        for op in users
    )


class _Depths:
    """How many reductions stand before a value in its chain."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.before: list[int] = []
        self.made: dict[int, int] = {}
        for op in program.operations:
            fused = op.op_class == "fused"
            depth = max((self.made.get(use.value, 0) for use in op.inputs), default=0) if fused else 0
            self.before.append(depth)
            for use in op.outputs:
                self.made[use.value] = depth + _reduces(program, op, use) if fused else 0

    def reread(self, value: int, operation: int) -> bool:
        """Whether a value of the chain must be read again, as a reduction ends between it and its use."""
        if _reduces(self.program, _producer(self.program, value), _producer(self.program, value).outputs[0]):
            return False  # one number where there were many
        return self.made[value] < self.before[operation]


def _reduces(program: Program, op: Operation, result: Use) -> bool:
    """Whether a chain ends here: elements are summed up, cut out, or put together of several arrays."""
    if any(factor.kind == "exchanged" for factor in op.factors):
        return True
    if is_slice_of_stack(program, op):
        return False
    kept = {factor for dim in result.dims for factor in dim}
    return any(factor not in kept for use in op.inputs for dim in use.dims for factor in dim)


def _stored(program: Program, use: Use, moves: bool, read: bool) -> Use:
    """The use with the width at which it lies in HBM."""
    own = program.values[use.value].itemsize
    size = (_width_read(program, use.value) if read else _width_written(program, use.value)) if moves else own
    return dataclasses.replace(use, stored_itemsize=size) if size != own else use


def _width_read(program: Program, value: int) -> float:
    source = _seen_through(program, value)
    in_hbm = _producer(program, source).op_class not in ("fused", "matmul")
    stored = program.values[source].itemsize
    return stored if in_hbm else min(stored, program.values[value].itemsize)


def _width_written(program: Program, value: int) -> float:
    """The widest that any use wants it, seen through casts."""
    users = [program.operations[at] for at, _ in program.consumers.get(value, ())]
    own = program.values[value].itemsize
    casts = [op for op in users if op.primitive == CAST and _is_view(program, op)]
    if not users or len(casts) < len(users):
        return own
    return min(own, max(program.values[op.outputs[0].value].itemsize for op in casts))
