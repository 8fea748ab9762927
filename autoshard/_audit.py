"""The audit: the compiled program held against its plan, collective by collective, and peak memory against peak memory.

A planned collective is found when the compiled program runs one of the same kind over the same axes with the same bytes
as often. What a compiler may do to a plan without making it another plan is recognised, and said:

| the compiled program | is the same plan |
|---|---|
| runs several planned collectives as one, or one in several pieces | at the same cost, or lower |
| runs a planned all-reduce as a reduce-scatter and an all-gather | at the same cost |
| reduces and slices where a reduce-scatter was planned | at higher cost; host devices have nothing else |
| gathers by an all-reduce of arrays padded with zeros | at higher cost |
| reduces bf16 as f32, on host devices | at twice the bytes |

Higher cost counts on a TPU; host devices only show that the program is partitioned as planned. Everything else that was
planned is *missing*, everything else that was compiled is *unplanned*. Shares are of the plan's time on the wire, with
compiled collectives priced by the model that priced the planned ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import jax

from autoshard import hlo, targets
from autoshard.errors import AutoshardError
from autoshard.hlo import CompiledCollective
from autoshard.plan import Plan, PlannedCollective
from costmodels.collectives import seconds as collective_seconds
from costmodels.collectives import wire_bytes
from costmodels.topology import Topology

NOTICEABLE = 0.01
"""The share of the plan's time on the wire above which a difference counts."""
MEMORY_TOLERANCE = 0.05
"""By how much of the planned peak the compiled one may differ."""
_ALIKE = 0.005
"""Relative difference between byte counts that padding may make."""
_MOST_TOGETHER = 4
"""How many collectives are looked for in one, where the compiled program does not say how many it combined."""

Target = Literal["host", "tpu", "gpu"]
Kind = Literal[
    "same plan at lower cost", "same plan", "same plan at higher cost", "missing", "unplanned", "peak memory"
]
Axes = tuple[str, ...]


class AuditError(AutoshardError):
    """A plan could not be compiled for the target that it was to be audited on; the compiler's error is chained."""


@dataclass(frozen=True)
class Difference:
    """One way in which the compiled program is not word for word the plan.

    `bytes` is what it sends more (less, if negative) per chip and step, or needs more at its peak. `share` is the part
    of the plan's time on the wire, or of the planned peak, that is at stake. `counts` says whether the audit fails by
    it.
    """

    kind: Kind
    text: str
    bytes: float
    share: float
    counts: bool


@dataclass(frozen=True)
class Pair:
    """Planned collectives beside the compiled ones that do their work, `count` times; either side may be empty."""

    planned: tuple[PlannedCollective, ...]
    compiled: tuple[CompiledCollective, ...]
    count: int


@dataclass(frozen=True)
class Audit:
    """What came of an audit; `str(audit)` is a table.

    - `ok`: whether no difference counts.
    - `collectives`: everything that the compiled program sends.
    - `pairs`: planned beside compiled.
    - `peak_bytes`: per chip, as the compiler reports it; None where it does not.
    - `compute_seconds`: the compiler's own estimate of everything but collectives; None where it makes none.
    """

    target: Target
    name: str
    topology: Topology
    planned: tuple[PlannedCollective, ...]
    planned_seconds: float
    planned_collective_seconds: float
    planned_peak_bytes: float
    collectives: tuple[CompiledCollective, ...]
    pairs: tuple[Pair, ...]
    differences: tuple[Difference, ...]
    peak_bytes: float | None
    compute_seconds: float | None

    @property
    def ok(self) -> bool:
        """Whether no difference counts."""
        return not any(difference.counts for difference in self.differences)

    @property
    def collective_seconds(self) -> float:
        """What the compiled collectives cost under the plan's model."""
        return sum(seconds_of(each, self.topology) * each.count for each in self.collectives)

    def wire_bytes(self) -> dict[Axes, tuple[float, float]]:
        """Per set of mesh axes: bytes that one chip sends in one step, planned and compiled."""
        found: dict[Axes, tuple[float, float]] = {}
        for side, each in [*((0, p) for p in self.planned), *((1, c) for c in self.collectives)]:
            axes = axes_of(each, self.topology)
            sent = wire_bytes(each.kind, _along(axes, self.topology), float(each.bytes)) * each.count
            planned, compiled = found.get(axes, (0.0, 0.0))
            found[axes] = (planned + sent, compiled) if side == 0 else (planned, compiled + sent)
        return dict(sorted(found.items(), key=lambda item: -max(item[1])))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        sent = [{"axes": list(axes), "planned": a, "compiled": b} for axes, (a, b) in self.wire_bytes().items()]
        return {
            "ok": self.ok,
            "target": self.target,
            "plan": self.name,
            "topology": self.topology.name,
            "peak_bytes": {"planned": self.planned_peak_bytes, "compiled": self.peak_bytes},
            "seconds": {
                "planned": self.planned_seconds,
                "planned_collectives": self.planned_collective_seconds,
                "compiled_compute": self.compute_seconds,
                "compiled_collectives": self.collective_seconds,
            },
            "wire_bytes": sent,
            "planned": [asdict(each) for each in self.planned],
            "compiled": [asdict(each) for each in self.collectives],
            "differences": [asdict(each) for each in self.differences],
        }

    def __str__(self) -> str:
        from autoshard.audit_report import render

        return render(self)


def audit(
    plan: Plan, fn: Callable[..., Any], *args: Any, target: Target = "host", devices: Sequence[Any] | None = None
) -> Audit:
    """Compiles a planned function and compares what the compiler made of it with the plan.

        audit = autoshard.audit(plan, decode, params, cache, tokens, position, target="tpu")
        audit.ok, audit.peak_bytes

    **Arguments:**

    - `args`: the arguments the plan was searched for, arrays or `jax.ShapeDtypeStruct`s; nothing is allocated or run.
    - `target`: "host" compiles for CPU devices of this machine, which is quick and partitions alike, "tpu" for the
      plan's own chips with the real TPU compiler (libtpu), without any TPU.
    - `devices`: compile for these instead.

    **Raises:** `PlanMismatchError` when plan and function do not belong together; `AuditError` when the compiler
    refuses the program (memory that does not suffice, for instance); `AutoshardError` when the target cannot be had.
    """
    if target == "gpu":
        raise AutoshardError('target="gpu" is not there yet: audit on "host", where the same collectives are compiled.')
    if target not in ("host", "tpu"):
        raise AutoshardError(f'target is {target!r}; "host" or "tpu" would do.')
    topology = plan.topology
    found = devices if devices is not None else _devices(topology, target)
    mesh = targets.mesh_of(found, topology.axis_sizes)
    shapes = jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, args
    )
    lowered = plan.jit(fn, mesh=mesh).lower(*shapes)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise AuditError(f"The {target} compiler refused {plan.name} for {topology.name}. It says: {error}") from error
    peak = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0)
    return compare(plan, compiled.as_text(), target, float(peak) if peak else None)


def _devices(topology: Topology, target: Target) -> list[Any]:
    if target == "host":
        return targets.host_devices(topology.size)
    return targets.tpu_devices(topology.name, topology.shape, topology.chip.name)


def compare(plan: Plan, text: str, target: Target = "host", peak_bytes: float | None = None) -> Audit:
    """Compares the text of a compiled program with a plan.

    **Arguments:**

    - `text`: `compiled.as_text()`.
    - `peak_bytes`: the compiled program's peak memory per chip, if it is known; it counts only for a TPU.
    """
    topology, estimate = plan.topology, plan.estimate
    compiled = [c for c in hlo.collectives(text, topology.axis_sizes) if axes_of(c, topology)]
    planned = [p for p in estimate.collectives if axes_of(p, topology)]
    pairs = tuple(_Pairing(topology, planned, compiled, target).run())
    wire = sum(p.seconds for p in planned) or estimate.seconds
    differences = [d for pair in pairs if (d := _judge(pair, topology, target, wire)) is not None]
    if peak_bytes is not None and target == "tpu":
        differences += _judge_memory(estimate.peak_bytes, peak_bytes)
    cycles, clock = hlo.estimated_cycles(text), topology.chip.clock_hertz
    return Audit(
        target,
        plan.name,
        topology,
        tuple(planned),
        estimate.seconds,
        estimate.collective_seconds,
        estimate.peak_bytes,
        tuple(compiled),
        pairs,
        tuple(sorted(differences, key=lambda d: (not d.counts, -abs(d.share)))),
        peak_bytes,
        cycles / clock if cycles and clock else None,
    )


def axes_of(collective: PlannedCollective | CompiledCollective, topology: Topology) -> Axes:
    """The axes of a collective in mesh order, without those of one chip; all where its groups are no set of axes."""
    order = [axis.name for axis in topology.axes if axis.size > 1]
    return tuple(axis for axis in order if collective.axes is None or axis in collective.axes)


def seconds_of(collective: CompiledCollective, topology: Topology) -> float:
    """What one execution of a compiled collective costs under the plan's model."""
    axes = _along(axes_of(collective, topology), topology)
    return float(collective_seconds(collective.kind, axes, float(collective.bytes)))


def _along(axes: Axes, topology: Topology):
    return tuple(topology.axis(name) for name in axes)


# --- Pairing


@dataclass
class _Lot:
    """A collective of either side, and how many of its executions have no partner yet."""

    of: Any
    kind: str
    axes: Axes
    bytes: float
    left: int


class _Pairing:
    """Finds partners pass by pass, the most literal first."""

    def __init__(self, topology: Topology, planned: Sequence, compiled: Sequence, target: Target) -> None:
        self.host = target == "host"
        self.planned, self.compiled = (
            [_Lot(each, each.kind, axes_of(each, topology), float(each.bytes), each.count) for each in side]
            for side in (planned, compiled)
        )
        self.pairs: list[Pair] = []

    def run(self) -> Iterator[Pair]:
        for planned_kind, compiled_kind in _SPELLINGS:
            for narrow in (False, True) if self.host else (False,):
                self._merged(planned_kind, compiled_kind, narrow)
                self._in_pieces(planned_kind, compiled_kind, narrow)
        self._halves()
        yield from self.pairs
        yield from (Pair((lot.of,), (), lot.left) for lot in self.planned if lot.left)
        yield from (Pair((), (lot.of,), lot.left) for lot in self.compiled if lot.left)

    def _merged(self, planned_kind: str, compiled_kind: str, narrow: bool) -> None:
        """One compiled collective for one or several planned ones."""
        for lot in _of_kind(self.compiled, compiled_kind):
            if not _may_be(lot.of, planned_kind, compiled_kind) or (narrow and not _widened(lot.of)):
                continue
            combined = lot.of.spelling.removeprefix("combined ")
            most = int(combined) if combined.isdigit() else _MOST_TOGETHER
            bytes = lot.bytes / 2 if narrow else lot.bytes
            while lot.left and (group := self._adding_up_to(bytes, lot.axes, self.planned, planned_kind, most)):
                self._pair(group, [lot])

    def _in_pieces(self, planned_kind: str, compiled_kind: str, narrow: bool) -> None:
        """Several compiled collectives for a planned one."""
        for lot in _of_kind(self.planned, planned_kind):
            usable = [
                c
                for c in self.compiled
                if _may_be(c.of, planned_kind, compiled_kind) and (not narrow or _widened(c.of))
            ]
            bytes = lot.bytes * 2 if narrow else lot.bytes
            while lot.left and (group := self._adding_up_to(bytes, lot.axes, usable, compiled_kind, _MOST_TOGETHER)):
                self._pair([lot], group)

    def _adding_up_to(self, bytes: float, axes: Axes, lots: Sequence[_Lot], kind: str, most: int) -> list[_Lot]:
        usable = [lot for lot in _of_kind(lots, kind) if lot.axes == axes and lot.bytes <= bytes * (1 + _ALIKE)]
        groups = (group for size in range(1, most + 1) for group in combinations(usable, size))
        return list(next((group for group in groups if _alike(sum(lot.bytes for lot in group), bytes)), ()))

    def _halves(self) -> None:
        """A planned all-reduce as a reduce-scatter and an all-gather."""
        for lot in _of_kind(self.planned, "all-reduce"):
            fitting = [c for c in self.compiled if c.left and c.axes == lot.axes and _alike(c.bytes, lot.bytes)]
            both = [next((c for c in fitting if c.kind == kind), None) for kind in ("reduce-scatter", "all-gather")]
            if lot.left and all(both):
                self._pair([lot], [c for c in both if c])

    def _pair(self, planned: Sequence[_Lot], compiled: Sequence[_Lot]) -> None:
        count = min(lot.left for lot in (*planned, *compiled))
        for lot in (*planned, *compiled):
            lot.left -= count
        self.pairs.append(Pair(tuple(lot.of for lot in planned), tuple(lot.of for lot in compiled), count))


_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_SPELLINGS = (*((kind, kind) for kind in _KINDS), ("reduce-scatter", "all-reduce"), ("all-gather", "all-reduce"))
"""Planned kinds with the kinds that they may be compiled to, the most literal first."""


def _of_kind(lots: Sequence[_Lot], kind: str) -> list[_Lot]:
    return [lot for lot in lots if lot.kind == kind and lot.left]


def _may_be(compiled: CompiledCollective, planned_kind: str, compiled_kind: str) -> bool:
    """Whether a compiled collective may stand for a planned kind; an all-reduce gathers only among zeros."""
    gathers = (planned_kind, compiled_kind) == ("all-gather", "all-reduce")
    return compiled.kind == compiled_kind and (not gathers or "gather" in compiled.spelling)


def _widened(compiled: CompiledCollective) -> bool:
    """Whether a reduction may have been asked for in a type of half the width."""
    return compiled.dtype in ("f32", "float32") and compiled.kind in ("all-reduce", "reduce-scatter")


def _alike(a: float, b: float) -> bool:
    return abs(a - b) <= _ALIKE * max(a, b)


# --- Judging


def _judge(pair: Pair, topology: Topology, target: Target, wire_seconds: float) -> Difference | None:
    """What a pair says about the compiled program; None when it says that all is as planned."""
    planned = sum(p.seconds / p.count * pair.count for p in pair.planned)
    compiled = sum(seconds_of(c, topology) * pair.count for c in pair.compiled)
    more = sum(_sent(c, topology) for c in pair.compiled) - sum(_sent(p, topology) for p in pair.planned)
    share, bytes = abs(compiled - planned) / wire_seconds, more * pair.count
    noticeable = share > NOTICEABLE
    if not pair.compiled:
        text = f"{_described(pair.planned, topology, pair.count)}, {pair.planned[0].where}: not in the compiled program"
        return Difference("missing", text, bytes, share, noticeable)
    if not pair.planned:
        place = _place(pair.compiled[0])
        text = f"{_described(pair.compiled, topology, pair.count)}{place}: not in the plan"
        return Difference("unplanned", text, bytes, share, noticeable)
    spelled, asked = {c.kind for c in pair.compiled}, {p.kind for p in pair.planned}
    widened = target == "host" and bytes > 0 and any(map(_widened, pair.compiled))
    if spelled == asked and len(pair.planned) == len(pair.compiled) and not widened:
        return None
    sides = [_described(side, topology, pair.count) for side in (pair.planned, pair.compiled)]
    text = " compiled as ".join(sides) + ("; this compiler reduces bf16 as f32" if widened else "")
    if compiled < planned * (1 - 1e-9):
        return Difference("same plan at lower cost", text, bytes, share, False)
    if target == "host" or not compiled > planned * (1 + 1e-9):
        return Difference("same plan", text, bytes, share, False)
    return Difference("same plan at higher cost", text, bytes, share, noticeable)


def _judge_memory(planned: float, compiled: float) -> Iterator[Difference]:
    share = (compiled - planned) / planned
    if abs(share) > MEMORY_TOLERANCE:
        text = f"the compiled program needs {compiled / planned:.3f} times the planned peak"
        yield Difference("peak memory", text, compiled - planned, abs(share), True)


def _sent(each: PlannedCollective | CompiledCollective, topology: Topology) -> float:
    return wire_bytes(each.kind, _along(axes_of(each, topology), topology), float(each.bytes))


def _described(group: Sequence[PlannedCollective | CompiledCollective], topology: Topology, count: int) -> str:
    """Such as `2 reduce-scatters over x of 2 KiB × 118`."""
    from autoshard.tables import size

    alike: Mapping[tuple, int] = {}
    for each in group:
        key = (each.kind, axes_of(each, topology), float(each.bytes))
        alike = {**alike, key: alike.get(key, 0) + 1}
    parts = [
        (f"{n} {kind}s" if n > 1 else kind) + f" over {''.join(axes)} of {size(bytes)}"
        for (kind, axes, bytes), n in alike.items()
    ]
    return " and ".join(parts) + (f" × {count}" if count > 1 else "")


def _place(compiled: CompiledCollective) -> str:
    found = compiled.source or compiled.op_name.rpartition("shard_map/")[2]
    return f", {found}" if found else ""
