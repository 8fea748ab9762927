"""How long does a trace of a hundred thousand equations take, to be traced, folded, solved and emitted?

    python benchmarks/large_trace.py                # one table, and benchmarks/results/large_trace.json
    python benchmarks/large_trace.py --layers 126   # of another depth: the table alone

A decode step of Llama 3 405B's width, unrolled, with its backward pass to every weight. 126 layers, its published depth, are
a third of the equations; the depth here gives a hundred thousand. Seconds are processor seconds. The only target is that the
run ends.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import autoshard
from autoshard.emitting import targets
from benchmarks.models import equations
from examples import llama
from search.formulation.layer_folding import folds

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "large_trace.json"
EQUATIONS = 100_000
LAYERS = 400
TOPOLOGY = "v5p:8x8x8"


def loss(params: Any, cache: Any, tokens: Any, position: Any, following: Any) -> Any:
    """The mean negative log-likelihood of the tokens that should follow."""
    found, _ = llama.decode_step(params, cache, tokens, position)
    likely = jax.nn.log_softmax(found)
    return -jnp.mean(jnp.take_along_axis(likely, following[:, None], axis=1))


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the processor seconds."""
    started = time.process_time()
    found = run()
    return found, round(time.process_time() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--topology", default=TOPOLOGY)
    asked = parser.parse_args()
    work = llama.decode(size="405b", layers=asked.layers, batch=64, context=2048, unrolled=True)
    args = (*work.args, work.args[2])
    step = jax.grad(loss)
    jaxpr, jax_seconds = timed(lambda: jax.make_jaxpr(step)(*args))
    count = equations(jaxpr.jaxpr)
    del jaxpr
    plan, seconds = timed(lambda: autoshard.search(step, *args, topology=asked.topology, name="large trace"))
    program = plan.program
    assert program is not None
    mesh = targets.mesh_of(targets.tpu_devices(*_described(plan)), plan.topology.axis_sizes)
    lowered, lowering = timed(lambda: plan.jit(step, mesh=mesh).lower(*args))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = [
        {"row": "equations", "reference": EQUATIONS, "ours": count, "layers": asked.layers},
        {"row": "seconds that JAX takes to trace it", "reference": None, "ours": jax_seconds},
        {
            "row": "seconds from function to plan",
            "reference": None,
            "ours": seconds,
            "search_seconds": round(plan.proof.wall_seconds, 1),
            "status": plan.proof.status,
            "gap": plan.proof.gap,
            **plan.proof.account(),
            "operations": len(program.operations),
            "folds": [f"{fold.copies} × {fold.period}" for fold in folds(program)],
        },
        {
            "row": "seconds to emit and lower it",
            "reference": None,
            "ours": lowering,
            "module_bytes": len(lowered.as_text()),
        },
        {"row": "peak memory of the process, GiB", "reference": None, "ours": round(peak, 2)},
    ]
    for row in rows:
        print(
            f"{row['row']:40s} {row['ours']:>10,}", *(f"{k}: {v}" for k, v in row.items() if k not in ("row", "ours"))
        )
    if (asked.layers, asked.topology) == (LAYERS, TOPOLOGY):
        RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _described(plan: autoshard.Plan) -> tuple[str, list[int], str]:
    topology = plan.topology
    return topology.name, [axis.size for axis in topology.axes], topology.chip.name


if __name__ == "__main__":
    main()
