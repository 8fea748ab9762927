"""Residents of on-chip memory: values that cause no HBM traffic between two operations.

A compiler keeps the results of arithmetic there if arithmetic uses them. A loop carry stays too if every iteration
recomputes it by arithmetic, as a residual or a sum of gradients, and if it does not begin as a donated argument: a donated
buffer is updated in place in HBM. Values that all iterations only read, and values that are updated or sliced in place, such
as a cache of keys and values, do not stay.

All carries of a loop share the room: each of $k$ such arrays may be $1/k$ of the size that one alone may have. (Compiled
for v5e, loops that carry one array of up to 96 MiB keep it; of 16 or 32 sums of gradients of 8 MiB each they keep 11 and
10; of donated ones none.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from costmodels.program.analysis import cached_analysis
from costmodels.program.operand_chains import operand_chains
from costmodels.program.program import Program
from costmodels.program.views import CAST, is_view, uses_through

CARRY = "loop_carry"
"""The primitive of a loop carry. Operands: the initial value and the value of an iteration. Results: the carry inside the loop,
and the final value."""

_ARITHMETIC = ("matmul", "fused")


@cached_analysis
def sharers(program: Program, value: int) -> int:
    """The number of arrays that share the on-chip memory with a value, itself included; 0 if it never stays there."""
    made, users = _producer_through_views(program, value), [*_users(program, value)]
    if made is None or not users or made in operand_chains(program):
        return 0
    carries = _carries(program)
    if any(program.operations[at].primitive == CARRY for at in (made, *users)):
        users = _without_stacks(program, users)
    room = [carries.get(at, int(_computes(program, at))) for at in (made, *users)]
    return max(room) if all(room) else 0


@cached_analysis
def _carries(program: Program) -> dict[int, int]:
    """Per carry that may stay on the chip, the number of such carries of its loop."""
    carries = [i for i, op in enumerate(program.operations) if op.primitive == CARRY]
    found: set[int] = set()
    for i in sorted(carries, key=lambda i: -_depth(program, _loop(program, i))):
        if _stays_on_chip(program, i, found):
            found.add(i)
    room = Counter(_loop(program, i) for i in found if program.operations[i].factors)
    return {i: max(room[_loop(program, i)], 1) for i in found}


def _stays_on_chip(program: Program, carry: int, known: set[int]) -> bool:
    """Whether arithmetic computes and uses a carry; an inner loop may take it over if it is `known` to keep it."""
    op, loop = program.operations[carry], _loop(program, carry)
    after = [use.value for use in op.inputs if use.region == loop]
    if not after or _is_donated(program, carry):
        return False
    makers = [_producer_through_views(program, value) for value in after]
    users = [at for value in (op.outputs[0].value, *after) for at in _users(program, value) if at != carry]
    within = {at for at in known if program.operations[at].region == loop}
    return all(
        at is not None and (_computes(program, at) or at in within)
        for at in (*makers, *_without_stacks(program, users))
    )


def _without_stacks(program: Program, users: list[int]) -> list[int]:
    """The users without the stacks of a loop's results per iteration, into which an array is copied from any memory."""
    return [at for at in users if program.operations[at].primitive != "loop_stack"]


def _is_donated(program: Program, carry: int) -> bool:
    """Whether a carry begins as a donated argument."""
    at: int | None = carry
    while at is not None and (op := program.operations[at]).primitive == CARRY:
        begins = [use.value for use in op.inputs if use.region == op.region]
        at = _producer_through_views(program, begins[0]) if begins else None
    return any(at == program.arguments[argument] for argument, _ in program.donated)


def _loop(program: Program, carry: int) -> int:
    """The region of the loop that has a carry."""
    return program.operations[carry].outputs[0].region


def _depth(program: Program, region: int) -> int:
    parent = program.regions[region].parent
    return 0 if parent is None else 1 + _depth(program, parent)


def _computes(program: Program, operation: int) -> bool:
    return program.operations[operation].op_class in _ARITHMETIC


def _producer_through_views(program: Program, value: int) -> int | None:
    """The producer of the array that a value is a view or a cast of; None if there is none."""
    while value in program.producers:
        at = program.producers[value][0]
        op = program.operations[at]
        cast = op.op_class == "fused" and op.primitive == CAST
        if not (is_view(op) or cast) or not op.inputs:
            return at
        value = op.inputs[0].value
    return None


def _users(program: Program, value: int) -> Iterator[int]:
    """The operations that use a value or a view of it."""
    for at, _ in uses_through(program, value, lambda at: is_view(program.operations[at])):
        yield at
