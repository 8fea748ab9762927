"""Compiled steps with rings against the same programs without, by replay of their schedules.

    python benchmarks/overlap.py [--only CASE ...] [--resume]

A row is a model of a few layers at its published widths, a phase and a slice. It is searched twice, without overlap and with
`overlap = "looped"`, compiled with the TPU compiler (libtpu, no TPU), and both schedules are replayed as audits do
(`autoshard.auditing.replay`). `reference` is the replayed step without overlap in ms, `with_rings_ms` the one with rings, and
`ours` the faster of both, which `search --overlap looped --verify tpu` keeps. `ratio` is `ours` over `reference`; `floor` is
the ratio if all communication of the program without overlap were hidden at no cost. Further columns: both planned steps, the
hidden share of the rings' permutes as planned and as replayed, the differences of the audit, and the compiled peaks over the
planned ones. A row that could not run says why.

Rows of cases that do not run again keep their last result, with its commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "overlap.json"

from benchmarks.on_chip import Case, run_apart  # noqa: E402

LAYERS = 2
"""Layers of each model: enough for a loop over layers."""


def _case(example: str, phase: str, topology: str, **sizes: Any) -> Case:
    return Case(example, phase, topology, {**sizes, "layers": LAYERS})


CASES = {
    case.name: case
    for case in (
        _case("palm", "prefill", "v4:4x4x4", size="540b", batch=1),
        _case("palm", "prefill", "v4:4x4x4", size="540b", batch=64),
        _case("palm", "decode", "v4:4x4x4", size="540b", batch=512),
        _case("llama", "prefill", "v5e:4x4", size="70b", batch=1),
        _case("llama", "prefill", "v5p:4x4x4", size="405b", batch=1),
        _case("llama", "prefill", "v5e:4x4", size="405b", batch=1),
        _case("training", "train", "v5e:4x4", size="8b", batch=16),
        _case("training", "train", "v5p:2x2x4", size="8b", batch=16),
    )
}


def measure(case: Case) -> dict[str, Any]:
    """The row of a case, in this process."""
    import importlib

    import autoshard
    from benchmarks.on_chip import SEARCH_SECONDS
    from costmodels.machine.conventions import LOOPED
    from costmodels.machine.topology import parse_topology

    work = getattr(importlib.import_module(f"examples.{case.example}"), case.phase)(**case.sizes)
    plain = parse_topology(case.topology)
    looped = replace(plain, pricing=replace(plain.pricing, overlap=LOOPED))
    found = []
    for topology in (plain, looped):
        plan = autoshard.search(
            work.fn, *work.args, topology=topology, donate_argnums=work.donate_argnums, time_limit=SEARCH_SECONDS
        )
        found.append((plan, autoshard.audit(plan, work.fn, *work.args, target="tpu")))
    (_, before), (plan, after) = found
    rings = [each for each in after.overlap if each.replayed is not None]
    time = sum(each.seconds for each in rings)
    return {
        "reference": before.replay.seconds * 1e3,
        "ours": min(before.replay.seconds, after.replay.seconds) * 1e3,
        "with_rings_ms": after.replay.seconds * 1e3,
        "ratio": min(1.0, after.replay.seconds / before.replay.seconds),
        "floor": 1 - before.replay.exposed_seconds / before.replay.seconds,
        "planned_ms": [before.planned_seconds * 1e3, after.planned_seconds * 1e3],
        "core_ms": [before.replay.core_seconds * 1e3, after.replay.core_seconds * 1e3],
        "exposed_ms": [before.replay.exposed_seconds * 1e3, after.replay.exposed_seconds * 1e3],
        "rings": sum(each.hidden_seconds > 0 for each in plan.estimate.collectives),
        "ring_ms": time * 1e3,
        "hidden": {
            which: sum(getattr(each, which) * each.seconds for each in rings) / time if time else None
            for which in ("planned", "replayed")
        },
        "peak_gib": [each.peak_bytes / 2**30 for each in (before, after)],
        "peak_ratio": [each.peak_bytes / each.planned_peak_bytes for each in (before, after)],
        "gap": plan.proof.gap,
        "ok": [before.ok, after.ok],
        "differences": [f"{each.kind}: {each.text}" for each in after.differences if each.counts],
        "libtpu": importlib.import_module("importlib.metadata").version("libtpu"),
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    if row["ours"] is None:
        print(f"{row['row']:44s} {row['why'][:120]}", flush=True)
        return
    hidden = [f"{row['hidden'][which]:8.1%}" if row["ring_ms"] else "       -" for which in ("planned", "replayed")]
    print(
        f"{row['row']:44s} {row['reference']:9.3f} {row['with_rings_ms']:9.3f} {row['ratio']:6.3f} {row['floor']:6.3f}"
        f" {row['rings']:5d} {' '.join(hidden)} {row['peak_ratio'][0]:6.3f} {row['peak_ratio'][1]:6.3f}",
        flush=True,
    )


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help="run cases with one of these in their names"
    )
    parser.add_argument("--resume", action="store_true", help="run only cases without a result")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(CASES[options.case])))
        return
    known = {row["row"]: row for row in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.exists() else {}
    print(
        f"{'case':44s} {'without':>9s} {'rings':>9s} {'ratio':>6s} {'floor':>6s} {'rings':>5s}  planned replayed   peaks"
    )
    for name in (each for each in CASES if not options.only or any(part in each for part in options.only)):
        if not options.resume or known.get(name, {}).get("ours") is None:
            known[name] = run_apart(CASES[name], Path(__file__))
        show(known[name])
        RESULTS.write_text(json.dumps([known[each] for each in CASES if each in known], indent=1) + "\n", "utf-8")
    ratios = [row["ratio"] for row in known.values() if row["ours"] is not None]
    if ratios:
        print(
            f"geometric mean of {len(ratios)}: {exp(sum(map(log, ratios)) / len(ratios)):.3f}, worst {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
