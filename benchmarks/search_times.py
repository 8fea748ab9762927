"""How long does a proven plan take, from trace to plan, and how does that grow with layers, mesh axes and chips?

    python benchmarks/search_times.py             # tables, benchmarks/results/search.json and search_growth.svg
    python benchmarks/search_times.py --cases     # without the growth

Each case runs in a process of its own, so that its peak memory is its own. `reference` is the target, in
seconds on two cores.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MOST_SECONDS = 150
"""After which a case is given up."""


class Case(NamedTuple):
    """An example's functions with their sizes, searched on a topology; several phases are searched together."""

    name: str
    module: str
    phases: tuple[tuple[str, float, dict[str, Any]], ...]
    topology: str
    reference: float | None = None
    grows: str = ""
    at: int = 0


def palm(phase: str, topology: str, reference: float | None, **sizes: Any) -> Case:
    name = f"PaLM {sizes['size']} {phase}, batch {sizes['batch']}, {topology}"
    return Case(name, "palm", ((phase, 1.0, sizes),), topology, reference)


def llama(topology: str, reference: float | None, **sizes: Any) -> Case:
    how = "unrolled" if sizes.get("unrolled") else "scanned"
    depth = f", {sizes['layers']} layers" if "layers" in sizes else ""
    name = f"Llama 3 {sizes['size']} decode, {how}{depth}, batch {sizes['batch']}, {topology}"
    return Case(name, "llama", (("decode", 1.0, sizes),), topology, reference)


def deep(name: str, function: str, topology: str) -> Case:
    """A deep program whose layers are not all alike."""
    return Case(f"{name}, {topology}", "benchmarks.deep_programs", ((function, 1.0, {}),), topology, 30.0)


def growing(what: str, at: int, case: Case) -> Case:
    return case._replace(grows=what, at=at)


CASES = (
    palm("decode", "v4:4x4x4", 5.0, size="540b", batch=64),
    palm("prefill", "v4:4x4x4", 5.0, size="540b", batch=1),
    palm("prefill", "v4:4x4x4", 5.0, size="540b", batch=64),
    llama("v5p:4x4x8", 15.0, size="405b", batch=64, unrolled=True),
    llama("v5p:4x4x8", 5.0, size="405b", batch=64),
    palm("decode", "v4:8x8x8", 10.0, size="540b", batch=64),
    llama("v5e:16x16", 10.0, size="70b", batch=256),
    Case(
        "PaLM 540b prefill and 64 steps of decode together, batch 64, v4:4x4x4",
        "palm",
        (("prefill", 1.0, {"size": "540b", "batch": 64}), ("decode", 64.0, {"size": "540b", "batch": 64})),
        "v4:4x4x4",
        15.0,
    ),
    palm("decode", "v4:2x4x2", 10.0, size="62b", batch=32),
    palm("decode", "h100:8", 10.0, size="8b", batch=8),
    deep("DeepSeek-V3's shape, decode, 61 layers unrolled", "deepseek_v3", "v5p:4x4x4"),
    deep("Local and global attention 5:1, decode, 60 layers unrolled", "alternating", "v5e:4x4"),
    deep("Llama 3 70b decode, int8, 80 layers unrolled", "int8", "v5e:4x8"),
)
GROWTH = (
    *(
        growing("layers, unrolled", n, llama("v5p:4x4x8", None, size="405b", batch=64, unrolled=True, layers=n))
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    ),
    *(
        growing("mesh axes (16 chips)", axes, llama(topology, None, size="8b", batch=256))
        for axes, topology in enumerate(("v4:1x1x16", "v4:1x4x4", "v4:2x2x4", "2xv4:2x2x2"), start=1)
    ),
    *(
        growing("chips", chips, llama(f"v5p:{shape}", None, size="8b", batch=512))
        for chips, shape in (
            (4, "1x2x2"),
            (16, "2x2x4"),
            (64, "4x4x4"),
            (256, "4x8x8"),
            (1024, "8x8x16"),
            (4096, "16x16x16"),
        )
    ),
)


def measured(case: Case) -> dict[str, Any]:
    """One case in this process: wall seconds from trace to proof, peak memory, and the proof."""
    import importlib

    module = importlib.import_module(case.module if "." in case.module else f"examples.{case.module}")
    started = time.monotonic()
    works = {phase: getattr(module, phase)(**sizes) for phase, _, sizes in case.phases}
    if len(works) > 1:
        from autoshard import search_phases

        weights = {phase: weight for phase, weight, _ in case.phases}
        proof = search_phases(works, shared="params", weights=weights, topology=case.topology).proof
    else:
        from autoshard.annotating.hbm_traffic import annotate_traffic
        from autoshard.tracing.trace import trace
        from costmodels.machine.topology import parse_topology
        from search.solve import search

        (work,) = works.values()
        traced = annotate_traffic(trace(work.fn, *work.args, donate_argnums=work.donate_argnums))
        proof = search(traced.program, parse_topology(case.topology)).proof
    return {
        "row": case.name,
        "reference": case.reference,
        "ours": round(time.monotonic() - started, 2),
        "processor_seconds": round(time.process_time(), 2),
        "status": proof.status,
        "gap": proof.gap,
        "step_seconds": proof.objective_seconds,
        **proof.account(),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **({"grows": case.grows, "at": case.at} if case.grows else {}),
    }


def isolated(number: int) -> dict[str, Any]:
    """One case in a process of its own; an error becomes a row with its reason."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(number)]
    case = (*CASES, *GROWTH)[number]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"not proven in {MOST_SECONDS} s"
        return {"row": case.name, "reference": case.reference, "ours": None, "why": why, "grows": case.grows}
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["no word"]
        return {"row": case.name, "reference": case.reference, "ours": None, "why": why[0]}
    return json.loads(done.stdout)


def main() -> None:
    if sys.argv[1:] and sys.argv[1].isdigit():
        print(json.dumps(measured((*CASES, *GROWTH)[int(sys.argv[1])])))
        return
    rows = []
    wide = max(len(case.name) for case in (*CASES, *GROWTH))
    print(
        f"{'case':{wide}s} {'target s':>8s} {'ours s':>7s} {'CPU s':>6s} {'gap':>6s} {'states':>8s} {'left':>6s}"
        f" {'booleans':>8s} {'CP-SAT s':>8s} {'parts':>5s} {'status':>8s} {'GiB':>5s}"
    )
    for number in range(len(CASES) if "--cases" in sys.argv else len(CASES) + len(GROWTH)):
        row = isolated(number)
        rows.append(row)
        target = "" if row["reference"] is None else f"{row['reference']:.1f}"
        if row["ours"] is None:
            print(f"{row['row']:{wide}s} {target:>8s} failed: {row['why']}", flush=True)
            continue
        left = row["states"] - row["fixed_by_presolve"]
        counts = (
            f"{row['states']:8,d} {left:6,d} {row['booleans']:8,d} {row['solver_seconds']:8.2f} {row['branches']:5d}"
        )
        counts += f" {row['solver_status']:>8s} {row['peak_gib']:5.2f}"
        spent = f"{row['ours']:7.2f} {row['processor_seconds']:6.1f}"
        print(f"{row['row']:{wide}s} {target:>8s} {spent} {row['gap']:6.3g} {counts}", flush=True)
    if all(row["ours"] is None for row in rows):
        raise SystemExit("No case ran: the results are left as they are.")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "search.json").write_text(json.dumps(rows, indent=1) + "\n")
    plotted([row for row in rows if row.get("grows") and row["ours"] is not None])


def plotted(rows: list[dict[str, Any]]) -> None:
    """Seconds against layers, axes and chips, as a picture, where matplotlib is at hand."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("No picture of the growth: matplotlib is not installed.")
        return
    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    if not kinds:
        return
    figure, panels = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3), sharey=True, layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        found = [(row["at"], row["ours"]) for row in rows if row["grows"] == kind]
        panel.plot(*zip(*found, strict=True), marker="o")
        panel.set(xlabel=kind, ylim=(0, None))
        if kind != "mesh axes (16 chips)":
            panel.set_xscale("log", base=2)
        else:
            panel.set_xticks([at for at, _ in found])
    panels[0].set_ylabel("seconds, trace to proof")
    figure.savefig(RESULTS / "search_growth.svg")


if __name__ == "__main__":
    main()
