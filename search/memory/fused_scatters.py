"""Scatters that run inside the kernel that uses their result, though they are not written as elementwise.

A scatter of one element to each row of a constant array is the gradient of a per-row gather, such as the label's logit
in a cross-entropy. Compilers write it as a comparison of the column numbers with the index.
"""

from __future__ import annotations

from math import prod

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Program


def is_inlined(program: Program, operation: int) -> bool:
    """Whether an operation's result takes no memory if only fused operations use it.

    **Arguments:**

    - `operation`: its number.
    """
    return program.operations[operation].op_class == "fused" or operation in _comparisons(program)


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
