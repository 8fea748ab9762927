"""The replayed times of a program beside those of its plan: of instructions, and of the rings beside matmuls.

The planned time of a source line goes to the instructions of this line, matmuls first, then the costliest. Any excess
is unplanned: copies, re-tiling, slices of stacked arrays that are copied out. Collectives are compared with the plan
separately, and count as planned here.

A collective that is planned as a ring of $n$ chips is compiled to $n - 1$ permutes to a neighbour, each of $1/n$ of its bytes,
and to a collective over its other axes (`search.formulation.rings`). So these are the planned collectives of an audit. The
time of the permutes that the core does not wait for is hidden. The plan expects a share of it to be hidden, and the replay
of the schedule shows the actual one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.auditing.hlo_collectives import COLLECTIVE_KINDS
from autoshard.auditing.replay import Costly, Replay, Transferred
from autoshard.planning.records import OperationPlan, PlannedCollective
from costmodels.machine.collectives import seconds_on
from costmodels.machine.rings import hop_seconds
from costmodels.machine.topology import Topology
from search.formulation.overlap import LOOPED_KINDS

Array = tuple[int, str]
"""The number and the type of an array."""


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


# --- rings


@dataclass(frozen=True)
class Overlap:
    """The permutes of all rings with the same axis and bytes per hop, in one step.

    - `count`: the planned number of permutes; `seconds`: their time on the links.
    - `planned`, `replayed`: the share of that time that is hidden, from 0 to 1; `replayed` is None if the program has none.
    - `where`: the array of the first ring, and its use.
    """

    axis: str
    bytes: float
    count: float
    seconds: float
    planned: float
    replayed: float | None
    where: str


def is_ring(planned: PlannedCollective, topology: Topology) -> bool:
    """Whether a planned collective is emitted as a ring."""
    return topology.pricing.looped and planned.hidden_seconds > 0 and planned.kind in LOOPED_KINDS


def ring_parts(planned: PlannedCollective, topology: Topology) -> tuple[PlannedCollective, ...]:
    """A planned collective as it is emitted: itself, or the permutes of its ring and the collective over its other axes."""
    if not is_ring(planned, topology):
        return (planned,)
    axis, rest = topology.axis(planned.axes[0]), planned.axes[1:]
    bytes_, hops = planned.bytes / axis.size, axis.size - 1
    apart = float(seconds_on(topology, planned.kind, rest, bytes_)) * planned.count if rest else 0.0
    exposed = max(planned.seconds - apart, 0.0)
    where = f"ring of {planned.kind}: {planned.where}"
    hop = PlannedCollective(
        "collective-permute", (axis.name,), bytes_, planned.count, exposed / hops, where, planned.hidden_seconds / hops
    )
    other = replace(planned, axes=rest, bytes=bytes_, seconds=apart, hidden_seconds=0.0)
    return (*(hop,) * hops, other) if rest else (hop,) * hops


def distinct_rings(
    planned: Sequence[PlannedCollective], arrays: Sequence[Array], topology: Topology
) -> list[tuple[PlannedCollective, Array]]:
    """The planned collectives that are emitted, each with its array: matmuls that take one gathered array share its ring.

    **Arguments:**

    - `arrays`: number and type of the array that each collective sends.
    """
    found: dict[Any, tuple[PlannedCollective, Array]] = {}
    for k, (each, array) in enumerate(zip(planned, arrays, strict=True)):
        shared = each.kind == "all-gather" and is_ring(each, topology)
        found.setdefault((array, each.axes, each.bytes) if shared else k, (each, array))
    return list(found.values())


def overlaps(planned: Sequence[PlannedCollective], topology: Topology, replayed: Replay) -> tuple[Overlap, ...]:
    """Planned and replayed overlap of all rings; those of one axis and size cannot be told apart and are one entry.

    **Arguments:**

    - `planned`: the plan's collectives, not yet in parts; a ring that matmuls share once (`distinct_rings`).
    """
    found: dict[tuple[str, int], list[PlannedCollective]] = {}
    for each in planned:
        if is_ring(each, topology):
            hops = ring_parts(each, topology)[: topology.axis(each.axes[0]).size - 1]
            found.setdefault((hops[0].axes[0], round(hops[0].bytes)), []).extend(hops)
    return tuple(
        _overlap(axis, rings, topology, [each for each in replayed.transfers if _is_hop(each, axis, bytes_)])
        for (axis, bytes_), rings in found.items()
    )


def _overlap(axis: str, rings: Sequence[PlannedCollective], topology: Topology, sent: Sequence[Transferred]) -> Overlap:
    count = sum(each.count for each in rings)
    seconds = count * float(hop_seconds(topology.axis(axis), rings[0].bytes))
    exposed = sum(each.seconds for each in rings)
    whole = sum(each.seconds for each in sent)
    done = 1 - sum(each.exposed_seconds for each in sent) / whole if whole else None
    return Overlap(axis, rings[0].bytes, count, seconds, max(1 - exposed / seconds, 0.0), done, rings[0].where)


def _is_hop(each: Transferred, axis: str, bytes_: int) -> bool:
    return (each.kind, each.axes) == ("collective-permute", (axis,)) and each.bytes == bytes_
