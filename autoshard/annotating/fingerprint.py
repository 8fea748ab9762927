"""The fingerprint of a program: a hash of its computation, its costs and its pins; and whether two compute the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from costmodels.program.program import Output, Program, Use


def place_number(place: int | Output) -> int:
    """An operand (0, 1, ...) or result (-1, -2, ...) as a number, as in plan files."""
    return -1 - place.index if isinstance(place, Output) else place


def fingerprint(program: Program) -> str:
    """A hash of operations, factors, shapes and types. It does not depend on names or on JAX's spelling."""
    digest = hashlib.sha256()
    for value in program.values:
        digest.update(repr((value.shape, value.dtype, value.region)).encode())
    for op in program.operations:
        costs = (
            op.op_class,
            [sorted(group) for group in op.linear],
            tuple(map(place_number, op.traffic)),
            op.flops_per_point,
            op.dtype,
        )
        digest.update(repr((op.primitive, op.factors, op.inputs, op.outputs, op.region, costs)).encode())
        if op.pinned is not None:
            digest.update(repr(op.pinned).encode())
    # Names contain their source line. The parent of the main region counts as -1, as when the first plans were written.
    regions = [(each.kind, -1 if each.parent is None else each.parent, each.count) for each in program.regions]
    digest.update(repr((regions, program.results, program.donated)).encode())
    return digest.hexdigest()


def computes_same(first: Program, second: Program) -> bool:
    """Whether two programs have the same operations, values and pins; HBM traffic and other costs may differ.

    A plan of an older version then still describes a function, although the cost model has changed.
    """
    return _computation(first) == _computation(second)


def _computation(program: Program) -> object:
    values = [(value.shape, value.dtype, value.region) for value in program.values]
    operations = [
        (op.primitive, op.factors, _places(op.inputs), _places(op.outputs), op.region, op.pinned)
        for op in program.operations
    ]
    regions = [(each.kind, each.parent, each.count) for each in program.regions]
    return values, operations, regions, program.results, program.donated


def _places(uses: Sequence[Use]) -> list[object]:
    return [(use.value, use.dims, use.region) for use in uses]
