"""What differs between a plan and its compiled program, and what of that counts.

Differences of an unrolled model's layers are one each, and each counts if all of its kind come to something together: what
is little in one layer is much in a hundred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from autoshard._util.paths import shared_name, unnumbered
from autoshard._util.tables import size
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.auditing.matching import Axes, Pair, axes_of, literal
from autoshard.auditing.redundant_work import repeated
from autoshard.planning.records import PlannedCollective
from costmodels.machine.collectives import seconds_on, wire_bytes
from costmodels.machine.topology import Topology

NOTICEABLE = 0.01
"""The share of the plan's time on the wire above which differences count."""
HIGHER_COST = 0.02
"""The share of the plan's time on the wire by which the compiler may make the same plan dearer."""
MEMORY_TOLERANCE = 0.05
"""By how much of the planned peak the compiled one may differ."""

Target = Literal["host", "tpu", "gpu"]
Kind = Literal[
    "same plan at lower cost",
    "same plan",
    "same plan at higher cost",
    "missing",
    "unplanned",
    "replicated",
    "computed again",
    "peak memory",
]

_LIMITS = {"missing": NOTICEABLE, "unplanned": NOTICEABLE, "same plan at higher cost": HIGHER_COST}
"""The share of the plan's time on the wire above which all differences of a kind count."""


@dataclass(frozen=True)
class Difference:
    """One way in which the compiled program is not word for word the plan.

    `bytes` is what it sends more (less, if negative) per chip and step, or needs more at its peak. `share` is the part
    of the plan's time on the wire, of the planned peak or of the planned FLOPs, that is at stake. `counts` says whether
    the audit fails by it.
    """

    kind: Kind
    text: str
    bytes: float
    share: float
    counts: bool = False


def seconds_of(collective: CompiledCollective, topology: Topology) -> float:
    """What one execution of a compiled collective costs under the plan's model."""
    axes = axes_of(collective, topology)
    return float(seconds_on(topology, collective.kind, axes, float(collective.bytes)))


def _along(axes: Axes, topology: Topology):
    return tuple(topology.axis(name) for name in axes)


def of_collectives(pairs: Sequence[Pair], topology: Topology, target: Target, wire_seconds: float) -> list[Difference]:
    """What pairs of planned and compiled collectives say about the compiled program; nothing where all is as planned.

    **Arguments:**

    - `wire_seconds`: what the plan spends on the wire.
    """
    found = [d for pair in pairs if (d := _of_pair(pair, topology, target, wire_seconds)) is not None]
    sent = sum(sent_bytes(each, topology) * pair.count for pair in pairs for each in pair.planned)
    return [*_together(found, sent or 1.0), *(_of_widening(pairs, topology, wire_seconds) if target == "host" else ())]


def _together(found: Iterable[Difference], planned_bytes: float) -> Iterator[Difference]:
    """Those that are alike as one; each counts where all of its kind reach the limit.

    What is missing has to reach it in bytes, too: compilers add up numbers before they send them, each alone all latency.
    """
    groups: dict[tuple[str, str], list[Difference]] = {}
    shares: dict[str, float] = {}
    for each in found:
        groups.setdefault((each.kind, unnumbered(each.text)), []).append(each)
        share = min(each.share, -each.bytes / planned_bytes) if each.kind == "missing" else each.share
        shares[each.kind] = shares.get(each.kind, 0.0) + share
    for (kind, _), alike in groups.items():
        times = f"{len(alike)} times: " if len(alike) > 1 else ""
        yield replace(
            alike[0],
            text=times + shared_name(each.text for each in alike),
            bytes=sum(each.bytes for each in alike),
            share=sum(each.share for each in alike),
            counts=shares[kind] > _LIMITS.get(kind, inf),
        )


def _of_pair(pair: Pair, topology: Topology, target: Target, wire_seconds: float) -> Difference | None:
    """What a pair says about the compiled program; None when it says that all is as planned."""
    planned = sum(p.seconds / p.count * pair.count for p in pair.planned)
    compiled = sum(seconds_of(c, topology) * pair.count for c in pair.compiled)
    more = sum(sent_bytes(c, topology) for c in pair.compiled) - sum(sent_bytes(p, topology) for p in pair.planned)
    share, bytes = abs(compiled - planned) / wire_seconds, more * pair.count
    if not pair.compiled:
        text = f"{_described(pair.planned, topology, pair.count)}, {pair.planned[0].where}: not in the compiled program"
        return Difference("missing", text, bytes, share)
    if not pair.planned:
        text = f"{_described(pair.compiled, topology, pair.count)}{_place(pair.compiled[0])}: not in the plan"
        if any(each.only_sliced for each in pair.compiled):
            text += ", and only slices of it are used (an involuntary full rematerialization)"
        return Difference("unplanned", text, bytes, share)
    if literal(pair):
        return None
    text = " compiled as ".join(_described(side, topology, pair.count) for side in (pair.planned, pair.compiled))
    if compiled < planned * (1 - 1e-9):
        return Difference("same plan at lower cost", text, bytes, share)
    if target == "host" or not compiled > planned * (1 + 1e-9):
        return Difference("same plan", text, bytes, share)
    return Difference("same plan at higher cost", text, bytes, share)


def _of_widening(pairs: Sequence[Pair], topology: Topology, wire_seconds: float) -> Iterator[Difference]:
    """Host devices send 16-bit floats as 32-bit ones: one difference for all."""
    runs, more, seconds = 0, 0.0, 0.0
    for pair in pairs:
        bytes = sum(c.bytes for c in pair.compiled) - sum(p.bytes for p in pair.planned)
        if (
            pair.planned
            and pair.compiled
            and {c.kind for c in pair.compiled} == {p.kind for p in pair.planned}
            and bytes
        ):
            runs += pair.count * len(pair.compiled)
            more += pair.count * bytes
            seconds += pair.count * sum(seconds_of(c, topology) for c in pair.compiled)
            seconds -= pair.count * sum(p.seconds / p.count for p in pair.planned)
    if runs:
        text = f"host devices have no 16-bit collectives: {runs} runs send float32 instead"
        yield Difference("same plan", text, more, abs(seconds) / wire_seconds, False)


def of_work(
    planned: Mapping[str, float], compiled: Mapping[str, float], again: Mapping[str, float]
) -> Iterator[Difference]:
    """What matmuls compute more than planned, by line of the user's code: `planned`, `compiled` and `again` are FLOPs.

    **Arguments:**

    - `again`: of the compiled ones, those that form again what another fusion forms, too.
    """
    total = max(sum(planned.values()), 1.0)
    for each in repeated(planned, compiled, again, NOTICEABLE):
        times = f"{each.compiled / each.planned:.2f} times the planned" if each.planned else "unplanned"
        text = f"matmuls at {each.source or 'an unknown line'} compute {times} FLOPs"
        share = (each.compiled - each.planned) / total
        if each.compiled - each.again <= each.planned + NOTICEABLE * total:
            yield Difference("computed again", f"{text}: once for each fusion that uses them", 0.0, share, False)
        else:
            yield Difference("replicated", f"{text}: an operand is replicated", 0.0, share, True)


def of_memory(planned: float, compiled: float) -> Iterator[Difference]:
    """What the compiled program needs more or less than the planned peak, in bytes."""
    share = (compiled - planned) / planned
    if abs(share) > MEMORY_TOLERANCE:
        text = f"the compiled program needs {compiled / planned:.3f} times the planned peak"
        yield Difference("peak memory", text, compiled - planned, abs(share), True)


def sent_bytes(each: PlannedCollective | CompiledCollective, topology: Topology) -> float:
    """What one chip sends in one run of a collective."""
    return float(wire_bytes(each.kind, _along(axes_of(each, topology), topology), float(each.bytes)))


def _described(group: Sequence[PlannedCollective | CompiledCollective], topology: Topology, count: int) -> str:
    """Such as `2 reduce-scatters over x of 2 KiB × 118`."""
    alike = Counter((each.kind, "".join(axes_of(each, topology)), size(each.bytes)) for each in group)
    parts = [f"{f'{n} {kind}s' if n > 1 else kind} over {axes} of {of}" for (kind, axes, of), n in alike.items()]
    return " and ".join(parts) + (f" × {count}" if count > 1 else "")


def _place(compiled: CompiledCollective) -> str:
    found = compiled.source or compiled.op_name.rpartition("shard_map/")[2]
    return f", {found}" if found else ""
