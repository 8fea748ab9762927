"""Matmuls of a compiled program beside the planned ones: what is computed more often than planned, by source line.

A partitioner that replicates an operand makes every chip compute what the plan has several share. No collective shows
it; the FLOPs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoshard.planning.records import OperationPlan


@dataclass(frozen=True)
class Repeated:
    """A line of the user's code whose matmuls compute more than was planned, in FLOPs per chip and step.

    `again` are those of `compiled` that form a result which was there already.
    """

    source: str
    planned: float
    compiled: float
    again: float


def planned_flops(operations: Sequence[OperationPlan]) -> dict[str, float]:
    """FLOPs of the planned matmuls of one chip and step by source line, without padding."""
    found: dict[str, float] = {}
    for each in operations:
        if each.matmul:
            found[each.source] = found.get(each.source, 0.0) + each.flops
    return found


def repeated(
    planned: Mapping[str, float], compiled: Mapping[str, float], again: Mapping[str, float], tolerance: float
) -> tuple[Repeated, ...]:
    """The lines that compute more than planned, the worst first; none where all of them together do not.

    Compilers turn some small matmuls into multiplications and sums, which are not counted: less than planned says nothing.
    """
    total = sum(planned.values())
    if sum(compiled.values()) <= total * (1 + tolerance):
        return ()
    more = [Repeated(at, planned.get(at, 0.0), flops, again.get(at, 0.0)) for at, flops in compiled.items()]
    worst = sorted(more, key=lambda each: each.planned - each.compiled)
    return tuple(each for each in worst if each.compiled - each.planned > tolerance * total)
