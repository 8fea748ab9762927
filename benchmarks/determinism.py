"""Is the same plan found every time: in other processes, on a busy machine, under another JAX?

    python benchmarks/determinism.py                                # 20 runs a case, benchmarks/results/determinism.json
    python benchmarks/determinism.py --runs 4 --other PYTHON        # and as many under the JAX of another Python

Each run is a process with its own hash seed. Every second one runs beside as many busy processes as make twice the number of
processors with those that run already. A run is the digest of the traced program, every choice, the verdict, and the seconds
to twelve digits. `reference` is one plan for each case, `ours` the number of different ones, `load` the least and the most
processes that ran or waited for a processor (the average of a minute).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "PaLM 540b decode, batch 64, v4:4x4x4": ("palm", "decode", {"size": "540b", "batch": 64}, "v4:4x4x4"),
    "PaLM 540b prefill, batch 1, v4:4x4x4": ("palm", "prefill", {"size": "540b", "batch": 1}, "v4:4x4x4"),
    "Llama 3 8b decode, batch 128, v5e:4x4": ("llama", "decode", {"size": "8b", "batch": 128}, "v5e:4x4"),
    "Mixtral 8x7b decode, batch 64, v5e:4x4": ("mixtral", "decode", {"size": "8x7b", "batch": 64}, "v5e:4x4"),
}
"""Decode and prefill, with and without memory that binds: an example's function, its sizes and a topology."""


def digest_of(name: str) -> str:
    """Searches one case in this process: the version of JAX and a digest of the plan."""
    import importlib

    import jax

    import autoshard

    module, phase, sizes, topology = CASES[name]
    work = getattr(importlib.import_module(f"examples.{module}"), phase)(**sizes)
    plan = autoshard.search(work.fn, *work.args, topology=topology, donate_argnums=work.donate_argnums)
    proof = plan.proof
    # Python 3.12 sums floating-point numbers more exactly than 3.11: the last bits of the seconds differ.
    seconds = f"{proof.objective_seconds:.12g} {proof.bound_seconds:.12g}"
    found = (plan.fingerprint, plan.choice, seconds, proof.solver_status)
    return f"{jax.__version__} {hashlib.sha256(repr(found).encode()).hexdigest()}"


def _burn() -> None:
    while True:
        pass


@contextmanager
def _busy(many: int) -> Iterator[None]:
    """Processes that compute for as long as the block runs; none for a number below 1."""
    burners = [multiprocessing.Process(target=_burn, daemon=True) for _ in range(many)]
    for each in burners:
        each.start()
    try:
        yield
    finally:
        for each in burners:
            each.terminate()
            each.join()


def isolated(name: str, python: str, run: int) -> str:
    """One search in a process of its own, or the last line of its error."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(run)}
    with _busy(2 * (os.cpu_count() or 1) - int(os.getloadavg()[0]) if run % 2 else 0):
        command = [python, __file__, "--case", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return (done.stdout if done.returncode == 0 else done.stderr or "no output").strip().splitlines()[-1]


def row_of(name: str, pythons: list[str], runs: int) -> dict[str, Any]:
    """How many plans the runs of one case found, and which."""
    found: Counter[str] = Counter()
    loads: list[float] = []
    for python in pythons:
        for run in range(runs):
            found[isolated(name, python, run)] += 1
            loads.append(round(os.getloadavg()[0], 1))
    plans = {each.split(" ", 1)[-1] for each in found}
    row = {"row": name, "reference": 1, "ours": len(plans), "runs": len(loads), "load": [min(loads), max(loads)]}
    return {**row, "found": dict(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--other", help="a Python with another JAX")
    parser.add_argument("--case", choices=CASES, help="prints the digest of one case")
    asked = parser.parse_args()
    if asked.case:
        print(digest_of(asked.case))
        return
    rows = []
    for name in CASES:
        rows.append(row_of(name, [sys.executable, *([asked.other] if asked.other else [])], asked.runs))
        print(f"{name:40s} {rows[-1]['runs']:3d} runs, different plans: {rows[-1]['ours']}", flush=True)
        (RESULTS / "determinism.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["ours"] != 1 for row in rows))


if __name__ == "__main__":
    main()
