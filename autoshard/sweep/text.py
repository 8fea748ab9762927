"""A sweep as text, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import exp, log
from textwrap import wrap

from autoshard.sweep.advice import advice, cost_of, latency_of
from autoshard.sweep.frontier import cheapest, fastest, frontier, gains, longest
from autoshard.sweep.results import FAILED, INFEASIBLE, PRUNED, SOLVED
from autoshard.sweep.rows import Row, SweepResult
from autoshard.tables import WIDTH, item, percent, size, table, time

_LISTED = 8
"""How many points without a plan are named, for each reason."""


def render(sweep: SweepResult, width: int = WIDTH) -> str:
    """The frontiers, what to make of them, and what became of the points that have no plan."""
    parts = [_summary(sweep)]
    parts += [_frontier(sweep, phase, width) for phase in sweep.phases if sweep.of(phase)]
    parts += [_answers(sweep, width), _recommendations(sweep, width), _without(sweep, width)]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _summary(sweep: SweepResult) -> Iterator[str]:
    counts = Counter(row.outcome for row in sweep.rows)
    unproven = sum(row.status != "OPTIMAL" for row in sweep.solved)
    proven = "all proven optimal" if not unproven else f"{unproven} of them not proven optimal"
    words = {INFEASIBLE: "do not fit", PRUNED: "ruled out by a lower bound", FAILED: "failed"}
    rest = "".join(f", {counts[key]} {word}" for key, word in words.items() if counts[key])
    yield f"{sweep.name}: {len(sweep.rows)} points, {counts[SOLVED]} with a plan ({proven}){rest}"


_HEADERS = ("topology", "point", "latency", "chip-ms a token", "price", "MFU", "memory", "layout")


def _frontier(sweep: SweepResult, phase: str, width: int) -> Iterator[str]:
    rows = sweep.of(phase)
    best = frontier(rows)
    yield f"{phase}: the frontier of {len(rows)} plans"
    lines = table(_HEADERS, [_cells(row, sweep.currency) for row in best], "<~>>>>>~", width - 2)
    yield from (f"  {line}" for line in lines)


def _cells(row: Row, currency: str) -> tuple[str, ...]:
    knobs = ", ".join(f"{key} {value}" for key, value in row.knobs.items())
    price = "-" if row.price is None else f"{row.price:.3g} {currency}/M"
    unproven = "" if row.status == "OPTIMAL" else f" (gap {percent(row.gap)})"
    cost = f"{1e3 * row.chip_seconds_per_token:.3g}"
    share = percent(row.peak_bytes / row.budget_bytes)
    return row.topology, knobs, time(row.latency_seconds), cost, price, percent(row.mfu), share, row.headline + unproven


def _answers(sweep: SweepResult, width: int) -> Iterator[str]:
    """What the job's constraints ask for."""
    lines = []
    for phase in sweep.phases:
        rows = sweep.of(phase)
        key = {"decode": "seconds_per_token", "prefill": "seconds_to_first_token"}.get(rows[0].kind if rows else "", "")
        if limit := sweep.constraints.get(key):
            lines += item(answer_cheapest(sweep, phase, limit), width)
    if lines:
        yield "Answers"
        yield from lines


def answer_cheapest(sweep: SweepResult, phase: str, limit: float) -> str:
    """The cheapest slice at a latency or less, in a sentence."""
    found = cheapest(sweep.of(phase), limit)
    if found is None:
        near = min(sweep.of(phase), key=lambda row: row.latency_seconds, default=None)
        nearest = f"; the fastest is {near.name} with {latency_of(near)}" if near else ""
        return f"{phase}: no plan takes {time(limit)} or less{nearest}."
    words = f"{latency_of(found)}, {cost_of(found, sweep.currency)}, {percent(found.mfu)} MFU"
    return f"{phase}: the cheapest at {time(limit)} or less is {found.name}: {words}; {found.headline}."


def answer_fastest(sweep: SweepResult, phase: str, chips: int) -> str:
    """The fastest plan on so many chips, in a sentence."""
    found = fastest(sweep.of(phase), chips)
    if found is None:
        counts = sorted({row.chips for row in sweep.of(phase)})
        return f"{phase}: no plan is on {chips} chips; there are plans on {', '.join(map(str, counts)) or 'none'}."
    words = f"{latency_of(found)}, {cost_of(found, sweep.currency)}"
    return f"{phase}: the fastest on {chips} chips is {found.name}: {words}; {found.headline}."


def answer_longest(sweep: SweepResult, phase: str, knob: str) -> str:
    """The largest value of a knob that has a plan, in a sentence."""
    found = longest(sweep.of(phase), knob)
    if found is None:
        numbers = dict.fromkeys(
            key for row in sweep.of(phase) for key, value in row.knobs.items() if isinstance(value, int | float)
        )
        return f"{phase}: {knob} is no number that its plans differ in; {', '.join(numbers) or 'none'} would do."
    most = max(
        (row.knobs[knob] for row in sweep.rows if row.phase == phase and isinstance(row.knobs.get(knob), int | float)),
        key=float,
    )
    room = "" if most != found.knobs[knob] else " (the largest that the job asks for; larger ones may fit)"
    held = f"{size(found.peak_bytes)} of {size(found.budget_bytes)} a chip"
    return f"{phase}: the largest {knob} is {found.knobs[knob]}{room}: {found.name}, {held}, {latency_of(found)}."


def answer_gain(sweep: SweepResult, phase: str, knob: str, first: str, second: str, width: int = WIDTH) -> list[str]:
    """What one value of a knob gains over another, pair by pair."""
    pairs = gains(sweep.of(phase), knob, first, second)
    if not pairs:
        return [f"{phase}: no two plans differ in {knob} {first} and {second} alone."]
    ratios = [pair.latency for pair in pairs]
    mean = exp(sum(map(log, ratios)) / len(ratios))
    least, most = min(pairs, key=lambda pair: pair.latency), max(pairs, key=lambda pair: pair.latency)
    held = sum(pair.second.peak_bytes for pair in pairs) / sum(pair.first.peak_bytes for pair in pairs)
    words = (
        f"{phase}: {knob} {second} is {mean:.2f} times as fast as {first}, and as cheap, over {len(pairs)} pairs of plans:"
        f" {least.latency:.2f} at {least.second.name}, {most.latency:.2f} at {most.second.name}."
        f" It takes {percent(held)} of the memory.{_only(sweep, phase, knob, first, second)}"
    )
    rows = [
        (
            pair.second.topology,
            ", ".join(f"{key} {value}" for key, value in pair.second.knobs.items() if key != knob),
            time(pair.first.latency_seconds),
            time(pair.second.latency_seconds),
            f"{pair.latency:.2f} ×",
            size(pair.first.peak_bytes),
            size(pair.second.peak_bytes),
        )
        for pair in pairs
    ]
    headers = ("topology", "point", first, second, "faster", f"{first} a chip", f"{second} a chip")
    return [
        *wrap(words, width, break_on_hyphens=False),
        *(f"  {x}" for x in table(headers, rows, "<~>>>>>", width - 2)),
    ]


def _only(sweep: SweepResult, phase: str, knob: str, first: str, second: str) -> str:
    """How many points fit with the second value of a knob alone."""

    def rest(row: Row) -> tuple:
        return row.topology, tuple((key, value) for key, value in row.knobs.items() if key != knob)

    rows = [row for row in sweep.rows if row.phase == phase]
    full = {rest(row) for row in rows if row.knobs.get(knob) == first and row.outcome in (INFEASIBLE, PRUNED)}
    gained = [row for row in rows if row.knobs.get(knob) == second and row.outcome == SOLVED and rest(row) in full]
    return f" {len(gained)} points have a plan with {second} alone, such as {gained[0].name}." if gained else ""


def _recommendations(sweep: SweepResult, width: int) -> Iterator[str]:
    yield "What to make of it"
    for sentence in advice(sweep):
        yield from item(sentence, width)


def _without(sweep: SweepResult, width: int) -> Iterator[str]:
    words = {FAILED: "Failed", INFEASIBLE: "No layout fits", PRUNED: "Ruled out without a search"}
    rows = [row for row in sweep.rows if row.outcome != SOLVED]
    if rows:
        yield "Points without a plan"
    for outcome, title in words.items():
        yield from _reasons(title, [row for row in rows if row.outcome == outcome], width)


def _reasons(title: str, rows: Sequence[Row], width: int) -> Iterator[str]:
    for row in rows[:_LISTED]:
        yield from item(f"{title}: {row.phase} on {row.name}: {row.why.splitlines()[0].rstrip('.')}.", width)
    if len(rows) > _LISTED:
        yield f"    and {len(rows) - _LISTED} more"
