"""Which operands and results of fused operations pass through HBM."""

from __future__ import annotations

import dataclasses

from costmodels.program import Operation, Program


def with_traffic(program: Program) -> Program:
    """Gives fused operations their HBM traffic: a chain of them reads its sources and writes its sinks.

    A source is anything that no fused operation made (a matmul's result, an argument, a loop's slice), a sink anything that
    an operation outside the chain uses; views in between (broadcasts, reshapes, transpositions) are looked through.
    """
    operations = list(program.operations)
    for i, op in enumerate(operations):
        if op.op_class == "fused" and op.flops_per_point:
            reads = [k for k, use in enumerate(op.inputs) if not _fused(program, _seen_through(program, use.value))]
            writes = [-1 - k for k, use in enumerate(op.outputs) if _leaves(program, use.value)]
            operations[i] = dataclasses.replace(op, traffic=(*reads, *writes))
    return dataclasses.replace(program, operations=tuple(operations))


def _is_view(op: Operation) -> bool:
    return op.op_class == "fused" and not op.flops_per_point and bool(op.inputs)


def _fused(program: Program, value: int) -> bool:
    return program.operations[program.producers[value][0]].op_class == "fused"


def _seen_through(program: Program, value: int) -> int:
    """The value that a view shows."""
    while _is_view(op := program.operations[program.producers[value][0]]):
        value = op.inputs[0].value
    return value


def _leaves(program: Program, value: int) -> bool:
    """Whether an operation outside a fused chain uses a value, directly or by way of views."""
    users = [program.operations[at] for at, _ in program.consumers.get(value, ())]
    return any(
        any(_leaves(program, use.value) for use in op.outputs) if _is_view(op) else op.op_class != "fused"
        for op in users
    )
