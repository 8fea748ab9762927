"""View operations (transpose, reshape, squeeze, slice of a stack) that allocate no memory of their own.

A transposition or a reshape neither computes nor moves anything if its users read the array in the other order:
compilers give a product its operands' dimensions in the order in which they are stored. Nor does a slice of a stack
that is complete except for its index: its users read it in the stack. A result of the program, a loop carry and an
array updated in place are arrays of their own. So is a transposed array of which a gather picks, if others read the
array as it is: libtpu 0.0.50 copies it.
"""

from __future__ import annotations

from math import prod

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program
from costmodels.program.views import BROADCASTS, RENAMES, uses_through

IN_PLACE = (
    "dynamic_update_slice",
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
)
"""Primitives that may write into their first operand."""


@cached_analysis
def views(program: Program) -> frozenset[int]:
    """The operations whose result is a view of their operand."""
    found: set[int] = set()
    picked: set[int] = set()
    for i in reversed(range(len(program.operations))):
        op = program.operations[i]
        if op.primitive == "gather":
            picked.add(op.inputs[0].value)
        if (
            op.primitive == "transpose"
            and op.outputs[0].value in picked
            and len(program.consumers[op.inputs[0].value]) > 1
        ):
            continue
        shows = _renames(program, op) or (is_slice_of_stack(program, op) and _is_read_in_time(program, op, found))
        if shows and _is_only_read(program, op, found):
            found.add(i)
            if op.outputs[0].value in picked:
                picked.add(op.inputs[0].value)
    return frozenset(found)


def _shows(program: Program, op: Operation) -> bool:
    return _renames(program, op) or is_slice_of_stack(program, op)


def is_slice_of_stack(program: Program, op: Operation) -> bool:
    """Whether an operation slices an array at one index, or several, of its leading dimensions."""
    if op.primitive != "dynamic_slice" or op.op_class != "fused":
        return False
    return is_whole_slice(*(program.values[use.value].shape for use in (op.inputs[0], op.outputs[0])))


def is_whole_slice(stack: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a part of an array of this shape has one index in the leading dimensions, and is complete in others."""
    return any(stack[k:] == part[k:] and set(part[:k]) <= {1} for k in range(len(stack) + 1))


def _is_read_in_time(program: Program, op: Operation, known: set[int]) -> bool:
    """Whether a slice is read before anything overwrites its source."""
    uses = program.consumers[op.inputs[0].value]
    written = [at for at, position in uses if position == 0 and program.operations[at].primitive in IN_PLACE]
    return not written or _last_read(program, op, known) < min(written)


def _last_read(program: Program, op: Operation, known: set[int]) -> int:
    return max((at for at, _ in uses_through(program, op.outputs[0].value, known.__contains__)), default=-1)


def _renames(program: Program, op: Operation) -> bool:
    if op.primitive not in RENAMES | BROADCASTS or op.op_class != "fused" or len(op.inputs) != 1:
        return False
    given, made = (program.values[use.value] for use in (*op.inputs, *op.outputs))
    return prod(given.shape) == prod(made.shape) and given.itemsize == made.itemsize


def _is_only_read(program: Program, op: Operation, known: set[int]) -> bool:
    """Whether only reading operations use a result; `known` are the views among those after it."""
    return all(
        at in known
        or (
            not _shows(program, program.operations[at])
            and program.operations[at].op_class in ("matmul", "fused", "memory")
            and (position > 0 or program.operations[at].primitive not in IN_PLACE)
        )
        for at, position in program.consumers.get(op.outputs[0].value, ())
    )
