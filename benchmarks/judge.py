"""The step time of a compiled TPU program, for any contestant.

The judge reads only the text of the compiled program and its topology, so it cannot prefer a contestant:

$$T = \\frac{\\text{estimated cycles}}{\\text{clock}} + \\sum_{\\text{collectives}} \\text{runs} \\cdot T_{\\text{torus}},$$

where both sums multiply loop bodies by their trip counts. The cycles are the TPU compiler's own, written beside every
fusion, with the time to read and write HBM in them. It writes none beside collectives; these are costed from their bytes
and their replica groups (`autoshard.auditing.collective_times`).

`step_seconds` assumes no overlap. `overlapped_seconds` is the other extreme: computation hides all asynchronous work as far
as possible. `replayed_seconds` is between them: the schedule, as audits replay it (`autoshard.auditing.replay`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.auditing import hlo_collectives
from autoshard.auditing.collective_times import Sent, price_collective
from autoshard.auditing.hlo_parser import Module, Scope, parse, shape_bytes, trip_count, tuple_parts
from autoshard.auditing.replay import replay
from costmodels.machine.topology import Topology

_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
"""A memory space other than HBM in a shape's layout."""
_OPAQUE = ("custom-call", "gather", "scatter", "sort", "fusion", "convolution", "dot")
"""Opcodes that do work, whose cycles are missed where the compiler estimates none."""


@dataclass(frozen=True)
class Verdict:
    """The time of one step of a compiled program.

    - `compute_seconds`: estimated cycles over the clock.
    - `wire_seconds`, `wire_bytes`: collectives, run serially; bytes that one chip sends.
    - `replayed_seconds`: the schedule replayed, with copies and collectives beside the core.
    - `floor_seconds`: the bytes that the step must read or write once, at nominal HBM bandwidth.
    - `prefetch_bytes`: copies from HBM to on-chip memory beside computation; in no estimate.
    - `unestimated`: the number of runs of working operations without an estimate, by opcode.
    - `notes`: the judge's assumptions.
    """

    compute_seconds: float
    wire_seconds: float
    wire_bytes: float
    overlapped_seconds: float
    replayed_seconds: float
    floor_seconds: float
    prefetch_bytes: float
    sent: tuple[Sent, ...]
    unestimated: dict[str, int]
    notes: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """Computation and collectives, run serially."""
        return self.compute_seconds + self.wire_seconds


def judge(text: str, topology: Topology) -> Verdict:
    """The time of one step of a compiled TPU program.

    **Arguments:**

    - `text`: `compiled.as_text()`.
    - `topology`: its target; device numbers in the text count its chips row-major.

    **Raises:** `ValueError` if the text is not a compiled program, or has no estimates.
    """
    cycles, clock = hlo_collectives.estimated_cycles(text), topology.chip.clock_hertz
    replayed = replay(text, topology)
    if cycles is None or not clock or replayed is None:
        raise ValueError("The program carries no estimated cycles: only the TPU compiler writes them.")
    found = hlo_collectives.collectives(text, topology.axis_sizes)
    sent = tuple(each for each in (price_collective(one, topology) for one in found) if each.axes)
    wire = sum(each.seconds for each in sent)
    hideable = min(sum(each.seconds for each in sent if each.asynchronous), cycles / clock)
    unestimated, prefetched = _without_estimate(parse(text))
    guessed = sum(not each.count_known for each in found)
    odd = Counter(each.priced_as for each in sent if each.priced_as.startswith("odd"))
    notes = [f"{guessed} collectives in loops of unknown length"] * bool(guessed)
    notes += [f"{n} collectives over {what}" for what, n in odd.items()]
    return Verdict(
        compute_seconds=cycles / clock,
        wire_seconds=wire,
        wire_bytes=sum(each.wire_bytes for each in sent),
        overlapped_seconds=cycles / clock + wire - hideable,
        replayed_seconds=replayed.seconds,
        floor_seconds=replayed.floor_seconds,
        prefetch_bytes=prefetched,
        sent=sent,
        unestimated=unestimated,
        notes=tuple(notes),
    )


# --- what the estimates leave out


def _without_estimate(module: Module) -> tuple[dict[str, int], float]:
    """Runs of working operations without an estimate, by opcode, and the bytes prefetched from HBM."""
    runs: Counter[str] = Counter()
    prefetched = 0.0
    for scope, count in _scopes(Scope(module.computations[module.entry]), module, 1):
        for inst in scope.computation.instructions.values():
            collective = "all-" in inst.attributes or "AllReduceScatter" in inst.attributes
            if inst.opcode in _OPAQUE and '"estimated_cycles"' not in inst.attributes and not collective:
                runs[inst.opcode] += count
            if inst.opcode in ("copy-start", "slice-start", "async-start"):
                prefetched += count * _fetched(inst.shape, inst.opcode)
    return dict(runs), prefetched


def _fetched(shape: str, opcode: str) -> int:
    """The bytes that an asynchronous copy brings on the chip from HBM."""
    parts = tuple_parts(shape)
    target, source = (parts[1], parts[0]) if opcode != "copy-start" else (parts[0], parts[1])
    from_hbm = not _ON_CHIP.search(source.rpartition("{")[2]) and _ON_CHIP.search(target)
    return shape_bytes(target) if from_hbm else 0


def _scopes(scope: Scope, module: Module, count: int) -> Iterator[tuple[Scope, int]]:
    """Every computation that a run executes, except the insides of fusions, with its number of runs."""
    yield scope, count
    for inst in scope.computation.instructions.values():
        if inst.opcode == "while":
            rounds, _ = trip_count(inst, scope, module)
            names = [inst.attribute("body"), inst.attribute("condition")]
        elif inst.opcode != "fusion":
            rounds, names = 1, inst.called()
        else:
            continue
        for name in names:
            if name in module.computations:
                yield from _scopes(Scope(module.computations[name], inst, scope), module, count * rounds)
