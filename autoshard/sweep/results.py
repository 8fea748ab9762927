"""Results of points: plain data for a store, equal for equal points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from autoshard.annotating.padding import unpadded_program
from autoshard.explaining.explain import short_name
from autoshard.explaining.layer_groups import group_operations
from autoshard.planning.records import PlanRecord

SOLVED, INFEASIBLE, PRUNED, FAILED = "solved", "infeasible", "pruned", "failed"
"""The outcomes of a point: a plan; no layout fits; not searched, because a lower bound rules it out; an error."""


@dataclass(frozen=True)
class PhaseResult:
    """One phase's plan in numbers; seconds of one step, bytes on one chip.

    `useful_flops` are the FLOPs of the program's matmuls, over all chips and without padding; `peak_flops` is the peak
    FLOP/s of all chips in the dtype of most matmuls. `layout` maps every matmul, the largest first, to its strategy.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    peak_bytes: float
    budget_bytes: float
    useful_flops: float
    peak_flops: float
    layout: Mapping[str, str]

    @property
    def mfu(self) -> float:
        """The part of the chips' peak rate that the program's matmuls use."""
        return self.useful_flops / (self.seconds * self.peak_flops)


@dataclass(frozen=True)
class Result:
    """The outcome of a point; without a plan `phases` is empty, and `why` has the reason.

    `handoff_seconds`: the time to reshard the hand-overs between phases with a shared layout. `proofs` (by phase),
    `wall_seconds` and `plans` (compressed JSON by phase) are not compared.
    """

    outcome: str
    why: str = ""
    phases: Mapping[str, PhaseResult] = field(default_factory=dict)
    status: str = ""
    gap: float = 0.0
    handoff_seconds: float = 0.0
    wall_seconds: float = field(default=0.0, compare=False)
    proofs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    plans: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the plans, as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "plans"}


def result_from_dict(data: Mapping[str, Any]) -> Result:
    """The inverse of `Result.to_dict`."""
    phases = {name: PhaseResult(**each) for name, each in data["phases"].items()}
    return Result(**{**data, "phases": phases})


def phase_result(plan: PlanRecord) -> PhaseResult:
    """The result of a plan."""
    estimate, program = plan.estimate, plan.program and unpadded_program(plan.program, plan.padding)
    useful: dict[str, float] = {}
    for _, op in program.matmuls() if program is not None else ():
        points = 1.0
        for factor in op.factors:
            points *= factor.size
        done = op.flops_per_point * points * program.multiplicity(op.region)  # pyright: ignore[reportOptionalMemberAccess]
        useful[op.dtype] = useful.get(op.dtype, 0.0) + done
    dtype = max(useful, key=lambda each: useful[each], default="bfloat16")
    return PhaseResult(
        estimate.seconds,
        estimate.compute_seconds,
        estimate.memory_seconds,
        estimate.collective_seconds,
        estimate.peak_bytes,
        estimate.budget_bytes,
        sum(useful.values()),
        plan.topology.size * plan.topology.chip.matmul_flops_per_second(dtype),
        layout_words(plan),
    )


def layout_words(plan: PlanRecord) -> dict[str, str]:
    """Strategy by matmul, those with most FLOPs first; equal layers are merged."""
    found: dict[str, tuple[float, str]] = {}
    for op in group_operations(op for op in plan.operations if op.matmul):
        name = short_name(op)
        done = found.get(name, (0.0, ""))[0] + op.count * _size(op.sizes)
        found[name] = (done, op.strategy)
    return {name: strategy for name, (_, strategy) in sorted(found.items(), key=lambda item: (-item[1][0], item[0]))}


def _size(sizes: tuple[int, ...]) -> float:
    product = 1.0
    for size in sizes:
        product *= size
    return product
