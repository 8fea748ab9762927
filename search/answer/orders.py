"""The orders of the dimensions of arguments in a TPU's memory, derived from their readers.

The matrix unit takes an operand whose two minor dimensions are the matrix's: the longest of the summed dimensions, and
the longest of the kept ones, or those that the matmul beside it has in its matrix
(`search.answer.matrix_dimensions`). It iterates over batch dimensions and all others. Either of the two may lie along the
lanes, so the one that pads less does. `ragged_dot`, also in a chain, reads its weights as [group, summed, kept], and a look-up
reads whole rows. An array that a loop slices is stored slice by slice. Without an order, an argument is stored as its shape
and type suggest (`search.formulation.tpu_tiles.default_order`), and is re-tiled at every step if its readers need another
order.

An argument gets an order if all of its readers are products, look-ups and updates in place. If an elementwise operation
reads it too, as an optimizer does, the operation's other arrays must have the same order.

On compiled programs (libtpu 0.0.42) these orders are those that the compiler chooses with `Layout.AUTO`; see
docs/plan.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from costmodels.machine.topology import Topology
from costmodels.operations import matrix_factors
from costmodels.program.grouped import CHAIN, grouped
from costmodels.program.program import Operation, Program, Use
from costmodels.program.views import CAST, RENAMES
from search.answer.assignment import Choice, produced_layout
from search.answer.matrix_dimensions import shared_dimensions
from search.formulation.layouts import local_shape
from search.formulation.tpu_tiles import default_order, padding
from search.memory.views import IN_PLACE

Order = tuple[int, ...]
Dims = tuple[int | None, ...]
"""Per dimension of an array the argument's dimension that it is, or None if it is none or several."""
_LITTLE = 0.01
"""Limit on what other readers may read of an argument, relative to what products read: a row written into a cache."""
_PADDED = 1.25
"""Limit on an array's bytes in its order, relative to its default bytes. The plan's memory does not count the excess.
"""
_SHOWN = RENAMES | {CAST, "optimization_barrier", "dynamic_slice", "slice"}
_AROUND = frozenset({"loop_constant", "loop_slice", "loop_carry", "loop_stack", "branch_constant"})
"""Primitives that keep an array's dimensions distinguishable, and through which a compiler reads."""


@dataclass(frozen=True)
class Reader:
    """An operation that reads an argument, the order that it needs, and the bytes that one chip reads in a step.

    There is no order where the argument's dimensions cannot be followed to the operation.
    """

    operation: int
    order: Order | None
    bytes: float


def orders(program: Program, choice: Choice, topology: Topology) -> tuple[Order, ...]:
    """Per flat argument the order of its dimensions, major to minor; empty if the device's default is as good.

    A donated argument and the result in its place have one order. Chips other than TPUs have no tiles, and no orders.
    """
    return tuple(
        order_of(
            demand(program, choice, topology, at), stored_shape(program, choice, topology, at), itemsize(program, at)
        )
        for at in program.arguments
    )


def itemsize(program: Program, source: int) -> float:
    """The bytes of an element of an argument."""
    return program.values[program.operations[source].outputs[0].value].itemsize


def stored_shape(program: Program, choice: Choice, topology: Topology, source: int) -> Order:
    """The shape of an argument's shard on one chip."""
    value = program.operations[source].outputs[0].value
    return local_shape(program.values[value].shape, produced_layout(program, choice, value), topology.axis_sizes)


def demand(program: Program, choice: Choice, topology: Topology, source: int) -> Counter[Order | None]:
    """The bytes that one chip reads of an argument in a step, by the order that the reader needs; None if it is not known."""
    wanted: Counter[Order | None] = Counter()
    if topology.chip.kind == "tpu" and len(stored_shape(program, choice, topology, source)) > 1:
        for each in readers(program, choice, topology, source):
            wanted[each.order] += each.bytes  # pyright: ignore[reportArgumentType]
    return wanted


def order_of(wanted: Counter[Order | None], sizes: Order, element_bytes: float) -> Order:
    """The order of an argument with this demand on a TPU; empty if the default is as good, or if no order is."""
    others = wanted.get(None, 0)
    known = {order: bytes for order, bytes in wanted.items() if order is not None}
    best = max(known, key=lambda order: known[order], default=None)
    if best is None or 0 in sizes or others > _LITTLE * known[best]:
        return ()
    plain = default_order(sizes, element_bytes)
    padded = _padding(best, sizes) > _PADDED * _padding(plain, sizes)
    return () if padded or is_same_order(best, plain, sizes) else best


def is_same_order(one: Order, other: Order, sizes: Order) -> bool:
    """Whether two orders are the same in memory: dimensions of one element do not count."""
    return _long(one, sizes) == _long(other, sizes)


def _padding(order: Order, sizes: Order) -> float:
    """Bytes of the tiles over the bytes of the array."""
    long = _long(order, sizes)
    return padding(sizes[long[-2]], sizes[long[-1]]) if len(long) > 1 else 1.0


def _long(order: Order, sizes: Order) -> Order:
    """An order without the dimensions of one element."""
    return tuple(i for i in order if sizes[i] > 1)


def readers(program: Program, choice: Choice, topology: Topology, source: int) -> Iterator[Reader]:
    """The operations that read an argument, through views and casts of it, loops, and updates in place."""
    value = program.operations[source].outputs[0].value
    shape = program.values[value].shape
    sizes = local_shape(shape, produced_layout(program, choice, value), topology.axis_sizes)
    held = prod(sizes) * program.values[value].itemsize
    seen = {value}
    ahead: list[tuple[int, Dims]] = [(value, tuple(range(len(sizes))))]
    while ahead:
        at, dims = ahead.pop()
        for index, operand in program.consumers.get(at, ()):
            op = program.operations[index]
            if op.op_class == "sink":
                continue
            if not _shows(op, operand) and not _takes_slabs(op, operand):
                part = prod(program.values[at].shape) / prod(shape)
                order = _preferred_order(program, choice, topology, index, operand, dims, sizes)
                yield Reader(index, order, held * part * program.multiplicity(op.region))
            for use in op.outputs if _shows(op, operand) else ():
                if use.value not in seen:
                    seen.add(use.value)
                    ahead.append((use.value, _dims_after(op, operand, use, dims)))


def _shows(op: Operation, operand: int) -> bool:
    """Whether an operation's result is its operand, or a part of it."""
    return op.primitive in _AROUND or (operand == 0 and op.primitive in (*_SHOWN, *IN_PLACE))


def _takes_slabs(op: Operation, operand: int) -> bool:
    """Whether a look-up copies slabs of several whole dimensions, which it does in any order of them."""
    if (op.primitive, operand) != ("gather", 0):
        return False
    kept = {factor for output in op.outputs for dim in output.dims for factor in dim}
    return sum(bool(dim) and set(dim) <= kept for dim in op.inputs[0].dims) > 1


def _dims_after(op: Operation, operand: int, result: Use, dims: Dims) -> Dims:
    place = {dim: at for dim, at in zip(op.inputs[operand].dims, dims, strict=True) if dim}
    return tuple(place.get(dim) for dim in result.dims)


def _preferred_order(
    program: Program, choice: Choice, topology: Topology, index: int, operand: int, dims: Dims, sizes: Order
) -> Order | None:
    """The order in which an operation needs an argument whose dimensions are those of its operand."""
    known = tuple(at for at in dims if at is not None)
    if len(known) < len(dims):
        return None
    op, others = program.operations[index], (at for at in range(len(sizes)) if at not in known)
    if matrix_factors(op) is None:
        reads_rows = (op.primitive, operand) in (("gather", 0), ("ragged_dot_general", 1))
        return (*others, *known) if reads_rows or _is_of_groups(op, operand) else None
    shared = shared_dimensions(program, choice, topology.axis_sizes, index, operand)
    order = _product_order(op, operand, known, {known[i] for i in shared}, sizes)
    return (*others, *order) if order else None


def _is_of_groups(op: Operation, operand: int) -> bool:
    """Whether an operand of a chain of grouped matmuls has a matrix per group, or a row."""
    groups, dims = grouped(op), op.inputs[operand].dims
    return (
        op.primitive == CHAIN
        and groups is not None
        and len(dims) > 1
        and dims[0] in ((groups.groups,), (groups.groups + 1,))
    )


def _product_order(op: Operation, operand: int, dims: Order, shared: set[int], sizes: Order) -> Order | None:
    """Batch dimensions, then the dimensions iterated over, then the matrix in the order that pads less.

    There is none if no dimension is summed, or none kept. `shared` are those that a matmul beside this one has in its
    matrix.
    """
    groups = matrix_factors(op)
    assert groups is not None
    roles = [set(dim) for dim in op.inputs[operand].dims]
    summed = [at for at, role in zip(dims, roles, strict=True) if role and role <= set(groups.contracted)]
    batch = [at for at, role in zip(dims, roles, strict=True) if role and role <= set(groups.batch)]
    kept = [at for at in dims if at not in (*summed, *batch)]
    if not summed or not kept:
        return None
    rows, lanes = sorted(
        (
            max(summed, key=lambda i: (i in shared, sizes[i], -i)),
            max(kept, key=lambda i: (i in shared, sizes[i], i)),
        )
    )
    if padding(sizes[lanes], sizes[rows]) < padding(sizes[rows], sizes[lanes]):
        rows, lanes = lanes, rows
    return (*(i for i in (*batch, *kept, *summed) if i not in (rows, lanes)), rows, lanes)
