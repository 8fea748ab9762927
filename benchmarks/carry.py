"""What do a plan's specs and constraints carry? Programs carried by hand, by constraints and by specs, compiled for TPUs.

    python benchmarks/carry.py [--only CASE ...] [--resume] [--most N]

A row is a block of `examples/blocks.py`, a model of few layers, a case of `benchmarks/audits.py` for TPUs, or Llama 3 with
unrolled layers: `reference` is the step of the manual
program, `ours` that of the program with constraints, in milliseconds, replayed as audits do; `specs_ms` that of specs alone.
`for_specs` is the plan of `autoshard search --carry specs`, with its manual program, and whether it is carried as planned;
where it is not, `constrained` in it is the plan with the least constraints, and their number (`carry="constraints"`, which
also updates loops in place).
A row also has bytes on the wire, peaks, the constraints as source, and the costliest difference of each program from the plan.
Each case is compiled in a process of its own: of a compiler that aborts, the row has the last words and what came before.

Rows of cases that are not run again are kept; `--resume` runs only cases without a row. `--most 0` compiles no program but
those of `for_specs`, `--plans 0` none of `for_specs`; each keeps the rest of a row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.audits import CASES as AUDITED  # noqa: E402
from benchmarks.audits import SEARCH_SECONDS, Case  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "carry.json"
CASE_SECONDS = 1200
"""The time limit of a case, by default."""
CLOSE = {"constraints": 1.03, "specs": 1.10}
"""The multiple of the manual step that programs of each way may take in the geometric mean."""


def _billions(case: Case) -> float:
    return float(case.size.removesuffix("b"))


UNROLLED = (
    Case("llama", "8b", "decode", {"size": "8b", "batch": 64, "unrolled": True}, "v5e:2x4", "tpu"),
    Case("llama", "8b", "prefill", {"size": "8b", "batch": 4, "unrolled": True}, "v5e:2x4", "tpu"),
)
BLOCKS = {
    f"block-{name}": Case("blocks", "", name, {}, "v5e:2x4", "tpu")
    for name in ("mlp", "gated", "scanned", "attention", "training")
}
_LLAMA = {"size": "8b", "batch": 64, "layers": 2}
_PREFILL = {"size": "8b", "batch": 8, "layers": 2}
SHORT = {
    "palm-8b-decode-4-layers": Case("palm", "8b", "decode", {**_LLAMA, "layers": 4}, "v5e:2x4", "tpu"),
    "palm-8b-prefill-2-layers": Case("palm", "8b", "prefill", _PREFILL, "v5e:2x4", "tpu"),
    "llama-8b-decode-2-unrolled": Case("llama", "8b", "decode", {**_LLAMA, "unrolled": True}, "v5e:2x4", "tpu"),
    "llama-8b-prefill-2-unrolled": Case("llama", "8b", "prefill", {**_PREFILL, "unrolled": True}, "v5e:2x4", "tpu"),
    "llama-8b-decode-4-layers": Case("llama", "8b", "decode", {**_LLAMA, "layers": 4}, "v5e:2x4", "tpu"),
    "llama-8b-prefill-2-layers": Case("llama", "8b", "prefill", _PREFILL, "v5e:2x4", "tpu"),
    "llama-70b-decode-8-layers": Case(
        "llama", "70b", "decode", {"size": "70b", "batch": 16, "layers": 8}, "v5e:4x4", "tpu"
    ),
}
"""Programs of few layers, whose loops compile to what those of all layers do."""
CASES = {
    **BLOCKS,
    **SHORT,
    **{case.name: case for case in sorted(AUDITED, key=_billions) if case.target == "tpu"},
    **{f"{case.name}-unrolled": case for case in UNROLLED},
}
"""The cases by name, the smallest first."""


# --- one case, in a process of its own


def compile_case(case: Case, most: int, plans: int, keep: Path | None) -> Iterator[dict[str, Any]]:
    """Searches the plan and compiles its programs; each part of the row as soon as it is known."""
    import importlib

    import autoshard
    from autoshard.carrying.carry import Carrier, compiler_of
    from autoshard.carrying.written import calls_of, line_of

    work = getattr(importlib.import_module(f"examples.{case.model}"), case.phase)(**case.sizes)
    options = {"donate_argnums": work.donate_argnums, "name": work.name, "time_limit": SEARCH_SECONDS}
    options["padding"] = False  # which the manual program alone adds
    plan = autoshard.search(work.fn, *work.args, topology=case.topology, **options)
    yield {"planned_ms": plan.estimate.seconds * 1e3, "gap": plan.proof.gap}
    if most:
        began = time.process_time()
        plan = autoshard.carry(plan, work.fn, *work.args, target="tpu", ways=("constraints",), most=most)
        if keep:
            plan.save(keep / f"{case.name.replace(':', '_')}.json")
        found = plan.carriage
        assert found is not None
        yield {
            **{each.way: figures(each) for each in found.programs},
            "within": found.within,
            "count": found.count,
            "compiled": found.compilations,
            "processor_seconds": round(time.process_time() - began, 1),
            "lines": [f"{line_of(each)}: {calls_of(each, each.variable or 'value')}" for each in found.constraints],
            "compiler": found.compiler,
        }
        yield {"specs": figures(Carrier(plan, work.fn, work.args, "tpu").try_way("specs")[0])}
    if plans:
        from autoshard.comparing.carried_plans import best_carried

        tried = best_carried(plan, work.fn, *work.args, k=plans, time_limit=SEARCH_SECONDS)
        chosen = tried.chosen
        ours = {"plan": chosen.name, "of": len(tried.plans), "planned_ms": chosen.plan.estimate.seconds * 1e3}
        by_hand = {"manual_ms": chosen.manual.step_seconds * 1e3} if chosen.manual else {}
        ours |= {
            **by_hand,
            "best_planned_ms": tried.best_planned_seconds * 1e3,
            "compiler": compiler_of("tpu"),
            "as_planned": chosen.is_as_planned,
            "words": list(tried.words()),
        }
        other = tried.constrained
        if other is not None:
            carriage, manual = other.plan.carriage, other.manual
            assert carriage is not None and manual is not None
            ours["constrained"] = {
                "plan": other.name,
                "count": carriage.count,
                "planned_ms": other.plan.estimate.seconds * 1e3,
                "manual_ms": manual.step_seconds * 1e3,
                "as_planned": other.is_as_planned,
                **figures(other.program),
            }
        yield {"for_specs": {**ours, **figures(chosen.program)}}


def figures(program: Any) -> dict[str, Any]:
    """A carried program as data; times in milliseconds."""
    if program.why:
        return {"why": program.why}
    return {
        "step_ms": program.step_seconds * 1e3,
        "wire_ms": program.wire_seconds * 1e3,
        "wire_bytes": program.wire_bytes,
        "peak_gib": program.peak_bytes / 2**30,
        "cause": program.cause,
    }


# --- all cases


def run_case(name: str, case: Case, options: argparse.Namespace, known: Mapping[str, Any]) -> dict[str, Any]:
    """A row: the ways of one case, in a process of its own; with the parts of the row from before that it does not run."""
    kept = {key: known[key] for key in known if (key == "for_specs" and not options.plans) or not options.most}
    row: dict[str, Any] = {"row": name, "reference": None, "ours": None, **kept}
    row |= {"topology": case.topology, "workload": dict(case.sizes)}
    began = time.monotonic()
    row |= in_process(name, options)
    row["seconds"] = round(time.monotonic() - began, 1)
    steps = {way: row.get(way, {}).get("step_ms") for way in ("manual", "constraints", "specs")}
    row |= {"reference": steps["manual"], "ours": steps["constraints"], "specs_ms": steps["specs"]}
    if steps["manual"] and steps["constraints"]:
        row["wire_ratio"] = row["constraints"]["wire_bytes"] / max(row["manual"]["wire_bytes"], 1.0)
    return row


def in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The parts of a row that one process printed, and why it printed no more if it did not end well."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--case", name, "--most", str(options.most), "--plans", str(options.plans)]
    command += ["--keep", options.keep]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(
                command, env=environment, stdout=out, stderr=err, timeout=options.seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        for each in (out, err):
            each.seek(0)
        parts = [json.loads(line) for line in out if line.startswith("{")]
        said = err.read().strip().splitlines()
    row = {key: value for part in parts for key, value in part.items()}
    if code is None:
        row["why"] = f"not done in {options.seconds:g} s"
    elif code:
        words = [line for line in said if "Check failed" in line or "Error" in line]
        aborted = "the compiler aborted: " if code < 0 else ""
        row["why"] = (aborted + (words or said or ["no word"])[-1])[:400]
    return row


def show(row: Mapping[str, Any]) -> None:
    """One line of the table."""

    def part(way: str) -> str:
        found = row.get(way) or {}
        if row["reference"] and found.get("step_ms"):
            return f"{found['step_ms'] / row['reference']:8.3f}"
        return f"{'-':>8s}"

    reference = f"{row['reference']:10.3f}" if row["reference"] else f"{'-':>10s}"
    planned = row.get("for_specs") or {}
    by_plan = f"{planned['step_ms']:9.3f} {planned['manual_ms']:9.3f}" if planned.get("manual_ms") else ""
    by_plan += {True: " as planned", False: " not as planned"}.get(planned.get("as_planned", ""), "")
    other = planned.get("constrained") or {}
    if other.get("step_ms"):
        how = "as planned" if other["as_planned"] else "not as planned"
        by_plan += f"; {how} with {other['count']} constraints: {other['step_ms']:.3f}"
    print(
        f"{row['row']:44s} {reference} {part('constraints')} {row.get('count', '-'):>5} {part('specs')} {by_plan}",
        flush=True,
    )
    for way in ("constraints", "specs"):
        found = row.get(way) or {}
        reason = found.get("why") or found.get("cause")
        if reason:
            print(f"    {way}: {reason[:170]}", flush=True)
    if row.get("why"):
        print(f"    {row['why'][:170]}", flush=True)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The geometric means over the rows that have both programs, and the number of aborts."""
    found = []
    for way, limit in CLOSE.items():
        both = [row for row in rows if row["reference"] and (row.get(way) or {}).get("step_ms")]
        if both:
            mean = exp(sum(log(row[way]["step_ms"] / row["reference"]) for row in both) / len(both))
            found.append({"row": f"{way} over manual, mean of {len(both)}", "reference": limit, "ours": mean})
    chosen = [row for row in rows if (row.get("for_specs") or {}).get("manual_ms")]
    if chosen:
        mean = exp(sum(log(_over_best(row)) for row in chosen) / len(chosen))
        found.append({"row": f"plans for specs over the best, mean of {len(chosen)}", "reference": None, "ours": mean})
        own = [row["for_specs"]["step_ms"] / row["for_specs"]["manual_ms"] for row in chosen]
        mean = exp(sum(map(log, own)) / len(own))
        found.append({"row": f"plans for specs over manual, mean of {len(chosen)}", "reference": 1.1, "ours": mean})
        part = sum(row["for_specs"]["as_planned"] for row in chosen) / len(chosen)
        found.append({"row": f"plans for specs as planned, part of {len(chosen)}", "reference": 0.95, "ours": part})
        part = sum(map(_as_planned_at_last, chosen)) / len(chosen)
        name = f"plans for specs as planned, with the least constraints where needed, part of {len(chosen)}"
        found.append({"row": name, "reference": 0.95, "ours": part})
    aborts = sum("aborted" in str((row.get(way) or row).get("why")) for row in rows for way in ("constraints", "specs"))
    return [*found, {"row": "aborts of the compiler", "reference": 0, "ours": aborts}]


def _as_planned_at_last(row: Mapping[str, Any]) -> bool:
    """Whether specs alone, or else the least constraints, carry the plan for specs as planned."""
    found = row["for_specs"]
    return found["as_planned"] or bool((found.get("constrained") or {}).get("as_planned"))


def _over_best(row: Mapping[str, Any]) -> float:
    """The step by specs over the manual program of the best plan; over its planned step where that is not compiled."""
    found = row["for_specs"]
    return found["step_ms"] / (row["reference"] or found.get("best_planned_ms") or row["planned_ms"])


def _matches(name: str, part: str) -> bool:
    """Whether a case is meant: the one of this name, or each whose name contains it if there is none."""
    return name == part or (part not in CASES and part in name)


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="cases whose names contain one of these")
    parser.add_argument("--resume", action="store_true", help="run only cases without a row")
    parser.add_argument(
        "--most", type=int, default=40, metavar="N", help="programs compiled to choose constraints; 0 for none"
    )
    parser.add_argument(
        "--plans", type=int, default=2, metavar="K", help="best plans, and by sums, compiled for specs; 0 for none"
    )
    parser.add_argument("--seconds", type=float, default=CASE_SECONDS, help="time limit of a case")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="save the carried plans there")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        for part in compile_case(
            CASES[options.case], options.most, options.plans, Path(options.keep) if options.keep else None
        ):
            print(json.dumps(part), flush=True)
        return
    chosen = [name for name in CASES if not options.only or any(_matches(name, part) for part in options.only)]
    if not chosen:
        sys.exit(f"There is no case like {options.only[0]!r}; there are {', '.join(CASES)}.")
    known = {row["row"]: row for row in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.exists() else {}
    print(
        f"{'case':44s} {'manual ms':>10s} {'constr.':>8s} {'count':>5s} {'specs':>8s} {'plan ms':>9s} {'by hand':>9s}"
    )
    for name in chosen:
        if not (options.resume and known.get(name, {}).get("ours") is not None):
            known[name] = run_case(name, CASES[name], options, known.get(name, {}))
        show(known[name])
        rows = [known[case] for case in CASES if case in known]
        RESULTS.write_text(json.dumps(rows + verdicts(rows), indent=1) + "\n")
    for row in verdicts([known[case] for case in CASES if case in known]):
        print(
            f"{row['row']}: {row['ours']:.4g}"
            + (f" (asked {row['reference']})" if row["reference"] is not None else "")
        )


if __name__ == "__main__":
    main()
