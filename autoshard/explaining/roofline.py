"""Roofline plots, one panel per plan: the intensity, the achieved rate and the bottleneck of every operation.

The horizontal axis is intensity, FLOPs per byte through HBM. The vertical axis is achieved FLOP/s, collectives included. A dot
is an operation, and its area the operation's time. The roofs are those of the matrix unit, by dtype, and of the vector unit;
dashed lines are the achievable rates, by the chip's efficiencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from itertools import pairwise, product
from math import atan2, degrees
from os import PathLike
from pathlib import Path
from typing import Any

from autoshard._util.files import write_whole
from autoshard._util.tables import percent, time
from autoshard.errors import AutoshardError
from autoshard.explaining.bottlenecks import Regimes, regimes
from autoshard.planning.records import PlanRecord
from costmodels.bottlenecks import REGIMES, Work
from costmodels.machine.chips import Chip

FORMATS = (".png", ".svg", ".pdf", ".html")
"""The file endings of a plot."""

_COLORS = {
    "compute": "#d1495b",
    "HBM": "#00798c",
    "vector unit": "#6a4c93",
    "communication": "#edae49",
    "overhead": "#8d96a3",
}
_PANEL_INCHES = (8.0, 5.6)
_NAMED = 6
"""The number of operations with names."""
_DISTANCES = (14, 24, 36, 50, 70, 95, 125)
"""The distances at which a name may be placed from its dot, in points."""
_DIRECTIONS = ((0.7, -0.7), (-0.7, -0.7), (0, -1), (1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0, 1))
_ALONG = tuple(i / 200 for i in range(201))
"""The points at which a line is sampled, as parts of it."""
_SLOPE = "HBM"
"""Marks the text along the HBM line."""
_SEEN = 1e-4
"""The share of the step above which an operation has a dot."""
_LARGEST_DOT = 1200.0
"""The area of a dot with the whole step's time, in square points."""


def save_roofline(plans: Sequence[PlanRecord], path: str | PathLike[str]) -> None:
    """Draws the rooflines of plans, such as prefill and decode, side by side into one file.

    **Arguments:**

    - `path`: ends in .png, .svg, .pdf or .html; the page is self-contained.

    **Raises:** `AutoshardError` if matplotlib is not installed, or for another ending.
    """
    where = Path(path)
    if where.suffix not in FORMATS:
        raise AutoshardError(f"{where} must end in {', '.join(FORMATS)}, got {where.suffix or 'no ending'}.")
    figure = draw(plans)
    if where.suffix == ".html":
        write_whole(where, _page(plans, figure))
    else:
        figure.savefig(where, dpi=150)


def draw(plans: Sequence[PlanRecord]) -> Any:
    """The rooflines as a matplotlib `Figure`, one panel per plan.

    **Raises:** `AutoshardError` if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AutoshardError("Plots need matplotlib: pip install 'autoshard[plots]'.") from error
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(plans), height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(zip(figure.subplots(1, len(plans), squeeze=False)[0], plans, strict=True))
    named = [_panel(axes, plan.topology.chip, regimes(plan)) for axes, plan in panels]
    for (axes, plan), works in zip(panels, named, strict=True):
        _labels(axes, works, plan.estimate.seconds)
    return figure


def _panel(axes: Any, chip: Chip, found: Regimes) -> list[Work]:
    """Draws everything except the names; returns the operations to be named, the longest first."""
    step = found.step.total_seconds
    works = [work for work in found.works if work.flops and work.bytes and work.total_seconds > _SEEN * step]
    peak = max(chip.flops_per_second.values())
    left = min([work.intensity for work in works], default=1.0) / 3
    right = max([work.intensity for work in works] + [2 * peak / chip.hbm_bytes_per_second]) * 3
    rates = [work.flops / work.total_seconds for work in works]
    bottom = max(min(rates, default=peak), peak * 1e-6) / 4
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, peak * 4))
    _roofs(axes, chip, left, right)
    for work, rate in zip(works, rates, strict=True):
        area = max(_LARGEST_DOT * work.total_seconds / step, 6.0)
        axes.scatter(
            work.intensity, max(rate, bottom), s=area, color=_COLORS[work.regime], alpha=0.75, linewidths=0, zorder=3
        )
    _legend(axes, found)
    bound = f"{found.regime}-bound" if found.regime else "free"
    reached = (
        f"{percent(found.step.of_flops)} of the compute units' rate, {percent(found.step.of_roofline)} of the roofline"
    )
    axes.set_title(f"{found.name} on {found.topology}: {bound}, {time(step)}\n{reached}", fontsize=11, loc="left")
    axes.set_xlabel("FLOPs per byte through HBM")
    axes.set_ylabel("FLOP/s of one chip, collectives included")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    return works[:_NAMED]


def _roofs(axes: Any, chip: Chip, left: float, right: float) -> None:
    """One roof per rate, and the ridge under the matrix unit's in bfloat16."""
    bandwidth = chip.hbm_bytes_per_second
    rates: dict[float, list[str]] = {}
    for dtype, rate in chip.flops_per_second.items():
        rates.setdefault(rate, []).append(dtype)
    rates.setdefault(chip.vector_flops_per_second, []).append("vector unit")
    for rate, names in rates.items():
        ridge = rate / bandwidth
        matrix = "vector unit" not in names
        style: dict[str, Any] = {"color": "#333333" if matrix else "#999999", "linewidth": 1.2, "zorder": 2}
        axes.plot([left, ridge, right], [left * bandwidth, rate, rate], **style)
        part, reached = _achievable_part(chip, matrix), _part(chip, "hbm_efficiency") * bandwidth
        if part * rate < rate or reached < bandwidth:
            axes.plot(
                [left, part * rate / reached, right],
                [left * reached, part * rate, part * rate],
                **style,
                linestyle="--",
            )
    top = max(rates)
    for rate, names in rates.items():
        above = rate == top or not any(1 < other / rate < 1.6 for other in rates)
        axes.annotate(
            f"{_flops(rate)} {', '.join(names)}",
            (right, rate),
            xytext=(5, -2 if above else -1),
            textcoords="offset points",
            ha="left",
            va="bottom" if above else "top",
            fontsize=8,
            color="#333333",
        )
    ridge = chip.matmul_flops_per_second("bfloat16") / bandwidth
    axes.axvline(ridge, color="#333333", linewidth=0.7, linestyle=":", zorder=1)
    low = axes.get_ylim()[0]
    beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"ridge, bfloat16: {ridge:.0f}", (ridge, low), xytext=(-4, 5), ha="right", **beside)
    slope = f"HBM: {bandwidth / 1e12:.3g} TB/s" if bandwidth >= 1e12 else f"HBM: {bandwidth / 1e9:.3g} GB/s"
    at = left * 1.6
    axes.annotate(slope, (at, at * bandwidth), xytext=(-2, 6), rotation_mode="anchor", gid=_SLOPE, **beside)


def _achievable_part(chip: Chip, matrix: bool) -> float:
    """The achievable part of a rate, by the chip's constants."""
    return _part(chip, "matmul_efficiency") if matrix else 1.0


def _part(chip: Chip, name: str) -> float:
    constant = chip.constants.get(name)
    return constant.value if constant else 1.0


def _turn(axes: Any) -> None:
    """Rotates the name of the HBM line to the line's slope, which is known only after the figure's layout."""
    for text in axes.texts:
        if text.get_gid() == _SLOPE:
            x, y = text.xy
            (x0, y0), (x1, y1) = axes.transData.transform([(x, y), (10 * x, 10 * y)])
            text.set_rotation(degrees(atan2(y1 - y0, x1 - x0)))


def _labels(axes: Any, works: Sequence[Work], step: float) -> None:
    """Places names beside their dots in free space; overlapping dots share a name."""
    groups: list[list[Work]] = []
    for work in works:
        near = next((group for group in groups if _together(group[0], work)), None)
        if near is None:
            groups.append([work])
        else:
            near.append(work)
    figure = axes.figure
    figure.draw_without_rendering()  # sizes on the page are known from here on
    _turn(axes)
    taken = [text.get_window_extent().padded(2) for text in axes.texts]
    taken += [axes.get_legend().get_window_extent(), *_dots(axes), *_roof_boxes(axes)]
    for group in groups:
        names = ", ".join(_short(each.name) for each in group)
        share = percent(sum(each.total_seconds for each in group) / step)
        place = (group[0].intensity, max(group[0].flops / group[0].total_seconds, axes.get_ylim()[0]))
        taken.append(_place(axes, f"{names}: {share}", place, taken))


def _dots(axes: Any) -> list[Any]:
    """The boxes of the dots on the page."""
    from matplotlib.transforms import Bbox

    found = []
    for dots in axes.collections:
        for (x, y), area in zip(dots.get_offsets(), dots.get_sizes(), strict=False):
            (px, py), half = axes.transData.transform((x, y)), area**0.5 / 2 * axes.figure.dpi / 72
            found.append(Bbox.from_extents(px - half, py - half, px + half, py + half))
    return found


def _roof_boxes(axes: Any) -> list[Any]:
    """Small boxes along the lines that are drawn."""
    from matplotlib.transforms import Bbox

    found = []
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata()) if line.get_transform() == axes.transData else []
        for (x0, y0), (x1, y1) in pairwise(ends):
            found += [Bbox.from_bounds(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t, 2, 2) for t in _ALONG]
    return found


def _place(axes: Any, text: str, place: tuple[float, float], taken: Sequence[Any]) -> Any:
    """Writes a text at the nearest free spot inside the axes; returns its box."""
    from matplotlib.text import Text

    label = axes.annotate(
        text,
        place,
        xytext=(0, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "#777777", "shrinkA": 0, "shrinkB": 0},
        zorder=4,
    )
    inside = axes.bbox.padded(-4)
    for distance, (right, up) in product(_DISTANCES, _DIRECTIONS):
        label.set_ha("left" if right > 0 else "right" if right < 0 else "center")
        label.set_position((right * distance, up * distance))
        label.update_positions(axes.figure.canvas.get_renderer())
        box = Text.get_window_extent(label).padded(1)
        fits = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
        if fits and not any(box.overlaps(other) for other in taken):
            break
    return box


def _together(one: Work, other: Work) -> bool:
    """Whether two dots overlap."""
    rates = one.flops / one.total_seconds, other.flops / other.total_seconds
    return max(rates) < 1.15 * min(rates) and 1 / 1.15 < one.intensity / other.intensity < 1.15


def _short(name: str) -> str:
    """The last key of an argument path: `params['layers']['wq']` is wq."""
    return name.rpartition("['")[2].removesuffix("']") if name.endswith("']") else name


def _legend(axes: Any, found: Regimes) -> None:
    seconds = found.seconds
    for regime in REGIMES:
        if seconds[regime]:
            axes.scatter([], [], s=40, color=_COLORS[regime], linewidths=0, label=f"{regime}: {time(seconds[regime])}")
    axes.legend(title="the step waits for", loc="upper left", fontsize=8, title_fontsize=8, framealpha=0.9)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e11 else f"{rate / 1e9:.3g} GFLOP/s"


def _page(plans: Sequence[PlanRecord], figure: Any) -> str:
    """A self-contained page: the plot, with the tables below it."""
    from html import escape

    picture = StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]
    tables = "".join(f"<pre>{escape(str(regimes(plan)))}</pre>" for plan in plans)
    title = escape("Roofline: " + ", ".join(f"{plan.name} on {plan.topology.name}" for plan in plans))
    style = "body{font-family:sans-serif;margin:2em}svg{max-width:100%;height:auto}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>'
        f"<body><h1>{title}</h1>{svg}{tables}</body></html>\n"
    )
