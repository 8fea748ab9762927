"""The choice of padding: which dimensions that the mesh axes do not divide are padded, and to which sizes.

Each padded program is a search of its own, with its own proof. The choice among them is by descent: the dimensions are
tried one by one, the costliest first, each with the sizes that more axes divide, and the fastest padding is kept. A search
ends as soon as its bound shows that the padding is not faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil, inf, prod
from time import monotonic
from typing import Generic, TypeVar

from autoshard._util.tables import time
from autoshard.annotating.annotated_function import AnnotatedFunction, annotate_pins
from autoshard.annotating.padding import Occurrences, Padding, dimensions_of, paddings_by_value
from autoshard.annotating.pinned_padding import paddings_of_pins
from autoshard.errors import InfeasibleError
from autoshard.planning.chains import choose_chains
from autoshard.planning.options import Options
from autoshard.planning.padding_costs import cut_seconds, repeated_seconds
from autoshard.planning.records_of import argument_plans, result_plans
from autoshard.planning.solving import LOG, ProgramChoice, solve_below
from autoshard.rules.pin import PinError
from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN
from costmodels.program.program import Program
from search.formulation.layer_folding import classes
from search.solve import Solution

T = TypeVar("T")
_MOST = 1.75
"""The largest padded size that is tried, as a multiple of the size."""
_LEAST_GAIN = 0.005
"""The fraction of a step that the padding of a dimension must save.

Of the paddings of `benchmarks/uneven.py` that were planned to save 0.4 %, one was replayed 4.8 % slower (Falcon-7B decode on
v4 4x4x4). Those that were planned to save 1 % or more, without more work on the chip, were all replayed faster.
"""


@dataclass(frozen=True)
class Candidate:
    """Dimensions that are padded together: one, that of every layer of an unrolled model, or that of several phases.

    `members` has the number of the program and the occurrences there; `fault` the reason why they cannot be padded together.
    """

    members: tuple[tuple[int, Occurrences], ...]
    fault: str = ""

    @property
    def size(self) -> int:
        """The size without padding."""
        return self.members[0][1].size

    @property
    def refusal(self) -> str:
        """Why they cannot be padded; empty if they can."""
        crossed = any(_is_crossed(a, b) for k, a in enumerate(self.members) for b in self.members[:k])
        reasons = (each.refusal for _, each in self.members)
        return next(filter(None, (self.fault, *reasons)), "it occurs in one dimension twice" if crossed else "")

    def overlaps(self, others: Sequence[Padded]) -> bool:
        """Whether a member occurs where one of the others does."""
        return any(_is_crossed(each, other) for each in self.members for p in others for other in p.candidate.members)


def _is_crossed(a: tuple[int, Occurrences], b: tuple[int, Occurrences]) -> bool:
    return a[0] == b[0] and a[1].overlaps(b[1])


@dataclass(frozen=True)
class Padded:
    """Dimensions with the size that they are padded to; `why` is a clause for a padding that a pin requires."""

    candidate: Candidate
    size: int
    why: str = ""


def paddings_in(padded: Sequence[Padded], program: int = 0) -> tuple[Padding, ...]:
    """The paddings of one program."""
    return tuple(member.padding(each.size) for each in padded for at, member in each.candidate.members if at == program)


@dataclass(frozen=True)
class Found(Generic[T]):
    """A plan with its seconds: of the step with what its calls add, and of its collectives."""

    answer: T
    padded: tuple[Padded, ...]
    seconds: float
    collectives: float

    def pays(self, other: Found[T] | None) -> bool:
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

    A function whose dimensions all divide is searched once. A pin on a dimension that its axes do not divide requires its
    padding.

    **Raises:** `InfeasibleError` if no plan fits; `PinError`, also for a dimension that cannot be padded.
    """
    started, error = monotonic(), None
    required = _required(function, topology, options)
    try:
        plain = choose_chains(function.padded(paddings_in(required)), topology, options)
    except InfeasibleError as found:
        plain, error = None, found
    original = (function.chained or function) if plain and _has_chains(plain.function) else function

    def search(padded: tuple[Padded, ...], cutoff: float, left: float | None) -> Found[ProgramChoice] | None:
        try:
            here = annotate_pins(original.padded(paddings_in(padded)), topology, options.pins)
        except PinError:  # the pin's axes do not divide the padded size
            return None
        solution = solve_below(here, topology, replace(options, time_limit=left), cutoff)
        return solution and found_of(ProgramChoice(here, solution), padded, topology, options)

    best = plain and found_of(plain, required, topology, options)
    trials = Trials(search, best, required, options, started)
    trials.run(_candidates_of(original.program, topology), topology)
    if trials.best is None:
        assert error is not None
        raise error
    choice = trials.best.answer
    unpadded = (
        None if required or plain is None else f"the best plan without padding takes {time(trials.first_seconds)}"
    )
    notes = trials.notes(lambda each: name_of([original], each), unpadded)
    return replace(choice, notes=(*(plain.notes if plain else ()), *notes, *_notes_of_pins(function, required)))


def _required(function: AnnotatedFunction, topology: Topology, options: Options) -> tuple[Padded, ...]:
    found = paddings_of_pins(function.program, function.traced.paths, topology, options.pins)
    return tuple(Padded(Candidate(((0, each),)), size, f"as {words} requires") for each, size, words in found)


def _notes_of_pins(function: AnnotatedFunction, required: Sequence[Padded]) -> Iterator[str]:
    if required and function.chained is not None:
        yield "chains of grouped matmuls as one operation are not tried, because pins require padding"


def found_of(
    choice: ProgramChoice, padded: tuple[Padded, ...], topology: Topology, options: Options
) -> Found[ProgramChoice]:
    """A plan with the seconds that decide whether its padding pays."""
    function, solution = choice.function, choice.solution
    seconds = solution.check.seconds + call_seconds(function, solution, topology, options.repeated)
    sliced = sum(float(each.seconds) for each in solution.slices)
    return Found(choice, padded, seconds, solution.check.collective_seconds - sliced)


def call_seconds(
    function: AnnotatedFunction,
    solution: Solution,
    topology: Topology,
    repeated: bool = False,
    kept: Sequence[int] = (),
) -> float:
    """The least seconds that each call adds: to cut its results, and if `repeated` to pad and cut donated arguments."""
    if not function.padding:
        return 0.0
    by_value = paddings_by_value(function.program, function.padding)
    results = result_plans(function.traced, solution, by_value)
    cut = cut_seconds(results, function.program, topology, kept)
    if not repeated:
        return cut
    arguments = argument_plans(function.traced, solution, function.weak, by_value)
    return cut + repeated_seconds(arguments, results, function.program, topology)


class Trials(Generic[T]):
    """The searches of a function, or of phases, with different paddings, and the best of them.

    **Attributes:**

    - `search`: the plan with a padding, if it takes less than the cutoff; the last argument is the rest of the time limit.
    - `best`: the best plan so far, at first that with the `required` padding.
    """

    def __init__(
        self,
        search: Callable[[tuple[Padded, ...], float, float | None], Found[T] | None],
        best: Found[T] | None,
        required: tuple[Padded, ...],
        options: Options,
        started: float,
    ) -> None:
        self.search, self.best, self.required, self.options, self.started = search, best, required, options, started
        self.first_seconds = best.seconds if best else inf
        self.tried, self.untried = 1, 0
        self.exposed: tuple[Padded, float] | None = None
        self.refused: list[Candidate] = []

    @property
    def padded(self) -> tuple[Padded, ...]:
        """The best padding."""
        return self.best.padded if self.best else self.required

    def run(self, candidates: Sequence[Candidate], topology: Topology) -> None:
        """Tries the sizes of each candidate in turn, beside the best padding before."""
        for each in candidates:
            if each.refusal:
                self.refused.append(each)
            elif not each.overlaps(self.padded):
                before = self.padded
                for size in sizes_for(each.size, topology):
                    self._try((*before, Padded(each, size)))

    def _try(self, padded: tuple[Padded, ...]) -> None:
        """Searches with a padding, and keeps the plan if it pays; not after the time limit."""
        limit = self.options.time_limit
        left = None if limit is None else limit - (monotonic() - self.started)
        if left is not None and left <= 0:
            self.untried += 1
            return
        self.tried += 1
        last = padded[-1]
        (self.options.progress or LOG.info)(f"a dimension of {last.candidate.size} padded to {last.size}")
        found = self.search(padded, inf if self.best is None else self.best.seconds * (1 - _LEAST_GAIN), left)
        if found is None:
            return
        if found.pays(self.best):
            self.best = found
        elif self.best and found.seconds < self.best.seconds * (1 - _LEAST_GAIN):
            self.exposed = last, found.seconds

    def notes(self, name: Callable[[Candidate], str], unpadded: str | None) -> Iterator[str]:
        """Sentences about the choice; `unpadded` is a clause on the best plan without padding, if there is one."""
        for each in self.padded:
            why = f", {each.why}" if each.why else ""
            yield f"{name(each.candidate)}: its dimension of {each.candidate.size} is padded to {each.size}{why}"
        if len(self.padded) > len(self.required):
            without = unpadded or ("" if self.required else "without it no plan fits")
            end = f"; {without}" if without else ""
            yield f"the padding is the best of {self.tried} that were searched{end}"
        if self.exposed:
            each, seconds = self.exposed
            yield (
                f"{name(each.candidate)}: its dimension of {each.candidate.size} is not padded to {each.size}: the plan would"
                f" take {time(seconds)}, but works more on the chip to save collectives, which a compiler may hide"
            )
        if self.untried:
            yield f"the time limit left {self.untried} paddings untried"
        for each in self.refused:
            yield f"{name(each)}: its dimension of {each.size} cannot be padded, because {each.refusal}"


def _has_chains(function: AnnotatedFunction) -> bool:
    return any(op.primitive == CHAIN for op in function.program.operations)


# --- the dimensions


def _candidates_of(program: Program, topology: Topology) -> list[Candidate]:
    """The dimensions of matmuls that some product of mesh axes does not divide, the costliest first."""
    groups = undivided(program, topology)
    return by_cost([Candidate(tuple((0, each) for each in group)) for group in groups], [program], [1.0])


def undivided(program: Program, topology: Topology) -> list[list[Occurrences]]:
    """The dimensions of matmuls that some product of mesh axes does not divide.

    The same dimension of identical layers, which a Python loop unrolled, is one group.
    """
    sizes = {factor.size for _, op in program.matmuls() for factor in op.factors}
    if not any(sizes_for(size, topology) for size in sizes):
        return []
    alike = classes(program)
    groups: dict[object, list[Occurrences]] = {}
    for each in dimensions_of(program):
        if sizes_for(each.size, topology):
            key = each.size, frozenset((alike[at], factor) for at, factor in each.factors)
            groups.setdefault(key, []).append(each)
    return list(groups.values())


def by_cost(candidates: Sequence[Candidate], programs: Sequence[Program], weights: Sequence[float]) -> list[Candidate]:
    """The candidates, those with the most multiply-adds first; `weights` are the runs of the programs."""

    def cost(each: Candidate) -> float:
        return sum(weights[at] * _weight(programs[at], member) for at, member in each.members)

    return sorted(candidates, key=lambda each: -cost(each))


def sizes_for(size: int, topology: Topology) -> list[int]:
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


def name_of(functions: Sequence[AnnotatedFunction], candidate: Candidate) -> str:
    """The first argument that has the dimension, or else the first array."""
    at, member = candidate.members[0]
    function, values = functions[at], member.values
    names = dict(zip(function.traced.argument_values, function.traced.paths, strict=True))
    found = min(value for value, _ in values)
    return next((names[v] for v, _ in sorted(values) if v in names), function.program.values[found].name)
