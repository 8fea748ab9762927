"""Recommendations from a sweep, as sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import exp, log

from autoshard._util.tables import figure, percent, time
from autoshard.sweep.analysis.frontier import Gain, cost_among, frontier, gains, is_number, switches
from autoshard.sweep.analysis.rows import REQUEST, Row, SweepResult
from autoshard.sweep.job import Knob

_SWITCHES = 6
"""The number of reported layout changes per phase."""
_LATENCY = {"decode": "per token", "prefill": "to the first token", REQUEST: "per request"}


Said = tuple[str, str]
"""The subject of a sentence within its phase (empty for the whole phase), and the sentence."""


def advice(sweep: SweepResult) -> list[str]:
    """The best layouts of a sweep and where they change; one or two sentences per item."""
    found = [
        f"{phase}{about and f', {about}'}: {words}"
        for phase in sweep.phases
        for about, words in _sentences(sweep, phase)
    ]
    return found or ["No point has a plan; the table has the reasons."]


def advice_of(sweep: SweepResult, phase: str) -> list[str]:
    """The recommendations for one phase, without its name; empty if it has no plan."""
    words = [
        f"{about}: {words}" if about else f"{words[0].upper()}{words[1:]}" for about, words in _sentences(sweep, phase)
    ]
    return [each.replace("by ", "By ", 1) if each.startswith("by ") else each for each in words]


def _sentences(sweep: SweepResult, phase: str) -> Iterator[Said]:
    rows = sweep.of(phase)
    for part in sweep.parts(phase):
        about = part.name.removeprefix(phase).removeprefix(", ")
        yield from ((about, words) for words in (*_ends(sweep, part.rows), *_steps(sweep, part.rows)))
    yield from _layouts(rows)
    yield from (("", words) for words in _words(sweep, rows))


def latency_of(row: Row) -> str:
    """A latency as text: `24.5 ms per token`; for a request also those of its phases."""
    words = f"{time(row.latency_seconds)} {_LATENCY.get(row.kind, 'per step')}"
    if row.kind != REQUEST:
        return words
    parts = [
        f"{time(taken)} {_LATENCY[kind]}"
        for kind in ("prefill", "decode")
        if (taken := row.seconds_of(kind)) is not None
    ]
    return f"{words} ({', '.join(parts)})" if parts else words


def cost_of(row: Row, currency: str) -> str:
    """A cost as text, with the figure that it rests on: `31 chip-ms per token (28 USD per million tokens, …)`."""
    price = "" if row.price is None else f" ({figure(row.price)} {currency} per million tokens, by planned times)"
    compiled = "" if row.slowdown is None else f"; compiled steps take {row.slowdown:.2f} times the planned"
    return f"{figure(1e3 * row.chip_seconds_per_token)} chip-ms per token{price}{compiled}"


def _ends(sweep: SweepResult, rows: Sequence[Row]) -> Iterator[str]:
    best, cost = frontier(rows), cost_among(rows)
    first, last = best[0], best[-1]
    which = "fastest" if last is not first else "fastest and the cheapest"
    words = f"{latency_of(first)} at {cost_of(first, sweep.currency)}, {first.headline}"
    yield f"the {which} is {sweep.label(first, in_part=True)}: {words}."
    if last is not first:
        yield (
            f"the cheapest is {sweep.label(last, in_part=True)}: {latency_of(last)} at {cost_of(last, sweep.currency)} and"
            f" {percent(last.mfu)} MFU, {last.headline}. It is {figure(last.latency_seconds / first.latency_seconds)} times"
            f" slower and {figure(cost(first) / cost(last))} times cheaper."
        )


def _steps(sweep: SweepResult, rows: Sequence[Row]) -> Iterator[str]:
    best = frontier(rows)
    found = [each for each in switches(best) if each.before.family != each.after.family]
    if len(best) > 1 and not found:
        yield f"the largest matmuls have one kind of layout along the whole frontier of {len(best)} points."
    for each in found[:_SWITCHES]:
        yield (
            f"from {sweep.label(each.before, in_part=True)} to {sweep.label(each.after, in_part=True)}, the next point of the"
            f" frontier, the layout changes from {each.before.family} to {each.after.family}."
        )
    if len(found) > _SWITCHES:
        more = len(found) - _SWITCHES
        yield f"and {more} more change{'s' if more > 1 else ''}."


def _layouts(rows: Sequence[Row]) -> Iterator[Said]:
    """The layouts along every numeric variable, with the others fixed."""
    for knob in dict.fromkeys(key for row in rows for key in row.knobs):
        lines = []
        for rest, group in _rows_by_other_knobs(rows, knob):
            spans = [
                (name, [row.knobs[knob] for row in part])
                for name, part in ((n, list(p)) for n, p in groupby(group, key=lambda row: row.family))
            ]
            if len(spans) > 1:
                lines.append((rest, spans))
        if lines:
            rest, spans = max(lines, key=lambda line: len(line[1]))
            words = "; ".join(f"{name} {_span(values)}" for name, values in spans)
            also = f" (one of {len(lines)} such series that change)" if len(lines) > 1 else ""
            yield f"by {knob}, {rest}", f"{words}{also}."


def _rows_by_other_knobs(rows: Sequence[Row], knob: str) -> Iterator[tuple[str, list[Row]]]:
    same = {key for key in rows[0].knobs if len({row.knobs.get(key) for row in rows}) == 1}
    table: dict[tuple, list[Row]] = {}
    for row in rows:
        if is_number(row.knobs.get(knob)):
            rest = tuple((key, each) for key, each in row.knobs.items() if key != knob and key not in same)
            table.setdefault((row.topology, rest), []).append(row)
    for (topology, rest), group in table.items():
        words = ", ".join(f"{key} {value}" for key, value in rest)
        yield f"on {topology}{f', {words}' if words else ''}", sorted(group, key=lambda row: float(row.knobs[knob]))


def _span(values: Sequence[Knob]) -> str:
    return f"at {values[0]}" if len(values) == 1 else f"from {values[0]} to {values[-1]}"


def _words(sweep: SweepResult, rows: Sequence[Row]) -> Iterator[str]:
    """The gain of each value of a text variable, such as a dtype, over the first."""
    for knob in dict.fromkeys(key for row in rows for key in row.knobs):
        values = list(dict.fromkeys(row.knobs[knob] for row in rows if isinstance(row.knobs.get(knob), str)))
        for other in values[1:]:
            if pairs := gains(rows, knob, values[0], other):
                least, most = (pick(pairs, key=lambda pair: pair.latency) for pick in (min, max))
                between = f", between {least.latency:.2f} and {most.latency:.2f} (most on {sweep.label(most.second)})"
                spread = between if most.latency - least.latency > _SAME else ""
                fast = (
                    f"{mean_gain(pairs):.2f} times as fast as"
                    if spread or abs(mean_gain(pairs) - 1) > _SAME
                    else "as fast as"
                )
                over = f"over {len(pairs)} pairs of points{spread}"
                yield f"{knob} {other} is {fast} {values[0]} {over}, and takes {memory_text(pairs)}."


_SAME = 0.005
"""The difference up to which two ratios count as equal."""


def mean_gain(pairs: Sequence[Gain]) -> float:
    """The speed-up of the second rows, as a geometric mean."""
    return exp(sum(log(pair.latency) for pair in pairs) / len(pairs))


def memory_text(pairs: Sequence[Gain]) -> str:
    """The memory of the second rows relative to the first, such as `81.9 % of the memory` or `as much memory`."""
    part = sum(pair.second.peak_bytes for pair in pairs) / sum(pair.first.peak_bytes for pair in pairs)
    if abs(part - 1) <= _SAME:
        return "as much memory"
    return f"{percent(part)} of the memory" if part < 1 else f"{part:.2f} times the memory"
