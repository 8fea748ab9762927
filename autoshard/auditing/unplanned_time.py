"""The unplanned time of a replayed step, by instruction.

The planned time of a source line goes to the instructions of this line, matmuls first, then the costliest. Any excess
is unplanned: copies, re-tiling, slices of stacked arrays that are copied out. Collectives are compared with the plan
separately, and count as planned here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoshard.auditing.hlo_collectives import COLLECTIVE_KINDS
from autoshard.auditing.replay import Costly
from autoshard.planning.records import OperationPlan


@dataclass(frozen=True)
class AuditedCost:
    """An instruction with its time in one step, and the unplanned part of it, in seconds."""

    instruction: Costly
    unplanned_seconds: float


def planned_seconds(operations: Sequence[OperationPlan]) -> dict[str, float]:
    """Seconds of the planned operations on one chip and step by source line, without collectives."""
    found: dict[str, float] = {}
    for each in operations:
        found[each.source] = found.get(each.source, 0.0) + each.seconds
    return found


def attribute_time(costly: Sequence[Costly], planned: Mapping[str, float]) -> tuple[AuditedCost, ...]:
    """Every instruction of a replay with the unplanned part of its time, in the replay's order."""
    left = dict(planned)
    unplanned: dict[int, float] = {}
    for i, each in sorted(enumerate(costly), key=lambda item: (not item[1].matmul, -item[1].seconds)):
        is_sent = each.opcode in COLLECTIVE_KINDS
        granted = each.seconds if is_sent else min(each.seconds, left.get(each.source, 0.0))
        if not is_sent:
            left[each.source] = left.get(each.source, 0.0) - granted
        unplanned[i] = each.seconds - granted
    return tuple(AuditedCost(each, unplanned[i]) for i, each in enumerate(costly))
