"""Arrays that libtpu converts to a narrower type before a loop that reads them only in that type.

A loop's constant, or the slices that its iterations take of a stack, are converted at once, before the outermost loop in
which the whole array does not change. Measured with libtpu 0.0.42 on v5e:

- Of float32 weights [16, 4096, 4096] that a loop casts to bfloat16, 50 arrays instead of 34, with or without a barrier
  before the conversion. If the loop also piles up the converted slices, they are not converted twice.
- A product of float32 operands at default precision multiplies them as bfloat16. `tanh(c @ w)` over w of [3, 8192, 8192]
  takes 1,920 MiB; at precision "high" or "highest" 1,536. Out of loops a product converts its operands in its own kernel.
- If the loop also reads the slices as they are, such as in a sum, nothing is converted before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program
from costmodels.program.views import CAST, RENAMES, uses_through
from search.memory.views import is_slice_of_stack

ROUNDED_BYTES = 2
"""Bytes of a bfloat16 element."""


class Converted(NamedTuple):
    """An array that is converted before a loop, with its life.

    - `whole`, `part`: its value before the loop, and the value in the loop.
    - `bytes`: those of the converted array.
    - `first`, `last`: the loop's first and last operation.
    """

    whole: int
    part: int
    bytes: float
    first: int
    last: int


@cached_analysis
def conversions(program: Program) -> tuple[Converted, ...]:
    """The arrays that are converted before loops."""
    found: dict[tuple[int, int, float], Converted] = {}
    for value, itemsize in _converted_in_loops(program):
        part, whole, region = _outermost(program, value)
        if part is not None:
            inside = [i for i, each in enumerate(program.operations) if region in program.enclosing(each.region)]
            key = program.values[whole].origin or whole, region, itemsize
            held = itemsize * prod(program.values[whole].shape)
            found.setdefault(key, Converted(whole, part, held, inside[0], inside[-1]))
    return tuple(found.values())


def _converted_in_loops(program: Program) -> Iterator[tuple[int, float]]:
    """The values that operations of loops convert, and the bytes of an element after the conversion."""
    for op in program.operations:
        if all(program.regions[region].kind != "loop" for region in program.enclosing(op.region)):
            continue
        for k, use in enumerate(op.inputs):
            itemsize = _narrowed_bytes(program, op, k)
            if itemsize and _is_only_narrowed(program, use.value):
                yield use.value, itemsize


def _narrowed_bytes(program: Program, op: Operation, operand: int) -> float:
    """The bytes of an element of an operand in the narrower type that an operation reads; 0 if it reads it as it is."""
    if operand in op.rounded:
        return ROUNDED_BYTES
    if op.primitive != CAST:
        return 0
    made, given = (program.values[each.value].itemsize for each in (op.outputs[0], op.inputs[operand]))
    return made if made < given else 0


def _is_only_narrowed(program: Program, value: int) -> bool:
    """Whether all that read an operand, or the slice of which it is a view, do so in a narrower type, not piled up."""
    made_by = program.operations[program.producers[value][0]]
    while made_by.primitive in RENAMES and made_by.inputs:
        value = made_by.inputs[0].value
        made_by = program.operations[program.producers[value][0]]
    return _are_narrowed(program, value)


def _are_narrowed(program: Program, value: int) -> bool:
    for at, position in uses_through(program, value, lambda at: program.operations[at].primitive in RENAMES):
        op = program.operations[at]
        if op.primitive == CAST:
            users = (program.operations[user] for user, _ in program.consumers.get(op.outputs[0].value, ()))
            narrowed = bool(_narrowed_bytes(program, op, 0)) and all(user.primitive != "loop_stack" for user in users)
        else:
            narrowed = position in op.rounded
        if not narrowed:
            return False
    return True


def _outermost(program: Program, value: int) -> tuple[int | None, int, int]:
    """The whole array of which a value is a slice or a view, outside all loops in which it does not change.

    Returns the value inside the outermost of these loops (None if there is no loop), the array, and that loop's region.
    """
    part, whole, region = None, value, 0
    while True:
        op = program.operations[program.producers[value][0]]
        if op.primitive in ("loop_slice", "loop_constant"):
            part, whole, region = value, op.inputs[0].value, program.values[value].region
        elif not (op.primitive in RENAMES and op.inputs) and not _is_slice_of_constant(program, op):
            return part, whole, region
        value = op.inputs[0].value


def _is_slice_of_constant(program: Program, op: Operation) -> bool:
    """Whether an operation takes one index of a stack that does not change in its loop."""
    if not is_slice_of_stack(program, op):
        return False
    return program.operations[program.producers[op.inputs[0].value][0]].primitive == "loop_constant"
