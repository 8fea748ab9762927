"""Bottlenecks of operations: compute, HBM, vector unit, communication or overhead, and the distance to the roofline.

An operation with $F$ FLOPs and $B$ bytes through HBM has the intensity $F/B$. If that exceeds the *ridge* of the roofline,
FLOP/s over bytes/s, it is compute-bound, else HBM-bound. If its loads and stores by the vector unit take longer than both,
it is bound by the vector unit. If its collectives take longer than both it is
communication-bound, and if its start-up does, overhead-bound (Lienhart, "LLM Inference Series: 5. Dissecting model
performance"). All seconds are those of the cost model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

REGIMES: tuple[str, ...] = ("compute", "HBM", "vector unit", "communication", "overhead")


def regime(compute: float, memory: float, vector: float, communication: float, overhead: float) -> str:
    """The name of the largest of the five; the first of equal ones; "" if all are 0."""
    sides = dict(zip(REGIMES, (compute, memory, vector, communication, overhead), strict=True))
    return max(sides, key=lambda side: sides[side]) if any(sides.values()) else ""


@dataclass(frozen=True)
class Work:
    """The work of an operation in one step on one chip, and the seconds of each resource alone.

    `seconds` is the on-chip time: the longest of compute, memory and vector unit, plus the overhead. A matmul adds the vector
    unit's time to that of memory.
    """

    name: str
    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    overhead_seconds: float
    seconds: float
    count: float = 1
    vector_seconds: float = 0.0

    @property
    def regime(self) -> str:
        """The slowest resource: "compute", "HBM", "vector unit", "communication" or "overhead"."""
        on_chip = (self.compute_seconds, self.memory_seconds, self.vector_seconds)
        return regime(*on_chip, self.communication_seconds, self.overhead_seconds)

    @property
    def intensity(self) -> float:
        """FLOPs per byte through HBM."""
        return self.flops / self.bytes if self.bytes else inf if self.flops else 0.0

    @property
    def ridge(self) -> float:
        """The intensity above which it is compute-bound, at the rates of the cost model."""
        if not self.compute_seconds or not self.memory_seconds:
            return 0.0
        return self.intensity * self.memory_seconds / self.compute_seconds

    @property
    def total_seconds(self) -> float:
        """The on-chip time and the time of its collectives."""
        return self.seconds + self.communication_seconds

    @property
    def of_flops(self) -> float:
        """The achieved fraction of the model's FLOP/s (efficiency and padding included), with its collectives."""
        return self.compute_seconds / self.total_seconds if self.total_seconds else 0.0

    @property
    def of_roofline(self) -> float:
        """The achieved fraction of the roofline at its intensity, with its collectives."""
        return max(self.compute_seconds, self.memory_seconds) / self.total_seconds if self.total_seconds else 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.name,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.compute_seconds + other.compute_seconds,
            self.memory_seconds + other.memory_seconds,
            self.communication_seconds + other.communication_seconds,
            self.overhead_seconds + other.overhead_seconds,
            self.seconds + other.seconds,
            self.count + other.count,
            self.vector_seconds + other.vector_seconds,
        )


def split_by_bottleneck(works: Iterable[Work]) -> dict[str, float]:
    """The seconds of a step by bottleneck; they add up to the step.

    On the chip an operation counts for the longest side of its roofline, and for its overhead. What a matmul needs to store
    its results after that counts for the vector unit. All collectives count for communication.
    """
    spent = dict.fromkeys(REGIMES, 0.0)
    for work in works:
        overhead = min(work.overhead_seconds, work.seconds)
        sides = {"HBM": work.memory_seconds, "compute": work.compute_seconds, "vector unit": work.vector_seconds}
        longest = max(sides, key=lambda side: sides[side])
        alone = min(sides[longest], work.seconds - overhead)
        spent[longest] += alone
        spent["vector unit"] += work.seconds - overhead - alone
        spent["overhead"] += overhead
        spent["communication"] += work.communication_seconds
    return spent


def total(works: Iterable[Work], name: str) -> Work:
    """The work of a whole step."""
    summed = Work(name, 0, 0, 0, 0, 0, 0, 0, 0)
    for work in works:
        summed = summed + work
    return summed
