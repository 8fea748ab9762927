"""How much time does a plan cost its user: importing, loading, binding it to 126 unrolled layers, and each call?

    python benchmarks/overhead.py            # one table, and benchmarks/results/overhead.json

`reference` is the target: importing takes at most 0.3 s more than JAX's own; loading a plan of 126 unrolled
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
RUNS = 4
DEVICES = 8
LAYERS = 126  # those of Llama 3 405B
IMPORT_SECONDS, INSERTION_SECONDS, CALL_RATIO = 0.3, 5.0, 1.0
CALLS = 300


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- importing


def importing() -> dict[str, float]:
    """Seconds that autoshard takes to import after JAX, by the clock and of the processor.

    `import autoshard` alone loads next to nothing; `search`, `load` and `Plan` bring the passes.
    """
    import jax
    import jax.numpy

    def run() -> None:
        from autoshard import Plan, load, search  # noqa: F401

    assert jax.numpy
    busy = time.process_time()
    return {"seconds": seconds(run), "cpu_seconds": time.process_time() - busy}


# --- calls


def calls() -> dict[str, float]:
    """Seconds of a call of `plan.jit(fn)`, and of `jax.jit` of the emitted program with the same shardings."""
    import jax
    import jax.numpy as jnp

    import autoshard
    from autoshard.emitting.bind import trace_as_planned
    from autoshard.emitting.program import emit
    from examples import llama

    work = llama.decode(size="tiny", batch=8, context=16)
    plan = autoshard.search(work.fn, *work.args, topology=f"cpu:{DEVICES}")
    mesh = plan.make_mesh()
    ins, outs = plan.shardings(mesh)
    traced = trace_as_planned(plan, work.fn, work.args)
    body = emit(traced, plan.choice, plan.topology, mesh)

    def plain(*args: Any) -> Any:
        return jax.tree.unflatten(traced.out_tree, body(*jax.tree.leaves(args), *traced.constants))

    args = jax.device_put(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), work.args), ins)
    found = {"planned": plan.jit(work.fn, mesh), "plain": jax.jit(plain, in_shardings=ins, out_shardings=outs)}
    for run in found.values():
        jax.block_until_ready(run(*args))
    best = dict.fromkeys(found, float("inf"))
    for _ in range(CALLS):  # interleaved, so that other load affects both
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
    """The plan of all layers."""
    import autoshard

    work = unrolled(LAYERS)
    autoshard.search(work.fn, *work.args, topology=f"cpu:{DEVICES}", name=work.name).save(path)


# --- the table


def isolated(*words: str) -> Any:
    """The output of one case, run in a process of its own."""
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
        "row": "import search, load and Plan of autoshard after jax, seconds",
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
