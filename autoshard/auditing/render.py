"""An audit as text: planned beside compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from autoshard._util.paths import shared_name, star_numbers
from autoshard._util.tables import WIDTH, item, percent, size, table, time
from autoshard.auditing.findings import Finding
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.auditing.matching import Pair, axes_of
from autoshard.auditing.planned_times import AuditedCost
from autoshard.auditing.record import AuditRecord
from autoshard.auditing.replay import MOST_COSTLY
from autoshard.planning.records import PlannedCollective


def render(audit: AuditRecord, width: int = WIDTH) -> str:
    """The audit as plain text tables: collectives, bytes on the wire by mesh axes, peak memory, time, differences."""
    sections = (
        _collectives(audit, width),
        _wire(audit, width),
        _chip(audit, width),
        _overlap(audit, width),
        _costliest(audit, width),
        _differences(audit, width),
    )
    verdict = "as planned" if audit.ok else "NOT as planned"
    if audit.is_slow and audit.step_seconds and audit.planned_seconds:
        verdict += f", {audit.step_seconds / audit.planned_seconds:.2f} times the planned time"
    carried = "" if audit.carry == "manual" else f" and carried by {audit.carry}"
    head = f"{audit.name} on {audit.topology.name}, compiled for {_TARGETS[audit.target]}{carried}: {verdict}"
    return "\n\n".join([head, *("\n".join(lines) for section in sections if (lines := list(section)))]) + "\n"


_SHARES = {
    "slower than planned": "more than planned",
    "less overlap": "of the planned step",
    "bytes on the wire": "of the bytes on the wire",
    "peak memory": "of the planned peak",
    "argument": "of the planned peak",
    "result": "of the planned peak",
    "donation": "of the planned peak",
    "FLOPs": "of the planned FLOPs",
    "replicated": "of the planned FLOPs",
    "computed again": "of the planned FLOPs",
}
_TARGETS = {"host": "host devices", "tpu": "the TPU", "gpu": "the GPU"}


def _collectives(audit: AuditRecord, width: int) -> Iterator[str]:
    yield "Collectives"
    if not audit.pairs:
        yield "  none planned, none compiled"
        return
    headers = ("planned", "axes", "payload", "runs", "compiled", "payload", "runs", "planned for")
    yield from _indent_all(table(headers, _rows(audit), "<<>>~>>~", width - 2))


def _rows(audit: AuditRecord) -> list[tuple[str, ...]]:
    """A row for each kind of pair: equal pairs of an unrolled model's layers, planned and compiled, are one row."""
    groups: dict[tuple[str, ...], list[Pair]] = {}
    for pair in audit.pairs:
        groups.setdefault(tuple(map(star_numbers, _row(audit, [pair]))), []).append(pair)
    return [_row(audit, alike) for alike in groups.values()]


def _row(audit: AuditRecord, alike: Sequence[Pair]) -> tuple[str, ...]:
    planned, found = alike[0].planned, alike[0].compiled
    runs = str(sum(pair.count for pair in alike))
    where = shared_name(pair.planned[0].where for pair in alike) if planned else ""
    many = f" and {len(planned) - 1} more" if len(planned) > 1 else ""
    return (
        _side(planned) or "nothing",
        "".join(axes_of((*planned, *found)[0], audit.topology)),
        _payload(planned),
        runs if planned else "",
        " + ".join(dict.fromkeys(map(_describe, found))) or "nothing",
        _payload(found),
        runs if found else "",
        where + many,
    )


def _side(group: Sequence[PlannedCollective]) -> str:
    counts = Counter(each.kind for each in group)
    return " + ".join(f"{n} × {kind}" if n > 1 else kind for kind, n in counts.items())


def _describe(each: CompiledCollective) -> str:
    plain = each.spelling.removesuffix("-start") in (each.kind, "ragged-" + each.kind)
    return each.kind if plain else f"{each.kind} ({each.spelling})"


def _payload(group: Sequence[PlannedCollective | CompiledCollective]) -> str:
    return size(sum(each.bytes for each in group)) if group else ""


def _wire(audit: AuditRecord, width: int) -> Iterator[str]:
    sent = audit.wire_bytes()
    if not sent:
        return
    rows = [
        ("".join(axes), size(planned), size(compiled), f"{compiled / planned:.4f}" if planned else "-")
        for axes, (planned, compiled) in sent.items()
    ]
    yield "Bytes that each chip sends in one step"
    yield from _indent_all(table(("axes", "planned", "compiled", "ratio"), rows, "<>>>", width - 2))


def _chip(audit: AuditRecord, width: int) -> Iterator[str]:
    rows = []
    if audit.peak_bytes is not None:
        ratio = f"{audit.peak_bytes / audit.planned_peak_bytes:.4f}"
        rows.append(("peak memory", size(audit.planned_peak_bytes), size(audit.peak_bytes), ratio))
    if audit.planned_flops and audit.flops:
        ratio = f"{audit.flops / audit.planned_flops:.4f}"
        rows.append(("FLOPs of matmuls", f"{audit.planned_flops:.4g}", f"{audit.flops:.4g}", ratio))
    if audit.compute_seconds is not None:
        on_chip = audit.planned_seconds - audit.planned_collective_seconds
        rows.append(_times("time on the chip (compiler's cycles)", on_chip, audit.compute_seconds))
    wire = audit.planned_collective_seconds, audit.collective_seconds
    rows.append(_times("time of collectives (plan's model)", *wire))
    if audit.compute_seconds is not None:
        rows.append(_times("step time", audit.planned_seconds, audit.compute_seconds + audit.collective_seconds))
    if audit.replay is not None:
        found = audit.replay
        rows.append(_times("step time, schedule replayed", audit.planned_seconds, found.seconds))
        rows.append(("  of it waiting for communication", "", time(found.exposed_seconds), ""))
        rows.append(("  of it waiting for copies", "", time(found.copy_seconds), ""))
        rows.append(("floor: bytes to move once", "", time(found.floor_seconds), ""))
    yield "One chip"
    yield from _indent_all(table(("", "planned", "compiled", "ratio"), rows, "<>>>", width - 2))


def _overlap(audit: AuditRecord, width: int) -> Iterator[str]:
    """The permutes of rings, and how much of their time is hidden."""
    if audit.overlap:
        yield "Rings: permutes hidden behind matmuls"
        rows = [
            (
                each.axis,
                size(each.bytes),
                f"{each.count:g}",
                time(each.seconds),
                percent(each.planned),
                "none found" if each.replayed is None else percent(each.replayed),
                each.where,
            )
            for each in audit.overlap
        ]
        headers = ("axis", "payload", "runs", "time", "planned", "replayed", "planned for")
        yield from _indent_all(table(headers, rows, "<>>>>>~", width - 2))


def _costliest(audit: AuditRecord, width: int) -> Iterator[str]:
    """The instructions that take the core the longest, to run them or to wait for them."""
    if audit.costs:
        yield "Costliest instructions"
        rows = [_cost(each) for each in audit.costs[:MOST_COSTLY]]
        headers = ("time", "not planned", "runs", "instruction", "at", "operation")
        yield from _indent_all(table(headers, rows, ">>><<~", width - 2))


def _cost(each: AuditedCost) -> tuple[str, ...]:
    it = each.instruction
    more = time(each.unplanned_seconds) if each.unplanned_seconds > 0 else ""
    return (time(it.seconds), more, str(it.runs), it.name, it.source, it.scope or it.opcode)


def _times(what: str, planned: float, compiled: float) -> tuple[str, ...]:
    return (what, time(planned), time(compiled), f"{compiled / planned:.3f}" if planned else "-")


def _differences(audit: AuditRecord, width: int) -> Iterator[str]:
    if audit.differences:
        yield "Differences"
        yield from (line for each in audit.differences for line in item(_difference(each), width))


def _difference(each: Finding) -> str:
    if not each.share and each.kind in _TOLD:
        return f"{each.kind}: {each.text}"
    of = _SHARES.get(each.kind, "of the time on the wire")
    told = each.counts or each.kind.startswith("same plan") or each.kind in _TOLD
    mark = "" if told else ", too small to count"
    return f"{each.kind}: {each.text} ({percent(each.share)} {of}{mark})"


_TOLD = ("computed again", "slower than planned", "less overlap", "path for an overflow")
"""Kinds of differences that are reported, and never count."""


def _indent_all(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
