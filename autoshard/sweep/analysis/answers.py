"""Sweeps and answers as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, isclose, log
from textwrap import wrap
from typing import Any, Literal

from autoshard._util.tables import WIDTH, figure, item, percent, size, table, time
from autoshard.sweep.analysis.advice import advice, cost_of, latency_of, mean_gain, memory_text
from autoshard.sweep.analysis.frontier import cheapest, excess, fastest, frontier, gains, is_number, keeps, longest
from autoshard.sweep.analysis.rows import REQUEST, Part, Row, SweepResult
from autoshard.sweep.job import Knob
from autoshard.sweep.results import FAILED, INFEASIBLE, PRUNED, SOLVED

RESTS_ON = "Latencies, costs and prices rest on planned step times; sweep --verify tpu compiles the frontier's plans."
"""The figure that a sweep's numbers rest on."""
_LISTED = 8
"""The number of slices that are listed per reason for points without a plan."""


def render(sweep: SweepResult, width: int = WIDTH) -> str:
    """The frontiers, the recommendations, and the outcomes of points without a plan."""
    parts = [_summary(sweep, width)]
    parts += [_frontiers(sweep, phase, width) for phase in sweep.phases if sweep.of(phase)]
    parts += [_answers(sweep, width), _recommendations(sweep, width), _infeasible_points(sweep, width)]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _summary(sweep: SweepResult, width: int) -> Iterator[str]:
    counts = Counter(row.outcome for row in sweep.rows)
    unproven = sum(row.status != "OPTIMAL" for row in sweep.solved)
    proven = "all proven optimal" if not unproven else f"{unproven} of them not proven optimal"
    words = {INFEASIBLE: "do not fit", PRUNED: "ruled out by a lower bound", FAILED: "failed"}
    rest = "".join(f", {counts[key]} {word}" for key, word in words.items() if counts[key])
    yield f"{sweep.name}: {len(sweep.rows)} points, {counts[SOLVED]} with a plan ({proven}){rest}"
    yield from (each for each in (limits_text(sweep), uncomparable(sweep)) if each)
    yield from wrap(RESTS_ON, width)


def limits_text(sweep: SweepResult) -> str:
    """The job's constraints as a sentence; empty if it has none."""
    given = sweep.constraints
    said = {
        "seconds_per_token": lambda value: f"{time(value)} per token",
        "seconds_to_first_token": lambda value: f"{time(value)} to the first token",
        "memory_gib": lambda value: f"{value:g} GiB of each chip",
    }
    parts = [words(given[key]) for key, words in said.items() if given.get(key)]
    return f"Allowed are at most {', '.join(parts)}." if parts else ""


def uncomparable(sweep: SweepResult) -> str:
    """A note for jobs with several kinds of chips without prices; empty otherwise."""
    chips = list(dict.fromkeys(row.chip for row in sweep.solved))
    if len(chips) < 2 or all(row.price is not None for row in sweep.solved):
        return ""
    return f"The job has no prices: a second of {' and of '.join(chips)} counts the same in costs."


def _frontiers(sweep: SweepResult, phase: str, width: int) -> Iterator[str]:
    for i, part in enumerate(sweep.parts(phase)):
        yield from ("",) * (i > 0)
        yield from _frontier(sweep, phase, part, width)


def _frontier(sweep: SweepResult, phase: str, part: Part, width: int) -> Iterator[str]:
    """The frontier of one part; the layouts are below the table, by letters, unshortened."""
    best, knobs = frontier(part.rows), [key for key in sweep.knobs_of(phase) if key not in sweep.per]
    alike = ", ".join(f"{key} {value}" for key, value in part.rows[0].knobs.items() if key not in sweep.knobs_of(phase))
    yield f"{part.name}: the frontier of {len(part.rows)} plans{f', {alike}' if alike else ''}"
    letters = {line: _letter(i) for i, line in enumerate(dict.fromkeys(row.headline for row in best))}
    priced = any(row.price is not None for row in best)
    together = best[0].kind == REQUEST
    headers = ["topology", *knobs, *(["per request", *best[0].phase_seconds] if together else ["latency"])]
    headers += ["chip-ms per token", *[f"{sweep.currency} per million tokens"] * priced, "MFU", "memory", "layout"]
    rows = [_cells(row, knobs, priced, letters) for row in best]
    align = "<" + "".join("<" if isinstance(best[0].knobs.get(key), str) else ">" for key in knobs)
    lines = table(headers, rows, align + ">" * (len(headers) - len(align) - 1) + "<", width - 2)
    yield from (f"  {line}" for line in lines)
    for line, letter in letters.items():
        yield from wrap(
            f"{letter}  {line}", width, initial_indent="  ", subsequent_indent="     ", break_on_hyphens=False
        )


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"{_letter(i // 26 - 1)}{_letter(i % 26)}"


def _cells(row: Row, knobs: Sequence[str], priced: bool, letters: Mapping[str, str]) -> tuple[str, ...]:
    price = ("-" if row.price is None else figure(row.price),) * priced
    steps = map(time, row.phase_seconds.values()) if row.kind == REQUEST else ()
    unproven = "" if row.status == "OPTIMAL" else f" (gap {percent(row.gap)})"
    return (
        row.topology,
        *(str(row.knobs.get(key, "-")) for key in knobs),
        time(row.latency_seconds),
        *steps,
        figure(1e3 * row.chip_seconds_per_token),
        *price,
        percent(row.mfu),
        percent(row.peak_bytes / row.budget_bytes),
        letters[row.headline] + unproven,
    )


def _answers(sweep: SweepResult, width: int) -> Iterator[str]:
    """The answers within the job's constraints."""
    lines = []
    for answer in answers(sweep):
        lines += item(answer.words, width)
    if lines:
        yield "Answers"
        yield from lines


def _by_slice(rows: Sequence[Row], knob: str) -> str:
    """The largest value of a variable per slice, if the slices differ."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.chips):
        if is_number(row.knobs.get(knob)):
            kept = best.setdefault(row.topology, row)
            best[row.topology] = max(kept, row, key=lambda each: float(each.knobs[knob]))
    if len({row.knobs[knob] for row in best.values()}) < 2:
        return ""
    return f" By slice: {', '.join(f'{row.knobs[knob]} on {name}' for name, row in best.items())}."


@dataclass(frozen=True)
class Answer:
    """A sentence, and its row if there is one; `found` is False if no plan answers the question."""

    words: str
    row: Row | None = None
    found: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain data, for JSON."""
        row = None if self.row is None else asdict(self.row) | {"tokens_per_second": self.row.tokens_per_second}
        return {"found": self.found, "answer": self.words, "point": row}

    def __str__(self) -> str:
        return self.words


def answers(sweep: SweepResult) -> list[Answer]:
    """The cheapest point of every phase within the job's constraints, as sentences."""
    given = sweep.constraints
    limits = given.get("seconds_per_token"), given.get("seconds_to_first_token")
    found = ((phase, limits_of(sweep, phase, *limits)) for phase in sweep.phases)
    return [answer for phase, mine in found if any(mine) for answer in answer_cheapest(sweep, phase, *mine)]


Limit = float | None
Most = Literal["tokens", "tokens-per-chip", "tokens-per-dollar"]


def limits_of(sweep: SweepResult, phase: str, per_token: Limit, first_token: Limit) -> tuple[Limit, Limit]:
    """The limits that apply to a phase: the first token's to prefill, a token's to other phases, both to phases with a shared
    layout."""
    kind = next((row.kind for row in sweep.rows if row.phase == phase and row.kind), "")
    return None if kind == "prefill" else per_token, first_token if kind in ("prefill", REQUEST) else None


def answer_cheapest(sweep: SweepResult, phase: str, per_token: Limit = None, first_token: Limit = None) -> list[Answer]:
    """The cheapest slice within limits, one sentence per part; the limits are those of `cheapest`."""
    parts = sweep.parts(phase) or (Part(phase, ()),)
    return [_answer_cheapest(sweep, part, per_token, first_token) for part in parts]


def _answer_cheapest(sweep: SweepResult, part: Part, per_token: Limit, first_token: Limit) -> Answer:
    found = cheapest(part.rows, per_token, first_token)
    limits = _limits(part.rows, per_token, first_token)
    if found is None:
        near = min(part.rows, key=lambda row: excess(row, per_token, first_token), default=None)
        nearest = f"; the nearest is {sweep.label(near, in_part=True)} with {latency_of(near)}" if near else ""
        return Answer(f"{part.name}: no plan takes {limits}{nearest}.", found=False)
    words = f"{latency_of(found)}, {cost_of(found, sweep.currency)}, {percent(found.mfu)} MFU"
    within = limits and f" at {limits}"
    return Answer(
        f"{part.name}: the cheapest{within} is {sweep.label(found, in_part=True)}: {words}; {found.headline}.", found
    )


def _limits(rows: Sequence[Row], per_token: Limit, first_token: Limit) -> str:
    """`30.0 ms per token or less and 2.00 s to the first token or less`."""
    token = " per token" if any(row.kind in ("decode", REQUEST) for row in rows) else ""
    parts = [f"{time(per_token)}{token} or less"] if per_token is not None else []
    parts += [f"{time(first_token)} to the first token or less"] if first_token is not None else []
    return " and ".join(parts)


def answer_fastest(
    sweep: SweepResult, phase: str, chips: int, per_token: Limit = None, first_token: Limit = None
) -> list[Answer]:
    """The fastest plan on a number of chips, one sentence per part."""
    parts = sweep.parts(phase) or (Part(phase, ()),)
    return [_answer_fastest(sweep, part, chips, per_token, first_token) for part in parts]


def _answer_fastest(sweep: SweepResult, part: Part, chips: int, per_token: Limit, first_token: Limit) -> Answer:
    rows = [row for row in part.rows if keeps(row, per_token, first_token)]
    limits = _limits(part.rows, per_token, first_token)
    within = limits and f" at {limits}"
    found = fastest(rows, chips)
    if found is None:
        there = ", ".join(map(str, sorted({row.chips for row in rows}))) or "none"
        return Answer(f"{part.name}: no plan{within} uses {chips} chips; there are plans for {there}.", found=False)
    words = f"{latency_of(found)}, {cost_of(found, sweep.currency)}"
    return Answer(
        f"{part.name}: the fastest on {chips} chips{within} is {sweep.label(found, in_part=True)}: {words}; {found.headline}.",
        found,
    )


def answer_most(
    sweep: SweepResult, phase: str, what: Most, per_token: Limit = None, first_token: Limit = None
) -> list[Answer]:
    """The plan with the most tokens per second, or per second per chip or dollar, one sentence per part."""
    parts = sweep.parts(phase) or (Part(phase, ()),)
    return [_answer_most(sweep, part, what, per_token, first_token) for part in parts]


def _answer_most(sweep: SweepResult, part: Part, what: Most, per_token: Limit, first_token: Limit) -> Answer:
    rows = [row for row in part.rows if keeps(row, per_token, first_token)]
    limits = _limits(part.rows, per_token, first_token)
    within = limits and f" at {limits}"
    if what == "tokens-per-dollar":
        rows = [row for row in rows if row.price is not None]
        if not rows and part.rows and all(row.price is None for row in part.rows):
            return Answer(f"{part.name}: the job has no prices; add [price] per_chip_hour.", found=False)
    score = {
        "tokens": lambda row: row.tokens_per_second,
        "tokens-per-chip": lambda row: row.tokens_per_second / row.chips,
        "tokens-per-dollar": lambda row: 1 / row.price,
    }[what]
    best = max(rows, key=score, default=None)
    if best is None:
        return Answer(f"{part.name}: no plan{within}.", found=False)
    rate = f"{figure(best.tokens_per_second)} tokens per second, {figure(best.tokens_per_second / best.chips)} per chip"
    title = {
        "tokens": "tokens per second",
        "tokens-per-chip": "tokens per second per chip",
        "tokens-per-dollar": "tokens per dollar",
    }
    return Answer(
        f"{part.name}: the most {title[what]}{within} has {sweep.label(best, in_part=True)}: {rate}, {latency_of(best)},"
        f" {cost_of(best, sweep.currency)}; {best.headline}.",
        best,
    )


def answer_longest(
    sweep: SweepResult, phase: str, knob: str, per_token: Limit = None, first_token: Limit = None
) -> Answer:
    """The largest value of a variable with a plan, as a sentence."""
    rows = [row for row in sweep.of(phase) if keeps(row, per_token, first_token)]
    limits = _limits(sweep.of(phase), per_token, first_token)
    within = limits and f" at {limits}"
    asked = [row.knobs[knob] for row in sweep.rows if row.phase == phase and is_number(row.knobs.get(knob))]
    if not asked:
        numbers = dict.fromkeys(key for row in sweep.of(phase) for key, value in row.knobs.items() if is_number(value))
        return Answer(
            f"{phase}: expected a number in which its plans differ ({', '.join(numbers) or 'there is none'}), got {knob}.",
            found=False,
        )
    found = longest(rows, knob)
    if found is None:
        return Answer(
            f"{phase}: no {knob} from {min(asked, key=float)} to {max(asked, key=float)} has a plan{within}.",
            found=False,
        )
    room = "" if float(found.knobs[knob]) < max(map(float, asked)) else " (the largest of the job; larger ones may fit)"
    held = f"{size(found.peak_bytes)} of {size(found.budget_bytes)} per chip"
    return Answer(
        f"{phase}: the largest {knob}{within} is {found.knobs[knob]}{room}: {found.name}, {held}, {latency_of(found)}."
        f"{_by_slice(rows, knob)}",
        found,
    )


def answer_gain(sweep: SweepResult, phase: str, knob: str, first: Knob, second: Knob, width: int = WIDTH) -> Answer:
    """The gain of one value of a variable over another, pair by pair."""
    pairs = gains(sweep.of(phase), knob, first, second)
    if not pairs:
        return Answer(f"{phase}: no two plans differ only in {knob} {first} and {second}.", found=False)
    least, most = min(pairs, key=lambda pair: pair.latency), max(pairs, key=lambda pair: pair.latency)
    knobs = [key for key in sweep.knobs_of(phase) if key != knob]
    alike = all(isclose(pair.latency, pair.cost) for pair in pairs)
    costs = exp(sum(log(pair.cost) for pair in pairs) / len(pairs))
    cheap = "" if alike else f", and {figure(costs)} times as cheap"
    words = (
        f"{phase}: {knob} {second} is {mean_gain(pairs):.2f} times as fast{' and as cheap' * alike} as {first}{cheap}, over"
        f" {len(pairs)} pairs of plans: {least.latency:.2f} at {sweep.label(least.second)},"
        f" {most.latency:.2f} at {sweep.label(most.second)}."
        f" It takes {memory_text(pairs)}.{_fits_only_with(sweep, phase, knob, first, second)}"
    )
    rows = [
        (
            pair.second.topology,
            *(str(pair.second.knobs.get(key, "-")) for key in knobs),
            time(pair.first.latency_seconds),
            time(pair.second.latency_seconds),
            f"{pair.latency:.2f} ×",
            size(pair.first.peak_bytes),
            size(pair.second.peak_bytes),
        )
        for pair in pairs
    ]
    headers = ("topology", *knobs, str(first), str(second), "faster", f"{first} per chip", f"{second} per chip")
    lines = table(headers, rows, "<" + ">" * (len(headers) - 1), width - 2)
    return Answer("\n".join([*wrap(words, width, break_on_hyphens=False), *(f"  {line}" for line in lines)]))


def _fits_only_with(sweep: SweepResult, phase: str, knob: str, first: Knob, second: Knob) -> str:
    """The number of points that fit only with the second value of a variable."""

    def rest(row: Row) -> tuple:
        return row.topology, tuple((key, value) for key, value in row.knobs.items() if key != knob)

    rows = [row for row in sweep.rows if row.phase == phase]
    full = {rest(row) for row in rows if row.knobs.get(knob) == first and row.outcome in (INFEASIBLE, PRUNED)}
    gained = [row for row in rows if row.knobs.get(knob) == second and row.outcome == SOLVED and rest(row) in full]
    return f" {len(gained)} points have a plan only with {second}, such as {gained[0].name}." if gained else ""


def _recommendations(sweep: SweepResult, width: int) -> Iterator[str]:
    yield "Recommendations"
    for sentence in advice(sweep):
        yield from item(sentence, width)


def _infeasible_points(sweep: SweepResult, width: int) -> Iterator[str]:
    words = {FAILED: "Failed", INFEASIBLE: "No layout fits", PRUNED: "Ruled out without a search"}
    rows = [row for row in sweep.rows if row.outcome != SOLVED]
    if rows:
        yield "Points without a plan"
    for outcome, title in words.items():
        yield from _reasons(sweep, title, [row for row in rows if row.outcome == outcome], width)


def _reasons(sweep: SweepResult, title: str, rows: Sequence[Row], width: int) -> Iterator[str]:
    """Points of one phase and slice as one item, with the reason of the first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.phase, row.topology), []).append(row)
    for (phase, topology), group in list(groups.items())[:_LISTED]:
        why = _first_sentences(group[0].why).removeprefix(f"{phase}: ")
        alike = [key for key in sweep.knobs_of(phase) if len({row.knobs.get(key) for row in group}) == 1]
        knobs = ", ".join(f"{key} {group[0].knobs[key]}" for key in alike if key in group[0].knobs)
        where = f"{phase} on {topology}{f', {knobs}' if knobs else ''}"
        count = f" ({len(group)} points; of the first)" if len(group) > 1 else ""
        yield from item(f"{title}: {where}{count}: {why}.", width)
    if len(groups) > _LISTED:
        yield f"    and {sum(map(len, list(groups.values())[_LISTED:]))} points more"


def _first_sentences(why: str) -> str:
    """The first line of a reason, without an incomplete sentence at its end."""
    line = why.splitlines()[0] if why else ""
    return (line.rpartition(". ")[0] if line.endswith(":") else line).rstrip(".")
