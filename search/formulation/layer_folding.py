"""The folding of identical layers in a program that a Python loop unrolled.

A layer written once and run in a Python loop is traced as a stretch of operations that repeats with a period; so are
two or three kinds of layer that alternate. Copies of an operation share one variable of the search, as they would in a
`scan`: the classes found here. Sharing restricts the search to plans that treat all copies alike. The cost of such a
plan is exact, since every copy's reshards and bytes are counted where they occur. Depth then enters the search only as
a factor.

A stretch counts as layers when its copies agree operation by operation (the computation and its shapes), when operands
come from the same place in each (the same position of the same copy, or of the copy before; one array for all; or from
before all copies: an argument, or a value that the forward pass saved for a backward pass, in each transposed alike), and
when each copy is fed by the one before.

Operations outside the stretches share a class if their operands and users do, in the same way: the copies' arguments
and results, and an optimizer's work on each layer's parameters.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodels.program.program import Operation, Program
from costmodels.program.views import RENAMES
from search.formulation.colour_refinement import refine

_PERIODS = 24
"""The number of most frequent distances between like operations that are tried as periods."""
_KINDS = 8
"""The most matmuls of one kind in a period: as many kinds of layer may alternate."""


@dataclass(frozen=True)
class Fold:
    """A stretch of the program that repeats: its operations in order, and the number of them in one copy."""

    operations: tuple[int, ...]
    period: int

    @property
    def copies(self) -> int:
        """The number of whole copies."""
        return len(self.operations) // self.period


def identity_classes(program: Program) -> tuple[int, ...]:
    """Every operation in a class of its own."""
    return tuple(range(len(program.operations)))


def classes(program: Program) -> tuple[int, ...]:
    """Per operation the first operation of its class; an operation without a copy is its own class."""
    found = list(identity_classes(program))
    for fold in folds(program):
        for at, operation in enumerate(fold.operations):
            found[operation] = fold.operations[at % fold.period]
    repeated = {first for first, count in Counter(found).items() if count > 1}
    if repeated:
        _share_alike(program, found, repeated)
    return tuple(found)


def tie(found: Sequence[int], pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The classes after merging the classes of each pair of operations."""
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
    """Finds repeats among the operations of a program that no fold has taken yet."""

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
        best = (0, 0, 0)
        for period in self._periods():  # in rising order: of two equally long stretches, the shorter period is right
            for start, length in self._runs(period, longer_than=best[1]):
                if length > best[1]:
                    best = (start, length, period)
        start, length, period = best
        if not length:
            return None
        whole = (length + period) // period * period
        return Fold(tuple(self.body[start : start + whole]), period)

    def take(self, fold: Fold) -> None:
        """Excludes a fold's operations from further search."""
        first = self.place[fold.operations[0]]
        self.free[first : first + len(fold.operations)] = False

    def _periods(self) -> list[int]:
        """Distances between matmuls of one kind, adjacent or a few apart: the most frequent at each step."""
        places: dict[int, list[int]] = {}
        for place in np.flatnonzero(self.heavy & self.free).tolist():
            places.setdefault(int(self.kinds[place]), []).append(place)
        found: set[int] = set()
        for apart in range(1, _KINDS + 1):
            distances: Counter[int] = Counter()
            for at in places.values():
                distances.update(after - before for before, after in zip(at, at[apart:], strict=False))
            found.update(period for period, _ in distances.most_common(_PERIODS))
        return sorted(found)

    def _runs(self, period: int, longer_than: int) -> list[tuple[int, int]]:
        """Stretches of at least one period in which every operation is like the one a period later."""
        alike = (self.kinds[:-period] == self.kinds[period:]) & self.free[:-period] & self.free[period:]
        edges = np.flatnonzero(np.diff(np.r_[False, alike, False].astype(np.int8)))
        found = []
        for start, end in edges.reshape(-1, 2).tolist():
            while end - start >= max(period, longer_than + 1):
                length = self._sound(start, end - start, period)
                if length >= period and self._is_chain(start, period):
                    found.append((start, length))
                start += max(length, 1)
        return found

    def _sound(self, start: int, length: int, period: int) -> int:
        """The length from `start` on for which the operands, too, come from corresponding places."""
        for at in range(start, start + length):
            if not self._flows_alike(at, period, start):
                return at - start
        return length

    def _flows_alike(self, at: int, period: int, start: int) -> bool:
        one, next_ = (self.program.operations[self.body[place]] for place in (at, at + period))
        for a, b in zip(one.inputs, next_.inputs, strict=True):
            if a.value == b.value:
                continue
            made, remade = self._producer(a.value), self._producer(b.value)
            if remade - made != period and not (made < start and (remade < start or at < start + period)):
                return False
            if remade < start and self._transposes(a.value) != self._transposes(b.value):
                return False
        return True

    def _transposes(self, value: int) -> tuple[object, ...]:
        """The transpositions, by their signatures, among the views that made a value of another."""
        found: list[object] = []
        operations = self.program.operations
        while (producer := self.program.producers.get(value)) is not None:
            op = operations[producer[0]]
            if op.primitive not in RENAMES or len(op.inputs) != 1:
                break
            if op.primitive == "transpose":
                found.append(op.signature)
            value = op.inputs[0].value
        return tuple(found)

    def _producer(self, value: int) -> int:
        """The place in the body where a value is made; before the body, for an argument."""
        producer = self.program.producers.get(value)
        return -1 if producer is None else self.place.get(producer[0], -1)

    def _is_chain(self, start: int, period: int) -> bool:
        """Whether the second copy does matrix work, and needs a value of the first."""
        if not self.heavy[start : start + period].any():
            return False
        for at in range(start + period, start + 2 * period):
            for use in self.program.operations[self.body[at]].inputs:
                made = self._producer(use.value)
                if start <= made < start + period:
                    return True
        return False


def _key(program: Program, op: Operation) -> tuple:
    """The properties in which copies of an operation agree: all but its reads from memory, which may differ."""
    uses = (*op.inputs, *op.outputs)
    arrays = tuple((program.values[use.value].shape, program.values[use.value].dtype) for use in uses)
    runs = tuple(program.multiplicity(use.region) for use in uses)
    work = (op.op_class, op.flops_per_point, op.dtype, op.exact, op.pinned)
    return (op.primitive, op.signature, arrays, runs, program.multiplicity(op.region), work)


def _share_alike(program: Program, found: list[int], repeated: set[int]) -> None:
    """Classes operations outside of the folds by their users and operands, which must be alike.

    Colours are refined until operations of one colour have operands and users of the same colours. Sums of scalars do
    not separate layers: the users of scalars do not count.
    """
    apart = [i for i in _connected_operations(program, found, repeated) if found[i] not in repeated]
    colours = _first_colours(program, found, repeated)
    donor = {program.results[b]: program.arguments[a] for a, b in program.donated}
    partner = donor | {argument: result for result, argument in donor.items()}
    around = {i: _neighbourhood(program, i, partner.get(i)) for i in apart}
    seers: dict[int, set[int]] = defaultdict(set)
    for i, groups in around.items():
        for other, _ in itertools.chain.from_iterable(groups):
            seers[other].add(i)

    def sight(i: int) -> tuple:
        return tuple(tuple(sorted((colours[other], k) for other, k in group)) for group in around[i])

    refine(colours, apart, sight, seers)
    first: dict[int, int] = {}
    for i in apart:
        found[i] = first.setdefault(colours[i], i)


def _first_colours(program: Program, found: Sequence[int], repeated: set[int]) -> list[int]:
    """The first colour of each operation: a fold's class for its members, the computation for others."""
    given = {program.arguments[argument] for argument, _ in program.donated}
    handed = {program.arguments[argument] for _, argument in program.handoffs}
    handed |= {program.results[result] for result, _ in program.handoffs}
    ids: dict[tuple, int] = {}
    return [
        found[i]
        if found[i] in repeated
        else ids.setdefault((_key(program, op), i in given, i in handed), len(program.operations) + len(ids))
        for i, op in enumerate(program.operations)
    ]


def _neighbourhood(program: Program, i: int, partner: int | None) -> list[list[tuple[int, int]]]:
    """An operation's neighbourhood, in unordered groups: operands' makers, results' users, its donation partner."""
    op = program.operations[i]
    made = [[program.producers[use.value]] for use in op.inputs]
    users = [list(program.consumers.get(use.value, ())) for use in op.outputs if program.values[use.value].shape]
    return [*made, *users, [] if partner is None else [(partner, 0)]]


def _connected_operations(program: Program, found: Sequence[int], repeated: set[int]) -> list[int]:
    """The operations that values connect with a fold, in order."""
    queue = [i for i in range(len(program.operations)) if found[i] in repeated]
    seen, seen_values = set(queue), set[int]()
    while queue:
        op = program.operations[queue.pop()]
        values = {use.value for use in (*op.inputs, *op.outputs)} - seen_values
        seen_values |= values
        near = {program.producers[value][0] for value in values if value in program.producers}
        near.update(at for value in values for at, _ in program.consumers.get(value, ()))
        queue += near - seen
        seen |= near
    return sorted(seen)
