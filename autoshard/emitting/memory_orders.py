"""Memory orders of the values that stem from an argument with a planned order of dimensions.

Compilers store loop carries in row-major order, for any format of the argument that a carry starts from. They copy the
array into that order before the loop, and back after it. Arrays that a loop only reads or slices keep their order.
Therefore a carry with another order is transposed, so that it is row-major in that order, and each iteration transposes
it back. Both transpositions are bitcasts if the argument has the order's format, and copies otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from costmodels.program.program import Operation, Program
from search.memory.views import IN_PLACE

Order = tuple[int, ...]
"""The dimensions of an array from major to minor; empty for the device's default."""

_SAME_ARRAY = ("loop_carry", *IN_PLACE)
"""Primitives whose result has the dimensions and the buffer of their first operand."""


def orders_of_values(program: Program, arguments: Sequence[Order]) -> Mapping[int, Order]:
    """The order of each value in the buffer of an argument with an order: in loops, and after in-place updates.

    **Arguments:**

    - `arguments`: per flat argument its order, empty for the device's default.
    """
    found = {
        program.operations[at].outputs[0].value: order
        for at, order in zip(program.arguments, arguments, strict=False)
        if order != tuple(range(len(order)))
    }
    waiting = list(found)
    while waiting:
        value = waiting.pop()
        for at, operand in program.consumers.get(value, ()):
            op = program.operations[at]
            for use in op.outputs if op.primitive in _SAME_ARRAY and operand == 0 else ():
                if use.value not in found:
                    found[use.value] = found[value]
                    waiting.append(use.value)
    return {value: order for value, order in found.items() if not _is_entered_late(program, value)}


def _is_entered_late(program: Program, value: int) -> bool:
    """Whether a carry's first operand comes from an iteration, because its initial value is a literal."""
    op = program.operations[program.producers[value][0]]
    return op.primitive == "loop_carry" and op.inputs[0].region != op.region


def order_of_operand(op: Operation, orders: Mapping[int, Order]) -> Order:
    """The order of an operation's first operand."""
    return orders.get(op.inputs[0].value, ()) if op.inputs else ()


def to_memory_order(piece: Any, order: Order) -> Any:
    """A shard with its dimensions transposed to their order in memory; unchanged if the order is empty."""
    return lax.transpose(piece, order) if order else piece


def to_program_order(piece: Any, order: Order) -> Any:
    """The inverse of `to_memory_order`: a shard with the dimensions of the program."""
    return lax.transpose(piece, tuple(map(int, np.argsort(order)))) if order else piece
