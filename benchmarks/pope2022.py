"""The measurements of Pope et al. 2022 on TPU v4, and the machine that the cost model assumes for them.

Latencies: tables 2 and 3, and the points of figure 1 (left), read from the image to about 3 %; "Efficiently Scaling
Transformer Inference", arXiv 2211.05102. Chips are joined as in the code released with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.naming.strategy_names import strategy_name
from autoshard.naming.weights import weight_operand
from autoshard.tracing.blocks import Traced
from autoshard.tracing.trace import trace
from autoshard.workload import Workload
from costmodels.machine.chips import Chip, chip, chip_from_dict
from costmodels.machine.conventions import LOOPED, Overlap, Pricing
from costmodels.machine.topology import Topology, topology_of_chip
from examples import palm
from search.answer.assignment import Choice
from search.formulation.strategies import Strategy
from search.solve import Limits, Solution, search

MACHINE = Path(__file__).parent / "pope2022_machine.json"
MESHES = {8: (2, 2, 2), 16: (2, 4, 2), 32: (4, 2, 4), 64: (4, 4, 4), 128: (8, 4, 4)}
PROMPT, GENERATED = 2048, 64
PEAK_FLOPS = 275e12
PARAMETERS = {"8b": 8.63e9, "62b": 62.5e9, "540b": 540.35e9}
"""Chowdhery et al. 2022, table 1; without the padding of heads, as in the paper's MFU."""
MEMORY_BYTES = 32 * 2**30
"""All that a chip has: what a program may use of it was more with the paper's compiler than with today's."""
LOGITS_AT_ONCE = 4
"""Copies of the attention's logits that our prefill may hold beyond that; the paper's cuts long prefills into chunks."""


OVERLAP: Overlap = LOOPED
"""The paper's programs loop their einsums (§3.5)."""
SEARCH_SECONDS = 40.0
"""A limit for each search; only long prefills come near it. On a machine that is busy with other things they stop early."""


class Row(NamedTuple):
    """A measurement: `seconds` of a whole prefill, or of one decode step."""

    name: str
    size: str
    phase: str
    chips: int
    batch: int
    weights: str
    seconds: float
    feed_forward: str = "WS-2D"
    attention: str = "batch"
    fitted: bool = False


TABLES = (
    Row("table 2: 540B prefill, low latency", "540b", "prefill", 64, 1, "int8", 0.29, "WS-2D", "head"),
    Row("table 2: 540B decode, low latency", "540b", "decode", 64, 64, "int8", 1.82 / 64, "WS-2D", "batch", True),
    Row("table 2: 540B prefill, throughput", "540b", "prefill", 64, 512, "bf16", 85.2, "WG-XYZ", "batch", True),
    Row("table 2: 540B decode, throughput", "540b", "decode", 64, 512, "bf16", 6.0 / 64, "WS-2D", "batch"),
    Row("table 3: 62B prefill, low latency", "62b", "prefill", 16, 1, "int8", 0.16, "WS-2D", "head", True),
    Row("table 3: 62B decode, low latency", "62b", "decode", 16, 32, "int8", 0.73 / 64, "WS-2D", "batch"),
    Row("table 3: 62B prefill, throughput", "62b", "prefill", 32, 512, "bf16", 20.2, "WG-XYZ", "batch"),
    Row("table 3: 62B decode, throughput", "62b", "decode", 8, 512, "bf16", 5.1 / 64, "WS-2D", "batch", True),
)

# Where a point of figure 1 is a row of a table, or is drawn where its own numbers do not put it (540B on 32 chips), it
# is left out. The batches of the int8 points follow from their cost, chips * latency / batch.
FIGURE = (
    Row("figure 1: 540B", "540b", "decode", 64, 64, "bf16", 36.9e-3, fitted=True),
    Row("figure 1: 540B", "540b", "decode", 64, 128, "bf16", 44.5e-3),
    Row("figure 1: 540B", "540b", "decode", 64, 256, "bf16", 57e-3, fitted=True),
    Row("figure 1: 540B", "540b", "decode", 64, 1024, "bf16", 183e-3),
    Row("figure 1: 540B", "540b", "decode", 128, 64, "bf16", 33e-3),
    Row("figure 1: 540B", "540b", "decode", 64, 128, "int8", 36e-3),
    Row("figure 1: 540B", "540b", "decode", 64, 256, "int8", 55e-3),
    Row("figure 1: 540B", "540b", "decode", 64, 512, "int8", 94e-3, fitted=True),
    Row("figure 1: 62B", "62b", "decode", 32, 32, "bf16", 11.6e-3),
    Row("figure 1: 62B", "62b", "decode", 16, 64, "bf16", 16.3e-3, fitted=True),
    Row("figure 1: 62B", "62b", "decode", 8, 1024, "bf16", 148e-3),
    Row("figure 1: 8B", "8b", "decode", 16, 32, "bf16", 4.3e-3, fitted=True),
    Row("figure 1: 8B", "8b", "decode", 8, 64, "bf16", 5.8e-3),
    Row("figure 1: 8B", "8b", "decode", 8, 1024, "bf16", 36.7e-3, fitted=True),
)


def machine() -> Chip:
    """A TPU v4 with the efficiencies and overheads that `fit_published.py` found, in a file beside this one."""
    return chip_from_dict(json.loads(MACHINE.read_text())) if MACHINE.exists() else chip("v4")


def topology(row: Row, on: Chip, overlap: Overlap = OVERLAP) -> Topology:
    """The row's chips under the paper's convention of bandwidth."""
    sizes, logits = MESHES[row.chips], 0.0
    if row.phase == "prefill":
        logits = 4.0 * row.batch * palm.SIZES[row.size].padded_heads * PROMPT**2 / row.chips
    memory = {"usable_hbm_bytes": MEMORY_BYTES + LOGITS_AT_ONCE * logits}
    found = topology_of_chip(f"v4:{'x'.join(map(str, sizes))}", on.override(memory, "benchmarks/pope2022.py"), sizes)
    return replace(found, pricing=Pricing("total", overlap))


def workload(row: Row) -> Workload:
    """A prefill of 2048 tokens, or a decode step half way through 64 generated ones."""
    if row.phase == "prefill":
        return palm.prefill(row.size, batch=row.batch, length=PROMPT, weights=row.weights)
    return palm.decode(row.size, batch=row.batch, context=PROMPT + GENERATED // 2, weights=row.weights)


@cache
def traced(row: Row) -> Traced:
    """The row's program."""
    work = workload(row)
    return annotate_traffic(trace(work.fn, *work.args, donate_argnums=work.donate_argnums))


Allow = Callable[[int, Strategy], bool]


def solved(
    row: Row, on: Chip, allow: Allow | None = None, overlap: Overlap = OVERLAP, start: Choice | None = None
) -> Solution:
    """The row's fastest plan; proven, unless `SEARCH_SECONDS` do not suffice. `start` is one that it must be no slower than."""
    limits = Limits(wall_seconds=SEARCH_SECONDS, reserve_bytes=0.0)
    return search(traced(row).program, topology(row, on, overlap), limits, allow=allow, start=start)


def mfu(row: Row, seconds: float) -> float:
    """FLOP/s of the parameters alone over the peak, as in the paper."""
    tokens = row.batch * (PROMPT if row.phase == "prefill" else 1)
    return 2 * PARAMETERS[row.size] * tokens / (seconds * row.chips * PEAK_FLOPS)


# --- Layouts by the paper's names


@dataclass(frozen=True)
class Families:
    """The layout of a plan, by the names of `autoshard.naming`."""

    feed_forward: str
    attention: str


def families(solution: Solution) -> Families:
    """The layout of the feed-forward network's first matmul, and of the attention's."""
    program, where = solution.problem.program, solution.problem.topology
    names = [(op, strategy_name(program, where, solution.choice, i)) for i, op in program.matmuls()]
    first = next(name for op, name in names if "wi_gate" in op.name)
    attention = next(name for op, name in names if "params" not in op.name)
    return Families(first, attention)


def same_feed_forward(asked: str, found: str) -> bool:
    """Whether a strategy by its full name is of the paper's family."""
    return found.startswith(f"{asked}:") or found == asked


def same_attention(asked: str, found: str) -> bool:
    """Whether attention is split by what the paper splits it by, and no less than by anything else."""
    return found.startswith(f"{asked}-sharded")


FEED_FORWARD = ("'wi_gate'", "'wi_up'", "'wo_ffn'")
PROJECTIONS = ("'wq'", "'wo'")
"""Of queries and of attention's result: in the code released with the paper one product with those of the feed-forward network,
and in one layout with them where the block is serial."""


def as_in_the_paper(row: Row, projections: bool = True) -> Allow:
    """Allows of the block only what the paper's layout does with it; all else stays free.

    **Arguments:**

    - `projections`: whether attention's projections are laid out as the feed-forward network is, or free.
    """
    program, config = traced(row).program, palm.SIZES[row.size]
    every = sum(size > 1 for size in MESHES[row.chips])

    def feed_forward(i: int, strategy: Strategy) -> bool:
        op = program.operations[i]
        own = {factor for dim in op.inputs[weight_operand(program, i) or 0].dims for factor in dim}
        split = {"contracted": 0, "output": 0, "tokens": 0}
        for f, used in enumerate(strategy.splits):
            role = "tokens" if f not in own else "contracted" if op.factors[f].kind == "sum" else "output"
            split[role] += len(used)
        if row.feed_forward == "WG-XYZ":
            return split["tokens"] == every
        return split["contracted"] > 0 and split["output"] > 0 and split["tokens"] == 0

    def attention(i: int, strategy: Strategy) -> bool:
        op = program.operations[i]
        left, right = ({factor for dim in use.dims for factor in dim} for use in op.inputs)
        for f, used in enumerate(strategy.splits):
            batch = f in left & right and op.factors[f].kind != "sum"
            head = not batch and op.factors[f].size == config.padded_heads
            if used and not (batch or (head and row.attention == "head")):
                return False
        return True

    def allow(i: int, strategy: Strategy) -> bool:
        op = program.operations[i]
        if op.op_class != "matmul":
            return True
        if any(name in op.name for name in (*FEED_FORWARD, *(PROJECTIONS if projections else ()))):
            return feed_forward(i, strategy)
        return "params" in op.name or attention(i, strategy)

    return allow
