"""Partial sums across the boundaries of loops: gradients, statistics and losses that a loop adds up.

A loop carry is an identity, so it may be a partial sum whenever its initial value and its next value may be: chips add up
their own parts, and one reduction after the loop makes the sum. A stack of partial sums is a partial sum as well. A zero is
one at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from costmodels.program.grouped import grouped
from costmodels.program.program import Operation
from costmodels.program.views import CAST, is_view

_Readers = dict[int, list[tuple[int, int]]]
"""Of each value, the operations that read it and the operand that it is."""


def with_partial_boundaries(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations of a program, with partial sums at the boundaries of loops only where something can make them.

    A loop leads back to its carry, so all boundaries begin as possible, and those that need what nothing makes are removed.
    So are those that help nothing, which keeps the search small: a carry whose value each iteration needs whole, such as a
    residual stream; a stack of which no reader takes a partial sum; updates in place outside of loops; zeros that enter no
    loop, and to which no rows of experts are added.
    """
    found = list(operations)
    makers = {use.value: i for i, op in enumerate(found) for use in op.outputs}
    readers: _Readers = {}
    for i, op in enumerate(found):
        for k, use in enumerate(op.inputs):
            readers.setdefault(use.value, []).append((i, k))
    _drop_useless(found, readers)
    _drop_impossible(found, makers)
    _drop_useless_zeros(found, makers, readers)
    return tuple(found)


def _drop_useless(found: list[Operation], readers: _Readers) -> None:
    """Removes partial sums that no reader takes, or that each iteration needs whole."""
    for i, op in enumerate(found):
        if op.linear and not _is_useful(found, readers, op):
            found[i] = replace(op, linear=())


def _drop_impossible(found: list[Operation], makers: Mapping[int, int]) -> None:
    """Removes partial sums of boundaries that nothing makes, until each that remains has a maker."""
    changed = True
    while changed:
        changed = False
        for i, op in enumerate(found):
            decided = op.op_class == "boundary" or op.primitive == "dynamic_update_slice"
            if decided and op.linear and not _can_be_partial(found, makers, op):
                found[i] = replace(op, linear=())
                changed = True


def _drop_useless_zeros(found: list[Operation], makers: Mapping[int, int], readers: _Readers) -> None:
    """Removes partial sums of zeros that enter no loop with partial sums, and to which no rows of experts are added."""

    def helps(at: int) -> bool:
        op = found[at]
        return (op.op_class == "boundary" and bool(op.linear)) or _adds_expert_rows(found, makers, op)

    for i, op in enumerate(found):
        readers_of = [at for use in op.outputs for at, _ in readers.get(use.value, ())]
        if frozenset() in op.linear and not any(map(helps, readers_of)):
            found[i] = replace(op, linear=tuple(group for group in op.linear if group))


def _adds_expert_rows(operations: Sequence[Operation], makers: Mapping[int, int], op: Operation) -> bool:
    """Whether an operation adds rows of a grouped matmul, or of linear work on them, into an array: the sum over experts."""
    if op.primitive != "scatter-add" or not op.linear or len(op.inputs) < 2:
        return False
    maker = operations[makers[op.inputs[-1].value]]
    while maker.op_class == "fused" and maker.linear and grouped(maker) is None:
        operand = min((k for group in maker.linear for k in group), default=None)
        if operand is None:
            return False
        maker = operations[makers[maker.inputs[operand].value]]
    return grouped(maker) is not None


def _is_useful(operations: Sequence[Operation], readers: _Readers, op: Operation) -> bool:
    """Whether partial sums may help at a boundary or at an update in place; true for any other operation."""
    if op.primitive == "dynamic_update_slice":
        return op.region != 0
    if op.op_class != "boundary":
        return True
    takes = [_takes_partial(operations, readers, at, k) for at, k in readers.get(op.outputs[0].value, ())]
    return all(takes) if op.primitive == "loop_carry" else any(takes)


def _takes_partial(operations: Sequence[Operation], readers: _Readers, at: int, operand: int) -> bool:
    """Whether an operation takes an operand as a partial sum; a view or a cast does if all readers of its result do."""
    waiting = [(at, operand)]
    while waiting:
        at, operand = waiting.pop()
        op = operations[at]
        if not any(operand in group for group in op.linear):
            return False
        if op.primitive == CAST or is_view(op):
            waiting += readers.get(op.outputs[0].value, ())
    return True


def _can_be_partial(operations: Sequence[Operation], makers: Mapping[int, int], op: Operation) -> bool:
    """Whether the operands of one of an operation's linear groups may all be partial sums."""
    return any(all(_makes_partial(operations[makers[op.inputs[k].value]]) for k in group) for group in op.linear)


def _makes_partial(op: Operation) -> bool:
    return bool(op.linear) or any(factor.kind == "sum" and factor.size > 1 for factor in op.factors)
