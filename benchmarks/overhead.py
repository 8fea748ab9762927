"""What does it cost to use a plan: importing, loading, binding it to 126 unrolled layers, and each call?

    python benchmarks/overhead.py            # one table, and benchmarks/results/overhead.json

`reference` is what we hold ourselves to: importing takes at most 0.3 s more than JAX's own; loading a plan of 126 unrolled
layers and lowering the function with it takes at most 5 s more than lowering the function alone; a call takes no longer than
one of `jax.jit` with the same shardings. Each row is measured in processes of its own; the least of several runs counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
RUNS = 4
DEVICES = 8
LAYERS, PLANNED_LAYERS = 126, 3  # those of Llama 3 405B; first, middle, last
IMPORT_SECONDS, INSERTION_SECONDS, CALL_RATIO = 0.3, 5.0, 1.0
CALLS = 300


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- importing


def importing() -> dict[str, float]:
    """Seconds that `import autoshard` takes after `import jax`, by the clock and of the processor."""
    import jax
    import jax.numpy

    def run() -> None:
        import autoshard  # noqa: F401

    assert jax.numpy
    busy = time.process_time()
    return {"seconds": seconds(run), "cpu_seconds": time.process_time() - busy}


# --- calls


def calls() -> dict[str, float]:
    """Seconds of a call of `plan.jit(fn)`, and of `jax.jit` of the emitted program with the same shardings."""
    import jax
    import jax.numpy as jnp

    import autoshard
    from autoshard.emit import emitted
    from autoshard.execution import traced_as
    from examples import llama

    work = llama.decode(size="tiny", batch=8, context=16)
    plan = autoshard.search(work.fn, *work.args, topology=f"cpu:{DEVICES}")
    mesh = plan.make_mesh()
    ins, outs = plan.shardings(mesh)
    traced = traced_as(plan, work.fn, work.args)
    body = emitted(traced, plan.choice, plan.topology, mesh)

    def plain(*args: Any) -> Any:
        return jax.tree.unflatten(traced.out_tree, body(*jax.tree.leaves(args), *traced.constants))

    args = jax.device_put(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), work.args), ins)
    found = {"planned": plan.jit(work.fn, mesh), "plain": jax.jit(plain, in_shardings=ins, out_shardings=outs)}
    for run in found.values():
        jax.block_until_ready(run(*args))
    best = dict.fromkeys(found, float("inf"))
    for _ in range(CALLS):  # by turns, so that whatever else the machine does falls on both
        for name, run in found.items():
            best[name] = min(best[name], seconds(lambda run=run: jax.block_until_ready(run(*args))))
    return best


# --- 126 layers


def insertion(path: str) -> dict[str, float]:
    """Seconds to load a plan and lower the unrolled model with it, and to lower the model alone; bytes of the plan's file."""
    import jax

    import autoshard

    work = unrolled(LAYERS)
    alone = seconds(lambda: jax.jit(work.fn).lower(*work.args))
    started = time.perf_counter()
    plan = autoshard.load(path)
    loaded = time.perf_counter() - started
    jitted = plan.jit(work.fn)
    lowered = seconds(lambda: jitted.lower(*work.args))
    return {"load": loaded, "lower": lowered, "alone": alone, "bytes": os.stat(path).st_size}


def unrolled(layers: int) -> Any:
    from examples import llama

    return llama.decode(size="tiny", layers=layers, batch=8, context=16, unrolled=True)


def write_deep_plan(path: str) -> None:
    """A plan of 126 layers, laid out as the first, the middle and the last of three that are searched.

    A search of all would do as well, but takes longer than what is measured here.
    """
    import autoshard
    from autoshard import trees
    from autoshard.trace import fingerprint, trace
    from search.solution import Choice

    small, large = unrolled(PLANNED_LAYERS), unrolled(LAYERS)
    plan = autoshard.search(small.fn, *small.args, topology=f"cpu:{DEVICES}")
    few, many = (trace(each.fn, *each.args) for each in (small, large))
    a, b = few.program, many.program
    rows = alike([signature(op) for op in a.operations], [signature(op) for op in b.operations])
    values = {}
    for i, op in enumerate(b.operations):
        for use, old in zip(op.outputs, a.operations[rows[i]].outputs, strict=True):
            if old.value in plan.choice.hubs:
                values[use.value] = plan.choice.hubs[old.value]
    sources = {at: k for k, at in enumerate(a.arguments)}
    sinks = {at: k for k, at in enumerate(a.results)}
    operations = tuple(replace(plan.operations[rows[i]], name=op.name) for i, op in enumerate(b.operations))
    deep = replace(
        plan,
        fingerprint=fingerprint(b),
        arguments=tuple(
            replace(plan.arguments[sources[rows[at]]], path=path)
            for at, path in zip(b.arguments, many.paths, strict=True)
        ),
        results=tuple(
            replace(plan.results[sinks[rows[at]]], path=path)
            for at, path in zip(b.results, many.result_paths, strict=True)
        ),
        in_tree=trees.describe(large.args),
        out_tree=trees.describe(many.out_tree.unflatten([0] * len(b.results))),
        operations=operations,
        choice=Choice(tuple(plan.choice.strategies[row] for row in rows), values),
    )
    deep.save(path)


def signature(op: Any) -> tuple[Any, ...]:
    """What an operation has in common with those of other layers."""
    name = "".join(sign for sign in op.name if not sign.isdigit())
    return op.primitive, op.factors, tuple(use.dims for use in (*op.inputs, *op.outputs)), name


def alike(few: list[Any], many: list[Any]) -> list[int]:
    """For each operation of a deep model the one of a shallow one that stands in the same place of its layer."""
    places: dict[Any, list[int]] = defaultdict(list)
    for i, key in enumerate(few):
        places[key].append(i)
    counts: dict[Any, int] = defaultdict(int)
    for key in many:
        counts[key] += 1
    seen: dict[Any, int] = defaultdict(int)
    rows = []
    for key in many:
        at, here = seen[key], places[key]
        seen[key] += 1
        extra = counts[key] - len(here)
        per_layer = extra // (LAYERS - PLANNED_LAYERS)
        # The first layer and what comes before it, the last and what comes after it; between them the middle one.
        first = len(here) - 2 * per_layer if per_layer else len(here)
        if at < first:
            rows.append(here[at])
        elif at >= first + extra:
            rows.append(here[at - extra])
        else:
            rows.append(here[first - per_layer + (at - first) % per_layer])
    return rows


# --- the table


def isolated(*words: str) -> Any:
    """What one case says, in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "TPU_SKIP_MDS_QUERY": "1",
    }
    done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
    return json.loads(done.stdout.splitlines()[-1])


def import_row() -> dict[str, Any]:
    runs = [isolated("importing") for _ in range(2 * RUNS)]
    return {
        "row": "import autoshard after jax, seconds",
        "reference": IMPORT_SECONDS,
        "ours": min(run["seconds"] for run in runs),
        "cpu_seconds": min(run["cpu_seconds"] for run in runs),
    }


def call_row() -> dict[str, Any]:
    runs = [isolated("calls") for _ in range(RUNS)]
    best = {name: min(run[name] for run in runs) for name in runs[0]}
    return {
        "row": "a call of plan.jit, times that of jax.jit",
        "reference": CALL_RATIO,
        "ours": best["planned"] / best["plain"],
        "planned_seconds": best["planned"],
        "plain_seconds": best["plain"],
    }


def insertion_row() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory, "plan.json"))
        isolated("write_deep_plan", path)
        runs = [isolated("insertion", path) for _ in range(RUNS)]
    best = min(runs, key=lambda run: run["load"] + run["lower"])
    return {
        "row": f"load a plan of {LAYERS} unrolled layers and lower with it, seconds more than without",
        "reference": INSERTION_SECONDS,
        "ours": best["load"] + best["lower"] - best["alone"],
        "load_seconds": best["load"],
        "lower_seconds": best["lower"],
        "lower_without_seconds": best["alone"],
        "file_bytes": best["bytes"],
    }


def main() -> None:
    rows = []
    for measure in (import_row, call_row, insertion_row):
        try:
            rows.append(measure())
        except (RuntimeError, OSError) as error:
            rows.append({"row": measure.__name__, "reference": None, "ours": None, "why": str(error)})
        row = rows[-1]
        ours = row.get("why") if row["ours"] is None else f"{row['ours']:.3f}"
        print(f"{row['row']:<86}  {row['reference'] or '-':>5}  {ours}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"Wrote {RESULTS.relative_to(ROOT)}.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
