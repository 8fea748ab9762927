"""Does the compiled program match its plan? Every model, phase and slice is searched, emitted, compiled and compared.

    python benchmarks/audits.py [--only CASE ...] [--resume] [--gpu-python .venv-gpu/bin/python]

Each case is one row: planned against compiled bytes for every set of mesh axes, the share of unplanned bytes,
planned against compiled peak memory, and the estimated step. TPU rows use the real TPU compiler (libtpu), GPU rows the real
XLA:GPU compiler, both without such a chip; host rows use the CPU compiler. A row passes if every limit of `LIMITS` holds;
`misses` lists those that do not.

Compilers may send less than was planned (an array gathered once for two uses): such differences are classed *same plan at
lower cost*. They are taken out of the comparison of bytes, and listed.

Rows of cases that are not run again are kept from the last time; `--resume` runs only cases that have no row yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "audits.json"
GPU_PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
CASE_SECONDS = 1500
SEARCH_SECONDS = 90.0
"""The time limit of a search: an audited plan need not be proven optimal; its row has the gap."""
LIMITS = {"wire": 0.02, "unplanned": 0.01, "peak": 0.05}
"""The allowed differences between compiled and planned: communicated bytes per set of axes, unplanned bytes, peak memory."""


Target = Literal["tpu", "host", "gpu"]


@dataclass(frozen=True)
class Case:
    """One function for one topology and one compiler."""

    model: str
    size: str
    phase: str
    sizes: Mapping[str, Any]
    topology: str
    target: Target

    @property
    def name(self) -> str:
        """Such as `palm-62b-decode-v4:2x2x2`."""
        target = "" if self.target == "tpu" else f"-{self.target}"
        return f"{self.model}-{self.size}-{self.phase}-{self.topology}{target}"


_SLICES = {
    ("palm", "8b"): ("v4:2x2x2", "v5e:2x4"),
    ("palm", "62b"): ("v4:2x2x2", "v6e:4x4"),
    ("palm", "540b"): ("v4:4x4x4", "v5p:4x4x4"),
    ("llama", "8b"): ("v5e:2x4", "v6e:2x4"),
    ("llama", "70b"): ("v5e:4x4", "v5p:2x2x4"),
    ("llama", "405b"): ("v4:4x4x4", "v5p:4x4x8"),
}
_BATCHES = {"decode": {"70b": 16}, "prefill": {"8b": 4}}
_OFTEN = {"decode": 64, "prefill": 1}
_HOSTS, _GPUS = ("cpu:2x2x2", "cpu:4x4x4"), ("h100:8", "h100:4x8")


def _cases(models: Sequence[tuple[str, str]], slices: Mapping[Any, Sequence[str]], target: Target) -> list[Case]:
    return [
        Case(model, size, phase, {"size": size, "batch": _BATCHES[phase].get(size, _OFTEN[phase])}, topology, target)
        for model, size in models
        for phase in ("decode", "prefill")
        for topology in slices[model, size]
    ]


CASES = (
    *_cases(tuple(_SLICES), _SLICES, "tpu"),
    *_cases((("palm", "8b"), ("llama", "8b")), dict.fromkeys(_SLICES, _HOSTS), "host"),
    *_cases((("llama", "8b"), ("llama", "70b")), dict.fromkeys(_SLICES, _GPUS), "gpu"),
)


# --- one case, in a process of its own


def audited(case: Case, keep: Path | None = None) -> dict[str, Any]:
    """One case in this process: searched, compiled and judged."""
    import importlib

    import autoshard

    if case.target == "host":
        import jax

        from costmodels.machine.topology import parse_topology

        jax.config.update("jax_num_cpu_devices", parse_topology(case.topology).size)
    workload = getattr(importlib.import_module(f"examples.{case.model}"), case.phase)(**case.sizes)
    started = time.monotonic()
    plan = autoshard.search(
        workload.fn,
        *workload.args,
        topology=case.topology,
        donate_argnums=workload.donate_argnums,
        name=workload.name,
        time_limit=SEARCH_SECONDS,
    )
    searched = time.monotonic()
    found = autoshard.audit(plan, workload.fn, *workload.args, target=case.target)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{case.name.replace(':', '_')}.txt").write_text(str(found), "utf-8")
    return {
        **judged(found),
        "gap": plan.proof.gap,
        **plan.proof.account(),
        "search_seconds": round(searched - started, 1),
        "compile_seconds": round(time.monotonic() - searched, 1),
    }


def judged(found: Any) -> dict[str, Any]:
    """The figures of an audit, and which limits they miss."""
    wire = [
        {"axes": "".join(axes), "planned": a, "compiled": b, "saved": saved, "ratio": _ratio(a - saved, b)}
        for axes, (a, b) in found.wire_bytes().items()
        for saved in [found.saved_bytes().get(axes, 0.0)]
    ]
    planned = sum(row["planned"] for row in wire)
    unplanned = found.unplanned_bytes() / planned if planned else float(found.unplanned_bytes() > 0)
    peak = found.peak_bytes / found.planned_peak_bytes if found.peak_bytes else None
    worst = max((abs(row["ratio"] - 1) for row in wire), default=0.0)
    compute = found.compute_seconds
    step = None if compute is None else compute + found.collective_seconds
    measured = {"wire": worst, "unplanned": unplanned, "peak": None if peak is None else abs(peak - 1)}
    if found.target == "host":
        measured["peak"] = None  # host devices have no HBM that a program must fit
    misses = [name for name, limit in LIMITS.items() if measured[name] is not None and measured[name] > limit]
    return {
        "ours": worst,
        "ok": found.ok,
        "misses": misses,
        "wire": wire,
        "unplanned": unplanned,
        "peak_ratio": peak,
        "peak_gib": found.peak_bytes and found.peak_bytes / 2**30,
        "planned_step_ms": found.planned_seconds * 1e3,
        "compiled_step_ms": step and step * 1e3,
        "compute_ms": compute and compute * 1e3,
        "wire_ms": found.collective_seconds * 1e3,
        "differences": [f"{each.kind}: {each.text}" for each in found.differences],
    }


def _ratio(planned: float, compiled: float) -> float:
    """Compiled over planned; 2 if nothing was planned."""
    return compiled / planned if planned else 2.0 if compiled else 1.0


# --- all cases


def isolated(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own; an error becomes a row with its reason."""
    python = options.gpu_python if case.target == "gpu" else sys.executable
    head = {"row": case.name, "reference": LIMITS["wire"], "ours": None, "topology": case.topology, **_asked(case)}
    if not Path(python).exists():
        return {**head, "why": f"{python} is not there: `make bench-audit` sets it up"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [python, __file__, "--case", case.name] + (["--keep", options.keep] if options.keep else [])
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CASE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {**head, "why": f"not done in {CASE_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines()[-1:] or ["no word"]
        return {**head, "why": words[0][:400]}
    return {**head, **json.loads(lines[-1]), "seconds": round(time.monotonic() - started, 1)}


def _asked(case: Case) -> dict[str, Any]:
    return {"target": case.target, "workload": {"example": case.model, "phase": case.phase, **case.sizes}}


def show(row: Mapping[str, Any]) -> None:
    """One line of the table, with the differences from the plan."""
    if row["ours"] is None:
        print(f"{row['row']:40s} failed: {row['why'][:150]}", flush=True)
        return
    peak = f"{row['peak_ratio']:7.3f}" if row["peak_ratio"] else f"{'':7s}"
    step = f"{row['compiled_step_ms']:10.2f}" if row["compiled_step_ms"] else f"{'':10s}"
    print(
        f"{row['row']:40s} {row['ours']:7.2%} {row['unplanned']:9.2%} {peak} {row['planned_step_ms']:10.2f} {step}"
        f" {row['wire_ms']:9.2f}  {'as planned' if not row['misses'] and row['ok'] else 'MISSES ' + ', '.join(row['misses'])}"
    )
    for text in row["differences"]:
        if not text.startswith("same plan:"):
            print(f"    {text}")
    sys.stdout.flush()


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The number of passing rows of each target, and of all its rows."""
    found = []
    for target in ("tpu", "host", "gpu"):
        own = [row for row in rows if row["target"] == target]
        passed = sum(row["ours"] is not None and row["ok"] and not row["misses"] for row in own)
        if own:
            found.append({"row": f"{target} rows as planned", "reference": len(own), "ours": passed})
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help="run cases whose names contain one of these"
    )
    parser.add_argument("--resume", action="store_true", help="run only cases without a row, or whose row failed")
    parser.add_argument("--gpu-python", default=str(GPU_PYTHON), help="the Python that has jax[cuda13]")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="write every audit's own table here")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    options = _options()
    by_name = {case.name: case for case in CASES}
    if options.case:
        print(json.dumps(audited(by_name[options.case], Path(options.keep) if options.keep else None)))
        return
    chosen = [name for name in by_name if not options.only or any(part in name for part in options.only)]
    if not chosen:
        sys.exit(f"There is no case like {options.only[0]!r}; there are {', '.join(by_name)}.")
    known = {row["row"]: row for row in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.exists() else {}
    print(
        f"{'case':40s} {'wire':>7s} {'unplanned':>9s} {'peak':>7s} {'planned ms':>10s} {'compiled':>10s} {'wire ms':>9s}"
    )
    for name in chosen:
        before = known.get(name, {})
        same = before.get("workload") == _asked(by_name[name])["workload"]
        done = options.resume and same and before.get("ours") is not None
        known[name] = known[name] if done else isolated(by_name[name], options)
        show(known[name])
        rows = [known[case] for case in by_name if case in known]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows + verdicts(rows), indent=1) + "\n")
    for row in verdicts([known[case] for case in by_name if case in known]):
        print(f"{row['row']}: {row['ours']} of {row['reference']}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
