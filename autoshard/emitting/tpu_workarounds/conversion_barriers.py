"""Scheduling barriers that delay weight conversions until their matmul, so that the planned peak memory holds.

A value computed from arguments alone, such as a weight in another type, can be computed at any time. The TPU compiler's
scheduler fills the time of collectives with such operations, layers ahead, within the chip's memory but above the plan's
peak. A barrier delays each until the other operand of its matmul exists.
"""

from __future__ import annotations

from collections.abc import Iterator

from costmodels.program.program import Operation, Program
from search.memory.views import views


def find_conversion_barriers(program: Program) -> dict[int, int]:
    """Per operation to delay, the value to wait for: the other operand of its matmul, if that is made before it."""
    given, made = _argument_values(program)
    known = given | made
    found: dict[int, int] = {}
    for at, op in program.matmuls():
        others = [use.value for use in op.inputs if use.value not in known]
        for first in (
            each for use in op.inputs if use.value in made for each in first_operands(program, use.value, given)
        ):
            value = next((value for value in others if program.producers[value][0] < first), None)
            if value is not None and _is_in_one_region(program, first, at, value):
                found.setdefault(first, value)
    return found


def _argument_values(program: Program) -> tuple[set[int], set[int]]:
    """The values that are arguments or views of them, and those that fused operations compute from them alone."""
    given: set[int] = set()
    made: set[int] = set()
    for i, op in enumerate(program.operations):
        operands = [use.value for use in op.inputs]
        if op.op_class == "source" or (i in views(program) and operands[0] in given):
            given.update(use.value for use in op.outputs)
        elif op.op_class == "fused" and operands and all(value in given or value in made for value in operands):
            made.update(use.value for use in op.outputs)
    return given, made


def first_operands(program: Program, value: int, given: set[int]) -> Iterator[int]:
    """The operations with arguments as operands from which a value is computed, each once."""
    open_, seen = [value], {value}
    while open_:
        at = program.producers[open_.pop()][0]
        operands = [use.value for use in program.operations[at].inputs]
        if any(operand in given for operand in operands):
            yield at
        fresh = [operand for operand in operands if operand not in given and operand not in seen]
        seen.update(fresh)
        open_.extend(fresh)


def _is_in_one_region(program: Program, first: int, product: int, value: int) -> bool:
    """Whether all are in one region, which a barrier requires."""
    operations: tuple[Operation, ...] = program.operations
    return operations[first].region == operations[product].region == program.values[value].region
