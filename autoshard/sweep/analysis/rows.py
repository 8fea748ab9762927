"""The points of a sweep as rows of a table: latency, cost, MFU and layout, and their file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autoshard._util.identity import IdentityMap
from autoshard.errors import AutoshardError
from autoshard.sweep.job import Job, Knob
from autoshard.sweep.points import Point, Unmade
from autoshard.sweep.results import SOLVED, Result
from autoshard.sweep.runner import Done

VERSION = 1
REQUEST = "request"
"""The kind of a row whose phases share a layout, with the times of a whole request."""
_HOUR = 3600.0


@dataclass(frozen=True)
class Row:
    """One point of a sweep.

    - `seconds`: of one step; for phases with a shared layout, of a whole request (each phase times its runs, plus
      `handoff_seconds`).
    - `latency_seconds`: of a decode step (the latency per token), of a prefill (the time to first token), or of a whole
      request.
    - `chip_seconds_per_token`: chips × seconds / tokens, $nt/(BL)$ in Pope et al. 2022; `price` is the money per million
      tokens, None without a price of the chip.
    - `mfu`: FLOPs of the program's matmuls (with attention, and with padded heads) over the chips' peak.
    - `proofs`: phase to the solver and its proof. `compiled_seconds`: phase to the step of its compiled program, if known.
    - `layout`: phase to matmul to strategy, the largest matmuls first. `phase_seconds`: of one step of each phase;
      `phase_kinds`: the kind of each.
    """

    phase: str
    kind: str
    topology: str
    chip: str
    chips: int
    knobs: Mapping[str, Knob]
    outcome: str
    why: str = ""
    key: str = ""
    seconds: float = 0.0
    tokens: float = 0.0
    latency_seconds: float = 0.0
    chip_seconds_per_token: float = 0.0
    price: float | None = None
    mfu: float = 0.0
    peak_bytes: float = 0.0
    budget_bytes: float = 0.0
    collective_seconds: float = 0.0
    status: str = ""
    gap: float = 0.0
    layout: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    phase_kinds: Mapping[str, str] = field(default_factory=dict)
    handoff_seconds: float = 0.0
    proofs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    compiled_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The point as text."""
        knobs = ", ".join(f"{key} {value}" for key, value in self.knobs.items())
        return f"{self.topology}{f', {knobs}' if knobs else ''}"

    @property
    def slowdown(self) -> float | None:
        """The compiled steps over the planned ones, of a point whose phases are all compiled; None for others."""
        if not self.compiled_seconds or set(self.compiled_seconds) != set(self.phase_seconds):
            return None
        return sum(self.compiled_seconds.values()) / sum(self.phase_seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """The throughput of the slice."""
        return self.chips / self.chip_seconds_per_token if self.chip_seconds_per_token else 0.0

    def seconds_of(self, kind: str) -> float | None:
        """The longest step of a kind of phase, such as "decode"; None if there is none."""
        if kind == self.kind:
            return self.latency_seconds
        named = {key: self.phase_kinds.get(key, key) for key in self.phase_seconds}  # the kind of a phase is its name
        return max((self.phase_seconds[key] for key, each in named.items() if each == kind), default=None)

    @property
    def headline(self) -> str:
        """The layout in a line: the largest matmul by a weight, and attention; with names of phases if there are several."""
        several = len(self.layout) > 1
        lines = ((phase, " | ".join(_main_strategies(layout))) for phase, layout in self.layout.items())
        return "; ".join(f"{phase} {line}" if several else line for phase, line in lines)

    @property
    def family(self) -> str:
        """The headline without axes, `WS-1D with batch-sharded`."""
        several = len(self.layout) > 1
        lines = ((phase, " with ".join(map(_bare, _main_strategies(layout)))) for phase, layout in self.layout.items())
        return ", ".join(f"{phase} {line}" if several else line for phase, line in lines)


def _bare(chosen: str) -> str:
    return family(chosen.removeprefix("attention "))


def _main_strategies(layout: Mapping[str, str]) -> tuple[str, ...]:
    """The strategies of the largest matmul by a weight and of the largest one of attention."""
    attention = next((each for each in layout.values() if _is_attention(each)), None)
    weights = next((each for each in layout.values() if not _is_attention(each)), None)
    if attention is None:
        return (weights or "no matrix products",)
    return (f"attention {attention}",) if weights is None else (weights, f"attention {attention}")


def _is_attention(strategy: str) -> bool:
    return "-sharded" in strategy.partition(":")[0]


def family(strategy: str) -> str:
    """A strategy without its axes: "WG-XY", "batch-sharded, head-sharded"."""
    head, colon, _ = strategy.partition(":")
    if colon:
        return head
    return ", ".join(part.split(" over ")[0] for part in strategy.split(", "))


@dataclass(frozen=True)
class Part:
    """The points of one frontier: those of a phase that have a plan and do the same work."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SweepResult:
    """A whole sweep: the job's name, its constraints and prices, and a row per point; `per` as in `Job`."""

    name: str
    rows: tuple[Row, ...]
    currency: str = "USD"
    constraints: Mapping[str, float | None] = field(default_factory=dict)
    store: str = ""
    per: tuple[str, ...] = ()

    @property
    def solved(self) -> tuple[Row, ...]:
        """The rows that have a plan."""
        return tuple(row for row in self.rows if row.outcome == SOLVED)

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases, in order."""
        return tuple(dict.fromkeys(row.phase for row in self.rows))

    def of(self, phase: str) -> tuple[Row, ...]:
        """The rows of one phase that have a plan."""
        return tuple(row for row in self.solved if row.phase == phase)

    def parts(self, phase: str) -> tuple[Part, ...]:
        """The rows of one phase that have a plan, grouped by the variables in `per`; each part has its frontier."""
        found: dict[str, list[Row]] = {}
        several = [key for key in self.per if key in self.knobs_of(phase)]
        for row in self.of(phase):
            work = ", ".join(f"{key} {row.knobs[key]}" for key in several)
            found.setdefault(work, []).append(row)
        return tuple(Part(f"{phase}, {work}" if len(found) > 1 else phase, tuple(rows)) for work, rows in found.items())

    def knobs_of(self, phase: str) -> tuple[str, ...]:
        """The variables in which the points of a phase differ, with or without a plan."""
        rows = [row for row in self.rows if row.phase == phase]
        keys = dict.fromkeys(key for row in rows for key in row.knobs)
        return tuple(key for key in keys if len({row.knobs.get(key) for row in rows}) > 1)

    def label(self, row: Row, in_part: bool = False) -> str:
        """A point as text, without the values that all points of its phase, or of its part, share."""
        keys = [key for key in self.knobs_of(row.phase) if key in row.knobs and not (in_part and key in self.per)]
        knobs = ", ".join(f"{key} {row.knobs[key]}" for key in keys)
        return f"{row.topology}{f', {knobs}' if knobs else ''}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"autoshard_sweep": VERSION} | asdict(self)


def sweep_result(job: Job, done: Iterable[Done], order: Sequence[Point | Unmade], store: str = "") -> SweepResult:
    """The rows of a sweep in the job's order."""
    found = IdentityMap((each.point, each) for each in done)
    rows = tuple(row_of(found[point], job.per_chip_hour) for point in order if point in found)
    return SweepResult(job.name, rows, job.currency, asdict(job.constraints), store, job.per)


def row_of(done: Done, per_chip_hour: Mapping[str, float] | None = None) -> Row:
    """One point as a row."""
    point, result = done.point, done.result
    if isinstance(point, Unmade):
        return Row(point.phase, "", point.topology, "", 0, dict(point.knobs), result.outcome, result.why)
    topology = point.topology
    kind = point.runs[0].kind if len(point.runs) == 1 else REQUEST
    row: dict[str, Any] = {
        "phase": point.phase,
        "kind": kind,
        "topology": topology.name,
        "chip": topology.chip.name,
        "chips": topology.size,
        "knobs": dict(point.knobs),
        "outcome": result.outcome,
        "why": result.why,
        "key": done.key,
    }
    if result.outcome != SOLVED:
        return Row(**row)
    rate = (per_chip_hour or {}).get(topology.chip.name)
    return Row(**row, **_numbers(point, result, rate))


def _numbers(point: Point, result: Result, per_chip_hour: float | None) -> dict[str, Any]:
    pairs = [(run, result.phases[run.phase]) for run in point.runs]
    seconds = sum(run.repeats * each.seconds for run, each in pairs) + result.handoff_seconds
    tokens = sum(run.repeats * run.tokens for run, _ in pairs)
    cost = point.topology.size * seconds / tokens if tokens else 0.0
    peak = pairs[0][1].peak_flops
    return {
        "seconds": seconds,
        "tokens": tokens,
        "latency_seconds": seconds,
        "chip_seconds_per_token": cost,
        "price": None if per_chip_hour is None else 1e6 * cost * per_chip_hour / _HOUR,
        "mfu": sum(run.repeats * each.useful_flops for run, each in pairs) / (seconds * peak),
        "peak_bytes": max(each.peak_bytes for _, each in pairs),
        "budget_bytes": pairs[0][1].budget_bytes,
        "collective_seconds": sum(run.repeats * each.collective_seconds for run, each in pairs)
        + result.handoff_seconds,
        "status": result.status,
        "gap": result.gap,
        "layout": {run.phase: dict(each.layout) for run, each in pairs},
        "phase_seconds": {run.phase: each.seconds for run, each in pairs},
        "phase_kinds": {run.phase: run.kind for run, _ in pairs},
        "handoff_seconds": result.handoff_seconds,
        "proofs": dict(result.proofs),
    }


def load_sweep(path: str | Path) -> SweepResult:
    """Reads a file of `autoshard sweep`.

    **Raises:** `AutoshardError` for another kind of file.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
        version = data.pop("autoshard_sweep")
        if version > VERSION:
            raise AutoshardError(f"{path} is from a newer autoshard; this one reads versions up to {VERSION}.")
        rows, per = tuple(Row(**row) for row in data["rows"]), tuple(data.get("per", ()))
        return SweepResult(**{**data, "rows": rows, "per": per})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AutoshardError(f"{path} is not a sweep of autoshard: {error!r}.") from error
