"""How long does a proven plan take, from trace to plan, and how much memory?

    python benchmarks/search_times.py            # one table, and benchmarks/results/search.json

Each case runs in a process of its own, so that its peak memory is its own. `reference` is the time that we hold ourselves to.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search.json"

CASES: tuple[tuple[str, dict[str, Any], str, float], ...] = (
    ("decode", {"size": "540b", "batch": 64}, "v4:4x4x4", 5.0),
    ("prefill", {"size": "540b", "batch": 1}, "v4:4x4x4", 5.0),
    ("prefill", {"size": "540b", "batch": 64}, "v4:4x4x4", 5.0),
    ("decode", {"size": "540b", "batch": 64}, "v4:8x8x8", 10.0),
    ("decode", {"size": "540b", "batch": 64}, "v5p:4x4x8", 10.0),
    ("decode", {"size": "540b", "batch": 256}, "v5e:16x16", 10.0),
    ("decode", {"size": "62b", "batch": 32}, "v4:2x4x2", 10.0),
    ("decode", {"size": "8b", "batch": 8}, "h100:8", 10.0),
)


def measured(phase: str, sizes: dict[str, Any], topology: str, reference: float) -> dict[str, Any]:
    """One case in this process: wall seconds from trace to proof, peak memory, and what is proven."""
    from autoshard.trace import trace
    from costmodels.topology import parse_topology
    from examples import palm
    from search.solve import search

    started = time.monotonic()
    workload = getattr(palm, phase)(**sizes)
    traced = trace(workload.fn, *workload.args, donate_argnums=workload.donate_argnums)
    proof = search(traced.program, parse_topology(topology)).proof
    return {
        "row": f"PaLM {sizes['size']} {phase}, batch {sizes['batch']}, {topology}",
        "reference": reference,
        "ours": round(time.monotonic() - started, 2),
        "status": proof.status,
        "gap": proof.gap,
        "step_seconds": proof.objective_seconds,
        "states": proof.states,
        "branches": proof.branches,
        "booleans": proof.booleans,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def isolated(case: int) -> dict[str, Any]:
    """One case in a process of its own; what fails is a row that says why."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, str(case)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        phase, sizes, topology, reference = CASES[case]
        why = done.stderr.strip().splitlines()[-1:] or ["no word"]
        return {"row": f"{phase} {sizes} {topology}", "reference": reference, "ours": None, "why": why[0]}
    return json.loads(done.stdout)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measured(*CASES[int(sys.argv[1])])))
        return
    rows = []
    print(
        f"{'case':44s} {'target s':>8s} {'ours s':>8s} {'gap':>6s} {'states':>8s} {'branches':>8s} {'booleans':>8s} {'GiB':>6s}"
    )
    for case in range(len(CASES)):
        row = isolated(case)
        rows.append(row)
        if row["ours"] is None:
            print(f"{row['row']:44s} {row['reference']:8.1f} failed: {row['why']}")
            continue
        counts = f"{row['states']:8,d} {row['branches']:8d} {row['booleans']:8,d} {row['peak_gib']:6.2f}"
        print(f"{row['row']:44s} {row['reference']:8.1f} {row['ours']:8.2f} {row['gap']:6.3g} {counts}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
