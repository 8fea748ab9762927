"""The time of a compiled collective, from its bytes and its replica groups.

- Groups of all chips that share coordinates on the other axes cost as much as the plan's model says of these axes.
- Boxes of chips (parts of axes, or every k-th chip) cost the same over open axes as long as the box; where k groups are
  interleaved each has 1/k of the links.
- Other groups cost the same over all axes along which members of a group differ, as if the groups were whole.
- Pairs (a collective-permute) cost as much as the most loaded link, if every pair takes the shortest way, axis by
  axis; at most the costliest permutation of `costmodels.machine.collectives`, whose ways avoid each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from autoshard.auditing.hlo_collectives import CompiledCollective, groups_of
from costmodels.machine.collectives import seconds as collective_seconds
from costmodels.machine.collectives import wire_bytes
from costmodels.machine.topology import Axis, Topology

Link = tuple[str, int]
"""The links along an axis in one direction, 1 or -1."""


@dataclass(frozen=True)
class Sent:
    """One collective of the program: all its runs in one step together, per chip.

    `priced_as` is the interpretation of its groups: "axes", "box", "pairs", or "odd groups of 3". `links` are those of
    a run.
    """

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
    links: frozenset[Link]


def price_collective(collective: CompiledCollective, topology: Topology) -> Sent:
    """The time of all runs of a compiled collective; one among no chips has no axes."""
    members = groups_of(collective.groups, topology.size)
    varying = tuple(axis for i, axis in enumerate(topology.axes) if _differ(members, i, topology))
    links = frozenset((axis.name, way) for axis in varying for way in (1, -1))
    if collective.kind == "collective-permute":
        once, moved, links = _permute(members, collective.bytes, topology)
        how = "pairs"
    else:
        axes, how = _participating_axes(members, varying, topology)
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
        links=links,
    )


def _coordinates(device: int, topology: Topology) -> tuple[int, ...]:
    found = []
    for size in reversed(topology.shape):
        device, along = divmod(device, size)
        found.append(along)
    return tuple(reversed(found))


def _differ(members: Sequence[Sequence[int]], axis: int, topology: Topology) -> bool:
    return any(len({_coordinates(device, topology)[axis] for device in group}) > 1 for group in members)


def _participating_axes(
    members: Sequence[Sequence[int]], varying: Sequence[Axis], topology: Topology
) -> tuple[tuple[Axis, ...], str]:
    """The axes to price a collective over, and the interpretation by which they were found."""
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


def _permute(pairs: Sequence[Sequence[int]], bytes: float, topology: Topology) -> tuple[float, float, frozenset[Link]]:
    """Seconds of a collective-permute, the bytes that an average chip sends, and the links that it takes.

    Every pair takes the shortest way, axis by axis. If both directions around a ring are equally short, half of the
    bytes take each. The most loaded link determines the time, and the longest way adds its hops. Some permutations
    then crowd few links. Ways that avoid each other are never slower than two uniform exchanges, which is the upper
    bound.
    """
    moving = [pair for pair in pairs if pair[0] != pair[1]]
    if not moving:
        return 0.0, 0.0, frozenset()
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
    links = frozenset((topology.axes[i].name, direction) for i, _, direction in load)
    return min(bytes * slowest + longest + launch, costliest), bytes * len(moving) / topology.size, links


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
