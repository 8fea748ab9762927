"""The differences between a plan and its compiled program, and those that fail the audit.

The differences of an unrolled model's layers are listed one by one, and each counts if the sum of its kind exceeds the
limit. Any figure outside the bounds of `autoshard.auditing.bounds` counts, even if every single difference is of a
harmless kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from autoshard._util.paths import shared_name, star_numbers
from autoshard._util.tables import percent, size, time
from autoshard.auditing import bounds
from autoshard.auditing.collective_times import price_collective
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.auditing.hlo_interface import CompiledArguments
from autoshard.auditing.matching import Axes, Pair, axes_of, expected_bytes, is_literal, is_realignment, sent_bytes
from autoshard.auditing.planned_times import AuditedCost, Overlap
from autoshard.planning.records import ArrayPlan, OperationPlan, PlannedCollective
from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology

CompileTarget = Literal["host", "tpu", "gpu"]
Kind = Literal[
    "same plan at lower cost",
    "same plan",
    "same plan at higher cost",
    "missing",
    "unplanned",
    "bytes on the wire",
    "replicated",
    "computed again",
    "FLOPs",
    "argument",
    "result",
    "donation",
    "peak memory",
    "slower than planned",
    "less overlap",
    "path for an overflow",
]

_LIMITS = {
    "missing": bounds.NOTICEABLE,
    "unplanned": bounds.NOTICEABLE,
    "same plan at higher cost": bounds.HIGHER_COST,
}
"""The share of the plan's communication time above which all findings of a kind count."""


@dataclass(frozen=True)
class Finding:
    """One difference between the compiled program and the plan.

    `bytes` is what it sends more (less, if negative) per chip and step, or needs more at its peak. `share` is the
    affected part of the plan's communication time, of its bytes there, of the planned peak or of the planned FLOPs.
    `counts` says whether it fails the audit.
    """

    kind: Kind
    text: str
    bytes: float
    share: float
    counts: bool = False


def seconds_of(collective: CompiledCollective, topology: Topology) -> float:
    """Seconds of one execution of a compiled collective under the plan's model; of a permute, by its pairs."""
    if collective.kind == "collective-permute" and collective.groups not in ("", "{}"):
        return price_collective(replace(collective, count=1), topology).seconds
    axes = axes_of(collective, topology)
    return float(seconds_on(topology, collective.kind, axes, float(collective.bytes)))


def find_overflow_paths(count: int) -> list[Finding]:
    """The paths for rows that do not fit into their buffers, if there are some."""
    if not count:
        return []
    text = f"conditionals for the case that a buffer for rows is too small: {count}; that branch is not counted"
    return [Finding("path for an overflow", text, 0.0, 0.0)]


# --- collectives


def find_in_collectives(
    pairs: Sequence[Pair], topology: Topology, target: CompileTarget, wire_seconds: float
) -> list[Finding]:
    """The findings of pairs of planned and compiled collectives; none if all are as planned.

    **Arguments:**

    - `wire_seconds`: the plan's communication time.
    """
    found = [(pair, d) for pair in pairs if (d := _find_in_pair(pair, topology, target, wire_seconds)) is not None]
    sent = sum(sent_bytes(each, topology) * pair.count for pair in pairs for each in pair.planned)
    widened = _find_in_widening(pairs, topology, wire_seconds) if target == "host" else ()
    return [*_merge_equal(found, sent or 1.0), *widened, *_find_in_axes(pairs, topology)]


def _merge_equal(found: Iterable[tuple[Pair, Finding]], planned_bytes: float) -> Iterator[Finding]:
    """Equal findings as one; each counts if the sum of its kind reaches the limit.

    Missing collectives and permutes of padded rows have to reach it in bytes, too, because each alone is all latency:
    compilers sum small values before they send them, and send one tile of a reduce-scatter's padding.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    shares: dict[str, float] = {}
    for pair, each in found:
        groups.setdefault((each.kind, star_numbers(each.text)), []).append(each)
        padded = each.kind == "same plan at higher cost" and any(map(is_realignment, pair.compiled))
        by_bytes = each.kind == "missing" or padded
        share = min(each.share, abs(each.bytes) / planned_bytes) if by_bytes else each.share
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


def _find_in_pair(pair: Pair, topology: Topology, target: CompileTarget, wire_seconds: float) -> Finding | None:
    """The finding of a pair; None if all is as planned.

    Host devices have no such topology: there the cost of a form is its bytes, not the time of its parts.
    """
    planned = max(pair.width, 1.0) * sum(p.seconds / p.count * pair.count for p in pair.planned)
    compiled = sum(seconds_of(c, topology) * pair.count for c in pair.compiled)
    more = sum(sent_bytes(c, topology) for c in pair.compiled) - sum(sent_bytes(p, topology) for p in pair.planned)
    share, bytes = abs(compiled - planned) / wire_seconds, more * pair.count
    if not pair.compiled:
        text = f"{_describe(pair.planned, topology, pair.count)}, {pair.planned[0].where}: not in the compiled program"
        return Finding("missing", text, bytes, share)
    if not pair.planned:
        text = f"{_describe(pair.compiled, topology, pair.count)}{_place(pair.compiled[0])}: not in the plan"
        if any(each.only_sliced for each in pair.compiled):
            text += ", and only slices of it are used (an involuntary full rematerialization)"
        return Finding("unplanned", text, bytes, share)
    if is_literal(pair):
        return None
    text = " compiled as ".join(_describe(side, topology, pair.count) for side in (pair.planned, pair.compiled))
    if compiled < planned * (1 - 1e-9):
        return Finding("same plan at lower cost", text, bytes, share)
    sent = sum(sent_bytes(c, topology) for c in pair.compiled) * pair.count
    dearer = sent > expected_bytes(pair, topology) * (1 + 1e-9) if target == "host" else compiled > planned * (1 + 1e-9)
    if not dearer:
        return Finding("same plan", text, bytes, share)
    return Finding("same plan at higher cost", text, bytes, share)


def _find_in_widening(pairs: Sequence[Pair], topology: Topology, wire_seconds: float) -> Iterator[Finding]:
    """Host devices send 16-bit floats as 32-bit ones: one finding for all."""
    wider = [pair for pair in pairs if pair.width > 1]
    runs = sum(pair.count * len(pair.compiled) for pair in wider)
    more = sum(pair.count * (pair.width - 1) * sum(p.bytes for p in pair.planned) for pair in wider)
    planned = sum(pair.count * p.seconds / p.count for pair in wider for p in pair.planned)
    seconds = sum(pair.count * seconds_of(c, topology) for pair in wider for c in pair.compiled) - planned
    if runs:
        text = f"host devices have no 16-bit collectives: {runs} runs send float32 instead"
        yield Finding("same plan", text, more, abs(seconds) / wire_seconds)


def wire_bytes_by_axes(pairs: Sequence[Pair], topology: Topology) -> dict[Axes, tuple[float, float, float]]:
    """Per set of mesh axes: bytes that one chip sends in one step, planned, expected of the compiler, and compiled.

    The expected ones are within `bounds.WIRE` of the compiled ones if the program is as planned; sorted, the most
    first.
    """
    found: dict[Axes, tuple[float, float, float]] = {}
    for pair in pairs:
        axes = axes_of((*pair.planned, *pair.compiled)[0], topology)
        planned = pair.count * sum(sent_bytes(each, topology) for each in pair.planned)
        compiled = pair.count * sum(sent_bytes(each, topology) for each in pair.compiled)
        before = found.get(axes, (0.0, 0.0, 0.0))
        found[axes] = (before[0] + planned, before[1] + expected_bytes(pair, topology), before[2] + compiled)
    return dict(sorted(found.items(), key=lambda item: -max(item[1][0], item[1][2])))


def _find_in_axes(pairs: Sequence[Pair], topology: Topology) -> Iterator[Finding]:
    """The sets of mesh axes on which the bytes leave their bounds."""
    sent = wire_bytes_by_axes(pairs, topology)
    total = sum(expected for _, expected, _ in sent.values())
    for axes, (_, expected, compiled) in sent.items():
        more = compiled - expected
        if abs(more) > bounds.WIRE * expected and abs(more) > bounds.SMALLEST_WIRE * total:
            times = (
                f"{compiled / expected:.3f} times the bytes that the plan expects"
                if expected
                else "what is not planned"
            )
            text = f"over {''.join(axes)} each chip sends {times}, {size(abs(more))} {'more' if more > 0 else 'less'}"
            yield Finding("bytes on the wire", text, more, abs(more) / (total or abs(more)), True)


# --- work: a partitioner that replicates an operand makes every chip compute what several should share


@dataclass(frozen=True)
class Repeated:
    """A source line whose matmuls compute more than was planned, in FLOPs per chip and step.

    `again` are those of `compiled` that form a result which exists already.
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


def find_repeated(
    planned: Mapping[str, float], compiled: Mapping[str, float], again: Mapping[str, float], tolerance: float
) -> tuple[Repeated, ...]:
    """The lines that compute more than planned, the worst first; none unless the total exceeds the plan.

    Compilers turn some small matmuls into multiplications and sums, which are not counted, so less than planned says
    nothing.
    """
    total = sum(planned.values())
    if sum(compiled.values()) <= total * (1 + tolerance):
        return ()
    more = [Repeated(at, planned.get(at, 0.0), flops, again.get(at, 0.0)) for at, flops in compiled.items()]
    worst = sorted(more, key=lambda each: each.planned - each.compiled)
    return tuple(each for each in worst if each.compiled - each.planned > tolerance * total)


def find_in_work(
    planned: Mapping[str, float], compiled: Mapping[str, float], again: Mapping[str, float]
) -> Iterator[Finding]:
    """Matmuls that compute more than planned, by source line: `planned`, `compiled` and `again` are FLOPs.

    **Arguments:**

    - `again`: of the compiled ones, those that recompute the result of another fusion.
    """
    due, done = max(sum(planned.values()), 1.0), sum(compiled.values())
    for each in find_repeated(planned, compiled, again, bounds.NOTICEABLE):
        times = f"{each.compiled / each.planned:.2f} times the planned" if each.planned else "unplanned"
        text = f"matmuls at {each.source or 'an unknown line'} compute {times} FLOPs"
        share = (each.compiled - each.planned) / due
        if each.compiled - each.again <= each.planned + bounds.NOTICEABLE * due:
            yield Finding("computed again", f"{text}: once for each fusion that uses them", 0.0, share)
        else:
            yield Finding("replicated", f"{text}: an operand is replicated", 0.0, share, True)
    if done > due * (1 + bounds.FLOPS):
        text = f"the matmuls compute {done / due:.3f} times the planned FLOPs"
        yield Finding("FLOPs", text, 0.0, done / due - 1, True)


# --- memory


def find_in_memory(planned: float, compiled: float) -> Iterator[Finding]:
    """The finding of a peak, in bytes, that leaves its bounds."""
    share = (compiled - planned) / planned
    if abs(share) > bounds.MEMORY:
        text = f"the compiled program needs {compiled / planned:.3f} times the planned peak"
        yield Finding("peak memory", text, compiled - planned, abs(share), True)


def find_in_interface(
    arguments: Sequence[ArrayPlan],
    results: Sequence[ArrayPlan],
    compiled: CompiledArguments,
    planned_peak: float,
) -> Iterator[Finding]:
    """Arguments and results that take more of a chip than planned, and donated arguments that no result overwrites."""
    sides: tuple[tuple[Literal["argument", "result"], Sequence[ArrayPlan], Sequence[int]], ...] = (
        ("argument", arguments, compiled.argument_bytes),
        ("result", results, compiled.result_bytes),
    )
    for kind, planned, held in sides:
        if len(planned) == len(held):
            rows = [(p.path, p.bytes_per_chip, float(b)) for p, b in zip(planned, held, strict=True)]
        else:  # the compiler drops unused arguments
            rows = [(f"all {kind}s", sum(p.bytes_per_chip for p in planned), float(sum(held)))]
        more = [(path, due, b) for path, due, b in rows if b > due]
        counts = sum(b - due for _, due, b in more) > bounds.MEMORY * planned_peak
        for path, due, b in more:
            if b - due > bounds.NOTICEABLE * planned_peak:
                text = f"{path} takes {size(b)} of each chip, planned {size(due)}"
                yield Finding(kind, text, b - due, (b - due) / planned_peak, counts)
    yield from _find_in_donations(arguments, compiled, planned_peak)


def _find_in_donations(
    arguments: Sequence[ArrayPlan], compiled: CompiledArguments, planned_peak: float
) -> Iterator[Finding]:
    """Donated arguments that stay beside the results that should overwrite them."""
    donated = sum(each.bytes_per_chip for each in arguments if each.donated)
    kept = donated - compiled.aliased_bytes
    if kept > bounds.NOTICEABLE * planned_peak:
        text = f"{size(kept)} of {size(donated)} donated arguments are not overwritten by results"
        share = kept / planned_peak
        yield Finding("donation", text, kept, share, share > bounds.MEMORY)


# --- time


def find_in_time(
    planned: float, replayed: float, costs: Sequence[AuditedCost], slower: float = bounds.SLOWER
) -> Iterator[Finding]:
    """A step that is much slower than planned, with the instructions that take the most unplanned time.

    The audit does not fail by it; `Audit.is_slow` reports it. `slower` is the multiple of the planned time above which it is.
    """
    if replayed > slower * planned:
        ratio = f"{replayed / planned:.2f} times the planned {time(planned)}" if planned else "planned without cost"
        causes = _causes(costs, bounds.NOTICEABLE * planned)
        text = f"a step takes {time(replayed)}, {ratio}"
        text += f"; the most that is not planned: {', '.join(causes)}" if causes else ""
        yield Finding("slower than planned", text, 0.0, replayed / planned - 1 if planned else 1.0)


def find_in_overlap(found: Sequence[Overlap], planned_seconds: float) -> Iterator[Finding]:
    """Rings of which the schedule hides less than planned; the audit does not fail by it.

    **Arguments:**

    - `planned_seconds`: of a whole step.
    """
    for each in found:
        less = each.planned - (each.replayed or 0.0)
        share = less * each.seconds / planned_seconds
        if each.replayed is not None and less > bounds.HIDDEN and share > bounds.NOTICEABLE:
            text = (
                f"permutes over {each.axis} of {size(each.bytes)} × {each.count:g}, {each.where}:"
                f" {percent(each.replayed)} of {time(each.seconds)} are hidden, planned {percent(each.planned)}:"
                " the core waits for them in the compiled schedule"
            )
            yield Finding("less overlap", text, 0.0, share)


_CAUSES = 3
"""The number of operations named as the cause of a slow step."""


def _causes(costs: Sequence[AuditedCost], least: float) -> list[str]:
    """The operations of source lines that take the most unplanned time, while they take more than the least."""
    groups: dict[tuple[str, str], list[AuditedCost]] = {}
    for each in sorted(costs, key=lambda each: -each.unplanned_seconds):
        it = each.instruction
        if each.unplanned_seconds <= 0:
            break
        groups.setdefault((it.scope.rpartition("/")[2] or it.opcode, it.source), []).append(each)
    total = {of: sum(each.unplanned_seconds for each in alike) for of, alike in groups.items()}
    worst = sorted(groups, key=lambda of: -total[of])[:_CAUSES]
    return [
        f"{time(total[what, at])} of {what}{f' at {at}' if at else ''} ({_names(groups[what, at])})"
        for what, at in worst
        if total[what, at] > least
    ]


def _names(alike: Sequence[AuditedCost]) -> str:
    first = alike[0].instruction
    return f"{first.name} × {first.runs}" + (f" and {len(alike) - 1} more" if len(alike) > 1 else "")


# --- words


def _describe(group: Sequence[PlannedCollective | CompiledCollective], topology: Topology, count: int) -> str:
    """A description such as `2 reduce-scatters over x of 2 KiB × 118`."""
    alike = Counter((each.kind, "".join(axes_of(each, topology)), size(each.bytes)) for each in group)
    parts = [f"{f'{n} {kind}s' if n > 1 else kind} over {axes} of {of}" for (kind, axes, of), n in alike.items()]
    return " and ".join(parts) + (f" × {count}" if count > 1 else "")


def _place(compiled: CompiledCollective) -> str:
    found = compiled.source or compiled.op_name.rpartition("shard_map/")[2]
    return f", {found}" if found else ""
