"""The regimes of a plan: the bottleneck of every operation and of the whole step, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import reduce
from math import isfinite
from operator import add
from typing import Any

from autoshard._util.paths import shared_name, star_numbers
from autoshard._util.tables import WIDTH, percent, table, time, wrap_text
from autoshard.explaining.explain import short_name
from autoshard.planning.records import OperationPlan, PlanRecord
from costmodels.bottlenecks import REGIMES, Work, regime, split_by_bottleneck, total
from costmodels.machine.collectives import seconds as collective_seconds

_MENTIONED = 0.005
"""The share of the step above which an operation is listed."""

_NOTHING = 1e-9
"""The share of a time below which a difference is rounding."""


@dataclass(frozen=True)
class Regimes:
    """The bottlenecks of a plan's operations.

    - `works`: operations with a cost, those with the same plan as one, the longest first.
    - `latency_seconds`: the part of the collectives that does not shrink with their bytes.
    """

    name: str
    topology: str
    chip: str
    works: tuple[Work, ...]
    latency_seconds: float

    @property
    def step(self) -> Work:
        """The work of the whole step."""
        return total(self.works, self.name)

    @property
    def seconds(self) -> dict[str, float]:
        """The step's seconds by bottleneck: "compute", "HBM", "vector unit", "communication", "overhead"."""
        return split_by_bottleneck(self.works)

    @property
    def regime(self) -> str:
        """The bottleneck with the largest share of the step."""
        return regime(*(self.seconds[each] for each in REGIMES))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""

        def row(work: Work) -> dict[str, Any]:
            found = asdict(work) | {"regime": work.regime, "intensity": work.intensity, "ridge": work.ridge}
            found |= {"of_flops": work.of_flops, "of_roofline": work.of_roofline}
            return {
                key: value if not isinstance(value, float) or isfinite(value) else str(value)
                for key, value in found.items()
            }

        step = row(self.step) | {"regime": self.regime, "seconds_by_regime": self.seconds}
        return {"name": self.name, "topology": self.topology, "step": step, "operations": [row(w) for w in self.works]}

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = WIDTH) -> str:
        """The step and its operations as plain text tables."""
        return "\n".join(_lines(self, width)) + "\n"


def regimes(plan: PlanRecord) -> Regimes:
    """The regimes of a plan, from its own numbers."""
    listed = [*sum_equal_operations(plan.operations).values(), *_slices(plan)]
    works = tuple(sorted(listed, key=lambda work: -work.total_seconds))
    latency = sum(
        each.count * float(collective_seconds(each.kind, tuple(plan.topology.axis(a) for a in each.axes), 0.0))
        for each in plan.estimate.collectives
    )
    return Regimes(plan.name, plan.topology.name, plan.topology.chip.name, works, latency)


def _slices(plan: PlanRecord) -> Iterator[Work]:
    """The time of the step beyond operations and collectives: local slices in HBM."""
    left = plan.estimate.seconds - sum(op.seconds + op.collective_seconds for op in plan.operations)
    if left > _NOTHING * plan.estimate.seconds:
        moved, took = (sum(float(getattr(op, each)) for op in plan.operations) for each in ("bytes", "memory_seconds"))
        yield Work("slices of arrays", 0.0, left * moved / took if took else 0.0, 0.0, left, 0.0, 0.0, left)


def sum_equal_operations(operations: Iterable[OperationPlan]) -> dict[tuple, Work]:
    """The operations with a cost; equal operations of unrolled layers in one layout are one."""
    groups: dict[tuple, list[OperationPlan]] = {}
    for op in operations:
        if op.seconds + op.collective_seconds:
            groups.setdefault((star_numbers(op.name), op.einsum, op.sizes, op.splits), []).append(op)
    return {
        key: replace(reduce(add, map(work_of, alike)), name=shared_name(map(short_name, alike)))
        for key, alike in groups.items()
    }


def work_of(op: OperationPlan) -> Work:
    """The work of one planned operation."""
    overhead = op.overhead_seconds
    if not overhead and not op.vector_seconds:  # a plan from an older file, which lacks both
        overhead = max(op.seconds - max(op.compute_seconds, op.memory_seconds), 0.0)
    if overhead < _NOTHING * op.seconds:  # rounding of a subtraction
        overhead = 0.0
    return Work(
        short_name(op),
        op.flops,
        op.bytes,
        op.compute_seconds,
        op.memory_seconds,
        op.collective_seconds,
        overhead,
        op.seconds,
        op.count,
        op.vector_seconds,
    )


def _lines(found: Regimes, width: int) -> Iterator[str]:
    for line in _summary(found):
        yield from wrap_text(line, width, 15)
    listed = [work for work in found.works if work.total_seconds > _MENTIONED * found.step.total_seconds]
    rows = [_HEADERS, *(_row(work, found.step.total_seconds) for work in listed)]
    if width < WIDTH:
        rows = [(*row[:2], *row[4:7], row[8]) for row in rows]
    yield ""
    yield from (f"  {line}" for line in table(rows[0], rows[1:], "/<>>>>>>>"[: len(rows[0])], width - 2))
    rest = [work for work in found.works if work not in listed]
    if rest:
        yield f"  {len(rest)} more, {time(sum(work.total_seconds for work in rest))} together"


_HEADERS = (
    "operation",
    "bound by",
    "FLOPs/byte",
    "ridge",
    "on chip",
    "collectives",
    "of step",
    "of FLOP/s",
    "of roofline",
)
"""The headers of the table; below the full width it has no intensities and no share of FLOP/s."""


def _summary(found: Regimes) -> Iterator[str]:
    step, seconds = found.step, found.seconds
    parts = ", ".join(f"{time(seconds[each])} {each}" for each in sorted(REGIMES, key=lambda each: -seconds[each]))
    bound = f"{found.regime}-bound" if found.regime else "free"
    yield f"{found.name} on {found.topology} is {bound}: {time(step.total_seconds)}"
    yield f"  bound by     {parts}"
    if found.latency_seconds:
        yield f"               ({time(found.latency_seconds)} of the communication is latency and launches)"
    yield f"  intensity    {_number(step.intensity)} FLOPs/byte; the ridge of its operations is at {_number(step.ridge)}"
    achieved = f"{percent(step.of_flops)} of the compute units' rate, {percent(step.of_roofline)} of the roofline"
    yield f"  achieved     {achieved}, both at the model's rates"


def _row(work: Work, step_seconds: float) -> tuple[str, ...]:
    wire = time(work.communication_seconds) if work.communication_seconds else "-"
    share = percent(work.total_seconds / step_seconds)
    reached = (percent(work.of_flops), percent(work.of_roofline))
    return (
        work.name,
        work.regime,
        _number(work.intensity),
        _number(work.ridge),
        time(work.seconds),
        wire,
        share,
        *reached,
    )


def _plain(value: Any) -> Any:
    """A value for JSON, which has no infinity."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _number(value: float) -> str:
    return f"{value:.3g}" if isfinite(value) and value else "-"
