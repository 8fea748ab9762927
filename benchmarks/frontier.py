"""Latency against cost for PaLM 8B, 62B and 540B, bf16 and int8, decode and prefill: does the frontier have the shape of the
one that was measured?

    python benchmarks/frontier.py       # two tables, benchmarks/results/frontier.json, and frontier.png beside it

Pope et al. 2022 ("Efficiently Scaling Transformer Inference", arXiv 2211.05102), figure 1 and tables 2 and 3, on TPU v4: 2048
tokens of prompt, 64 generated. `reference` is measured: seconds of a decode step or of a prefill, beside it cost in
chip-seconds per token. `ours` is the fastest plan, searched freely, on the machine that `fit_published.py` fitted to some of
these points (marked "fitted"). MFU counts the parameters' FLOPs alone, as the paper does. Every point is a search of its own;
a point whose search reached `SEARCH_SECONDS` has its gap.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from math import inf
from pathlib import Path
from typing import Any

from autoshard.sweep import engines
from autoshard.sweep.analysis.frontier import frontier, switches
from autoshard.sweep.analysis.rows import Row, SweepResult, row_of
from autoshard.sweep.points import Point, Run
from autoshard.sweep.results import SOLVED
from autoshard.sweep.runner import Sweep
from autoshard.sweep.store import Store
from benchmarks import pope2022
from benchmarks.pope2022 import FIGURE, GENERATED, PROMPT, TABLES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "frontier.json"
POINTS = ROOT / "benchmarks" / "results" / "frontier_points.json"
PICTURE = ROOT / "benchmarks" / "results" / "frontier.png"
PALM = ROOT / "examples" / "palm.py"
SEARCH_SECONDS = 120.0
WALL_SECONDS = 600.0
"""How long the whole may take on two cores."""
CORES = 2

DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PREFILL_BATCHES = (1, 4, 16, 64, 256, 512)
WEIGHTS = ("bf16", "int8")
SLICES = {
    ("decode", "8b"): (8, 16, 32),
    ("decode", "62b"): (8, 16, 32),
    ("decode", "540b"): (64, 128),
    ("prefill", "8b"): (8, 16),
    ("prefill", "62b"): (16, 32),
    ("prefill", "540b"): (64,),
}


def cases() -> Iterator[pope2022.Row]:
    """Every point, as a row of the paper without a measurement, and the paper's own; each once."""
    seen = set()
    for (phase, size), chips in SLICES.items():
        batches = DECODE_BATCHES if phase == "decode" else PREFILL_BATCHES
        for count in chips:
            for weights in WEIGHTS:
                for batch in batches:
                    seen.add(place := (size, phase, count, batch, weights))
                    yield pope2022.Row("", *place, seconds=0.0)
    for row in (*FIGURE, *TABLES):
        if _place(row) not in seen:
            seen.add(_place(row))
            yield row


def _place(row: pope2022.Row) -> tuple[str, str, int, int, str]:
    return row.size, row.phase, row.chips, row.batch, row.weights


def point_of(row: pope2022.Row, seconds: float) -> Point:
    """The search that a row stands for."""
    sizes: dict[str, Any] = {"size": row.size, "batch": row.batch, "weights": row.weights}
    sizes |= {"length": PROMPT} if row.phase == "prefill" else {"context": PROMPT + GENERATED // 2}
    tokens = row.batch * (PROMPT if row.phase == "prefill" else 1)
    name = f"{row.size} {row.phase}"  # a frontier is of one model
    run = Run(name, row.phase, f"{PALM}:{row.phase}", tuple(sizes.items()), tokens)
    where = pope2022.topology(row, pope2022.machine())
    knobs = tuple((key, sizes[key]) for key in ("size", "batch", "weights"))
    return Point((run,), where, knobs, memory_bytes=where.chip.usable_hbm_bytes, time_limit=seconds)


def found(
    places: Sequence[pope2022.Row], store: Path, workers: int, seconds: float, stop_after: float = inf
) -> dict[tuple, Row]:
    """Every case that was solved, by its place; none is begun `stop_after` seconds from now."""
    end, engine = time.monotonic() + stop_after, engines.processes(workers)

    def until(tasks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        return engine(takewhile(lambda _: time.monotonic() < end, tasks))

    points = {id(point): (row, point) for row in places for point in [point_of(row, seconds)]}
    rows: dict[tuple, Row] = {}
    with Store(store) as kept:
        sweep = Sweep([point for _, point in points.values()], kept, until)
        for count, done in enumerate(sweep, 1):
            case, _ = points[id(done.point)]
            row = row_of(done)
            if row.outcome == SOLVED:
                row = replace(row, mfu=pope2022.mfu(case, row.seconds))
            rows[_place(case)] = row
            print(
                f"{count:4d} of {len(points)}  {row.name:50s} {row.outcome} {row.status}", file=sys.stderr, flush=True
            )
    return rows


def compared(rows: dict[tuple, Row]) -> Iterator[dict[str, Any]]:
    """The paper's points beside ours."""
    for case in (*FIGURE, *TABLES):
        row = rows.get(_place(case))
        phase = "" if case in TABLES else f" {case.phase}"
        name = f"{case.name}{phase}, {case.chips} chips, batch {case.batch}, {case.weights}"
        tokens = case.batch * (PROMPT if case.phase == "prefill" else 1)
        entry = {"row": name, "reference": case.seconds, "ours": None, "fitted": case.fitted}
        entry |= {"reference_chip_seconds_per_token": case.chips * case.seconds / tokens, "phase": case.phase}
        if row is None or row.outcome != SOLVED:
            yield entry | {"why": "not begun before the run was stopped" if row is None else row.why}
            continue
        yield entry | {
            "ours": row.seconds,
            "ratio": row.seconds / case.seconds,
            "chip_seconds_per_token": row.chip_seconds_per_token,
            "mfu": row.mfu,
            "reference_mfu": pope2022.mfu(case, case.seconds),
            "status": row.status,
            "gap": row.gap,
            **row.proofs.get(case.phase, {}),
            "layout": row.headline,
        }


def ordered(rows: Sequence[dict[str, Any]], ours: str, reference: str) -> float:
    """The part of pairs of points that are in the same order for us as in the paper (1 is all)."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i] if a[reference] != b[reference]]
    same = [(a[ours] - b[ours]) * (a[reference] - b[reference]) > 0 for a, b in pairs]
    return sum(same) / len(same)


def processor_seconds() -> float:
    """The processor seconds of this process and its workers, which do not depend on other load."""
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in (own, workers))


def summary(
    rows: dict[tuple, Row], compare: Sequence[dict[str, Any]], wall: float, known: int
) -> Iterator[dict[str, Any]]:
    """Rows on the whole run; none if `known` points were in the store already."""
    solved = [row for row in rows.values() if row.outcome == SOLVED]
    proven = sum(row.status == "OPTIMAL" for row in solved)
    worst = max((row.gap for row in solved), default=0.0)
    load = {"load of the machine, a minute's mean": os.getloadavg()[0]}
    took = {"ours": round(wall, 1)}, {"ours": round(processor_seconds(), 1)}
    if known:
        why = f"{known} points were in the store already"
        took = {"ours": None, "why": why}, {"ours": None, "why": why}
    yield {"row": "wall seconds of the whole, on two cores", "reference": WALL_SECONDS} | took[0] | load
    yield {"row": "processor seconds of the whole", "reference": CORES * WALL_SECONDS} | took[1]
    yield {"row": "points", "reference": len(list(cases())), "ours": len(rows), "with a plan": len(solved)}
    yield {
        "row": "points with a plan that are proven optimal",
        "reference": len(solved),
        "ours": proven,
        "worst gap": worst,
    }
    for phase in ("decode", "prefill"):
        both = [row for row in compare if row["phase"] == phase and row["ours"] is not None]
        for what, ours, reference in (
            ("latency", "ours", "reference"),
            ("cost", "chip_seconds_per_token", "reference_chip_seconds_per_token"),
        ):
            name = f"{phase}: part of pairs of the paper's points in the paper's order of {what}"
            yield {"row": name, "reference": 1.0, "ours": round(ordered(both, ours, reference), 4), "points": len(both)}
    for size, weights in (("540b", "bf16"), ("540b", "int8"), ("62b", "bf16"), ("8b", "bf16")):
        yield layouts(rows, size, weights)


def layouts(rows: dict[tuple, Row], size: str, weights: str) -> dict[str, Any]:
    """The switches of layout along one prefill frontier, from the fastest point to the cheapest."""
    each = [row for (s, phase, _, _, w), row in rows.items() if (s, phase, w) == (size, "prefill", weights)]
    best = frontier([row for row in each if row.outcome == SOLVED])
    steps = [f"from {s.before.name} to {s.after.name}: {'; '.join(s.changes)}" for s in switches(best)]
    path = [f"batch {row.knobs['batch']} on {row.chips}: {row.headline}" for row in best]
    name = f"prefill frontier of PaLM {size} {weights}: switches of layout"
    return {"row": name, "reference": None, "ours": len(steps), "switches": steps, "points": path}


def draw(rows: dict[tuple, Row], compare: Sequence[dict[str, Any]]) -> None:
    """Figure 1: cost against latency, one curve a model and type, the paper's points beside; decode left, prefill right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    colours = {"8b": "#2a78b5", "62b": "#d5752a", "540b": "#3a8f4d"}
    for axes, phase in zip(panels, ("decode", "prefill"), strict=True):
        for size, colour in colours.items():
            for weights, style in (("bf16", "-"), ("int8", "--")):
                each = [row for (s, p, _, _, w), row in rows.items() if (s, p, w) == (size, phase, weights)]
                best = frontier([row for row in each if row.outcome == SOLVED])
                xs = [1e3 * row.latency_seconds for row in best]
                ys = [1e3 * row.chip_seconds_per_token for row in best]
                label = f"PaLM {size.upper()} {weights}, ours"
                axes.plot(xs, ys, style, color=colour, marker=".", markersize=5, linewidth=1.2, label=label)
        for entry in compare:
            if entry["phase"] == phase:
                size = "540b" if "540B" in entry["row"] else "62b" if "62B" in entry["row"] else "8b"
                marker = "o" if "bf16" in entry["row"] else "s"
                place = 1e3 * entry["reference"], 1e3 * entry["reference_chip_seconds_per_token"]
                axes.plot(*place, marker, markerfacecolor="none", color=colours[size], markersize=8)
        axes.plot([], [], "o", markerfacecolor="none", color="black", label="measured, bf16 (Pope et al. 2022)")
        axes.plot([], [], "s", markerfacecolor="none", color="black", label="measured, int8")
        axes.set(xscale="log", yscale="log", title=f"{phase.capitalize()}, {PROMPT} tokens")
        axes.set_xlabel("latency per token, ms" if phase == "decode" else "time to first token, ms")
        axes.set_ylabel("cost, chip-ms per token")
        axes.grid(which="both", linewidth=0.3, alpha=0.5)
        if phase == "decode":
            axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=150)


def show(compare: Sequence[dict[str, Any]], rest: Sequence[dict[str, Any]]) -> None:
    """The tables."""
    print(f"{'point':72s} {'paper':>9s} {'ours':>9s} {'ratio':>6s} {'MFU':>6s} {'paper':>6s}  proof")
    for row in compare:
        if row["ours"] is None:
            print(f"{row['row']:72s} {row['reference']:9.4g} no plan: {row['why'].splitlines()[0][:60]}")
            continue
        proof = row["status"] if not row["gap"] else f"gap {row['gap']:.2%}"
        numbers = f"{row['reference']:9.4g} {row['ours']:9.4g} {row['ratio']:6.2f}"
        print(f"{row['row']:72s} {numbers} {row['mfu']:6.1%} {row['reference_mfu']:6.1%}  {proof}")
    print()
    for row in rest:
        print(
            f"{row['row']}: {row['ours']}"
            + (f" (reference {row['reference']})" if row["reference"] is not None else "")
        )
        for step in row.get("switches", ()):
            print(f"    {step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--store", type=Path, help="keep points there and go on from them; the time is then that of the rest"
    )
    parser.add_argument("--seconds", type=float, default=SEARCH_SECONDS, help="for one search")
    parser.add_argument("--stop-after", type=float, default=inf, help="seconds after which no point is begun")
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.store or Path(folder, "points.sqlite")
        with Store(path) as before:
            known = len(before.keys())
        rows = found(list(cases()), path, asked.workers, asked.seconds, asked.stop_after)
    wall = time.monotonic() - started
    compare = list(compared(rows))
    rest = list(summary(rows, compare, wall, known))
    show(compare, rest)
    RESULTS.write_text(json.dumps([*compare, *rest], indent=1) + "\n")
    whole = SweepResult("PaLM on TPU v4", tuple(rows.values()))
    POINTS.write_text(json.dumps(whole.to_dict()) + "\n")
    draw(rows, compare)


if __name__ == "__main__":
    main()
