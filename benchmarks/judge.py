"""The step time of a compiled TPU program, for any contestant.

The judge reads only the text of the compiled program and its topology, so it cannot prefer a contestant:

$$T = \\frac{\\text{estimated cycles}}{\\text{clock}} + \\sum_{\\text{collectives}} \\text{runs} \\cdot T_{\\text{torus}},$$

where both sums multiply loop bodies by their trip counts. The cycles are the TPU compiler's own, written beside every
fusion, with the time to read and write HBM in them. It writes none beside collectives; they are costed from their bytes
and their replica groups:

- groups of all chips that share coordinates on the other axes: `costmodels.machine.collectives.seconds` over these axes;
- boxes of chips (parts of axes, or every k-th chip): the same over open axes as long as the box; where k groups are
  interleaved each has 1/k of the links;
- other groups: the same over all axes along which members of a group differ, as if the groups were whole;
- pairs (a collective-permute): the most loaded link, when every pair takes the shortest way, axis by axis; at most the
  costliest permutation of `costmodels.machine.collectives`, which uses disjoint routes.

`step_seconds` assumes no overlap. `overlapped_seconds` is the other extreme: computation hides all asynchronous collectives as
far as possible.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from autoshard.auditing import hlo_collectives
from autoshard.auditing.hlo_parser import Module, Scope, parse, shape_bytes, trip_count, tuple_parts
from costmodels.machine.collectives import seconds as collective_seconds
from costmodels.machine.collectives import wire_bytes
from costmodels.machine.topology import Axis, Topology

_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
"""A memory space other than HBM in a shape's layout."""
_OPAQUE = ("custom-call", "gather", "scatter", "sort", "fusion", "convolution", "dot")
"""Opcodes that do work, whose cycles are missed where the compiler estimates none."""


@dataclass(frozen=True)
class Sent:
    """One collective of the program: all its runs in one step together, per chip."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    seconds: float
    wire_bytes: float
    asynchronous: bool
    spelling: str
    op_name: str
    priced_as: str


@dataclass(frozen=True)
class Verdict:
    """The time of one step of a compiled program.

    - `compute_seconds`: estimated cycles over the clock.
    - `wire_seconds`, `wire_bytes`: collectives, run serially; bytes that one chip sends.
    - `prefetch_bytes`: copies from HBM to on-chip memory beside computation; in no estimate.
    - `unestimated`: the number of runs of working operations without an estimate, by opcode.
    - `notes`: the judge's assumptions.
    """

    compute_seconds: float
    wire_seconds: float
    wire_bytes: float
    overlapped_seconds: float
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
    if cycles is None or not clock:
        raise ValueError("The program carries no estimated cycles: only the TPU compiler writes them.")
    found = hlo_collectives.collectives(text, topology.axis_sizes)
    sent = tuple(each for each in (priced(one, topology) for one in found) if each.axes)
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
        prefetch_bytes=prefetched,
        sent=sent,
        unestimated=unestimated,
        notes=tuple(notes),
    )


# --- collectives


def priced(collective: hlo_collectives.CompiledCollective, topology: Topology) -> Sent:
    """The cost of all runs of a compiled collective; a collective within one chip has no axes."""
    members = hlo_collectives.groups_of(collective.groups, topology.size)
    varying = tuple(axis for i, axis in enumerate(topology.axes) if _differ(members, i, topology))
    if collective.kind == "collective-permute":
        once, moved = _permute(members, collective.bytes, topology)
        how = "pairs"
    else:
        axes, how = _taking_part(members, varying, topology)
        once = float(collective_seconds(collective.kind, axes, float(collective.bytes)))
        moved = float(wire_bytes(collective.kind, axes, float(collective.bytes)))
    return Sent(
        kind=collective.kind,
        axes=tuple(axis.name for axis in varying),
        bytes=collective.bytes,
        count=collective.count,
        seconds=once * collective.count,
        wire_bytes=moved * collective.count,
        asynchronous=collective.asynchronous,
        spelling=collective.spelling,
        op_name=collective.op_name,
        priced_as=how,
    )


def _coordinates(device: int, topology: Topology) -> tuple[int, ...]:
    found = []
    for size in reversed(topology.shape):
        device, along = divmod(device, size)
        found.append(along)
    return tuple(reversed(found))


def _differ(members: Sequence[Sequence[int]], axis: int, topology: Topology) -> bool:
    return any(len({_coordinates(device, topology)[axis] for device in group}) > 1 for group in members)


def _taking_part(
    members: Sequence[Sequence[int]], varying: Sequence[Axis], topology: Topology
) -> tuple[tuple[Axis, ...], str]:
    """The axes to price a collective over, and how they were found."""
    whole = prod(axis.size for axis in varying)
    if all(len(group) == whole for group in members):
        return tuple(varying), "axes"
    boxes = {_box(group, topology) for group in members}
    if len(boxes) == 1 and (box := boxes.pop()):
        return box, "box"
    return tuple(varying), f"odd groups of {len(members[0])}"


def _box(group: Sequence[int], topology: Topology) -> tuple[Axis, ...] | None:
    """The open axes that a group fills, if it is a box of evenly spaced chips."""
    found = []
    columns = list(zip(*(_coordinates(device, topology) for device in group), strict=True))
    for axis, column in zip(topology.axes, columns, strict=True):
        places = sorted(set(column))
        strides = {b - a for a, b in pairwise(places)} or {1}
        if len(strides) > 1:
            return None
        stride = strides.pop()
        if len(places) == axis.size:
            found.append(axis)
        else:
            apart = {"bytes_per_second": axis.bytes_per_second / stride, "hop_seconds": axis.hop_seconds * stride}
            found.append(replace(axis, size=len(places), wraparound=False, **apart))
    return tuple(found) if prod(axis.size for axis in found) == len(set(group)) else None


def _permute(pairs: Sequence[Sequence[int]], bytes: float, topology: Topology) -> tuple[float, float]:
    """Seconds of a collective-permute, and the bytes that an average chip sends.

    Every pair takes the shortest way, along one axis after the other; where both ways round a ring are as short, half
    goes either way. The link with the most to carry decides, and the longest way adds its hops. Some permutations crowd
    few links so; ways that avoid each other are never slower than two uniform exchanges, which is the bound from above.
    """
    moving = [pair for pair in pairs if pair[0] != pair[1]]
    if not moving:
        return 0.0, 0.0
    load: dict[tuple[int, tuple[int, ...], int], float] = defaultdict(float)
    longest = 0.0
    for source, target in moving:
        here, there = _coordinates(source, topology), _coordinates(target, topology)
        latency = 0.0
        for i, axis in enumerate(topology.axes):
            ways = _ways(axis, here[i], there[i])
            for way in ways:
                for at, direction in way:
                    load[i, (*here[:i], at, *here[i + 1 :]), direction] += 1 / len(ways)
            latency += axis.hop_seconds * len(ways[0])
            here = (*here[:i], there[i], *here[i + 1 :])
        longest = max(longest, latency)
    slowest = max(times / topology.axes[i].bytes_per_second for (i, _, _), times in load.items())
    launch = max(axis.launch_seconds for axis in topology.axes)
    varying = tuple(axis for i, axis in enumerate(topology.axes) if _differ(moving, i, topology))
    costliest = float(collective_seconds("collective-permute", varying, float(bytes)))
    return min(bytes * slowest + longest + launch, costliest), bytes * len(moving) / topology.size


def _ways(axis: Axis, start: int, end: int) -> list[list[tuple[int, int]]]:
    """The shortest ways along an axis, each as links (chip that it leaves, direction)."""
    if axis.kind == "switch":
        return [[(start, 1)]] if start != end else [[]]
    forward, n = (end - start) % axis.size, axis.size
    up, down = (start + k for k in range(forward)), (start - k for k in range(n - forward))
    upward, downward = [(at % n, 1) for at in up], [(at % n, -1) for at in down]
    if not axis.ring:
        return [upward] if end >= start else [downward]
    if 2 * forward == n:
        return [upward, downward]
    return [upward] if 2 * forward < n else [downward]


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
    """Every computation that a run executes, but the insides of fusions, and how often."""
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
