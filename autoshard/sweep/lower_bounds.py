"""Lower bounds from the formulas alone; points that they rule out are never searched.

On $n$ chips an operation has at most $n$ shards, so with $F$ FLOPs and $B$ bytes it takes at least $\\max(F / nC, B / nW)$ plus
its overhead. The sum over all runs of all operations, without collectives, bounds a step. Every argument takes at least $1/n$
of its bytes on each chip. Padding and indivisible sizes only increase both. On chips with on-chip memory, every array that
may stay there is assumed to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from autoshard._util.tables import size, time
from autoshard.sweep.points import Point, trace_run
from costmodels.machine.topology import Topology
from costmodels.operations import price
from costmodels.program.program import Program
from search.solve import RESERVE_PART

_ROUNDING = 1e-9
"""The rounding error of a sum, as a part; smaller violations do not count."""


@dataclass(frozen=True)
class Bound:
    """Lower bounds on the seconds of a step and the bytes on each chip."""

    seconds: float
    bytes: float


def lower_bound(program: Program, topology: Topology) -> Bound:
    """The bound of one program."""
    seconds, chip = 0.0, topology.chip
    if chip.on_chip_bytes:
        chip = replace(chip, on_chip_bytes=math.inf)
    for op in program.operations:
        runs = program.multiplicity(op.region)
        if op.op_class not in ("matmul", "fused", "memory") or not runs:
            continue
        cost = price(program, op, np.ones((1, len(op.factors))), chip, topology.pricing.asynchronous)
        start = float(cost.overhead_seconds[0])
        seconds += runs * ((float(cost.seconds[0]) - start) / topology.size + start)
    held = [*program.arguments, *program.constants]
    values = [program.values[program.operations[i].outputs[0].value] for i in held if program.operations[i].outputs]
    return Bound(seconds * (1 - _ROUNDING), sum(value.bytes for value in values) / topology.size * (1 - _ROUNDING))


def reason_to_prune(point: Point, seconds_per_token: float | None, seconds_to_first_token: float | None) -> str:
    """The reason why a point needs no search; empty if it needs one.

    **Raises:** `AutoshardError` if the target cannot be traced.
    """
    chip = point.topology.chip
    budget = point.memory_bytes or chip.usable_hbm_bytes * (1 - RESERVE_PART)
    for run in point.runs:
        found = lower_bound(trace_run(run).traced.program, point.topology)
        if found.bytes > budget:
            return f"{run.phase}: its arrays take at least {size(found.bytes)} per chip, of {size(budget)} available"
        limit = {"decode": seconds_per_token, "prefill": seconds_to_first_token}.get(run.kind)
        if limit is not None and found.seconds > limit:
            return f"{run.phase}: a step takes at least {time(found.seconds)}, but at most {time(limit)} is allowed"
    return ""
