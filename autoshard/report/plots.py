"""The frontier of a sweep as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from autoshard.report.of_sweep import series_name, series_of
from autoshard.sweep.analysis.frontier import cost_among, frontier, money
from autoshard.sweep.analysis.rows import REQUEST, Row, SweepResult

_PANEL_INCHES = (6.0, 4.6)
_COLORS = ("#2a78b5", "#d5752a", "#3a8f4d", "#a34b9b", "#8d6a3f", "#5b6770")


def save_frontier(sweep: SweepResult, path: str | PathLike[str]) -> None:
    """Draws cost against latency, one panel per phase, with points and frontier; the ending is `.png`, `.svg` or `.pdf`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = [phase for phase in sweep.phases if sweep.of(phase)]
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * max(len(phases), 1), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, phase in zip(figure.subplots(1, max(len(phases), 1), squeeze=False)[0], phases, strict=False):
        draw_panel(axes, sweep, phase)
    figure.savefig(path, dpi=150)


def draw_panel(axes: Any, sweep: SweepResult, phase: str) -> None:
    rows = sweep.of(phase)
    cost, keys = cost_among(rows), series_of(rows, sweep.per)
    scale = 1.0 if cost is money else 1e3
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(series_name(row, keys), []).append(row)

    def places(some: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [1e3 * row.latency_seconds for row in some], [scale * cost(row) for row in some]

    for (name, group), color in zip(groups.items(), _COLORS, strict=False):
        axes.plot(*places(group), ".", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
        best = frontier(group, cost)
        axes.plot(*places(best), "-o", color=color, markersize=4, linewidth=1.4, label=name or "frontier")
    per = f"{sweep.currency} per million tokens" if cost is money else "chip-ms per token"
    axes.set(xscale="log", yscale="log", title=phase, ylabel=f"cost, {per}")
    kinds = {
        "decode": "latency per token, ms",
        "prefill": "time to first token, ms",
        REQUEST: "latency of a request, ms",
    }
    axes.set_xlabel(kinds.get(rows[0].kind, "latency of a step, ms"))
    axes.grid(which="both", linewidth=0.3, alpha=0.5)
    axes.legend(fontsize=8)
