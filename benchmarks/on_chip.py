"""The time of compiled steps on a chip, by replay, against their plans and against the bytes that they must read.

    python benchmarks/on_chip.py [--only CASE ...] [--resume]

A row is a model, a phase and a slice: searched, compiled with the TPU compiler (libtpu, no TPU), and its schedule replayed as
audits do (`autoshard.auditing.replay`). It compares the planned step with the replayed one (`ours` = replayed / planned), and
lists the floor (bytes to move once over HBM's rate), the time on the chip, the communication that the core waits for, bytes on
the wire, peak memory, and the operations with the most unplanned time. A row that could not run says why. Decode steps of dense
models with at most 64 sequences are held against `BOUND` × floor + planned communication (`over_bound` is the ratio).

Rows of cases that do not run again keep their last result, with its commit; `--resume` runs only cases without a result.
Compiled programs are kept in `.cache/programs`. A case whose lowered program is unchanged is not compiled again: after a
change of costs alone, `--known` searches the cases again that have a result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "on_chip.json"
CASE_SECONDS = 600
SEARCH_SECONDS = 60.0
"""The time limit of a search; a row has its gap."""
WITHIN = ((0.85, 1.15), (0.7, 1.3))
"""Replayed over planned: the range for nine rows of ten, and the range for all."""
BOUND = 1.25
"""The allowed time on the chip of a dense decode step, over its floor."""
DENSE, MOST_SEQUENCES = ("palm", "llama"), 64
"""The examples, and the largest batch, that `BOUND` is for."""
WORST = 3
"""How many operations with unplanned time a row names."""


@dataclass(frozen=True)
class Case:
    """One function of an example, or of a model of another library, with its keyword arguments, on one slice."""

    example: str
    phase: str
    topology: str
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as `llama-70b-decode-unrolled-b16-v5e:4x4`."""
        options = [key for key, value in self.sizes.items() if value is True]
        types = [str(self.sizes[key]) for key in ("weights", "cache", "experts") if key in self.sizes]
        size = str(self.sizes.get("size", ""))
        batch = [f"b{self.sizes[key]}" for key in ("batch",) if key in self.sizes]
        return "-".join([self.example, *([size] * bool(size)), self.phase, *options, *types, *batch, self.topology])

    def build(self) -> Any:
        """The workload."""
        if self.example in LIBRARIES:
            return getattr(importlib.import_module("benchmarks.models_frameworks"), f"{self.example}_{self.phase}")()
        return getattr(importlib.import_module(f"examples.{self.example}"), self.phase)(**self.sizes)


LIBRARIES = ("equinox", "nnx")
"""The examples that `models_frameworks.py` builds, each at one size."""


def _palm() -> list[Case]:
    slices = {
        "8b": ("v4:2x2x2", "v5e:2x4", "v6e:2x4"),
        "62b": ("v4:2x2x4", "v5p:2x2x2"),
        "540b": ("v4:4x4x4", "v5p:4x4x4"),
    }
    decode = [
        Case("palm", "decode", topology, {"size": size, **types, "batch": batch})
        for size, found in slices.items()
        for topology in found
        for types in ({}, {"weights": "int8"})
        for batch in ((1, 64, 512) if size != "8b" else (8, 64))
    ]
    prefill = [Case("palm", "prefill", found[0], {"size": size, "batch": 1}) for size, found in slices.items()]
    return decode + prefill


def _llama() -> list[Case]:
    slices = {
        "8b": (("v5e:2x2", 8), ("v5e:4x4", 128), ("v6e:2x2", 8), ("v5p:2x2x1", 32), ("v4:2x2x1", 8), ("v5e:2x2", 1)),
        "70b": (("v5e:4x4", 16), ("v5p:2x2x4", 64), ("v6e:4x4", 64), ("v4:2x4x4", 32)),
        "405b": (("v5p:4x4x4", 64), ("v4:4x4x8", 128)),
    }
    decode = [
        Case("llama", "decode", topology, {"size": size, **form, "batch": batch})
        for size, found in slices.items()
        for topology, batch in found
        for form in ({}, {"unrolled": True})
    ]
    prefill = [
        Case("llama", "prefill", found[0][0], {"size": size, **form, "batch": 1})
        for size, found in slices.items()
        for form in ({}, {"unrolled": True})
    ]
    return decode + prefill


def _others() -> list[Case]:
    return [
        Case("mixtral", "decode", "v5e:4x4", {"size": "8x7b", "batch": 64}),
        Case("mixtral", "decode", "v5p:2x2x2", {"size": "8x7b", "batch": 8}),
        Case("mixtral", "prefill", "v5e:4x4", {"size": "8x7b", "batch": 16}),
        Case("mixtral", "decode", "v5e:4x4", {"size": "8x7b", "batch": 64, "experts": "ragged"}),
        Case("mixtral", "decode", "v6e:4x4", {"size": "8x7b", "batch": 64, "experts": "ragged"}),
        Case("mixtral", "decode", "v4:2x2x4", {"size": "8x7b", "batch": 32, "experts": "ragged"}),
        Case("mla", "decode", "v5e:4x4", {"size": "lite", "batch": 64}),
        Case("mla", "decode", "v6e:2x4", {"size": "lite", "batch": 64}),
        Case("mla", "prefill", "v5e:4x4", {"size": "lite", "batch": 16}),
        Case("t5", "forward", "v5e:4x4", {"size": "xxl", "batch": 16}),
        Case("t5", "forward", "v6e:2x4", {"size": "xxl", "batch": 16}),
        Case("training", "train", "v5p:2x2x4", {"size": "8b", "batch": 64}),
        Case("training", "train", "v5e:4x4", {"size": "8b", "batch": 16}),
        Case("equinox", "forward", "v5e:4x4"),
        Case("equinox", "forward", "v5p:2x2x2"),
        Case("equinox", "train", "v5p:2x2x4"),
        Case("nnx", "train", "v5e:2x4"),
        Case("nnx", "train", "v6e:2x4"),
    ]


CASES = {case.name: case for case in (*_palm(), *_llama(), *_others())}


# --- one case, in a process of its own


def measure(case: Case) -> dict[str, Any]:
    """The row of a case: searched, compiled and replayed in this process."""
    import autoshard
    from benchmarks.compiled_programs import audit_of

    work = case.build()
    started = time.monotonic()
    plan = autoshard.search(
        work.fn,
        *work.args,
        topology=case.topology,
        donate_argnums=work.donate_argnums,
        name=work.name,
        time_limit=SEARCH_SECONDS,
    )
    searched = time.monotonic()
    found, was_kept = audit_of(plan, work)
    seconds = {"search_seconds": searched - started}
    seconds |= {} if was_kept else {"compile_seconds": time.monotonic() - searched}
    return {
        **summarize(found),
        "gap": plan.proof.gap,
        "libtpu": importlib.import_module("importlib.metadata").version("libtpu"),
        **{name: round(spent, 1) for name, spent in seconds.items()},
    }


def summarize(found: Any) -> dict[str, Any]:
    """The figures of an audit, times in milliseconds."""
    replayed = found.replay
    wire = {"".join(axes): {"planned": a, "compiled": b} for axes, (a, b) in found.wire_bytes().items()}
    worst = sorted(found.costs, key=lambda each: -each.unplanned_seconds)[:WORST]
    return {
        "ours": replayed.seconds / found.planned_seconds,
        "planned_ms": found.planned_seconds * 1e3,
        "replayed_ms": replayed.seconds * 1e3,
        "floor_ms": replayed.floor_seconds * 1e3,
        "planned_on_chip_ms": (found.planned_seconds - found.planned_collective_seconds) * 1e3,
        "core_ms": replayed.core_seconds * 1e3,
        "planned_wire_ms": found.planned_collective_seconds * 1e3,
        "exposed_ms": replayed.exposed_seconds * 1e3,
        "awaited_copies_ms": replayed.copy_seconds * 1e3,
        "wire_bytes": wire,
        "peak_gib": found.peak_bytes and found.peak_bytes / 2**30,
        "peak_ratio": found.peak_bytes and found.peak_bytes / found.planned_peak_bytes,
        "ok": found.ok,
        "unplanned": [
            f"{each.unplanned_seconds * 1e3:.2f} ms: {each.instruction.scope or each.instruction.opcode}"
            f" at {each.instruction.source or 'no line'} ({each.instruction.name} × {each.instruction.runs})"
            for each in worst
            if each.unplanned_seconds > 0
        ],
    }


# --- all cases


def run_apart(case: Case, script: Path = Path(__file__)) -> dict[str, Any]:
    """The row of a case from a process of its own, which runs a script with `--case`, or the reason why there is none."""
    head = {"row": case.name, "reference": 1.0, "ours": None, "example": case.example, "phase": case.phase}
    head |= {"topology": case.topology, "sizes": dict(case.sizes), "revision": revision()}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, str(script), "--case", case.name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=CASE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**head, "why": f"not done in {CASE_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = [line for line in done.stderr.strip().splitlines() if "Error" in line][-1:]
        return {**head, "why": (words or done.stderr.strip().splitlines()[-1:] or ["no message"])[0][:400]}
    return {**head, **json.loads(lines[-1])}


def revision() -> str:
    """The commit that is measured, empty where Git has none; a `+` marks changes on top."""
    asked = (
        ["git", "rev-parse", "--short", "HEAD"],
        ["git", "status", "--porcelain", "--", "autoshard", "costmodels", "search"],
    )
    commit, changes = (subprocess.run(a, cwd=ROOT, capture_output=True, text=True, check=False).stdout for a in asked)
    return commit.strip() + ("+" if changes.strip() else "")


HEAD = (
    f"{'case':48s} {'planned':>8s} {'replayed':>8s} {'ratio':>6s} {'floor':>8s} {'core':>8s} {'wire':>7s} {'peak':>6s}"
    f" {'bound':>6s}"
)


def show(row: Mapping[str, Any]) -> None:
    """One line of the table, times in ms, the last column `over_bound`, and the most unplanned time."""
    if row["ours"] is None:
        print(f"{row['row']:48s} {row['why'][:120]}", flush=True)
        return
    times = [row[name] for name in ("planned_ms", "replayed_ms")]
    rest = f"{row['floor_ms']:8.2f} {row['core_ms']:8.2f} {row['exposed_ms']:7.2f} {row['peak_ratio'] or 0:6.3f}"
    over = over_bound(row)
    rest += f" {'-' if over is None else format(over, '.2f'):>6s}"
    print(f"{row['row']:48s} {times[0]:8.2f} {times[1]:8.2f} {row['ours']:6.2f} {rest}")
    if row["ours"] > WITHIN[0][1]:
        for text in row["unplanned"]:
            print(f"    {text}")
    sys.stdout.flush()


def pairs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The replayed steps of the same model unrolled (`ours`) and scanned (`reference`), in ms, and their ratio."""
    steps = {row["row"]: row["replayed_ms"] for row in rows if row["ours"] is not None}
    found = [(name, name.replace("-unrolled", "")) for name in steps if "-unrolled" in name]
    return [
        {"row": f"{scanned}, unrolled / scanned", "reference": steps[scanned], "ours": steps[name]}
        | {"ratio": steps[name] / steps[scanned]}
        for name, scanned in found
        if scanned in steps
    ]


def over_bound(row: Mapping[str, Any]) -> float | None:
    """The replayed step over `BOUND` × floor + planned communication; None for rows that the bound is not for."""
    if row["ours"] is None or row["example"] not in DENSE or row["phase"] != "decode":
        return None
    if row["sizes"]["batch"] > MOST_SEQUENCES:
        return None
    return row["replayed_ms"] / (BOUND * row["floor_ms"] + row["planned_wire_ms"])


def _with_bound(row: Mapping[str, Any]) -> dict[str, Any]:
    found = over_bound(row)
    return {**row, **({} if found is None else {"over_bound": found})}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many rows lie within each range and the bound, of those that they are for, and models unrolled beside scanned."""
    ratios = [row["ours"] for row in rows if row["ours"] is not None]
    bounds = [found for row in rows if (found := over_bound(row)) is not None]
    counts = [
        (f"replayed within {low} to {high} of the plan", len(ratios), sum(low <= ratio <= high for ratio in ratios))
        for low, high in WITHIN
    ]
    what = f"dense decode of at most {MOST_SEQUENCES} sequences within {BOUND} × floor + planned communication"
    counts.append((what, len(bounds), sum(found <= 1 for found in bounds)))
    return pairs(rows) + [{"row": name, "reference": total, "ours": count} for name, total, count in counts]


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows and their summary."""
    RESULTS.write_text(json.dumps([*map(_with_bound, rows), *summary(rows)], indent=1) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help="run cases with one of these in their names"
    )
    parser.add_argument("--resume", action="store_true", help="run only cases without a result")
    parser.add_argument("--exact", action="store_true", help="run cases of exactly these names")
    parser.add_argument("--known", action="store_true", help="run only cases with a result")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _is_asked(name: str, asked: str, options: argparse.Namespace) -> bool:
    return name == asked if options.exact else asked in name


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    options = _options()
    if options.case:
        print(json.dumps(measure(CASES[options.case])))
        return
    if options.list:
        print("\n".join(CASES))
        return
    chosen = [
        name for name in CASES if not options.only or any(_is_asked(name, part, options) for part in options.only)
    ]
    if not chosen:
        sys.exit(f"--only must be a part of a case's name, got {options.only[0]!r}. Cases: {', '.join(CASES)}.")
    known = {row["row"]: row for row in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.exists() else {}
    print(HEAD)
    for name in chosen:
        has_result = known.get(name, {}).get("ours") is not None
        if options.known and not has_result:
            continue
        done = options.resume and has_result
        known[name] = known[name] if done else run_apart(CASES[name])
        show(known[name])
        rows = [known[case] for case in CASES if case in known]
        write(rows)
    for row in summary([known[case] for case in CASES if case in known]):
        if "ratio" in row:
            print(f"{row['row']}: {row['ours']:.2f} / {row['reference']:.2f} ms = {row['ratio']:.2f}")
            continue
        share = row["ours"] / row["reference"] if row["reference"] else 0.0
        print(f"{row['row']}: {row['ours']} of {row['reference']} rows ({share:.0%})")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
