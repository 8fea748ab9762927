"""How far and how fast are unmodified third-party models planned?

    python benchmarks/models.py                          # one table, and benchmarks/results/models.json
    python benchmarks/models.py --only "llama-7b decode" # the rows whose name contains this; the others are kept
    python benchmarks/models.py --audit                  # compiled with the TPU compiler, too

A row is a model, a phase and a slice of chips: equations of the trace, the share of the estimated time under exact rules,
the folds that were found (copies × operations of one), seconds from trace to plan, the gap of the proof, and the audit
of the compiled program with the limits of `benchmarks/audits.py`. Each row runs in a process of its own (with `--together`
all in one, which is quicker).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
sys.path.insert(0, str(ROOT))  # Python puts the script's own folder there
ZOO = ("models_own", "models_huggingface", "models_beyond", "models_frameworks")
SLICES = ("v5e:4x4", "v5p:2x2x4")
TARGET_SECONDS = 30.0
"""The target from trace to plan; `reference` of every row. It applies to processor time, which equals wall time on an idle
machine: nothing here runs in parallel. Both are in the table."""
TIME_LIMIT = 120.0
"""Seconds after which a search is cut off, with the gap that is left."""


def cases() -> dict[tuple[str, str], tuple[str, Callable[..., Any]]]:
    """(model, phase) to its module and its builder."""
    return {
        key: (module, build)
        for module in ZOO
        for key, build in importlib.import_module(f"benchmarks.{module}").cases().items()
    }


def equations(jaxpr: Any) -> int:
    """The equations of a jaxpr, with those of everything it calls."""
    import jax
    from jax.extend import core as jex

    held = (jex.ClosedJaxpr, jex.Jaxpr)
    count = 0
    for eqn in jaxpr.eqns:
        inside = jax.tree_util.tree_leaves(list(eqn.params.values()), is_leaf=lambda leaf: isinstance(leaf, held))
        bodies = [getattr(each, "jaxpr", each) for each in inside if isinstance(each, held)]
        count += sum(map(equations, bodies)) if bodies else 1
    return count


def measured(model: str, phase: str, topology: str, with_audit: bool) -> dict[str, Any]:
    """One row, in this process."""
    import autoshard
    from search.formulation.layer_folding import classes, folds

    _, build = cases()[model, phase]
    work = build()
    _check_room(work, topology)
    started, used = time.monotonic(), time.process_time()
    plan = autoshard.search(
        work.fn,
        *work.args,
        topology=topology,
        donate_argnums=work.donate_argnums,
        name=work.name,
        time_limit=TIME_LIMIT,
    )
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    program = plan.program
    assert program is not None
    spent = [op.seconds + op.collective_seconds for op in plan.operations]
    exact = sum(s for s, op in zip(spent, program.operations, strict=True) if op.exact) / max(sum(spent), 1e-30)
    row = {
        "row": _name(model, phase, topology),
        "reference": TARGET_SECONDS,
        "ours": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "equations": _equations(work),
        "operations": len(program.operations),
        "exact_share": round(exact, 6),
        "folds": [f"{fold.copies} × {fold.period}" for fold in folds(program)],
        "classes": len(set(classes(program))),
        "status": plan.proof.status,
        "gap": plan.proof.gap,
        "search_seconds": round(plan.proof.wall_seconds, 1),
        "step_seconds": plan.estimate.seconds,
        "collective_seconds": plan.estimate.collective_seconds,
        "peak_gib": round(plan.estimate.peak_bytes / 2**30, 2),
        **plan.proof.account(),
        "warnings": [text for text in plan.warnings if "constants of" not in text],
    }
    return {**row, "audit": _audit(plan, work) if with_audit else None}


def _check_room(work: Any, topology: str) -> None:
    """Refuses arguments that are larger than all memory together, which a search would take long to prove.

    **Raises:** `ValueError`.
    """
    import jax

    from costmodels.machine.topology import parse_topology

    where = parse_topology(topology)
    room = where.size * where.chip.usable_hbm_bytes
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(work.args) if hasattr(leaf, "dtype"))
    if needed > room:
        raise ValueError(
            f"its arguments are {needed / 2**30:,.0f} GiB, and all chips together have {room / 2**30:,.0f}"
        )


def _equations(work: Any) -> int:
    import jax

    return equations(jax.make_jaxpr(work.fn)(*work.args).jaxpr)


def _audit(plan: Any, work: Any) -> dict[str, Any]:
    """The audit by the TPU compiler: the figures, and whether they are within bounds."""
    import autoshard
    from benchmarks.audits import judged

    started = time.monotonic()
    try:
        audit = autoshard.audit(plan, work.fn, *work.args, target="tpu")
    except autoshard.AutoshardError as error:
        return {"ok": None, "why": str(error)[:300]}
    found = judged(audit)
    return {
        "ok": not found["misses"],
        "wire": {row["axes"]: round(row["ratio"], 4) for row in found["wire"]},
        "saved_share": round(_share_saved(found["wire"]), 4),
        "unplanned_share": round(found["unplanned"], 4),
        "peak": round(found["peak_ratio"] or 0.0, 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def _share_saved(wire: Sequence[dict[str, Any]]) -> float:
    """The part of the planned bytes that the compiler saved: arrays sent once for two uses, or in a narrower type."""
    planned = sum(row["planned"] for row in wire)
    return sum(row["saved"] for row in wire) / planned if planned else 0.0


def _name(model: str, phase: str, topology: str) -> str:
    return f"{model} {phase}, {topology}"


def isolated(model: str, phase: str, topology: str, with_audit: bool) -> dict[str, Any]:
    """One row in a process of its own; an error becomes a row with its reason."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "jax"}
    command = [sys.executable, __file__, "--row", json.dumps([model, phase, topology, with_audit])]
    failed = {"row": _name(model, phase, topology), "reference": TARGET_SECONDS, "ours": None}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1200 if with_audit else 600, check=False
        )
    except subprocess.TimeoutExpired as error:
        return {**failed, "why": f"stopped after {error.timeout:.0f} s"}
    if done.returncode:
        return {
            **failed,
            "why": ["no word", *done.stderr.strip().splitlines()][-1][:400],
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def together(model: str, phase: str, topology: str, with_audit: bool) -> dict[str, Any]:
    """One row in this process; an error becomes a row with its reason."""
    try:
        return measured(model, phase, topology, with_audit)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:400]
        return {"row": _name(model, phase, topology), "reference": TARGET_SECONDS, "ours": None, "why": why}


def passes(row: dict[str, Any]) -> bool:
    """Whether a row meets every target that was measured."""
    if row["ours"] is None:
        return False
    audit = row.get("audit")
    audited = audit is None or bool(audit["ok"])
    return row["gap"] == 0 and row["exact_share"] >= 0.99 and row["cpu_seconds"] <= TARGET_SECONDS and audited


def _line(row: dict[str, Any]) -> str:
    if row["ours"] is None:
        return f"{row['row']:48s} failed: {row['why']}"
    audit = row.get("audit")
    word = (
        "-" if audit is None else "ok" if audit["ok"] else audit.get("why") or f"{audit['wire']} peak {audit['peak']}"
    )
    folds = ", ".join(row["folds"]) or "-"
    size = f"{row['equations']:7,d} {100 * row['exact_share']:7.2f} {folds:22s} {row['classes']:6,d}"
    found = f"{row['gap']:7.2g} {1e3 * row['step_seconds']:10.2f} {row['peak_gib']:7.2f}"
    return f"{row['row']:48s} {size} {row['ours']:6.1f} {row['cpu_seconds']:6.1f} {found} {word}"


def _known() -> dict[str, dict[str, Any]]:
    """The rows in the file, by name."""
    return {row["row"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--audit", action="store_true", help="compile with the TPU compiler and compare")
    parser.add_argument("--slices", default=",".join(SLICES), help="topologies, with commas between them")
    parser.add_argument("--together", action="store_true", help="all rows in this process")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measured(*json.loads(options.row))))
        return
    known = _known()
    head = "row", "equations", "exact %", "folds", "classes", "s", "CPU s", "gap", "step ms", "GiB", "audit"
    print("{:46s} {:>9s} {:>7s} {:22s} {:>6s} {:>6s} {:>6s} {:>7s} {:>10s} {:>7s} {}".format(*head))
    order = [(model, phase, where) for model, phase in cases() for where in SLICES]
    for model, phase, where in order:
        if options.only not in _name(model, phase, where) or where not in options.slices.split(","):
            continue
        row = (together if options.together else isolated)(model, phase, where, options.audit)
        known = {**_known(), row["row"]: row}  # another run may write beside this one
        print(_line(row), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        rows = [known[name] for name in (_name(*key) for key in order) if name in known]
        RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    rows = list(known.values())
    print(f"{sum(map(passes, rows))} of {len(rows)} rows meet every target that was measured.")


if __name__ == "__main__":
    main()
