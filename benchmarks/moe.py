"""Mixtures of experts: the best plan against the rules of public JAX code.

    python benchmarks/moe.py [--only CASE ...] [--contestants NAME ...] [--no-tpu] [--no-plan] [--resume]

A row is a decoder of published sizes with `lax.ragged_dot`, a phase and a slice. `reference` is the planned step with the
experts' matrices as in public code that gathers tokens, computes local experts and reduces (MaxText's ring of experts; EP of
jax-llm-examples): experts over as many mesh axes as divide them, hidden columns over the rest. All else is searched.
`columns` is the step with hidden columns over all axes (tpu-inference's default). `rules` has every weight and every cache
as the `ShardingRules` of jax-llm-examples (Qwen3, DeepSeek R1) lay them out on their mesh of `4 × n` chips, and only
activations are searched. `ours` is the step of the free search. Each is proven on its own. Only `ours` may send rows to
experts (`capacity=0` for the others), as that code does not. The searches
are of all layers. `*_replayed` are two layers of the published widths, compiled for the TPU slice and replayed. `*_ok` says
whether their audit found them as planned, and `*_differences` what differs. Nothing is compiled for GPUs. A model whose
arguments alone exceed a slice's memory has a row that says so. Searches are limited by `SEARCH_SECONDS` of wall time;
`*_processor_seconds` is what they took of a processor. What does not run again keeps its last result: rows, contestants, plans
with `--no-plan`, and what was compiled with `--no-tpu`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.errors import AutoshardError
from costmodels.machine.topology import parse_topology
from costmodels.program.grouped import CHAIN
from examples import gpt_oss, llama, mixtral, mla

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "moe.json"
SEARCH_SECONDS = 300.0
COMPILED_LAYERS = 2
MODELS: Mapping[str, mixtral.Config] = {
    "mixtral-8x7b": mixtral.SIZES["8x7b"],
    # Qwen/Qwen3-30B-A3B, config.json; without the norms of queries and keys
    "qwen3-30b-a3b": mixtral.Config(48, 2048, 768, 32, 4, 128, 151_936, experts=128, chosen=8),
    "gpt-oss-20b": gpt_oss.SIZES["20b"],
}
LATENT: Mapping[str, str] = {"deepseek-v3": "v3"}
"""Models with latent attention and a shared expert, by their size in `examples/mla.py`."""
PHASES = {"decode": (64, 2048), "prefill": (8, 1024)}
"""Sequences and their tokens: in the cache, or of the prompt."""
CONTESTANTS = ("reference", "rules", "ours", "columns")
_COMPILED = ("few", "ok", "differences", "replayed", "flops_ratio", "peak_ratio")
"""The beginnings of a contestant's entries of compiled layers."""
CASES = {
    f"{model}-{phase}-{topology}": (model, phase, topology)
    for topology in ("v5e:4x4", "v5p:4x4x4", "h100:4x8")
    for phase in PHASES
    for model in (*MODELS, *LATENT)
}


def workload(model: str, phase: str, layers: int | None = None) -> autoshard.Workload:
    """A model's function and abstract arguments."""
    batch, length = PHASES[phase]
    if model in LATENT:
        make = mla.decode if phase == "decode" else mla.prefill
        return make(LATENT[model], batch, length, layers, experts="ragged")
    if model == "gpt-oss-20b":
        make = gpt_oss.decode if phase == "decode" else gpt_oss.prefill
        return make("20b", batch, length, layers)
    config = MODELS[model] if layers is None else replace(MODELS[model], layers=layers)
    params, chosen = mixtral.abstract_params(config), config.chosen
    if phase == "prefill":
        step = partial(mixtral.prefill_step, chosen=chosen, feed_forward=mixtral.ragged_experts)
        return autoshard.Workload(step, (params, jax.ShapeDtypeStruct((batch, length), jnp.int32)))
    step = partial(mixtral.decode_step, chosen=chosen, feed_forward=mixtral.ragged_experts)
    cache = llama.abstract_cache(config, batch, length, unrolled=True)
    rest = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return autoshard.Workload(step, (params, cache, *rest), donate_argnums=(1,))


def _dividing(experts: int, sizes: Mapping[str, int], among: Sequence[str]) -> tuple[str, ...]:
    """The axes, of those given and in their order, whose product divides the number of experts."""
    split: list[str] = []
    for axis in among:
        if experts % (math.prod(sizes[each] for each in split) * sizes[axis]) == 0:
            split.append(axis)
    return tuple(split)


def pins(experts: int, topology: str, by_experts: bool) -> dict[str, P]:
    """The layouts of the experts' matrices by the public rules."""
    sizes = parse_topology(topology).axis_sizes
    split = _dividing(experts, sizes, [*sizes]) if by_experts else ()
    first, rest = split or None, tuple(axis for axis in sizes if axis not in split) or None
    in_columns, in_rows = P(first, None, rest), P(first, rest, None)
    return {"params.layers.*.w_gate": in_columns, "params.layers.*.w_up": in_columns, "params.layers.*.w_down": in_rows}


def public_rules(work: autoshard.Workload, experts: int, topology: str) -> dict[str, P]:
    """The layouts of all weights and caches by the `ShardingRules` of jax-llm-examples.

    Its mesh has axes of 1, 4 and n chips (`qwen3/main.py`): heads and hidden columns are split over the second, experts over
    the third, the vocabulary of the head over both. Of a topology, the first axis is the second, and the others are the third.
    Axes that do not divide the experts split hidden columns. Heads of latent attention are split over all axes
    (`deepseek_r1_jax/model.py`). Embeddings, routers, norms and latent caches are replicated.
    """
    sizes = parse_topology(topology).axis_sizes
    every = tuple(sizes)
    params, *rest = work.args
    layer = params["layers"][0]
    over = _dividing(experts, sizes, every[1:]) or None
    columns = tuple(axis for axis in every if axis not in (over or ()))
    heads = every if "w_latent" in layer else every[0]
    by_heads = ("wq", "wk", "wv", "wq_rotated")
    found = {name: P(None, heads, None) for name in by_heads} | {"wo": P(heads, None, None)}
    found |= {name: P(heads, None) for name in ("bq", "bk", "bv")} | {"sinks": P(heads)}
    found |= {name: P(over, None, columns) for name in ("w_gate", "w_up")} | {"w_down": P(over, columns, None)}
    found |= {name: P(over, columns) for name in ("b_gate", "b_up")} | {"b_down": P(over, None)}
    found |= {name: P(None, every[0]) for name in ("shared_gate", "shared_up")} | {"shared_down": P(every[0], None)}
    found |= {"head": P(None, every), "k": P(None, None, heads, None), "v": P(None, None, heads, None)}
    paths = {f"params.layers.*.{name}": name for name in layer}
    paths |= {f"params.{name}": name for name in params if name != "layers"}
    paths |= {f"cache.*.{name}": name for name in rest[0][0]} if len(rest) > 1 else {}
    return {path: found.get(name, P()) for path, name in paths.items()}


def _experts(model: str) -> int:
    return mla.config_of(LATENT[model]).experts if model in LATENT else MODELS[model].experts


def plan_case(case: str, contestant: str, layers: int | None = None) -> tuple[autoshard.Plan, autoshard.Workload]:
    """The plan of a case, with the layouts of its contestant pinned; those of "ours" are free."""
    model, phase, topology = CASES[case]
    work = workload(model, phase, layers)
    fixed = None
    if contestant == "rules":
        fixed = public_rules(work, _experts(model), topology)
    elif contestant != "ours":
        fixed = pins(_experts(model), topology, contestant == "reference")
    plan = autoshard.search(
        work.fn,
        *work.args,
        topology=topology,
        donate_argnums=work.donate_argnums,
        name=case,
        pins=fixed,
        time_limit=SEARCH_SECONDS,
        capacity=None if contestant == "ours" else 0,
    )
    return plan, work


def refusal(case: str) -> str:
    """Why a case has no plan: its arguments alone exceed the slice's memory. "" if they do not."""
    model, phase, topology = CASES[case]
    slice_ = parse_topology(topology)
    given = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(workload(model, phase).args))
    if given <= slice_.size * slice_.chip.usable_hbm_bytes:
        return ""
    return f"the arguments have {given / 2**30:.0f} GiB, more than {topology} has"


def measure(
    case: str, contestants: Sequence[str] = CONTESTANTS, planned: bool = True, compiled: bool = True
) -> dict[str, Any]:
    """Plans a case, and compiles and replays a few layers of it."""
    if why := refusal(case):
        return {"why": why}
    row: dict[str, Any] = {}
    for name in contestants:
        row |= _planned(case, name) if planned else {}
        row |= _compiled(case, name) if compiled and row.get(name, True) else {}
    return row


def _planned(case: str, name: str) -> dict[str, Any]:
    """All layers, searched."""
    started, processor = time.monotonic(), time.process_time()
    try:
        plan, _ = plan_case(case, name)
    except AutoshardError as error:
        return {name: None, f"{name}_why": str(error).splitlines()[0]}
    return {
        name: plan.estimate.seconds,
        f"{name}_gap": plan.proof.gap,
        f"{name}_status": plan.proof.status,
        f"{name}_search_seconds": round(time.monotonic() - started, 1),
        f"{name}_processor_seconds": round(time.process_time() - processor, 1),
        f"{name}_parallelism": str(plan.parallelism()),
        f"{name}_chains": sum(each.primitive == CHAIN for each in plan.operations),
        f"{name}_sends_rows": any(text.startswith("rows are sent") for text in plan.warnings),
    }


def _compiled(case: str, name: str) -> dict[str, Any]:
    """A few layers, compiled for TPUs and replayed; nothing for GPUs."""
    if CASES[case][2].startswith("h100"):
        return {}
    plan, work = plan_case(case, name, COMPILED_LAYERS)
    row: dict[str, Any] = {f"{name}_few_layers": COMPILED_LAYERS, f"{name}_few_planned": plan.estimate.seconds}
    try:
        found = autoshard.audit(plan, work.fn, *work.args, target="tpu")
    except AutoshardError as error:
        return row | {f"{name}_replayed": None, f"{name}_replayed_why": str(error).splitlines()[0]}
    return row | {
        f"{name}_few_sends_rows": any(text.startswith("rows are sent") for text in plan.warnings),
        f"{name}_ok": found.ok,
        f"{name}_differences": [f"{each.kind}: {each.text}" for each in found.differences],
        f"{name}_replayed": found.replay and found.replay.seconds,
        f"{name}_flops_ratio": found.flops and found.flops / found.planned_flops,
        f"{name}_peak_ratio": found.peak_bytes and found.peak_bytes / found.planned_peak_bytes,
    }


def _mean(rows: list[dict[str, Any]], ours: str, reference: str) -> float:
    ratios = [row[ours] / row[reference] for row in rows if row.get(ours) and row.get(reference)]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def _milliseconds(value: float | None) -> str:
    return f"{value * 1e3:10.3f}" if value else "         -"


def _runs_again(key: str, options: argparse.Namespace) -> bool:
    """Whether a run finds a row's entry again; not what it does not plan or compile."""
    if key == "why":
        return True
    name, _, rest = key.partition("_")
    of_compiled = rest.startswith(_COMPILED)
    return name in options.contestants and not (options.no_tpu if of_compiled else options.no_plan)


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="CASE")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--no-tpu", action="store_true", help="plan only; compile nothing")
    parser.add_argument("--no-plan", action="store_true", help="compile only; keep the last plans of all layers")
    parser.add_argument("--resume", action="store_true", help="run only cases without a result")
    options = parser.parse_args()
    rows = {row["row"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    columns = [f"{name}{kind}" for kind in ("", "_replayed") for name in CONTESTANTS]
    print(f"{'milliseconds':34s}" + "".join(f"{name.replace('_', ' ')[-10:]:>11s}" for name in columns))
    planned, compiled = not options.no_plan, not options.no_tpu
    for case in CASES:
        if any(part in case for part in options.only) and not (options.resume and case in rows):
            kept = {key: value for key, value in rows.get(case, {}).items() if not _runs_again(key, options)}
            row: dict[str, Any] = {"row": case} | kept | measure(case, options.contestants, planned, compiled)
            rows[case] = row
            print(f"{case:34s}" + "".join(f" {_milliseconds(row.get(name))}" for name in columns), flush=True)
            RESULTS.write_text(json.dumps([rows[name] for name in CASES if name in rows], indent=1) + "\n")
    done = [row for row in rows.values() if row["row"] in CASES]
    for against in (name for name in CONTESTANTS if name != "ours"):
        of_plans, of_replays = _mean(done, "ours", against), _mean(done, "ours_replayed", f"{against}_replayed")
        print(f"ours over {against}: planned {of_plans:.3f}, replayed {of_replays:.3f} (geometric means)")


if __name__ == "__main__":
    main()
