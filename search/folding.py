"""Identical layers, found again in the program that a Python loop unrolled.

A layer written once and run in a Python loop comes out of the trace as a stretch of operations that repeats with a period.
Copies of an operation share one variable of the search, as they would in a `scan`: the classes found here. Sharing is a
restriction to plans that treat all copies alike; what such a plan costs is exact, since every copy's changes of layout and
bytes are counted where they are. Depth then enters the search only as a factor.

A stretch counts as layers when its copies agree operation by operation (what is computed, on which shapes), when operands
come from the same place in each (the same position of the same copy, or of the copy before; an argument; or one array for
all), and when each copy is fed by the one before. The arguments and results of the copies are shared accordingly.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodels.program import Operation, Program

_PERIODS = 24
"""How many of the commonest distances between like operations are tried as periods."""
_KIN = 8
"""To how many earlier matmuls of its kind the distances of a matmul are taken."""


@dataclass(frozen=True)
class Fold:
    """A stretch of the program that repeats: its operations in order, and how many make one copy."""

    operations: tuple[int, ...]
    period: int

    @property
    def copies(self) -> int:
        """How many whole copies there are."""
        return len(self.operations) // self.period


def unfolded(program: Program) -> tuple[int, ...]:
    """Every operation in a class of its own."""
    return tuple(range(len(program.operations)))


def classes(program: Program) -> tuple[int, ...]:
    """Per operation the first operation of its class; an operation that nothing repeats is its own class."""
    found = list(unfolded(program))
    for fold in folds(program):
        for at, operation in enumerate(fold.operations):
            found[operation] = fold.operations[at % fold.period]
    repeated = {first for first, count in Counter(found).items() if count > 1}
    if repeated:
        _share_arguments(program, found, repeated)
        _share_results(program, found, repeated)
    return tuple(found)


def tied(found: Sequence[int], pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The classes after making each pair of operations alike; two classes that meet become one."""
    root = {first: first for first in found}

    def top(first: int) -> int:
        while root[first] != first:
            first = root[first]
        return first

    for a, b in pairs:
        low, high = sorted((top(found[a]), top(found[b])))
        root[high] = low
    return tuple(top(first) for first in found)


def folds(program: Program) -> tuple[Fold, ...]:
    """The stretches that repeat, the longest first."""
    body = [i for i, op in enumerate(program.operations) if op.op_class not in ("source", "sink")]
    if not body:
        return ()
    search = _Search(program, body)
    found = []
    while (best := search.longest()) is not None:
        found.append(best)
        search.take(best)
    return tuple(found)


class _Search:
    """Looks for repeats among the operations of a program that no fold has taken yet."""

    def __init__(self, program: Program, body: Sequence[int]) -> None:
        self.program, self.body = program, body
        self.place = {operation: at for at, operation in enumerate(body)}
        numbers: dict[object, int] = {}
        keys = (_key(program, program.operations[i]) for i in body)
        self.kinds = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self.heavy = np.array([program.operations[i].op_class == "matmul" for i in body])
        self.free = np.ones(len(body), dtype=bool)

    def longest(self) -> Fold | None:
        """The fold that shares the most operations, of those not yet taken."""
        best: tuple[int, int, int] | None = None
        for period in self._periods():
            for start, length in self._runs(period):
                if best is None or (length, -period) > (best[1], -best[2]):
                    best = (start, length, period)
        if best is None:
            return None
        start, length, period = best
        whole = (length + period) // period * period
        return Fold(tuple(self.body[start : start + whole]), period)

    def take(self, fold: Fold) -> None:
        """Leaves a fold's operations out of what is looked for next."""
        first = self.place[fold.operations[0]]
        self.free[first : first + len(fold.operations)] = False

    def _periods(self) -> list[int]:
        """The commonest distances between matmuls of one kind that are not far apart; a layer may have several of a kind."""
        at = np.flatnonzero(self.heavy & self.free)
        last: dict[int, deque[int]] = {}
        distances: Counter[int] = Counter()
        for place in at.tolist():
            before = last.setdefault(int(self.kinds[place]), deque(maxlen=_KIN))
            distances.update(place - other for other in before)
            before.append(place)
        return sorted(period for period, _ in distances.most_common(_PERIODS))

    def _runs(self, period: int) -> list[tuple[int, int]]:
        """Stretches of at least one period in which every operation is like the one a period later."""
        alike = (self.kinds[:-period] == self.kinds[period:]) & self.free[:-period] & self.free[period:]
        edges = np.flatnonzero(np.diff(np.r_[False, alike, False].astype(np.int8)))
        found = []
        for start, end in edges.reshape(-1, 2).tolist():
            while end - start >= period:
                length = self._sound(start, end - start, period)
                if length >= period and self._chained(start, period):
                    found.append((start, length))
                start += max(length, 1)
        return found

    def _sound(self, start: int, length: int, period: int) -> int:
        """How far from `start` on the operands, too, come from like places."""
        for at in range(start, start + length):
            if not self._flows_alike(at, period, start):
                return at - start
        return length

    def _flows_alike(self, at: int, period: int, start: int) -> bool:
        one, next_ = (self.program.operations[self.body[place]] for place in (at, at + period))
        for a, b in zip(one.inputs, next_.inputs, strict=True):
            if a.value == b.value:
                continue
            made, remade = self._made_at(a.value), self._made_at(b.value)
            if made is None or remade is None:
                if made is not remade:
                    return False
            elif remade - made != period and not (at < start + period and made < start):
                return False
        return True

    def _made_at(self, value: int) -> int | None:
        """Where in the body a value is made; None for an argument."""
        producer = self.program.producers.get(value)
        return None if producer is None else self.place.get(producer[0])

    def _chained(self, start: int, period: int) -> bool:
        """Whether the second copy does matrix work, and needs something of the first."""
        if not self.heavy[start : start + period].any():
            return False
        for at in range(start + period, start + 2 * period):
            for use in self.program.operations[self.body[at]].inputs:
                made = self._made_at(use.value)
                if made is not None and start <= made < start + period:
                    return True
        return False


def _key(program: Program, op: Operation) -> tuple:
    """What two operations must agree in to be copies of each other: all but what they read from memory, which the first may."""
    uses = (*op.inputs, *op.outputs)
    arrays = tuple((program.values[use.value].shape, program.values[use.value].dtype) for use in uses)
    runs = tuple(program.multiplicity(use.region) for use in uses)
    work = (op.op_class, op.flops_per_point, op.dtype, op.exact, op.pinned)
    return (op.primitive, op.signature, arrays, runs, program.multiplicity(op.region), work)


def _share_arguments(program: Program, found: list[int], repeated: set[int]) -> None:
    """Puts arguments that like operations use alike into one class."""
    taken = {program.arguments[argument] for argument, _ in program.donated}
    handed = {program.arguments[argument] for _, argument in program.handoffs}
    first: dict[tuple, int] = {}
    for i, op in enumerate(program.operations):
        if op.op_class != "source":
            continue
        uses = [(found[at], k) for at, k in program.consumers.get(op.outputs[0].value, ())]
        if any(at in repeated for at, _ in uses):
            key = (_key(program, op), tuple(sorted(uses)), i in taken, i in handed)
            found[i] = first.setdefault(key, i)


def _share_results(program: Program, found: list[int], repeated: set[int]) -> None:
    """Puts results that come out of like operations into one class."""
    donor = {program.results[result]: found[program.arguments[argument]] for argument, result in program.donated}
    handed = {program.results[result] for result, _ in program.handoffs}
    first: dict[tuple, int] = {}
    for i, op in enumerate(program.operations):
        if op.op_class != "sink" or op.inputs[0].value not in program.producers:
            continue
        at, position = program.producers[op.inputs[0].value]
        if found[at] in repeated:
            key = (_key(program, op), found[at], position, donor.get(i), i in handed)
            found[i] = first.setdefault(key, i)
