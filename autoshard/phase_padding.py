"""Padding of several phases together: shared and handed-over arrays have the same padded sizes in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from time import monotonic

from autoshard._util.tables import time
from autoshard.annotating.annotated_function import AnnotatedFunction, annotate_pins
from autoshard.annotating.masks import changed_results
from autoshard.annotating.padding import (
    Occurrences,
    Padding,
    occurrences_of,
    paddings_by_value,
    sizes_of,
)
from autoshard.annotating.pinned_padding import paddings_of_pins
from autoshard.planning.options import Options
from autoshard.planning.padding import (
    Candidate,
    Found,
    Padded,
    Trials,
    by_cost,
    call_seconds,
    name_of,
    paddings_in,
    undivided,
)
from autoshard.rules.pin import PinError
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.phases import Phases, Place, TooSlow, search_alone
from search.solve import NoPlan

Solve = Callable[[Sequence[AnnotatedFunction], float, float | None], Phases]
"""The joint plan of functions with pins, below a cutoff in seconds and within a time limit."""
Linked = Mapping[Place, Sequence[Place]]
"""The values of other phases that are the same array as a value of a phase."""


@dataclass(frozen=True)
class PhaseChoice:
    """The chosen programs of the phases, their joint plan, their results that keep padding, and sentences on the choice."""

    functions: tuple[AnnotatedFunction, ...]
    found: Phases
    handed_results: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sharing:
    """The arrays that phases share: pairs of arguments, and pairs of a result and the argument that it becomes."""

    shared: Sequence[tuple[Place, Place]]
    handed: Sequence[tuple[Place, Place]]

    def values(self, programs: Sequence[Program]) -> Linked:
        """The values of other phases that are the same array."""
        found: dict[Place, list[Place]] = {}
        pairs = [(_argument(programs, a), _argument(programs, b)) for a, b in self.shared]
        pairs += [(_result(programs, a), _argument(programs, b)) for a, b in self.handed]
        for one, other in pairs:
            found.setdefault(one, []).append(other)
            found.setdefault(other, []).append(one)
        return found


def choose_joint_padding(
    functions: Sequence[AnnotatedFunction],
    sharing: Sharing,
    topology: Topology,
    solve: Solve,
    weights: Sequence[float],
    options: Options,
) -> PhaseChoice:
    """The padding of all phases with the least weighted sum of times, and their joint plan.

    **Arguments:**

    - `functions`: the phases, without pins.

    **Raises:** `NoPlan`, `TooSlow`; `PinError`, also for a pinned dimension that cannot be padded.
    """
    started, error = monotonic(), None
    programs = [each.program for each in functions]
    linked = sharing.values(programs)
    required = _required(functions, linked, topology) if options.padding else ()

    def pinned(padded: Sequence[Padded]) -> tuple[AnnotatedFunction, ...]:
        each = (function.padded(paddings_in(padded, at)) for at, function in enumerate(functions))
        return tuple(annotate_pins(function, topology, None) for function in each)

    def found_of(here: tuple[AnnotatedFunction, ...], found: Phases, padded: tuple[Padded, ...]) -> Found[PhaseChoice]:
        kept = _handed_results(functions, here, sharing.handed)
        calls = map(call_seconds, here, found.solutions, (topology,) * len(here), (False,) * len(here), kept)
        added = sum(weight * seconds for weight, seconds in zip(weights, calls, strict=True))
        collectives = sum(
            weight * (each.check.collective_seconds - sum(float(one.seconds) for one in each.slices))
            for weight, each in zip(weights, found.solutions, strict=True)
        )
        return Found(PhaseChoice(here, found, kept), padded, found.proof.objective_seconds + added, collectives)

    def search(padded: tuple[Padded, ...], cutoff: float, left: float | None) -> Found[PhaseChoice] | None:
        try:
            here = pinned(padded)
            return found_of(here, solve(here, cutoff, left), padded)
        except (NoPlan, TooSlow, PinError):
            return None

    first, plain = pinned(required), None
    try:
        plain = found_of(first, solve(first, inf, options.time_limit), required)
    except (NoPlan, TooSlow) as found:
        error = found
    if not options.padding:
        return _choice(plain, error)
    trials = Trials(search, plain, required, options, started)
    trials.run(linked_candidates(programs, linked, topology, weights), topology)
    choice = _choice(trials.best, error)
    if not choice.found.alone:
        alone = search_alone([each.program for each in choice.functions], topology, options.limits())
        choice = replace(choice, found=replace(choice.found, alone=alone))
    without = None if required or plain is None else f"the best weighted sum without padding is {time(plain.seconds)}"
    return replace(choice, notes=tuple(trials.notes(lambda each: name_of(functions, each), without)))


def _choice(found: Found[PhaseChoice] | None, error: Exception | None) -> PhaseChoice:
    if found is None:
        assert error is not None
        raise error
    return found.answer


# --- dimensions of several programs


def linked_candidates(
    programs: Sequence[Program], linked: Linked, topology: Topology, weights: Sequence[float]
) -> list[Candidate]:
    """The dimensions of all phases that may be padded, each with what is the same dimension in the other phases."""
    found: list[dict[object, tuple[int, Occurrences]]] = []
    for at, program in enumerate(programs):
        for group in undivided(program, topology):
            members = _closed(programs, linked, [(at, each) for each in group])
            same = [each for each in found if not each.keys().isdisjoint(members)]
            found = [each for each in found if each.keys().isdisjoint(members)]
            found.append({key: member for each in (*same, members) for key, member in each.items()})
    return by_cost([Candidate(tuple(each.values())) for each in found], programs, weights)


def _closed(
    programs: Sequence[Program], linked: Linked, members: Iterable[tuple[int, Occurrences]]
) -> dict[object, tuple[int, Occurrences]]:
    """Dimensions with those of the other phases that are the same, by links between values."""
    found: dict[object, tuple[int, Occurrences]] = {}
    waiting = list(members)
    while waiting:
        at, each = waiting.pop()
        key = at, min(each.values.items())
        if key in found:
            continue
        found[key] = at, each
        for (value, dim), inner in each.values.items() if not each.refusal else ():
            for other, there in linked.get((at, value), ()):
                if programs[at].values[value].shape[dim] == programs[other].values[there].shape[dim]:
                    place = Padding(there, dim, each.size, each.size, inner)
                    waiting.append((other, occurrences_of(programs[other], place)))
    return found


def _required(functions: Sequence[AnnotatedFunction], linked: Linked, topology: Topology) -> tuple[Padded, ...]:
    """The paddings that constraints in the phases require.

    **Raises:** `PinError` if a dimension cannot be padded in all phases, or not to one size.
    """
    programs, found = [each.program for each in functions], list[Padded]()
    for at, function in enumerate(functions):
        for each, size, words in paddings_of_pins(function.program, function.traced.paths, topology, None):
            candidate = Candidate(tuple(_closed(programs, linked, [(at, each)]).values()))
            if candidate.refusal:
                raise PinError(f"{words} splits a dimension that cannot be padded, because {candidate.refusal}.")
            clash = next((other for other in found if candidate.overlaps([other])), None)
            if clash is None:
                found.append(Padded(candidate, size, f"as {words} requires"))
            elif clash.size != size:
                raise PinError(f"{words} requires a padding to {size}, and in another phase {clash.size}, {clash.why}.")
    return tuple(found)


def _handed_results(
    plain: Sequence[AnnotatedFunction], padded: Sequence[AnnotatedFunction], handed: Sequence[tuple[Place, Place]]
) -> tuple[tuple[int, ...], ...]:
    """Per phase the results that keep their padding: the next phase has the same, and it is zero."""
    programs = [each.program for each in padded]
    by_value = [paddings_by_value(each.program, each.padding) for each in padded]
    found: list[set[int]] = [set() for _ in padded]
    changed = [
        frozenset[int]().union(*(changed_results(function.program, each) for each in other.padding))
        for function, other in zip(plain, padded, strict=True)
    ]
    for (phase, k), argument in handed:
        (_, value), (other, there) = _result(programs, (phase, k)), _argument(programs, argument)
        given, taken = by_value[phase].get(value, ()), by_value[other].get(there, ())
        if given and k not in changed[phase] and sizes_of(given) == sizes_of(taken):
            found[phase].add(k)
    return tuple(tuple(sorted(each)) for each in found)


def _argument(programs: Sequence[Program], place: Place) -> Place:
    phase, position = place
    program = programs[phase]
    return phase, program.operations[program.arguments[position]].outputs[0].value


def _result(programs: Sequence[Program], place: Place) -> Place:
    phase, position = place
    program = programs[phase]
    return phase, program.operations[program.results[position]].inputs[0].value
