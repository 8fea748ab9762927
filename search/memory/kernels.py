"""Fused kernels: what runs inside them, and what they do to the arrays that they read: reduce them, or write over them.

A scatter of one element to each row of a constant array runs inside the kernel that uses its result, though it is not written
as elementwise. It is the gradient of a per-row gather, such as the label's logit in a cross-entropy. Compilers write it as a
comparison of the column numbers with the index.
"""

from __future__ import annotations

from math import prod

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program, Use
from costmodels.program.views import PARTS
from search.memory.views import IN_PLACE

REDUCTIONS = ("reduce_", "arg")
"""How the names of reductions begin; each is a kernel of its own before those that use its result."""


def is_in_place(op: Operation, position: int) -> bool:
    """Whether an operation may write its result where it reads an operand."""
    if op.primitive in IN_PLACE or op.primitive == "loop_carry":
        return position == 0
    if op.op_class != "fused" or op.primitive in PARTS or op.primitive.startswith(("cum", *REDUCTIONS)):
        return False
    return _elements(op, op.inputs[position]) == _elements(op, op.outputs[0])


def _elements(op: Operation, use: Use) -> list[int]:
    """The order of an array's elements: its factors, outermost first."""
    return [factor for dim in use.dims for factor in dim if op.factors[factor].size > 1]


def is_inlined(program: Program, operation: int) -> bool:
    """Whether an operation's result takes no memory if only fused operations use it.

    **Arguments:**

    - `operation`: its number.
    """
    op = program.operations[operation]
    return op.op_class == "fused" or (op.primitive.startswith("scatter") and operation in _comparisons(program))


@cached_analysis
def _comparisons(program: Program) -> frozenset[int]:
    found = (i for i, op in enumerate(program.operations) if op.primitive.startswith("scatter"))
    return frozenset(i for i in found if _is_comparison(program, i))


def _is_comparison(program: Program, operation: int) -> bool:
    op = program.operations[operation]
    if len(op.inputs) != 3:
        return False
    onto, indices, updates = op.inputs
    of_one_number = program.operations[program.producers[onto.value][0]]
    if of_one_number.primitive != "broadcast_in_dim" or of_one_number.inputs:
        return False
    rows = {factor for dim in onto.dims for factor in dim}
    one_each = all(factor in rows or op.factors[factor].size == 1 for dim in updates.dims for factor in dim)
    numbers, places = program.values[updates.value].shape, program.values[indices.value].shape[:-1]
    return one_each and prod(numbers) == prod(places)
