"""Arrays of conditionals: XLA lends a branch the arrays that it reads, and its result lies where the conditional's lies.

If a branch returns an array of the code around it, the conditional begins with a copy of that array, and its result takes
the copy. Other branches may write into the copy, but do not form other results there. Without such a branch, one that
writes into an array around it has a copy of its own. Measured with libtpu 0.0.42 on v5e,
in arrays of one size each:

| `lax.cond` of arguments `a` and `b`, by its branches | arrays |
|---|---|
| `a @ b + b` or `b @ a` | 3 |
| `a @ b` or `a` | 4; of donated `a` 3 |
| `a` with some rows written, or `a` | 3; of donated `a` 2 |
| `a` with some rows written, or `b @ a` | 4 |
"""

from __future__ import annotations

from collections.abc import Iterator

from costmodels.program.program import Operation, Program
from search.memory.views import IN_PLACE

BRANCH_CONSTANT = "branch_constant"
"""The operation through which a branch gets an array of the code around it."""
JOIN = "branch_join"


def is_read_by_branch(program: Program, op: Operation) -> bool:
    """Whether an operation gives a branch an array that the branch reads, and does not return."""
    if op.primitive != BRANCH_CONSTANT:
        return False
    return all(program.operations[at].primitive != JOIN for at, _ in program.consumers.get(op.outputs[0].value, ()))


def is_lent(program: Program, op: Operation) -> bool:
    """Whether the first operand of an update belongs to the code around the branch."""
    return _maker(program, op.inputs[0].value).primitive == BRANCH_CONSTANT


def results_of_branches(program: Program, op: Operation) -> Iterator[int]:
    """The results of branches that lie in the result of a conditional, if the operation forms one."""
    if op.primitive != JOIN:
        return
    makers = {use.value: _maker(program, use.value) for use in op.inputs}
    is_copied = any(maker.primitive == BRANCH_CONSTANT for maker in makers.values())
    for value, maker in makers.items():
        is_made = maker.op_class not in ("source", "boundary") and len(program.consumers[value]) == 1
        overwrites = maker.primitive in IN_PLACE and is_lent(program, maker)
        if maker.primitive == BRANCH_CONSTANT or (is_made and overwrites == is_copied):
            yield value


def _maker(program: Program, value: int) -> Operation:
    return program.operations[program.producers[value][0]]
