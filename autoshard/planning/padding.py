"""The choice of padding: which dimensions that the mesh axes do not divide are padded, and to which sizes.

Each padded program is a search of its own, with its own proof. The choice among them is by descent: the dimensions are
tried one by one, the costliest first, each with the sizes that more axes divide, and the fastest padding is kept. A search
ends as soon as its bound shows that the padding is not faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil, inf, prod
from time import monotonic

from autoshard._util.tables import time
from autoshard.annotating.annotated_function import AnnotatedFunction, annotate_pins
from autoshard.annotating.padding import Occurrences, Padding, dimensions_of, paddings_by_value
from autoshard.errors import InfeasibleError
from autoshard.planning.chains import choose_chains
from autoshard.planning.options import Options
from autoshard.planning.padding_costs import cut_seconds
from autoshard.planning.records_of import result_plans
from autoshard.planning.solving import LOG, ProgramChoice, solve_below
from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN
from costmodels.program.program import Program
from search.formulation.layer_folding import classes
from search.solve import Solution

_MOST = 1.75
"""The largest padded size that is tried, as a multiple of the size."""
_LEAST_GAIN = 0.005
"""The fraction of a step that the padding of a dimension must save.

Of the paddings of `benchmarks/uneven.py` that were planned to save 0.4 %, one was replayed 4.8 % slower (Falcon-7B decode on
v4 4x4x4). Those that were planned to save 1 % or more, without more work on the chip, were all replayed faster.
"""


@dataclass(frozen=True)
class _Candidate:
    """Dimensions that are padded together: one, or that of every layer of an unrolled model."""

    members: tuple[Occurrences, ...]

    @property
    def size(self) -> int:
        return self.members[0].size

    @property
    def refusal(self) -> str:
        """Why they cannot be padded; empty if they can."""
        crossed = any(a.overlaps(b) for k, a in enumerate(self.members) for b in self.members[:k])
        reasons = (each.refusal for each in self.members)
        return next(filter(None, reasons), "it occurs in one dimension twice" if crossed else "")

    def overlaps(self, others: Sequence[Occurrences]) -> bool:
        """Whether a member occurs where one of the others does."""
        return any(each.overlaps(other) for each in self.members for other in others)


@dataclass(frozen=True)
class _Padded:
    """Dimensions with the size that they are padded to."""

    candidate: _Candidate
    size: int


@dataclass(frozen=True)
class _Found:
    """A plan with its seconds: of the step with the cut of its results, and of its collectives."""

    function: AnnotatedFunction
    solution: Solution
    padded: tuple[_Padded, ...]
    seconds: float
    collectives: float

    def pays(self, other: _Found | None) -> bool:
        """Whether this plan is faster than another with less padding, and does not work more on the chip.

        A compiler may hide collectives behind work, but not work. Libtpu 0.0.50 hides up to 92 % of those of the prefills of
        `benchmarks/uneven.py` on v5e. Of GPT-2 XL on v5e 2x4, a padding that works 5 % more to save collectives was planned
        5 % faster and replayed 20 % slower.
        """
        if other is None:
            return True
        enough = self.seconds < other.seconds * (1 - _LEAST_GAIN)
        return enough and self.seconds - self.collectives <= other.seconds - other.collectives


def choose_padding(function: AnnotatedFunction, topology: Topology, options: Options) -> ProgramChoice:
    """The fastest plan over the paddings that are tried, the unpadded function among them.

    A function whose dimensions all divide is searched once.

    **Raises:** `InfeasibleError` if no plan fits, `PinError`.
    """
    started, error = monotonic(), None
    try:
        plain = choose_chains(function, topology, options)
    except InfeasibleError as found:
        plain, error = None, found
    original = (function.chained or function) if plain and _has_chains(plain.function) else function
    candidates = _candidates(original.program, topology)
    trials = _Trials(original, topology, options, plain, started)
    for each in candidates:
        if not each.refusal and not each.overlaps([m for p in trials.padded for m in p.candidate.members]):
            before = trials.padded
            for size in _sizes(each.size, topology):
                trials.run((*before, _Padded(each, size)))
    if trials.best is None:
        assert error is not None
        raise error
    best, notes = trials.best, trials.notes([each for each in candidates if each.refusal])
    return ProgramChoice(best.function, best.solution, (*(plain.notes if plain else ()), *notes))


class _Trials:
    """The searches of a function with different paddings, and the best of them."""

    def __init__(
        self,
        original: AnnotatedFunction,
        topology: Topology,
        options: Options,
        plain: ProgramChoice | None,
        started: float,
    ) -> None:
        self.original, self.topology, self.options, self.started = original, topology, options, started
        self.plain = self.best = plain and self._found(plain.function, plain.solution, ())
        self.tried, self.untried = 1, 0
        self.exposed: tuple[_Padded, float] | None = None

    @property
    def padded(self) -> tuple[_Padded, ...]:
        """The best padding."""
        return self.best.padded if self.best else ()

    def run(self, padded: tuple[_Padded, ...]) -> None:
        """Searches the function with a padding, and keeps the plan if it pays; not after the time limit."""
        limit = self.options.time_limit
        left = None if limit is None else limit - (monotonic() - self.started)
        if left is not None and left <= 0:
            self.untried += 1
            return
        self.tried += 1
        last = padded[-1]
        (self.options.progress or LOG.info)(f"a dimension of {last.candidate.size} padded to {last.size}")
        function = self.original.padded([*_paddings(padded)])
        function = annotate_pins(function, self.topology, self.options.pins)
        cutoff = inf if self.best is None else self.best.seconds * (1 - _LEAST_GAIN)
        solution = solve_below(function, self.topology, replace(self.options, time_limit=left), cutoff)
        if solution is None:
            return
        found = self._found(function, solution, padded)
        if found.pays(self.best):
            self.best = found
        elif self.best and found.seconds < self.best.seconds * (1 - _LEAST_GAIN):
            self.exposed = last, found.seconds

    def _found(self, function: AnnotatedFunction, solution: Solution, padded: tuple[_Padded, ...]) -> _Found:
        by_value = paddings_by_value(function.program, function.padding)
        results = result_plans(function.traced, solution, by_value)
        cut = cut_seconds(results, function.program, self.topology)
        sliced = sum(float(each.seconds) for each in solution.slices)
        return _Found(
            function, solution, padded, solution.check.seconds + cut, solution.check.collective_seconds - sliced
        )

    def notes(self, refused: Sequence[_Candidate]) -> Iterator[str]:
        """Sentences about the choice."""
        for each in self.padded:
            name = _name(self.original, each.candidate)
            yield f"{name}: its dimension of {each.candidate.size} is padded to {each.size}"
        if self.padded:
            plain = self.plain
            without = (
                f"the best plan without padding takes {time(plain.seconds)}" if plain else "without it no plan fits"
            )
            yield f"the padding is the best of {self.tried} that were searched; {without}"
        if self.exposed:
            each, seconds = self.exposed
            name = _name(self.original, each.candidate)
            yield (
                f"{name}: its dimension of {each.candidate.size} is not padded to {each.size}: the plan would take"
                f" {time(seconds)}, but works more on the chip to save collectives, which a compiler may hide"
            )
        if self.untried:
            yield f"the time limit left {self.untried} paddings untried"
        for each in refused:
            name = _name(self.original, each)
            yield f"{name}: its dimension of {each.size} cannot be padded, because {each.refusal}"


def _paddings(padded: Sequence[_Padded]) -> Iterator[Padding]:
    return (member.padding(each.size) for each in padded for member in each.candidate.members)


def _has_chains(function: AnnotatedFunction) -> bool:
    return any(op.primitive == CHAIN for op in function.program.operations)


# --- the dimensions


def _candidates(program: Program, topology: Topology) -> list[_Candidate]:
    """The dimensions of matmuls that some product of mesh axes does not divide, the costliest first.

    The same dimension of identical layers, which a Python loop unrolled, is one candidate.
    """
    sizes = {factor.size for _, op in program.matmuls() for factor in op.factors}
    if not any(_sizes(size, topology) for size in sizes):
        return []
    alike = classes(program)
    groups: dict[object, list[Occurrences]] = {}
    for each in dimensions_of(program):
        if _sizes(each.size, topology):
            key = each.size, frozenset((alike[at], factor) for at, factor in each.factors)
            groups.setdefault(key, []).append(each)
    found = [_Candidate(tuple(members)) for members in groups.values()]
    return sorted(found, key=lambda each: -sum(_weight(program, member) for member in each.members))


def _sizes(size: int, topology: Topology) -> list[int]:
    """The multiples of the mesh axes, and of their products, that a size may be padded to."""
    if size < 2:
        return []
    axes = list(topology.axis_sizes.values())
    parts = {prod(chosen) for count in range(1, len(axes) + 1) for chosen in combinations(axes, count)}
    padded = {ceil(size / part) * part for part in parts}
    return sorted(each for each in padded if size < each <= _MOST * size)


def _weight(program: Program, occurrences: Occurrences) -> float:
    """The multiply-adds of the matmuls in which a dimension occurs."""
    operations = {at for at, _ in occurrences.factors}
    return sum(
        program.multiplicity(op.region) * prod(factor.size for factor in op.factors)
        for at, op in program.matmuls()
        if at in operations
    )


def _name(function: AnnotatedFunction, candidate: _Candidate) -> str:
    """The first argument that has the dimension, or else the first array."""
    values = candidate.members[0].values
    names = dict(zip(function.traced.argument_values, function.traced.paths, strict=True))
    found = min(value for value, _ in values)
    return next((names[v] for v, _ in sorted(values) if v in names), function.program.values[found].name)
