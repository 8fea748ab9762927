"""Which arrays may stay in a chip's own memory, and how many at once: they pass through no HBM.

A compiler keeps there what arithmetic makes and arithmetic uses. An array that goes round a loop stays too if every round
makes it anew by arithmetic, as a residual or a sum of gradients, and if no result takes the memory of the argument that it
began as: a donated buffer is updated where it lies. What all rounds only read, and what is updated or sliced in place, as
a cache of keys and values, does not.

All that a loop carries lies there at once, and shares the room: of $k$ such arrays each may be $1/k$ of what one alone may
be. (Compiled for v5e, loops that carry one array of up to 96 MiB keep it; of 16 or 32 sums of gradients of 8 MiB each they
keep 11 and 10; of donated ones none.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from costmodels.program.program import Operation, Program

CAST = "convert_element_type"
"""The primitive that changes a type: it moves nothing of its own."""

CARRY = "loop_carry"
"""The primitive of what goes round a loop: what enters it and what a round makes go in, a round's own and the last come out."""

_ARITHMETIC = ("matmul", "fused")


def sharers(program: Program, value: int) -> int:
    """Among how many arrays that lie on the chip at once an array may be one; 0 if it passes through HBM, however small."""
    made, users = _made_by(program, value), [*_users(program, value)]
    if made is None or not users:
        return 0
    carries = _carries(program)
    if any(program.operations[at].primitive == CARRY for at in (made, *users)):
        users = _but_stacks(program, users)
    room = [carries.get(at, int(_computes(program, at))) for at in (made, *users)]
    return max(room) if all(room) else 0


def _carries(program: Program) -> dict[int, int]:
    """Per carry that may stay on the chip, how many such arrays its loop has."""
    key = ("carries on the chip",)
    if key not in program.memo:
        carries = [i for i, op in enumerate(program.operations) if op.primitive == CARRY]
        found: set[int] = set()
        for i in sorted(carries, key=lambda i: -_depth(program, _loop(program, i))):
            if _goes_round_on_the_chip(program, i, found):
                found.add(i)
        room = Counter(_loop(program, i) for i in found if program.operations[i].factors)
        program.memo[key] = {i: max(room[_loop(program, i)], 1) for i in found}
    return program.memo[key]


def _goes_round_on_the_chip(program: Program, carry: int, known: set[int]) -> bool:
    """Whether arithmetic makes and uses what goes round; a loop within may take it over if it is `known` to keep it."""
    op, loop = program.operations[carry], _loop(program, carry)
    after = [use.value for use in op.inputs if use.region == loop]
    if not after or _donated(program, carry):
        return False
    makers = [_made_by(program, value) for value in after]
    users = [at for value in (op.outputs[0].value, *after) for at in _users(program, value) if at != carry]
    within = {at for at in known if program.operations[at].region == loop}
    return all(
        at is not None and (_computes(program, at) or at in within) for at in (*makers, *_but_stacks(program, users))
    )


def _but_stacks(program: Program, users: list[int]) -> list[int]:
    """Without the loops' stacks of what each round makes, to which an array is copied wherever it lies."""
    return [at for at in users if program.operations[at].primitive != "loop_stack"]


def _donated(program: Program, carry: int) -> bool:
    """Whether what goes round began as an argument whose memory a result takes."""
    at: int | None = carry
    while at is not None and (op := program.operations[at]).primitive == CARRY:
        begins = [use.value for use in op.inputs if use.region == op.region]
        at = _made_by(program, begins[0]) if begins else None
    return any(at == program.arguments[argument] for argument, _ in program.donated)


def _loop(program: Program, carry: int) -> int:
    """The region that an array goes round in."""
    return program.operations[carry].outputs[0].region


def _depth(program: Program, region: int) -> int:
    parent = program.regions[region].parent
    return 0 if parent < 0 else 1 + _depth(program, parent)


def _computes(program: Program, operation: int) -> bool:
    return program.operations[operation].op_class in _ARITHMETIC


def _shows(op: Operation) -> bool:
    """Whether an operation is a view."""
    return op.op_class == "fused" and not op.flops_per_point


def _made_by(program: Program, value: int) -> int | None:
    """What makes the array that a value is a view or a cast of; None where the program does not say."""
    while value in program.producers:
        at = program.producers[value][0]
        op = program.operations[at]
        cast = op.op_class == "fused" and op.primitive == CAST
        if not (_shows(op) or cast) or not op.inputs:
            return at
        value = op.inputs[0].value
    return None


def _users(program: Program, value: int) -> Iterator[int]:
    """What uses a value, or a view of it."""
    for at, _ in program.consumers.get(value, ()):
        op = program.operations[at]
        if _shows(op):
            for use in op.outputs:
                yield from _users(program, use.value)
        else:
            yield at
