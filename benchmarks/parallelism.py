"""Which kind of parallelism does the search choose, and where does it change?

    python benchmarks/parallelism.py                     # one table, and benchmarks/results/parallelism.json

Each sweep changes one size, or the memory of a chip, and names the parallelism of every plan by `Plan.parallelism`.
`reference` are the kinds that textbooks recommend at the two ends: the plans at the first and at the last point of the sweep
must have them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "parallelism.json"
sys.path.insert(0, str(ROOT))  # Python puts the script's own folder there

import autoshard  # noqa: E402
from examples import llama, mixtral  # noqa: E402


def feed_forward(params: Any, x: jax.Array) -> jax.Array:
    """Residual feed-forward layers on tokens `[T, E]`, scanned and rematerialized."""

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return x + jax.nn.gelu(x @ layer[0]) @ layer[1], None

    return jax.lax.scan(jax.checkpoint(block), x, params)[0]


def train_step(params: Any, state: Any, x: jax.Array) -> Any:
    """One AdamW step on float32 parameters that are cast to bf16 for the model."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    grads = jax.grad(lambda p: jnp.square(feed_forward(p, x).astype(jnp.float32)).mean())(half)
    grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)
    updates, state = optax.adamw(1e-3).update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _layers(count: int, width: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((count, *each), dtype) for each in ((width, 4 * width), (4 * width, width)))


def forward(tokens: int, layers: int = 8, width: int = 1024) -> autoshard.Workload:
    """The feed-forward layers alone."""
    args = (_layers(layers, width, jnp.bfloat16), jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16))
    return autoshard.Workload(feed_forward, args, name=f"{tokens} tokens")


def training(tokens: int, layers: int, width: int) -> autoshard.Workload:
    """A training step of them."""
    params = _layers(layers, width, jnp.float32)
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    args = (params, state, jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16))
    return autoshard.Workload(train_step, args, donate_argnums=(0, 1), name=f"width {width}")


def dispatched_experts(experts: int, width: int = 2048) -> autoshard.Workload:
    """Tokens sent to two experts each, through buffers (GShard, Lepikhin et al. 2020, arXiv 2006.16668)."""
    shapes = {"router": (width, experts), "w_gate": (experts, width, 4 * width), "w_up": (experts, width, 4 * width)}
    shapes["w_down"] = (experts, 4 * width, width)
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((64, 512, width), jnp.bfloat16)
    return autoshard.Workload(partial(_dispatch, 2), (layer, x), name=f"{experts} experts")


def _dispatch(chosen: int, layer: Any, x: jax.Array) -> jax.Array:
    return mixtral.dispatched_experts(layer, x, chosen)


def prefill(batch: int) -> autoshard.Workload:
    """One layer of Llama 3 8B on 32,768 tokens."""
    return llama.prefill("8b", batch=batch, length=32_768 // batch, layers=1)


def decode(batch: int) -> autoshard.Workload:
    """Four layers of Llama 3 70B."""
    return llama.decode("70b", batch=batch, context=512, layers=4)


@dataclass(frozen=True)
class Sweep:
    """A question, the swept values, and the kinds that must be among the first point's and among the last point's."""

    question: str
    topology: str
    points: tuple[float, ...]
    build: Callable[[Any], autoshard.Workload]
    ends: tuple[str, str]
    memory: bool = False


GIB = 2**30
TIME_LIMIT = 60.0
"""Seconds after which the search of one point ends."""
SWEEPS = {
    "tokens": Sweep(
        "a small model, tokens grow", "v5e:4x4", (16, 256, 1024, 4096, 65_536), forward, ("tensor", "data parallel")
    ),
    "width": Sweep(
        "training with 65,536 tokens, the model grows",
        "v5e:4x4",
        (16, 64, 256, 1024, 2048),
        partial(training, 65_536, 2),
        ("data parallel", "ZeRO"),
    ),
    "memory": Sweep(
        "training, memory of a chip (GiB) shrinks",
        "v5e:4x4",
        (4, 3, 2.5, 2.25, 2),
        lambda _: training(65_536, 8, 4096),
        ("ZeRO-2", "ZeRO-3"),
        memory=True,
    ),
    "node": Sweep(
        "decode on two nodes of eight GPUs, the batch grows",
        "h100:2x8",
        (16, 256, 1024, 4096),
        decode,
        ("tensor parallel", "data parallel"),
    ),
    "prefill": Sweep(
        "prefill of 32,768 tokens in all, ever more sequences",
        "v5e:4x4",
        (1, 2, 4, 16),
        prefill,
        ("sequence parallel", "data parallel"),
    ),
    "experts": Sweep(
        "tokens dispatched to experts, experts grow",
        "v5e:4x4",
        (2, 8, 16, 64),
        dispatched_experts,
        ("data parallel", "expert parallel"),
    ),
}


def planned(sweep: Sweep, point: float) -> autoshard.Plan:
    """The plan at one point of a sweep."""
    work = sweep.build(point)
    return autoshard.search(
        work.fn,
        *work.args,
        topology=sweep.topology,
        donate_argnums=work.donate_argnums,
        memory_bytes=point * GIB if sweep.memory else None,
        time_limit=TIME_LIMIT,
    )


def flips(found: Sequence[tuple[float, str]]) -> list[str]:
    """Between which neighbours of a sweep the name changes."""
    pairs = pairwise(found)
    return [f"{before:g} → {after:g}" for (before, old), (after, new) in pairs if old != new]


def row(name: str) -> dict[str, Any]:
    """One sweep: the names at its points, and where they flip."""
    sweep = SWEEPS[name]
    plans = [(point, planned(sweep, point)) for point in sweep.points]
    named = [(point, str(plan.parallelism())) for point, plan in plans]
    return {
        "row": f"{sweep.question}, {sweep.topology}",
        "reference": list(sweep.ends),
        "ours": flips(named),
        "points": [
            {
                "at": point,
                "parallelism": text,
                "step_seconds": plan.estimate.seconds,
                "gap": plan.proof.gap,
                **plan.proof.account(),
            }
            for (point, text), (_, plan) in zip(named, plans, strict=True)
        ],
        "as_expected": sweep.ends[0] in named[0][1] and sweep.ends[1] in named[-1][1] and len(flips(named)) > 0,
    }


def main() -> None:
    rows = []
    for name in SWEEPS:
        found = row(name)
        rows.append(found)
        print(f"{found['row']}: flips at {', '.join(found['ours']) or 'nowhere'}")
        for point in found["points"]:
            print(
                f"  {point['at']:8g}  {1e3 * point['step_seconds']:10.3f} ms  gap {point['gap']:.2g}  {point['parallelism']}"
            )
    RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"{sum(each['as_expected'] for each in rows)} of {len(rows)} sweeps flip as expected.")


if __name__ == "__main__":
    main()
