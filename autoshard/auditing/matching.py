"""The matching of compiled collectives with the planned ones whose work they do.

Partners are matched pass by pass, the most literal first: one for one, several planned in one compiled, one planned in
several compiled parts. Each pass begins with the same kind, then tries the spellings that a compiler may choose
instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.planning.records import PlannedCollective
from costmodels.machine.collectives import wire_bytes
from costmodels.machine.topology import Topology

Axes = tuple[str, ...]

_ALIKE = 0.005
"""Relative difference between byte counts that padding may cause."""
_GRAIN = _ALIKE / 16
"""Relative difference below which partial sums of byte counts are merged."""
_MOST_TOGETHER = 4
"""The most collectives matched with one, if the compiled program does not say how many it combined."""
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_SPELLINGS = (*((kind, kind) for kind in _KINDS), ("reduce-scatter", "all-reduce"), ("all-gather", "all-reduce"))
"""Planned kinds with the kinds that they may be compiled to, the most literal first."""


_MOVES = ("all-gather", "all-to-all", "collective-permute")
"""Kinds that leave all values unchanged."""
_PICKS = ("max", "min")
"""Reductions whose result is one of the values."""
_HALF = ("bf16", "f16")
_NARROWER = 0.75
"""The part of its bytes below which a collective must have been sent in a narrower type."""


@dataclass(frozen=True)
class Pair:
    """Planned collectives beside the compiled ones that do their work, `count` times; either side may be empty.

    `width` is the width of the sent values over the planned one: 2 for 16-bit floats on host devices, 1/2 for float32
    that a matmul reads as bfloat16. `arrays` are the indices of the arrays that the planned ones send.
    """

    planned: tuple[PlannedCollective, ...]
    compiled: tuple[CompiledCollective, ...]
    count: int
    width: float = 1.0
    arrays: tuple[int, ...] = ()


def match_collectives(
    planned: Sequence[PlannedCollective],
    arrays: Sequence[int],
    compiled: Sequence[CompiledCollective],
    topology: Topology,
    widths: Sequence[float] = (),
    narrow: Sequence[bool] = (),
) -> tuple[Pair, ...]:
    """Pairs all planned with all compiled collectives, where an array that is planned twice may be sent once.

    **Arguments:**

    - `arrays`: the index of the array that each planned collective sends.
    - `widths`, `narrow`: as in `pair_collectives`.
    """
    times: Counter[tuple[Any, ...]] = Counter()
    again = []
    for each, array in zip(planned, arrays, strict=True):
        alike = (array, each.kind, frozenset(each.axes), each.bytes, each.count)
        again.append(times[alike])
        times[alike] += 1
    order = sorted(range(len(planned)), key=lambda i: again[i])  # so that repetitions are those left without a partner
    pairs = pair_collectives(
        [planned[i] for i in order],
        compiled,
        topology,
        [widths[i] for i in order] if widths else (),
        [narrow[i] for i in order] if narrow else (),
        [arrays[i] for i in order],
    )
    return join_repetitions(pairs)


def pair_collectives(
    planned: Sequence[PlannedCollective],
    compiled: Sequence[CompiledCollective],
    topology: Topology,
    widths: Sequence[float] = (),
    narrow: Sequence[bool] = (),
    arrays: Sequence[int] = (),
) -> tuple[Pair, ...]:
    """Pairs all planned with all compiled collectives; those without a partner come last, alone.

    **Arguments:**

    - `widths`: the factor by which the sent values of each planned collective are wider; 1 by default.
    - `narrow`: whether the compiler may send its values with half as many bits, if their users read no more.
    - `arrays`: the index of the array that each planned collective sends; by default each sends its own.
    """
    widths, arrays = widths or [1.0] * len(planned), arrays or range(len(planned))
    lots = [
        _Lot(p, p.kind, axes_of(p, topology), p.bytes * width, int(p.count), array)
        for p, width, array in zip(planned, widths, arrays, strict=True)
    ]
    found = [_Lot(c, c.kind, axes_of(c, topology), float(c.bytes), c.count) for c in compiled]
    pairing = _Pairing(lots, found, [])
    halves = [lot for lot, half in zip(lots, narrow, strict=False) if half and lot.kind in (*_MOVES, "all-reduce")]
    narrowed = _Pairing(halves, [lot for lot in found if _may_be_narrower(lot.of)], pairing.pairs)
    if halves:  # by their types, before two of half the bytes count as the parts of one
        wide = [lot for lot in found if lot.of.dtype == "f32"]
        _Pairing(
            [lot for lot in lots if lot not in halves], [lot for lot in found if lot not in wide], pairing.pairs
        ).match_singly()
        _Pairing(halves, wide, pairing.pairs).match_singly()
        _send_halves(halves)
        narrowed.match_singly()
    for lot in halves:
        lot.bytes = float(lot.of.bytes)
    pairing.run()
    for lot in lots:
        lot.bytes = float(lot.of.bytes)  # not widened after all
    pairing.run()
    _send_halves(halves)
    narrowed.run()
    alone = [Pair((lot.of,), (), lot.left, arrays=(lot.array,)) for lot in lots if lot.left]
    return (*pairing.pairs, *alone, *(Pair((), (lot.of,), lot.left) for lot in found if lot.left))


def _may_be_narrower(each: CompiledCollective) -> bool:
    """Whether a collective sends 16-bit floats and computes nothing with them, so its values may be those of float32."""
    return each.dtype in _HALF and (each.kind in _MOVES or each.reduction in _PICKS)


def _send_halves(lots: Sequence[_Lot]) -> None:
    for lot in lots:
        lot.bytes = lot.of.bytes / 2


def join_repetitions(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Joins planned collectives without a partner to those that send the same array in the same way, for another use."""

    def sent_keys(pair: Pair) -> set[tuple[Any, ...]]:
        numbered = zip(pair.arrays, pair.planned, strict=True)
        return {(array, each.kind, frozenset(each.axes), each.bytes) for array, each in numbered}

    found: list[Pair] = []
    for pair in pairs:  # those with partners come first
        same = [i for i, other in enumerate(found) if other.planned and sent_keys(pair) & sent_keys(other)]
        if same and not pair.compiled and found[same[0]].count == pair.count:
            one = found[same[0]]
            joined = (*one.planned, *pair.planned), (*one.arrays, *pair.arrays)
            found[same[0]] = replace(one, planned=joined[0], arrays=joined[1])
        else:
            found.append(pair)
    return tuple(found)


def expected_bytes(pair: Pair, topology: Topology) -> float:
    """Bytes that the plan expects one chip to send per step for a pair: at most the planned ones, in its width.

    A compiler may send one array once for several uses, and several arrays as one. The plan expects these savings.
    """
    planned = pair.width * sum(sent_bytes(each, topology) for each in pair.planned)
    compiled = sum(sent_bytes(each, topology) for each in pair.compiled)
    saves = pair.compiled and not is_literal(pair) and compiled < planned
    return pair.count * (compiled if saves else planned)


def sent_bytes(each: PlannedCollective | CompiledCollective, topology: Topology) -> float:
    """Bytes that one chip sends in one run of a collective."""
    along = tuple(topology.axis(name) for name in axes_of(each, topology))
    return float(wire_bytes(each.kind, along, float(each.bytes)))


def axes_of(collective: PlannedCollective | CompiledCollective, topology: Topology) -> Axes:
    """The axes of a collective in mesh order, without those of one chip; all if its groups are not a set of axes."""
    order = [axis.name for axis in topology.axes if axis.size > 1]
    return tuple(axis for axis in order if collective.axes is None or axis in collective.axes)


def is_literal(pair: Pair) -> bool:
    """Whether every planned collective of a pair is compiled to one of its kind, with values that are not narrower."""
    kinds = {p.kind for p in pair.planned} == {c.kind for c in pair.compiled} and len(pair.planned) == len(
        pair.compiled
    )
    return kinds and sum(c.bytes for c in pair.compiled) > _NARROWER * sum(p.bytes for p in pair.planned)


def is_realignment(collective: CompiledCollective) -> bool:
    """Whether a collective only sends the rows that the padding of a reduce-scatter left with a neighbour."""
    return collective.spelling == "reduce-scatter realignment"


@dataclass(eq=False)
class _Lot:
    """A collective of either side, and its executions that have no partner yet."""

    of: Any
    kind: str
    axes: Axes
    bytes: float
    left: int
    array: int = -1


class _Pairing:
    def __init__(self, planned: list[_Lot], compiled: list[_Lot], pairs: list[Pair]) -> None:
        self.planned, self.compiled, self.pairs = planned, compiled, pairs

    def match_singly(self) -> None:
        """Each collective with one of its own kind."""
        for kind in dict.fromkeys(lot.kind for lot in self.planned):
            compiled, planned = ([lot for lot in side if lot.kind == kind] for side in (self.compiled, self.planned))
            self._match(compiled, planned, lambda lot: 1)

    def run(self) -> None:
        """All passes over the collectives without a partner."""
        for planned_kind, compiled_kind in _SPELLINGS:
            planned = [lot for lot in self.planned if lot.kind == planned_kind]
            compiled = [lot for lot in self.compiled if _may_be(lot, planned_kind, compiled_kind)]
            self._match(compiled, planned, lambda lot: 1)
            self._match(compiled, planned, _largest_bytes)
            self._match(planned, compiled, lambda lot: _MOST_TOGETHER)
        self._halves()
        self._realignments()

    def _match(self, single: Sequence[_Lot], several: Sequence[_Lot], most: Callable[[_Lot], int]) -> None:
        """Finds, for every lot of one side, lots of the other side that sum to it."""
        for lot in single:
            while lot.left and (group := _find_summands(lot, several, most(lot))):
                self._pair([lot, *group])

    def _halves(self) -> None:
        """A planned all-reduce as a reduce-scatter and an all-gather."""
        for lot in self.planned:
            if lot.kind == "all-reduce" and lot.left:
                fitting = [c for c in self.compiled if c.left and c.axes == lot.axes and _is_close(c.bytes, lot.bytes)]
                both = [next((c for c in fitting if c.kind == kind), None) for kind in ("reduce-scatter", "all-gather")]
                if all(both):
                    self._pair([lot, *(c for c in both if c)])

    def _realignments(self) -> None:
        """Permutes of the rows that padding left with a neighbour belong to the reduce-scatters before them."""
        for lot in self.compiled:
            if lot.left and is_realignment(lot.of):
                fitting = [i for i, pair in enumerate(self.pairs) if self._scatters(pair, lot)]
                if fitting:
                    pair = self.pairs[fitting[0]]
                    self.pairs[fitting[0]] = replace(pair, compiled=(*pair.compiled, lot.of))
                    lot.left -= pair.count

    def _scatters(self, pair: Pair, permute: _Lot) -> bool:
        scatter = next((c for c in pair.compiled if c.spelling == "all-reduce-scatter fusion"), None)
        alone = scatter is not None and len(pair.compiled) == 1 and pair.count <= permute.left
        return alone and scatter is not None and scatter.axes == permute.of.axes

    def _pair(self, lots: Sequence[_Lot]) -> None:
        count = min(lot.left for lot in lots)
        for lot in lots:
            lot.left -= count
        planned, compiled = ([lot for lot in lots if lot in side] for side in (self.planned, self.compiled))
        width = _sum(planned) / (sum(lot.of.bytes for lot in planned) or 1.0)
        self.pairs.append(
            Pair(
                planned=tuple(lot.of for lot in planned),
                compiled=tuple(lot.of for lot in compiled),
                count=count,
                width=width or 1.0,
                arrays=tuple(lot.array for lot in planned),
            )
        )


def _find_summands(whole: _Lot, lots: Sequence[_Lot], most: int) -> list[_Lot]:
    """At most this many lots whose bytes sum to another's: all, or the fewest of the nearest sums.

    Empty if no sum matches.
    """
    fitting = [lot for lot in lots if lot.left and lot.axes == whole.axes and lot.bytes <= whole.bytes * (1 + _ALIKE)]
    if one_by_one := _part_by_part(whole, fitting):
        return one_by_one
    if fitting and len(fitting) <= most and _is_close(_sum(fitting), whole.bytes):
        return fitting
    groups = (group for group in _groups(fitting, most, whole.bytes) if _is_close(_sum(group), whole.bytes))
    return min(groups, key=lambda group: (abs(_sum(group) - whole.bytes), len(group)), default=[])


def _part_by_part(whole: _Lot, lots: Sequence[_Lot]) -> list[_Lot]:
    """A lot for each array that a compiled collective says it combines; none if any has no match."""
    parts = whole.of.parts if isinstance(whole.of, CompiledCollective) else ()
    left, found = list(lots), []
    for part in sorted(parts, reverse=True):
        at = next((k for k, lot in enumerate(left) if _is_close(lot.bytes, part)), None)
        if at is None:
            return []
        found.append(left.pop(at))
    return found


def _groups(lots: Sequence[_Lot], most: int, target: float) -> Iterator[list[_Lot]]:
    """Groups of lots up to a number of bytes; of those with about the same sum the smallest.

    Lots of the same bytes are interchangeable, and sums that differ by much less than padding are merged. So hundreds
    of lots that a compiler combined are not tried in all their combinations.
    """
    kinds: dict[float, list[_Lot]] = {}
    for lot in lots:
        kinds.setdefault(lot.bytes, []).append(lot)
    grain = _GRAIN * target or 1.0
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # the sum, and the number of each kind
    for bytes, alike in sorted(kinds.items(), reverse=True):
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, counts in found.values():
            room = int((target * (1 + _ALIKE) - total) // bytes) if bytes else 0
            for n in range(min(len(alike), most - sum(counts), room) + 1):
                each = total + n * bytes, (*counts, n)
                known = grown.setdefault(round(each[0] / grain), each)
                if sum(each[1]) < sum(known[1]):
                    grown[round(each[0] / grain)] = each
        found = grown
    order = [kinds[bytes] for bytes in sorted(kinds, reverse=True)]
    for _, counts in found.values():
        group = [lot for alike, n in zip(order, counts, strict=True) for lot in alike[:n]]
        if group:
            yield group


def _sum(group: Sequence[_Lot]) -> float:
    return sum(lot.bytes for lot in group)


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _ALIKE * max(a, b)


def _largest_bytes(lot: _Lot) -> int:
    combined = lot.of.spelling.removeprefix("combined ")
    return int(combined) if combined.isdigit() else _MOST_TOGETHER


def _may_be(lot: _Lot, planned_kind: str, compiled_kind: str) -> bool:
    """Whether a compiled collective may stand for a planned kind; an all-reduce gathers only among zeros."""
    gathers = (planned_kind, compiled_kind) == ("all-gather", "all-reduce")
    return lot.kind == compiled_kind and (not gathers or "gather" in lot.of.spelling)
