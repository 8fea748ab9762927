"""Public bug reports and requests about sharding in JAX, rebuilt: what was found, what was asked, what is planned now.

The first rows are faults of earlier plans. `reference` is what was planned or compiled then, `asked` what should be. The
further rows are reports on other systems: what their authors asked for must hold in our plan, and on eight host devices the
plan must compute what the unsharded function does. Prints a table and writes `benchmarks/results/reports.json`.

    python benchmarks/reports.py [--only NAME] [--no-tpu]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import autoshard
from benchmarks import reports_programs as programs
from benchmarks.reports_programs import Case, filled, is_close

RESULTS = Path(__file__).parent / "results" / "reports.json"
GIB, MIB = 2**30, 2**20
REDUCTIONS = ("all-reduce", "reduce-scatter")
WITHIN = 1.05
"""The most that a compiled peak may exceed the planned one."""

Plan = autoshard.Plan
Answer = tuple[str, bool]
"""The text of the present plan, and whether it is as asked."""


@dataclass(frozen=True)
class Fault:
    """A fault of earlier plans: its public sources, the earlier figures, what was asked, and its measurement."""

    name: str
    sources: str
    before: str
    asked: str
    measure: Callable[[bool], Answer | None]


@dataclass(frozen=True)
class Report:
    """A report on another system: its source, what its author asked, and the check of our plan.

    `before` is our plan before the mends of this table, where it was another.
    """

    name: str
    source: str
    asked: str
    build: Callable[[bool], Case]
    check: Callable[[Plan], Answer]
    topology: str = "v5e:4x4"
    hosts: str = "cpu:2x4"
    before: str = ""
    options: Mapping[str, Any] | None = None


def plan_of(case: Case, topology: str, **options: Any) -> Plan:
    """The plan of a case."""
    return autoshard.search(case.fn, *case.args, topology=topology, **{**case.options, **options})


def reductions(plan: Plan) -> float:
    """The number of reductions in one step."""
    return sum(each.count for each in plan.estimate.collectives if each.kind in REDUCTIONS)


def largest(plan: Plan, kind: str) -> float:
    """The MiB of the largest collective of a kind."""
    return max((each.bytes / MIB for each in plan.estimate.collectives if each.kind == kind), default=0.0)


# --- Faults of earlier plans


def dropout(tpu: bool) -> Answer:
    without, with_it = (plan_of(programs.dropout_training(rate), "v5e:4x4").estimate for rate in (0.0, 0.1))
    small = programs.dropout_training(0.1, layers=2, batch=8, width=16)
    equal = is_equal_on_hosts(small, "cpu:2x4")
    text = (
        f"{with_it.seconds * 1e3:.0f} ms (without dropout {without.seconds * 1e3:.0f}), {with_it.peak_bytes / GIB:.1f} GiB;"
        f" {'equal' if equal else 'NOT EQUAL'} on 8 hosts"
    )
    return text, equal and with_it.seconds < 1.5 * without.seconds and with_it.peak_bytes < 1.2 * without.peak_bytes


def scaled(tpu: bool) -> Answer:
    plan = plan_of(programs.scaled_weights(), "v5e:4x4", baselines=True)
    found = {each.name: each.seconds * 1e6 for each in plan.baselines}
    text = (
        f"{plan.parallelism()}; {plan.estimate.seconds * 1e6:.1f} us, Megatron 1D {found['Megatron 1D']:.1f} us,"
        f" data parallel {found['data parallel']:.0f} us"
    )
    right = plan.parallelism().names == ("tensor parallel",)
    return text, right and found["Megatron 1D"] <= 1.001 * plan.estimate.seconds * 1e6 < found["data parallel"] / 3


def accumulated(tpu: bool) -> Answer:
    plans = {form: plan_of(programs.accumulation(form), "v5e:2x4") for form in ("scan", "sum")}
    text = "; ".join(
        f"{form}: {reductions(plan):.0f} collectives, {plan.estimate.seconds * 1e3:.1f} ms"
        for form, plan in plans.items()
    )
    small = programs.accumulation("scan", rounds=4, batch=16, width=8)
    equal = is_equal_on_hosts(small, "cpu:2x4")
    once = all(each.count == 1 for plan in plans.values() for each in plan.estimate.collectives)
    return f"{text}; {'equal' if equal else 'NOT EQUAL'} on 8 hosts", once and equal


def compiled_peak(case: Case, topology: str) -> Answer:
    plan = plan_of(case, topology)
    audit = autoshard.audit(plan, case.fn, *case.args, target="tpu")
    compiled = audit.peak_bytes or 0.0
    part = compiled / plan.estimate.peak_bytes
    text = f"planned {plan.estimate.peak_bytes / GIB:.3f} GiB, compiled {compiled / GIB:.3f}: {part:.3f}"
    return text, part <= WITHIN


FAULTS = (
    Fault(
        "dropout draws every chip's masks",
        "jax-ml/jax#15895, young-geng/scalax#6",
        "299 ms (without dropout 118), 3.4 GiB",
        "about the step without dropout; each chip draws its own numbers",
        dropout,
    ),
    Fault(
        "scaled weights are activations",
        "vllm-project/tpu-inference#2781, xai-org/grok-1#265, ml-explore/mlx-lm#1734",
        "sequence parallel; data parallel 45.8 us, Megatron 1D 84.3 us",
        "tensor parallel; Megatron 1D is the plan, data parallel several times slower",
        scaled,
    ),
    Fault(
        "gradients are reduced in every microbatch",
        "alpa-projects/alpa#214, alpa-projects/alpa#78, openxla/xla#49143, marin-community/levanter#342",
        "8 reduce-scatters (10.5 ms), 22.1 ms; without zeros 14.0 ms",
        "each collective once per step",
        accumulated,
    ),
    Fault(
        "a scanned cache stands twice",
        "jax-ml/jax#21367, apple/axlearn#1208, vllm-project/vllm-ascend#8050, nod-ai/amd-shark-ai#1404",
        "planned 1.13 GiB, compiled 2.13: 1.89",
        "compiled within 5 % of the plan",
        lambda tpu: compiled_peak(programs.scanned_cache(), "v5e:1x8") if tpu else None,
    ),
    Fault(
        "stacked results are counted after their loop",
        "openxla/xla#17541, NVIDIA/jaxpp#13, apple/axlearn#993, jax-ml/jax#35915",
        "planned 0.906 GiB, compiled 1.125: 1.24",
        "compiled within 5 % of the plan",
        lambda tpu: compiled_peak(programs.stacked_results(), "v5e:1x1") if tpu else None,
    ),
)


# --- Reports on other systems


def peak_below(mebibytes: float) -> Callable[[Plan], Answer]:
    """A check that a chip holds no more than its shards."""

    def check(plan: Plan) -> Answer:
        peak = plan.estimate.peak_bytes / MIB
        return f"{plan.estimate.seconds * 1e3:.3g} ms, peak {peak:.0f} MiB", peak <= mebibytes

    return check


def gathers_below(mebibytes: float) -> Callable[[Plan], Answer]:
    """A check that nothing larger is all-gathered."""

    def check(plan: Plan) -> Answer:
        most = largest(plan, "all-gather")
        return f"{plan.estimate.seconds * 1e6:.0f} us, largest all-gather {most:.3g} MiB", most <= mebibytes

    return check


def is_named(*words: str) -> Callable[[Plan], Answer]:
    """A check of the names of a plan's parallelism."""

    def check(plan: Plan) -> Answer:
        text = str(plan.parallelism())
        return text, all(word in text for word in words)

    return check


def gathers_each_layer(plan: Plan) -> Answer:
    """Each layer's weight is gathered forward and backward, and never all at once."""
    runs = sum(each.count for each in plan.estimate.collectives if each.kind == "all-gather")
    peak = plan.estimate.peak_bytes / MIB
    return f"{runs:.0f} all-gathers of at most {largest(plan, 'all-gather'):.0f} MiB, peak {peak:.0f} MiB", runs >= 32


def reduces_once(plan: Plan) -> Answer:
    """The gradient that a scan adds up is reduced once."""
    large = [each for each in plan.estimate.collectives if each.kind in REDUCTIONS and each.bytes > MIB]
    runs, estimate = sum(each.count for each in large), plan.estimate
    text = f"{runs:.0f} reduction of a gradient, {estimate.seconds * 1e3:.1f} ms, {estimate.peak_bytes / MIB:.0f} MiB"
    return text, runs == 1


def keeps_heads(plan: Plan) -> Answer:
    """Attention is split by heads, and nothing is gathered between it and the output's weight."""
    scores = [op.strategy for op in plan.operations if op.matmul and "head-sharded" in op.strategy]
    whole = [each for each in plan.estimate.collectives if each.kind == "all-gather" and "reshape" in each.where]
    return f"{scores[0] if scores else 'no heads'}; {len(whole)} all-gathers at the reshape", bool(scores) and not whole


def needs_no_collective_inside(plan: Plan) -> Answer:
    """Orthogonalisations are split by layers: the matmuls need no collectives."""
    inside = sum(op.collective_seconds for op in plan.operations if op.matmul)
    split = all("batch" in op.strategy and "over xy" in op.strategy for op in plan.operations if op.matmul)
    return f"matmuls {'by layers' if split else 'not by layers'}, {inside * 1e3:.3g} ms of collectives inside", split


REPORTS = (
    Report(
        "random initialisation of a sharded weight",
        "jax-ml/jax#19893, google/flax#3701",
        "each chip draws its shard of the 32 GiB (2 GiB)",
        programs.random_weights,
        peak_below(2100),
        before="did not fit: 32 GiB per chip",
    ),
    Report(
        "initialisation by vmap over keys of layers",
        "marin-community/levanter#475",
        "each chip draws its shard of the 7 GiB (448 MiB)",
        programs.random_layers,
        peak_below(500),
        before="21.8 ms, peak 7616 MiB",
    ),
    Report(
        "optimizer state split, parameters whole",
        "google/flax#5172",
        "ZeRO-1 or ZeRO-2, by pins alone",
        programs.optimizer_state,
        is_named("data parallel with sharded optimizer state"),
    ),
    Report(
        "a reshard that GSPMD makes by full rematerialisation",
        "jax-ml/jax#21562",
        "no all-gather",
        programs.exchanged_layout,
        gathers_below(0),
    ),
    Report(
        "top-k sampling from logits split by vocabulary",
        "vllm-project/tpu-inference#3511",
        "candidates alone are gathered, not 37 MiB of logits",
        programs.sampling,
        gathers_below(0.5),
    ),
    Report(
        "log-probabilities from logits split by vocabulary",
        "tenstorrent/tt-xla#5137",
        "no gather of 16 MiB of logits",
        programs.log_probabilities,
        gathers_below(0.5),
    ),
    Report(
        "gathers of fully sharded weights, rematerialised",
        "jax-ml/jax#25010",
        "each layer's weight is gathered again in the backward pass, where memory is short",
        programs.gathered_weights,
        gathers_each_layer,
        options={"memory_bytes": 500 * MIB},
    ),
    Report(
        "sequence parallelism over six GPUs",
        "haoliuhl/ringattention#9",
        "a number of chips that is no power of two splits the sequence",
        programs.attention,
        is_named("sequence parallel", "6 ways"),
        topology="a100:6",
        hosts="cpu:6",
    ),
    Report(
        "heads split through a reshape",
        "fattorib/ZeRO-transformer#4",
        "heads stay split through reshape(B, T, C)",
        lambda small: programs.attention(small, length=8192),
        keeps_heads,
        options={"pins": {"params.q": jax.P(None, ("x", "y")), "x": jax.P()}},
    ),
    Report(
        "a loss over tiles of tokens",
        "AI-Hypercomputer/maxtext#2242",
        "gradients of all tiles are reduced once",
        programs.tiled_vocabulary,
        reduces_once,
        before="55.0 ms, 1457 MiB; the weight gathered once, all-reduces in each tile",
    ),
    Report(
        "Muon on a stack of layers",
        "goodfire-ai/spd#978, google-deepmind/optax#1660",
        "Newton-Schulz by layers, without collectives inside",
        programs.orthogonalised,
        needs_no_collective_inside,
    ),
    Report(
        "statistics of batch normalisation",
        "google/flax#2417",
        "means of the whole batch: two small all-reduces",
        programs.batch_norm,
        lambda plan: (f"{reductions(plan):.0f} reductions of {largest(plan, 'all-reduce') * 1024:.2g} KiB",
                      reductions(plan) == 2),
    ),
    Report(
        "LoRA with tensor parallelism",
        "meta-pytorch/opacus#789",
        "`W + s A B` is a weight: tensor parallel",
        programs.adapted,
        lambda plan: (str(plan.parallelism()), plan.parallelism().names == ("tensor parallel",)),
        before="named data parallel",
    ),
)  # fmt: skip


def is_equal_on_hosts(case: Case, topology: str, **options: Any) -> bool:
    """Whether a plan over host devices computes what the unsharded function does."""
    plan = plan_of(case, topology, **options)
    args = jax.tree.map(filled, case.args)
    wanted = jax.jit(case.fn)(*args)
    found = plan.jit(case.fn)(*jax.tree.map(jnp.copy, args))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(is_close(np.asarray(a, np.float64), np.asarray(b, np.float64), b.dtype) for a, b in pairs)


def rows(only: str, tpu: bool) -> Iterator[dict[str, Any]]:
    """The rows of the table."""
    for fault in FAULTS:
        if only in fault.name:
            found = fault.measure(tpu)
            row = {"row": fault.name, "source": fault.sources, "reference": fault.before, "asked": fault.asked}
            if found is None:
                yield row | {"ours": None, "why": "the TPU compiler was not asked", "as_asked": False}
            else:
                yield row | {"ours": found[0], "as_asked": found[1]}
    for report in REPORTS:
        if only in report.name:
            options = dict(report.options or {})
            text, right = report.check(plan_of(report.build(False), report.topology, **options))
            options.pop("memory_bytes", None)
            equal = is_equal_on_hosts(report.build(True), report.hosts, **options)
            text = f"{text}; {'equal' if equal else 'NOT EQUAL'} on {report.hosts}"
            row = {"row": report.name, "source": report.source, "reference": report.before or None}
            yield row | {"asked": report.asked, "ours": text, "as_asked": right and equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-tpu", action="store_true", help="without the rows that need the TPU compiler")
    options = parser.parse_args()
    found = []
    for row in rows(options.only, not options.no_tpu):
        found.append(row)
        print(f"{'ok ' if row['as_asked'] else 'NO '} {row['row']} ({row['source']})", flush=True)
        for key in ("reference", "asked", "ours"):
            print(f"      {key:10s} {row[key] or '-'}", flush=True)
    if not options.only:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"{sum(row['as_asked'] for row in found)} of {len(found)} rows as asked.")


if __name__ == "__main__":
    main()
