"""The order in which the dimensions of a value lie in memory, where the plan has one for the argument that it was.

What goes round a loop a compiler lays out row-major, whatever the format of the argument that it began as: it then relays the
array before the loop and after it. What a loop only reads or slices it takes as it lies. So an array that goes round in another
order does so transposed, row-major in that order, and each round sees it transposed back. Both transpositions are bitcasts
where the argument has the order's format; where it has not, each is a copy.
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
"""Primitives whose result has the dimensions of their first operand, and lies where that does."""


def orders_of_values(program: Program, arguments: Sequence[Order]) -> Mapping[int, Order]:
    """The order of each value that lies where an argument with an order lies: in loops, and after updates in place.

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
    """Whether a carry's first operand is what a round makes, as of one that begins as a literal."""
    op = program.operations[program.producers[value][0]]
    return op.primitive == "loop_carry" and op.inputs[0].region != op.region


def order_of_operand(op: Operation, orders: Mapping[int, Order]) -> Order:
    """The order of an operation's first operand."""
    return orders.get(op.inputs[0].value, ()) if op.inputs else ()


def in_order(piece: Any, order: Order) -> Any:
    """A piece with its dimensions in the order in which they lie; as it is without an order."""
    return lax.transpose(piece, order) if order else piece


def as_written(piece: Any, order: Order) -> Any:
    """A piece that `in_order` has transposed, with its dimensions as the program has them."""
    return lax.transpose(piece, tuple(map(int, np.argsort(order)))) if order else piece
