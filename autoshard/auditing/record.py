"""The record of an audit: planned and compiled collectives, memory, FLOPs and time, and their differences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autoshard.auditing import bounds
from autoshard.auditing.findings import CompileTarget, Finding, seconds_of, wire_bytes_by_axes
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.auditing.matching import Axes, Pair, sent_bytes
from autoshard.auditing.planned_times import AuditedCost, Overlap
from autoshard.auditing.replay import MOST_COSTLY, Replay
from autoshard.planning.carriage import Carry
from autoshard.planning.records import PlannedCollective
from costmodels.machine.topology import Topology


@dataclass(frozen=True)
class AuditRecord:
    """The result of an audit.

    - `ok`: whether no difference counts.
    - `collectives`: all collectives of the compiled program.
    - `pairs`: planned beside compiled.
    - `peak_bytes`: per chip, as the compiler reports it; None if it does not.
    - `planned_flops`, `flops`: of the matmuls of one chip and step, planned and compiled.
    - `compute_seconds`: the compiler's own estimate of everything but collectives; None if there is none.
    - `replay`: the schedule replayed, with copies and collectives beside the core; None if there is no estimate.
    - `costs`: the instructions of the replay by their time, the costliest first, with the unplanned part of it.
    - `line_flops`: per source line with matmuls, their planned and compiled FLOPs on one chip and step.
    - `carry`: the way in which the program carries the plan.
    - `overlap`: per size and axis of the planned rings, the planned and the replayed share of their time that is hidden.
    """

    target: CompileTarget
    name: str
    topology: Topology
    planned: tuple[PlannedCollective, ...]
    planned_seconds: float
    planned_collective_seconds: float
    planned_peak_bytes: float
    collectives: tuple[CompiledCollective, ...]
    pairs: tuple[Pair, ...]
    differences: tuple[Finding, ...]
    peak_bytes: float | None
    compute_seconds: float | None
    planned_flops: float
    flops: float
    replay: Replay | None = None
    costs: tuple[AuditedCost, ...] = ()
    line_flops: tuple[tuple[str, float, float], ...] = ()
    carry: Carry = "manual"
    overlap: tuple[Overlap, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no difference counts."""
        return not any(difference.counts for difference in self.differences)

    @property
    def step_seconds(self) -> float | None:
        """One step of the compiled program, by the replay of its schedule; None if the compiler estimates nothing."""
        return None if self.replay is None else self.replay.seconds

    @property
    def is_slow(self) -> bool:
        """Whether a compiled step takes more than `bounds.SLOWER` times the planned time."""
        return self.step_seconds is not None and self.step_seconds > bounds.SLOWER * self.planned_seconds

    @property
    def collective_seconds(self) -> float:
        """Seconds of the compiled collectives under the plan's model."""
        return sum(seconds_of(each, self.topology) * each.count for each in self.collectives)

    def wire_bytes(self) -> dict[Axes, tuple[float, float]]:
        """Per set of mesh axes: bytes that one chip sends in one step, planned and compiled."""
        sent = wire_bytes_by_axes(self.pairs, self.topology)
        return {axes: (planned, compiled) for axes, (planned, _, compiled) in sent.items()}

    def saved_bytes(self) -> dict[Axes, float]:
        """Per set of mesh axes: the bytes that the compiler is expected to save against the plan, per chip and step.

        An example is an array that is gathered once for two uses, or as the bfloat16 that a matmul reads of float32.
        Host devices widen 16-bit floats; there the figure is the excess, and negative. Forms of a collective that cost
        more than planned are not expected.
        """
        sent = wire_bytes_by_axes(self.pairs, self.topology)
        return {axes: planned - due for axes, (planned, due, _) in sent.items() if planned != due}

    def unplanned_bytes(self) -> float:
        """Bytes that one chip sends in one step in unplanned collectives."""
        alone = (pair for pair in self.pairs if not pair.planned)
        return sum(sent_bytes(each, self.topology) * pair.count for pair in alone for each in pair.compiled)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, for JSON."""
        sent = [
            {"axes": list(axes), "planned": planned, "expected": expected, "compiled": compiled}
            for axes, (planned, expected, compiled) in wire_bytes_by_axes(self.pairs, self.topology).items()
        ]
        return {
            "ok": self.ok,
            "slow": self.is_slow,
            "target": self.target,
            "carry": self.carry,
            "plan": self.name,
            "topology": self.topology.name,
            "flops": {"planned": self.planned_flops, "compiled": self.flops},
            "peak_bytes": {"planned": self.planned_peak_bytes, "compiled": self.peak_bytes},
            "seconds": {
                "planned": self.planned_seconds,
                "planned_collectives": self.planned_collective_seconds,
                "compiled_compute": self.compute_seconds,
                "compiled_collectives": self.collective_seconds,
                "replayed": self.step_seconds,
                "floor": self.replay and self.replay.floor_seconds,
                "exposed_communication": self.replay and self.replay.exposed_seconds,
                "awaited_copies": self.replay and self.replay.copy_seconds,
            },
            "costliest": [
                {**asdict(each.instruction), "unplanned_seconds": each.unplanned_seconds}
                for each in self.costs[:MOST_COSTLY]
            ],
            "overlap": [asdict(each) for each in self.overlap],
            "wire_bytes": sent,
            "planned": [asdict(each) for each in self.planned],
            "compiled": [asdict(each) for each in self.collectives],
            "differences": [asdict(each) for each in self.differences],
        }
