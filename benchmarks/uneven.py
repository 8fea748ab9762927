"""Models whose dimensions the mesh does not divide: the best plan with padding against the best plan without.

    python benchmarks/uneven.py [--only CASE ...] [--audit] [--resume] [--floors]

A row is a decoder of published sizes, a phase and a slice. `reference` is the planned step without padding, `ours` that of a
search by default; `--audit` compiles both for the chips of the row, and replays them on TPUs. Programs for GPUs are compiled
only by a Python with XLA:GPU (`.venv-gpu/bin/python`, see `make bench-audit`). Rows that do not run again keep their last
result. PaLM 540B has its 48 heads; `by_hand` is the planned step of the model with 64, as Pope et al. 2022 padded it. `pinned`
and `by_hand_pinned` are those with the heads over all chips, which pads 48 to 64. `--floors` adds to the rows with padding the
planned step of a smaller model, whose heads and words the mesh divides (`floor`): the plan of a padded model splits arrays that
are larger in every dimension, so no padding can be planned faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.auditing.audit import AuditError
from autoshard.emitting.targets import COMPILERS, has_cuda
from costmodels.machine.topology import parse_topology
from examples import palm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "uneven.json"
SEARCH_SECONDS = 600.0
_HOSTS = 6
"""The most host devices of a case."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder with layer norms and an MLP of two matrices."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    words: int


MODELS: Mapping[str, Sizes] = {
    "gpt2-xl": Sizes(48, 1600, 25, 25, 64, 6400, 50_257),  # Radford et al. 2019; OpenAI's released configuration
    "falcon-7b": Sizes(32, 4544, 71, 1, 64, 18_176, 65_024),  # tiiuae/falcon-7b, config.json
    "qwen2-0.5b": Sizes(24, 896, 14, 2, 64, 4864, 151_936),  # Qwen/Qwen2-0.5B, config.json
    "phi-2": Sizes(32, 2560, 32, 32, 80, 10_240, 51_200),  # microsoft/phi-2, config.json
    "whisper-large-decoder": Sizes(32, 1280, 20, 20, 64, 5120, 51_865),  # openai/whisper-large-v2, config.json
}
PALM = (("decode", 1), ("decode", 64), ("decode", 512), ("prefill", 1))
CASES = {
    f"{name}-{phase}-b{batch}-{topology}": (name, phase, batch, topology)
    for name in MODELS
    for topology in ("v5e:2x4", "v5e:4x4", "v4:4x4x4", "h100:6", "cpu:6")
    for phase, batch in (("decode", 1), ("decode", 16), ("prefill", 1), ("prefill", 16))
} | {f"palm-540b-{phase}-b{batch}-v4:4x4x4": ("palm-540b", phase, batch, "v4:4x4x4") for phase, batch in PALM}
TOKENS = 1024
OVER_ALL = P(None, None, ("x", "y", "z"))
"""The heads of PaLM's queries over all chips of a v4 cube."""


# --- the model


def _layer(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    e, h, k, d, f = sizes.width, sizes.heads, sizes.kv_heads, sizes.head, sizes.hidden
    return {
        "wq": (e, h, d),
        "wk": (e, k, d),
        "wv": (e, k, d),
        "wo": (h, d, e),
        "up": (e, f),
        "down": (f, e),
        "norm": (e,),
    }


def abstract(sizes: Sizes) -> dict[str, Any]:
    """The shapes of the parameters, stacked over the layers."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layers = {name: array(sizes.layers, *shape) for name, shape in _layer(sizes).items()}
    return {"words": array(sizes.words, sizes.width), "layers": layers, "norm": array(sizes.width)}


def _norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def _attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Attention of `[B, T, H, D]` over `[B, S, K, D]`; consecutive heads share keys and values."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def _mlp(layer: Any, x: Array) -> Array:
    return jax.nn.gelu(x @ layer["up"]) @ layer["down"]


def prefill(params: Any, tokens: Array) -> Array:
    """The logits of the last token of `tokens` `[B, T]`."""
    visible = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))

    def step(x: Array, layer: Any) -> tuple[Array, None]:
        normed = _norm(x, layer["norm"])
        q, k, v = (jnp.einsum("bte,ehd->bthd", normed, layer[name]) for name in ("wq", "wk", "wv"))
        x = x + jnp.einsum("bthd,hde->bte", _attend(q, k, v, visible), layer["wo"])
        return x + _mlp(layer, _norm(x, layer["norm"])), None

    x, _ = lax.scan(step, params["words"][tokens], params["layers"])
    return _norm(x[:, -1], params["norm"]) @ params["words"].T


def decode(params: Any, cache: Any, tokens: Array, position: Array) -> tuple[Array, Any]:
    """The logits after `tokens` `[B]` at a position, and the cache with them in it."""
    visible = jnp.arange(cache["k"].shape[2]) <= position

    def step(x: Array, scanned: Any) -> tuple[Array, Any]:
        layer, k, v = scanned
        normed = _norm(x, layer["norm"])[:, None]
        q, key, value = (jnp.einsum("bte,ehd->bthd", normed, layer[name]) for name in ("wq", "wk", "wv"))
        k = lax.dynamic_update_slice_in_dim(k, key, position, 1)
        v = lax.dynamic_update_slice_in_dim(v, value, position, 1)
        x = x + jnp.einsum("bthd,hde->bte", _attend(q, k, v, visible), layer["wo"])[:, 0]
        return x + _mlp(layer, _norm(x, layer["norm"])), (k, v)

    x, (k, v) = lax.scan(step, params["words"][tokens], (params["layers"], cache["k"], cache["v"]))
    return _norm(x, params["norm"]) @ params["words"].T, {"k": k, "v": v}


def palm_of(heads: int, phase: str, batch: int) -> autoshard.Workload:
    """PaLM 540B with as many heads: bf16 weights, and a cache of 2048 tokens."""
    config = replace(palm.SIZES["540b"], padded_heads=heads)
    params = palm.abstract_params(config)
    if phase == "prefill":
        return autoshard.Workload(palm.prefill_step, (params, jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32)))
    rest = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return autoshard.Workload(
        palm.decode_step, (params, palm.abstract_cache(config, batch), *rest), donate_argnums=(1,)
    )


def workload(model: str, phase: str, batch: int) -> autoshard.Workload:
    """A model's function and abstract arguments."""
    if model == "palm-540b":
        return palm_of(palm.SIZES["540b"].heads, phase, batch)
    return workload_of(MODELS[model], phase, batch)


def workload_of(sizes: Sizes, phase: str, batch: int) -> autoshard.Workload:
    params = abstract(sizes)
    if phase == "prefill":
        return autoshard.Workload(prefill, (params, jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32)))
    entry = jax.ShapeDtypeStruct((sizes.layers, batch, TOKENS, sizes.kv_heads, sizes.head), jnp.bfloat16)
    rest = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return autoshard.Workload(decode, (params, {"k": entry, "v": entry}, *rest), donate_argnums=(1,))


# --- one case


def measure(case: str, audit: bool) -> dict[str, Any]:
    """The row of a case."""
    model, phase, batch, topology = CASES[case]
    work = workload(model, phase, batch)
    row: dict[str, Any] = {"row": case}
    for name, padding in (("reference", False), ("ours", True)):
        started = time.process_time()
        try:
            plan = _search(work, topology, case, padding)
        except autoshard.InfeasibleError as error:
            row |= {name: None, f"{name}_why": str(error).splitlines()[0]}
            continue
        row |= {f"{name}_search_seconds": round(time.process_time() - started, 1), f"{name}_gap": plan.proof.gap}
        row |= {name: plan.estimate.seconds, f"{name}_padding": [f"{p.size} to {p.padded}" for p in plan.padding]}
        if audit and (plan.topology.chip.kind != "gpu" or has_cuda()):
            row |= {f"{name}_{key}": value for key, value in _audited(plan, work, row).items()}
    if model == "palm-540b":
        by_hand, pins = palm_of(64, phase, batch), {"params['layers']['wq']": OVER_ALL}
        row["by_hand"] = _search(by_hand, topology, case, False).estimate.seconds
        row["pinned"] = _search(work, topology, case, True, pins).estimate.seconds
        row["by_hand_pinned"] = _search(by_hand, topology, case, False, pins).estimate.seconds
    return row


def floor(case: str) -> float | None:
    """The planned step of the model with its heads and words rounded down to what the mesh divides; None if none is left."""
    model, phase, batch, topology = CASES[case]
    axes = list(parse_topology(topology).axis_sizes.values())
    counts = sorted(math.prod(chosen) for n in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, n))
    sizes = MODELS[model]
    fitting = [count for count in counts if count <= sizes.heads]
    if not fitting:
        return None
    heads = sizes.heads // fitting[-1] * fitting[-1]
    kv_heads = heads if sizes.kv_heads == sizes.heads else sizes.kv_heads
    words = sizes.words // math.prod(axes) * math.prod(axes)
    smaller = replace(sizes, heads=heads, kv_heads=kv_heads, words=words)
    return _search(workload_of(smaller, phase, batch), topology, case, False).estimate.seconds


def _search(
    work: autoshard.Workload, topology: str, name: str, padding: bool, pins: Mapping[str, P] | None = None
) -> autoshard.Plan:
    return autoshard.search(
        work.fn,
        *work.args,
        topology=topology,
        donate_argnums=work.donate_argnums,
        name=name,
        padding=padding,
        pins=pins,
        time_limit=SEARCH_SECONDS,
    )


def _audited(plan: autoshard.Plan, work: autoshard.Workload, row: Mapping[str, Any]) -> dict[str, Any]:
    """The compiled program and its replay; a plan without padding is compiled once, as the reference."""
    keys = ("replayed", "peak_ratio", "as_planned", "differences")
    if not plan.padding and "reference_replayed" in row:
        return {key: row[f"reference_{key}"] for key in keys}
    try:
        found = autoshard.audit(plan, work.fn, *work.args, target=COMPILERS[plan.topology.chip.kind])
    except AuditError as error:
        return {"refused": str(error).splitlines()[0]}
    replayed = found.replay and found.replay.seconds
    peak = found.peak_bytes and found.peak_bytes / found.planned_peak_bytes
    return dict(zip(keys, (replayed, peak, found.ok, [each.text for each in found.differences]), strict=True))


def _mean(rows: list[dict[str, Any]], ours: str, reference: str) -> float:
    ratios = [row[ours] / row[reference] for row in rows if row.get(ours) and row.get(reference)]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="CASE")
    parser.add_argument("--audit", action="store_true", help="compile, and replay programs for TPUs")
    parser.add_argument("--floors", action="store_true", help="only add the floors of rows with padding on TPUs")
    parser.add_argument("--resume", action="store_true", help="run only cases without a result")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", _HOSTS)
    rows = {row["row"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    if options.floors:
        _add_floors(rows)
    for case in CASES if not options.floors else ():
        if any(part in case for part in options.only) and not (options.resume and case in rows):
            row = rows[case] = measure(case, options.audit)
            step = [f"{row[name] * 1e3:8.2f} ms" if row[name] else "    no plan" for name in ("reference", "ours")]
            print(f"{case:44s} {step[0]} {step[1]}  {', '.join(row.get('ours_padding', []))}", flush=True)
            kept = [rows[name] for name in CASES if name in rows]
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    done = [row for row in rows.values() if row["row"] in CASES]
    print(f"planned: {_mean(done, 'ours', 'reference'):.3f} of the best plan without padding, {len(done)} rows")
    print(f"replayed: {_mean(done, 'ours_replayed', 'reference_replayed'):.3f}")
    for name in ("reference", "ours"):
        compiled = [row[f"{name}_as_planned"] for row in done if f"{name}_as_planned" in row]
        print(f"{name}: {sum(compiled)} of {len(compiled)} compiled plans are as planned")
    padded = [row for row in done if row.get("ours_padding") and row.get("floor")]
    for name, key in (("planned", "ours"), ("floor", "floor")):
        print(f"{name}, of the {len(padded)} rows padded on TPUs: {_mean(padded, key, 'reference'):.3f}")
    print(f"replayed, of these: {_mean(padded, 'ours_replayed', 'reference_replayed'):.3f}")


def _add_floors(rows: dict[str, dict[str, Any]]) -> None:
    for case, row in rows.items():
        if row.get("ours_padding") and row.get("reference") and parse_topology(CASES[case][3]).chip.kind == "tpu":
            row["floor"] = floor(case)
            print(
                f"{case:44s} planned {row['ours'] / row['reference']:.3f}, floor {row['floor'] / row['reference']:.3f}"
            )
    RESULTS.write_text(json.dumps([rows[name] for name in CASES if name in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
