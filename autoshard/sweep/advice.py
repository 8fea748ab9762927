"""Recommendations: what a sweep says, in words with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import exp, log

from autoshard.sweep.frontier import family, frontier, gains, switches
from autoshard.sweep.job import Knob
from autoshard.sweep.rows import REQUEST, Row, SweepResult
from autoshard.tables import percent, time

_SWITCHES = 6
"""How many switches of layout are told, of one phase."""
_LATENCY = {"decode": "a token", "prefill": "to the first token", REQUEST: "a request"}


def advice(sweep: SweepResult) -> list[str]:
    """A short text: which parallelism where, and where it changes; one sentence or two an item."""
    found = [f"{phase}{words}" for phase in sweep.phases for words in _advice_of(sweep, phase)]
    return found or ["No point has a plan: the table says why for each."]


def advice_of(sweep: SweepResult, phase: str) -> list[str]:
    """The same of one phase, whose name is not repeated; empty if it has no plan."""
    words = (each.removeprefix(": ").removeprefix(", ") for each in _advice_of(sweep, phase))
    return [f"{each[0].upper()}{each[1:]}" for each in words]


def _advice_of(sweep: SweepResult, phase: str) -> Iterator[str]:
    """Sentences that go on from the name of the phase."""
    rows = sweep.of(phase)
    if rows:
        for part in (_ends(rows, sweep.currency), _layouts(rows), _steps(rows), _dtypes(rows)):
            yield from part


def latency_of(row: Row) -> str:
    """`24.5 ms a token`; of a request its phases too."""
    words = f"{time(row.latency_seconds)} {_LATENCY.get(row.kind, 'a step')}"
    if row.kind != REQUEST:
        return words
    parts = [
        f"{time(taken)} {_LATENCY[kind]}"
        for kind in ("prefill", "decode")
        if (taken := row.seconds_of(kind)) is not None
    ]
    return f"{words} ({', '.join(parts)})" if parts else words


def cost_of(row: Row, currency: str) -> str:
    """`31 chip-ms a token (28 USD a million)`."""
    price = "" if row.price is None else f" ({row.price:.3g} {currency} a million)"
    return f"{1e3 * row.chip_seconds_per_token:.3g} chip-ms a token{price}"


def _ends(rows: Sequence[Row], currency: str) -> Iterator[str]:
    best = frontier(rows)
    first, last = best[0], best[-1]
    yield f": the fastest is {first.name}: {latency_of(first)} at {cost_of(first, currency)}, {_said(first)}."
    if last is not first:
        times = last.latency_seconds / first.latency_seconds
        less = first.chip_seconds_per_token / last.chip_seconds_per_token
        yield (
            f": the cheapest is {last.name}: {latency_of(last)} at {cost_of(last, currency)} and {percent(last.mfu)}"
            f" MFU, {_said(last)}. It is {times:.3g} times slower and {less:.3g} times cheaper."
        )


def _said(row: Row) -> str:
    return row.headline or "with no matrix products"


def _layouts(rows: Sequence[Row]) -> Iterator[str]:
    """Along every number that is varied, with all else equal: which layout from where to where."""
    for knob in dict.fromkeys(key for row in rows for key in row.knobs):
        lines = []
        for rest, group in _along(rows, knob):
            spans = [
                (name, [row.knobs[knob] for row in part])
                for name, part in ((n, list(p)) for n, p in groupby(group, key=_family))
            ]
            if len(spans) > 1:
                lines.append((rest, spans))
        if lines:
            rest, spans = max(lines, key=lambda line: len(line[1]))
            words = "; ".join(f"{name} {_span(values)}" for name, values in spans)
            also = f" ({len(lines)} such series change; this one changes most)" if len(lines) > 1 else ""
            yield f", by {knob}, {rest}: {words}{also}."


def _along(rows: Sequence[Row], knob: str) -> Iterator[tuple[str, list[Row]]]:
    table: dict[tuple, list[Row]] = {}
    for row in rows:
        value = row.knobs.get(knob)
        if isinstance(value, int | float) and not isinstance(value, bool):
            rest = tuple((key, each) for key, each in row.knobs.items() if key != knob)
            table.setdefault((row.topology, rest), []).append(row)
    for (topology, rest), group in table.items():
        words = ", ".join(f"{key} {value}" for key, value in rest)
        yield f"on {topology}{f', {words}' if words else ''}", sorted(group, key=lambda row: float(row.knobs[knob]))


def _family(row: Row) -> str:
    """The families of the largest matrix product and of attention."""
    return " with ".join(family(part.removeprefix("attention ")) for part in row.headline.split(" | "))


def _span(values: Sequence[Knob]) -> str:
    return f"at {values[0]}" if len(values) == 1 else f"from {values[0]} to {values[-1]}"


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    best = frontier(rows)
    found = [each for each in switches(best) if _family(each.before) != _family(each.after)]
    if len(best) > 1 and not found:
        yield f": the largest products keep one kind of layout along the whole frontier of {len(best)} points."
    for each in found[:_SWITCHES]:
        old, new = _family(each.before), _family(each.after)
        yield f": along the frontier {old} gives way to {new} between {each.before.name} and {each.after.name}."
    if len(found) > _SWITCHES:
        yield f": and {len(found) - _SWITCHES} switches more."


def _dtypes(rows: Sequence[Row]) -> Iterator[str]:
    """What each value of a knob of words, such as a dtype, gains over the first."""
    for knob in dict.fromkeys(key for row in rows for key in row.knobs):
        values = list(dict.fromkeys(row.knobs[knob] for row in rows if isinstance(row.knobs.get(knob), str)))
        for other in values[1:]:
            pairs = gains(rows, knob, values[0], other)
            if pairs:
                ratios = [pair.latency for pair in pairs]
                mean = exp(sum(map(log, ratios)) / len(ratios))
                most = max(pairs, key=lambda pair: pair.latency)
                yield (
                    f": {knob} {other} is {mean:.2f} times as fast as {values[0]} over {len(pairs)} pairs of points,"
                    f" between {min(ratios):.2f} and {max(ratios):.2f} (most on {most.second.name})."
                )
