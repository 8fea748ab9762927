"""The data of a sweep's page."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from autoshard._util.identity import IdentityMap
from autoshard.sweep.analysis.advice import advice_of
from autoshard.sweep.analysis.answers import RESTS_ON, answers, limits_text, uncomparable
from autoshard.sweep.analysis.frontier import frontier, negative_mfu, switches
from autoshard.sweep.analysis.rows import Part, Row, SweepResult
from autoshard.sweep.results import SOLVED

_SERIES = 6
"""The maximum number of curves of a chart."""


Links = Mapping[tuple[str, str], str]
"""The pages of plans, by the key of their point and their phase."""


def sweep_page_data(sweep: SweepResult, links: Links | None = None) -> dict[str, Any]:
    """The data of a sweep's page, with its rows.

    **Arguments:**

    - `links`: the pages to which points link.
    """
    solved = sweep.solved
    unproven = sum(row.status != "OPTIMAL" for row in solved)
    return {
        "title": sweep.name,
        "summary": [
            {"name": "points", "value": str(len(sweep.rows)), "note": f"{len(solved)} with a plan"},
            {"name": "proven", "value": str(len(solved) - unproven), "note": f"{unproven} with a gap"},
            {"name": "slices", "value": str(len({row.topology for row in solved})), "note": _span(solved)},
        ],
        "currency": sweep.currency,
        "limits": limits_text(sweep),
        "answers": [each.words for each in answers(sweep)],
        "notes": [each for each in (uncomparable(sweep), RESTS_ON) if each],
        "phases": [_phase(sweep, phase, links or {}) for phase in sweep.phases if sweep.of(phase)],
        "without": [
            {"phase": row.phase, "name": row.name, "outcome": row.outcome, "why": row.why}
            for row in sweep.rows
            if row.outcome != SOLVED
        ],
    }


def _span(rows: tuple[Row, ...]) -> str:
    counts = sorted({row.chips for row in rows})
    return f"{counts[0]} to {counts[-1]} chips" if len(counts) > 1 else f"{counts[0]} chips" if counts else "none"


def _phase(sweep: SweepResult, phase: str, links: Links) -> dict[str, Any]:
    rows = sweep.of(phase)
    parts = sweep.parts(phase)
    best = IdentityMap((row, None) for part in parts for row in frontier(part.rows))
    best_mfu = IdentityMap((row, None) for part in parts for row in frontier(part.rows, negative_mfu))
    return {
        "name": phase,
        "kind": rows[0].kind,
        "advice": advice_of(sweep, phase),
        "ends": [
            _end(which, row, part.name, sweep.label(row, in_part=True)) for part in parts for which, row in _ends(part)
        ],
        "series": series_of(rows, sweep.per),
        "priced": any(row.price is not None for row in rows),
        "points": [_point(row, row in best, row in best_mfu, links) for row in _best_first(rows, best)],
        "switches": [
            {"before": sweep.label(each.before), "after": sweep.label(each.after), "changes": list(each.changes)}
            for part in parts
            for each in switches(frontier(part.rows))
        ],
    }


def _best_first(rows: tuple[Row, ...], best: Container[Row]) -> list[Row]:
    """The frontier, the fastest first, followed by the rest in the job's order."""
    chosen = sorted((row for row in rows if row in best), key=lambda row: row.latency_seconds)
    return [*chosen, *(row for row in rows if row not in best)]


def _ends(part: Part) -> list[tuple[str, Row]]:
    best = frontier(part.rows)
    if len(best) == 1:
        return [("fastest and cheapest", best[0])]
    return [("fastest", best[0]), ("cheapest", best[-1])]


def _end(which: str, row: Row, part: str, name: str) -> dict[str, Any]:
    """One end of a frontier, for the page's first table."""
    return {
        "part": part,
        "which": which,
        "name": name,
        "latency": row.latency_seconds,
        "cost": row.chip_seconds_per_token,
        "price": row.price,
        "mfu": row.mfu,
        "headline": row.headline,
    }


def series_of(rows: tuple[Row, ...], per: tuple[str, ...] = ()) -> list[str]:
    """The variables by which points are coloured: those in `per`, and text variables with few values, such as a dtype."""
    knobs = dict.fromkeys([*per, *(key for row in rows for key in row.knobs)])
    words = [key for key in knobs if key in per or any(isinstance(row.knobs.get(key), str) for row in rows)]
    several = [key for key in words if len({row.knobs.get(key) for row in rows}) > 1]
    while several and len({tuple(row.knobs.get(key) for key in several) for row in rows}) > _SERIES:
        several.pop()
    return several


def series_name(row: Row, keys: Sequence[str]) -> str:
    """The series of a row: text values alone, numbers with the name of their variable."""
    values = ((key, row.knobs.get(key)) for key in keys)
    return ", ".join(f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in values)


def _point(row: Row, best: bool, best_mfu: bool, links: Links) -> dict[str, Any]:
    return {
        "name": row.name,
        "topology": row.topology,
        "chip": row.chip,
        "chips": row.chips,
        "knobs": dict(row.knobs),
        "latency": row.latency_seconds,
        "cost": row.chip_seconds_per_token,
        "price": row.price,
        "mfu": row.mfu,
        "slowdown": row.slowdown,
        "rate": row.tokens_per_second / row.chips if row.chips else 0.0,
        "memory": row.peak_bytes / row.budget_bytes,
        "collectives": row.collective_seconds / row.seconds,
        "phases": dict(row.phase_seconds),
        "proof": row.status,
        "gap": row.gap,
        "headline": row.headline,
        "layout": {phase: dict(layout) for phase, layout in row.layout.items()},
        "pages": {phase: links[row.key, phase] for phase in row.phase_seconds if (row.key, phase) in links},
        "best": best,
        "best_mfu": best_mfu,
    }
