"""The dimension that a matmul has in its matrix, of several: that of the matmul before or behind it.

The matrix unit takes one summed and one kept dimension of an operand and iterates over the others. Where an operand has
several, the compiler takes the one that the neighbouring matmul has in its own matrix, as the array between them then
keeps its order: the head dimension of a projection of queries, as the scores sum over it, even if there are more heads.
Seen on programs compiled by libtpu 0.0.42 with `Layout.AUTO`: 71 heads of 64, 96 of 80, 48 of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from costmodels.operations import matrix_factors
from costmodels.program.program import Operation, Program, Use
from search.answer.assignment import Choice

Factors = Mapping[int, int]
"""Per position of an array's dimensions, the factor of the matmul that is followed."""


def shared_dimensions(program: Program, choice: Choice, sizes: Mapping[str, int], index: int, operand: int) -> set[int]:
    """The positions of an operand's dimensions that a matmul beside this one has in its matrix.

    **Arguments:**

    - `sizes`: the chips along each mesh axis.
    - `index`, `operand`: a matmul of two operands, and one of them.
    """
    op = program.operations[index]
    found: set[int] = set()
    for use, walk in ((op.inputs[1 - operand], _before), (op.outputs[0], _behind)):
        ahead, seen = [(use.value, _single(use))], {use.value}
        while ahead:
            value, factors = ahead.pop()
            for at, here, others in walk(program, value):
                beside = program.operations[at]
                if beside.op_class == "matmul":
                    found |= {factors[i] for i in _matrix(choice, sizes, at, beside, here) if i in factors}
                    continue
                place = {dim: factors[i] for i, dim in enumerate(here.dims) if dim and i in factors}
                for other in others if beside.op_class != "boundary" else ():
                    kept = {i: place[dim] for i, dim in enumerate(other.dims) if dim in place}
                    if kept and other.value not in seen:
                        seen.add(other.value)
                        ahead.append((other.value, kept))
    return {i for i, dim in enumerate(op.inputs[operand].dims) if len(dim) == 1 and dim[0] in found}


def _single(use: Use) -> Factors:
    """The dimensions that are one factor each."""
    return {i: dim[0] for i, dim in enumerate(use.dims) if len(dim) == 1}


def _before(program: Program, value: int) -> Iterator[tuple[int, Use, tuple[Use, ...]]]:
    """The operation that makes an array, the array as its result, and its operands."""
    at, output = program.producers[value]
    yield at, program.operations[at].outputs[output], program.operations[at].inputs


def _behind(program: Program, value: int) -> Iterator[tuple[int, Use, tuple[Use, ...]]]:
    """The operations that read an array, the array as their operand, and their results."""
    for at, operand in program.consumers.get(value, ()):
        yield at, program.operations[at].inputs[operand], program.operations[at].outputs


def _matrix(choice: Choice, sizes: Mapping[str, int], at: int, op: Operation, use: Use) -> set[int]:
    """The positions of the dimensions of an operand or result that are its matmul's matrix: the longest of each role."""
    groups = matrix_factors(op)
    if groups is None:
        return set()
    splits = choice.strategies[at].splits
    local = [op.factors[i].size / prod(sizes[axis] for axis in split) for i, split in enumerate(splits)]
    found = set()
    for role in (groups.rows, groups.columns, groups.contracted):
        held = [i for i, dim in enumerate(use.dims) if dim and set(dim) <= set(role)]
        if held:
            found.add(max(held, key=lambda i: (prod(local[k] for k in use.dims[i]), i)))
    return found
