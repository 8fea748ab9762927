"""How good are the plans? XLA AutoSharding and expert hand layouts against ours, judged by the same rules on compiled programs.

Every contestant shards the same function for the same slice. The real TPU compiler compiles all of them. `judge.py` reads only
the compiled text. Contestants:

- **ours**: `autoshard.search`, emitted as one manual `shard_map`;
- **AutoSharding**: XLA's own search with its own compiler (jax 0.9.2), on each way to merge the torus into two axes, the
  best of which counts; and the argument specs that it chose, compiled by our compiler;
- **hand layouts** (`hand_layouts.py`): argument specs, the rest left to the partitioner (Shardy);
- for diagnosis only, **our specs alone**: our plan's argument and result specs, the rest left to the partitioner.

A step's time is the replay of the compiled schedule. Every peer of our compiler is compiled with the device's own memory
formats of arguments and results and with those that the compiler chooses (`Layout.AUTO`); the faster program counts. Ours
has the formats of its plan, by rule, and is compiled once. `--tuned` adds ours in the fastest of the ways that
`autoshard verify` tries, as a row of its own that no ratio uses.

    python benchmarks/peers.py [--only CASE ...] [--peer-python .venv-peer/bin/python]

Ten cases are programs of other people's shape with their authors' own rules (`expert_programs.py`, `logical_axes.py`). These
are compiled with formats that the compiler chooses, and then, the fastest first, with the device's own.

A case has a limit of processor seconds, not of wall time, so that a loaded machine leaves out no contestant. Every
contestant's row names its `commit`. Rows of cases that are not run again are kept from the last time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"
CASE_SECONDS, AUTOSHARDING_SECONDS = 900, 300
"""The processor seconds of a case without AutoSharding, and of one AutoSharding."""
HANGS = 20
"""A process that takes this many times its processor seconds in wall time is stopped, too."""
TUNED = "ours, tuned"
OURS, AUTOSHARDING, AUTO_SPECS, OUR_SPECS = "ours", "AutoSharding", "AutoSharding's specs", "our specs alone"
NOT_PEERS = (OURS, TUNED, OUR_SPECS)
TARGETS = {"worst ours / best peer": 1.0, "geomean ours / AutoSharding": 0.5, "geomean ours / best peer": 0.75}


@dataclass(frozen=True)
class Case:
    """One function for one slice."""

    name: str
    example: str
    phase: str
    sizes: Mapping[str, Any]
    topology: str


# Unrolled 70B has 16 of its 80 layers for everybody: AutoSharding would take minutes for all of them.
CASES = (
    Case("palm-540b-decode-64", "palm", "decode", {"size": "540b", "batch": 64}, "v4:4x4x4"),
    Case("palm-540b-decode-512", "palm", "decode", {"size": "540b", "batch": 512}, "v4:4x4x4"),
    Case("palm-540b-prefill-1", "palm", "prefill", {"size": "540b", "batch": 1, "length": 2048}, "v4:4x4x4"),
    Case("palm-62b-decode-32", "palm", "decode", {"size": "62b", "batch": 32}, "v4:2x4x2"),
    Case("llama-8b-decode-32", "llama", "decode", {"size": "8b", "batch": 32}, "v5e:2x4"),
    Case("llama-8b-prefill-4", "llama", "prefill", {"size": "8b", "batch": 4, "length": 2048}, "v5e:2x4"),
    Case(
        "llama-70b-unrolled-16-layers-decode-16",
        "llama",
        "decode",
        {"size": "70b", "batch": 16, "unrolled": True, "layers": 16},
        "v5e:4x4",
    ),
    Case("llama-405b-decode-64", "llama", "decode", {"size": "405b", "batch": 64}, "v5p:4x4x8"),
    # The slices and batches of public serving and training recipes (MaxText's and tunix's Llama configurations).
    Case("llama-8b-decode-1", "llama", "decode", {"size": "8b", "batch": 1}, "v5e:2x4"),
    Case("llama-8b-decode-128", "llama", "decode", {"size": "8b", "batch": 128}, "v5e:4x4"),
    Case("llama-8b-decode-64-v6e", "llama", "decode", {"size": "8b", "batch": 64}, "v6e:2x4"),
    Case("llama-8b-prefill-16", "llama", "prefill", {"size": "8b", "batch": 16, "length": 1024}, "v5e:4x4"),
    Case("llama-8b-prefill-1-v6e", "llama", "prefill", {"size": "8b", "batch": 1, "length": 4096}, "v6e:2x4"),
    Case(
        "llama-8b-unrolled-8-layers-decode-64",
        "llama",
        "decode",
        {"size": "8b", "batch": 64, "unrolled": True, "layers": 8},
        "v5e:2x4",
    ),
    Case("llama-70b-decode-32", "llama", "decode", {"size": "70b", "batch": 32}, "v5e:4x4"),
    Case("llama-70b-decode-64-v5p", "llama", "decode", {"size": "70b", "batch": 64}, "v5p:2x2x4"),
    Case("llama-70b-prefill-8-v6e", "llama", "prefill", {"size": "70b", "batch": 8, "length": 2048}, "v6e:4x4"),
    Case("palm-8b-prefill-8", "palm", "prefill", {"size": "8b", "batch": 8, "length": 2048}, "v4:2x2x2"),
    # Programs with their authors' own rules (`expert_programs.py`), 2 layers of published widths.
    Case("tunix-llama-8b-decode", "experts", "listed", {}, "v5e:2x4"),
    Case("tunix-qwen2-7b-decode", "experts", "biased", {}, "v5e:2x4"),
    Case("gemma2-9b-decode", "experts", "capped", {}, "v6e:2x4"),
    Case("jax-llm-llama-70b-decode", "experts", "ragged", {}, "v5e:4x4"),
    Case("maxtext-llama-8b-decode", "experts", "two_caches", {}, "v5e:2x4"),
    Case("maxtext-llama-8b-prefill", "experts", "packed", {}, "v5e:2x4"),
    Case("qwen3-8b-carried-decode", "experts", "carried", {}, "v5p:2x2x2"),
    Case("llama2-7b-flat-decode", "experts", "flat", {}, "v5e:2x4"),
    Case("mistral-7b-rolling-decode", "experts", "rolling", {}, "v5e:2x4"),
    Case("llama-1b-training", "experts", "training", {}, "v5e:4x4"),
)


# --- one case, in a process of its own


def contest(case: Case, peer_python: str, keep: Path | None, only: str) -> Iterator[dict[str, Any]]:
    """Every contestant's row, as it is done; ours, then the expert layouts.

    `only` is "ours", "tuned" (ours, and the fastest of the ways to emit it), "experts" (ours and expert layouts), or empty
    for all contestants.
    """
    from autoshard.emitting import targets
    from benchmarks import contestants
    from costmodels.machine.topology import parse_topology

    topology = parse_topology(case.topology)
    mesh = targets.mesh_of(targets.tpu_devices(topology.name, topology.shape, topology.chip.name), topology.axis_sizes)
    bench = contestants.Bench(case.name, case.example, contestants.workload_of(case), topology, mesh, keep)
    plan, spent = bench.searched()
    yield bench.ours(OURS, plan, spent)
    if only == "tuned":
        yield bench.tuned(TUNED, plan)
    if only in ("ours", "tuned"):
        return
    program = contestants.program_of(case)
    if program:
        yield from bench.by_rules(program)
        return
    yield from bench.hand_layouts()
    if only == "experts":
        return
    yield bench.partitioned(OUR_SPECS, plan.in_specs, plan.out_specs)
    yield from autosharded(case, bench, peer_python)


def autosharded(case: Case, bench: Any, peer_python: str) -> Iterator[dict[str, Any]]:
    """AutoSharding on each way to merge the torus into two axes: its best by its own compiler, then its specs by ours."""
    from benchmarks import contestants

    runs = [_autosharding(case, merged, bench.topology, peer_python) for merged in contestants.merged(bench.topology)]
    rows = [bench.judged(AUTOSHARDING, run) if "text" in run else {"contestant": AUTOSHARDING, **run} for run in runs]
    best = min(range(len(rows)), key=lambda i: rows[i].get("step_ms") or float("inf"))
    others = [f"{row['mesh']}: {row.get('step_ms') or row['why']}" for i, row in enumerate(rows) if i != best]
    yield {**rows[best], "other_meshes": others}
    if "text" in runs[best]:
        yield bench.partitioned(AUTO_SPECS, *bench.specs_from(runs[best]))


def _autosharding(case: Case, merged: Sequence[str], topology: Any, peer_python: str) -> dict[str, Any]:
    """The output of the peer's process, or the reason why there is none."""
    from autoshard.emitting import targets

    name, options = targets.describe_target(topology.name, topology.shape, topology.chip.name)
    task = {
        "example": case.example,
        "phase": case.phase,
        "sizes": dict(case.sizes),
        "topology": name,
        "options": options,
        "axis_sizes": topology.axis_sizes,
        "merged": list(merged),
    }
    mesh = " × ".join(merged)
    if not Path(peer_python).exists():
        return {"mesh": mesh, "why": f"{peer_python} is not there: `make bench-peers` sets it up"}
    # Without the variables of this JAX: TPU_LIBRARY_PATH would give the peer our compiler.
    ours = ("JAX", "LIBTPU", "PYTHONPATH", "TPU", "XLA")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "autosharding.json"
        command = [peer_python, str(ROOT / "benchmarks" / "autosharding.py"), json.dumps(task), str(out)]
        _, why = run_limited(command, environment, AUTOSHARDING_SECONDS)
        if why or not out.exists():
            return {"mesh": mesh, "why": why or "no result"}
        return {"mesh": mesh, **json.loads(out.read_text("utf-8"))}


def run_limited(command: Sequence[str], environment: Mapping[str, str], seconds: int) -> tuple[str, str]:
    """The output of a process that may use so many processor seconds, and why it ended early, empty if it did not."""
    limited = ["bash", "-c", f'ulimit -S -t {seconds}; ulimit -H -t {seconds + 5}; exec "$@"', "bash", *command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                limited,
                env=dict(environment),
                stdout=out,
                stderr=errors,
                timeout=HANGS * seconds,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        out.seek(0)
        errors.seek(0)
        said, why = out.read(), ""
        if code is None:
            why = f"not done in {HANGS * seconds} s"
        elif code in (-signal.SIGXCPU, -signal.SIGKILL):
            why = f"not done in {seconds} processor seconds"
        elif code:
            why = _last_words(errors.read())
        return said, why


def _last_words(stderr: str) -> str:
    """The line of an error with the reason."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line or "Check failed" in line]
    return (telling or lines or ["no word"])[-1][:300]


# --- all cases


def isolated(case: Case, options: argparse.Namespace, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """One case in a process of its own; contestants that it did not reach are missing, with the reason."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--contest", case.name]
    command += ["--peer-python", options.peer_python] + (["--keep", options.keep] if options.keep else [])
    command += [f"--{name}" for name in ("ours-only", "tuned", "experts") if getattr(options, name.replace("-", "_"))]
    started = time.monotonic()
    out, why = run_limited(command, environment, CASE_SECONDS)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if (options.ours_only or options.tuned) and known:
        done = [row["contestant"] for row in rows]
        rows += [row for row in known["contestants"] if row["contestant"] not in done]
    return summary(case, rows, why, time.monotonic() - started)


def summary(case: Case, contestants: Sequence[dict[str, Any]], why: str, seconds: float) -> dict[str, Any]:
    """A case as one row: our step against AutoSharding's and the best peer's."""
    steps = {row["contestant"]: row["step_ms"] for row in contestants if row.get("fits") and row.get("step_ms")}
    peers = {name: step for name, step in steps.items() if name not in NOT_PEERS}
    ours, auto = steps.get(OURS), steps.get(AUTOSHARDING)
    best = min(peers, key=lambda name: peers[name], default=None)
    return {
        "row": case.name,
        "reference": peers[best] if best else None,
        "ours": ours,
        "unit": "ms",
        "best_peer": best,
        "ours / best peer": ours / peers[best] if ours and best else None,
        "ours / AutoSharding": ours / auto if ours and auto else None,
        "topology": case.topology,
        "workload": {"example": case.example, "phase": case.phase, **case.sizes},
        "contestants": list(contestants),
        "seconds": round(seconds, 1),
        **({"why": why} if why else {}),
    }


def verdicts(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets: never slower than the best peer, and by how much faster in the geometric mean."""
    best = [row["ours / best peer"] for row in cases if row["ours / best peer"]]
    auto = [row["ours / AutoSharding"] for row in cases if row["ours / AutoSharding"]]
    found = (max(best, default=None), _geomean(auto), _geomean(best))
    return [
        {"row": name, "reference": target, "ours": ours, "cases": n, "met": ours is not None and ours <= target}
        for (name, target), ours, n in zip(TARGETS.items(), found, (len(best), len(auto), len(best)), strict=True)
    ]


def _geomean(ratios: Sequence[float]) -> float | None:
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else None


def show(row: Mapping[str, Any]) -> None:
    """One case of the table."""
    print(f"\n{row['row']} on {row['topology']}  ({row['seconds']:.0f} s)")
    print(
        f"  {'contestant':44s} {'search s':>8s} {'CPU s':>7s} {'step ms':>9s} {'compute':>9s} {'wire':>9s} {'wire MiB':>9s}"
        f" {'peak GiB':>8s} {'if hidden':>9s}"
    )
    for each in row["contestants"]:
        if each.get("step_ms") is None:
            print(f"  {each['contestant']:44s} {each['why'][:100]}")
            continue
        spent = [each.get("search_seconds"), each.get("search_cpu_seconds")]
        searched = f"{spent[0]:8.1f} {spent[1]:7.1f}" if None not in spent else f"{'':16s}"
        print(
            f"  {each['contestant']:44s} {searched} {each['step_ms']:9.2f} {each['compute_ms']:9.2f}"
            f" {each['wire_ms']:9.2f} {each['wire_mib']:9.1f} {each['peak_gib']:8.2f} {each['overlapped_ms']:9.2f}"
            + ("" if each["fits"] else "  does not fit")
        )
    if row.get("why"):
        print(f"  stopped: {row['why']}")
    ratios = [f"{key} {row[key]:.3f}" for key in ("ours / best peer", "ours / AutoSharding") if row[key]]
    print(f"  {', '.join(ratios) or 'no comparison'}; best peer: {row['best_peer']}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="run these; keep the others' rows")
    parser.add_argument("--peer-python", default=str(PEER_PYTHON), help="the Python that has jax 0.9.2")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="write every compiled text here")
    parser.add_argument("--ours-only", action="store_true", help="judge our plans again, and keep the peers' rows")
    parser.add_argument("--tuned", action="store_true", help="the same, and in the fastest of the ways to emit it")
    parser.add_argument("--experts", action="store_true", help="compare with the expert layouts alone")
    parser.add_argument("--contest", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    options = _options()
    by_name = {case.name: case for case in CASES}
    if options.contest:
        keep = Path(options.keep) if options.keep else None
        from benchmarks.on_chip import revision

        commit = revision()
        only = "tuned" if options.tuned else "ours" if options.ours_only else "experts" if options.experts else ""
        for row in contest(by_name[options.contest], options.peer_python, keep, only):
            said = {key: value for key, value in row.items() if key != "text"}
            print(json.dumps({**said, "commit": commit}), flush=True)
        return
    unknown = [name for name in options.only if name not in by_name]
    if unknown:
        sys.exit(f"There is no case {unknown[0]!r}; there are {', '.join(by_name)}.")
    path = RESULTS / "peers.json"
    known = {row["row"]: row for row in json.loads(path.read_text("utf-8"))} if path.exists() else {}
    for name in options.only or by_name:
        known[name] = isolated(by_name[name], options, known.get(name))
        show(known[name])
        cases = [known[case] for case in by_name if case in known]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(cases + verdicts(cases), indent=1) + "\n")
    for row in verdicts([known[case] for case in by_name if case in known]):
        got = "not known" if row["ours"] is None else f"{row['ours']:.3f}"
        print(f"{row['row']:32s} target {row['reference']:.2f}  got {got} over {row['cases']} cases")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
