"""What-if programs: the same operations with narrower arrays, or with a dimension twice as long.

Each is a pure function from a program to a program. Operations keep their numbers, so a plan of one program is a plan of the
other, and the search can look for a better one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from costmodels.program.program import Operation, Program, Use


class NotDoubled(ValueError):
    """Raised for a dimension that cannot be doubled alone; states the operation or the array that prevents it."""


def with_itemsize(program: Program, values: Iterable[int], itemsize: float) -> Program:
    """The program with these values in elements of at most `itemsize` bytes; nothing else changes."""
    narrowed = set(values)
    return replace(
        program,
        values=tuple(
            replace(value, itemsize=itemsize) if i in narrowed and value.itemsize > itemsize else value
            for i, value in enumerate(program.values)
        ),
    )


def views_of(program: Program, value: int) -> frozenset[int]:
    """A value and all values that hold its elements without arithmetic: slices, views, updates, loop carries.

    Elements flow through an operation's first operand; other operands (indices, the update of an array) do not count.
    """
    found, waiting = {value}, [value]
    while waiting:
        for at, position in program.consumers.get(waiting.pop(), ()):
            op = program.operations[at]
            carried = op.op_class == "boundary"
            if op.op_class in ("matmul", "sink") or op.flops_per_point or (position and not carried):
                continue
            further = {use.value for use in op.outputs} - found
            found |= further
            waiting += sorted(further)
    return frozenset(found)


def double_dimension(program: Program, value: int, dim: int) -> Program:
    """The program with one dimension of a value, and every dimension tied to it, twice as long.

    Dimensions are tied by the factors of operations: `b` of `ab,bc->ac` is a dimension of both operands. If a dimension
    consists of several factors, as after a reshape, the first of them grows.

    **Raises:** `NotDoubled` if an array and its use would then differ.
    """
    dims, factors = _find_tied(program, value, dim)
    values = tuple(
        replace(each, shape=tuple(2 * n if (i, d) in dims else n for d, n in enumerate(each.shape)))
        for i, each in enumerate(program.values)
    )
    operations = tuple(
        replace(
            op,
            factors=tuple(replace(f, size=2 * f.size) if (i, k) in factors else f for k, f in enumerate(op.factors)),
        )
        for i, op in enumerate(program.operations)
    )
    grown = replace(program, values=values, operations=operations)
    _check(program, grown)
    return grown


def _find_tied(program: Program, value: int, dim: int) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The dimensions (value, position) and the factors (operation, number) that grow with one dimension."""
    dims, factors, waiting = {(value, dim)}, set[tuple[int, int]](), [(value, dim)]
    while waiting:
        array, at = waiting.pop()
        for operation, use in _uses(program, array):
            made_of = use.dims[at]
            if not made_of or any((operation, f) in factors for f in made_of):
                continue
            factors.add((operation, made_of[0]))
            for each in _dims_with(program.operations[operation], made_of[0]):
                if each not in dims:
                    dims.add(each)
                    waiting.append(each)
    return dims, factors


def _uses(program: Program, value: int) -> Iterator[tuple[int, Use]]:
    if value in program.producers:
        at, position = program.producers[value]
        yield at, program.operations[at].outputs[position]
    for at, position in program.consumers.get(value, ()):
        yield at, program.operations[at].inputs[position]


def _dims_with(op: Operation, factor: int) -> Iterator[tuple[int, int]]:
    for use in (*op.inputs, *op.outputs):
        yield from ((use.value, at) for at, made_of in enumerate(use.dims) if factor in made_of)


def _check(before: Program, after: Program) -> None:
    """Checks that every use has grown as its array has, and that no slice or concatenation runs along a grown dimension.

    **Raises:** `NotDoubled`."""
    for old, new in zip(before.operations, after.operations, strict=True):
        for f, (was, now) in enumerate(zip(old.factors, new.factors, strict=True)):
            sides = [any(f in made_of for use in uses for made_of in use.dims) for uses in (old.inputs, old.outputs)]
            if was != now and was.kind == "whole" and sides.count(True) == 1:
                raise NotDoubled(f"{old.name} cuts or joins arrays along it.")
        for use in (*new.inputs, *new.outputs):
            shapes = zip(before.values[use.value].shape, after.values[use.value].shape, use.dims, strict=True)
            for was, now, made_of in shapes:
                grown = prod(new.factors[f].size for f in made_of) / prod(old.factors[f].size for f in made_of)
                if now != was * grown:
                    name = before.values[use.value].name
                    raise NotDoubled(f"{old.name} ties a dimension of {name} to one that does not grow with it.")
