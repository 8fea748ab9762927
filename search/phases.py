"""Several phases at once: one layout for what they share, the weighted sum of their times least."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from costmodels.phases import Span, join
from costmodels.program import Program
from costmodels.topology import Topology
from search.ascent import Say
from search.check import check
from search.folding import classes
from search.problem import build
from search.solution import Choice, collectives
from search.solve import DEFAULTS, Limits, Proof, Solution, search

Place = tuple[int, int]
"""A phase, and the position of one of its arguments or results."""


@dataclass(frozen=True)
class Phases:
    """The phases' solutions under one layout of what they share.

    `proof` is about the weighted sum, handing over included; `alone` are the phases' solutions each by itself;
    `handoff_seconds` what changing the layout of handed-over arrays takes, once.
    """

    solutions: tuple[Solution, ...]
    alone: tuple[Solution, ...]
    weights: tuple[float, ...]
    proof: Proof
    handoff_seconds: float


def search_phases(
    programs: Sequence[Program],
    weights: Sequence[float],
    topology: Topology,
    shared: Sequence[tuple[Place, Place]],
    handoffs: Sequence[tuple[Place, Place]] = (),
    limits: Limits = DEFAULTS,
    say: Say = lambda _: None,
) -> Phases:
    """Lays several phases out together.

    **Arguments:**

    - `weights`: how often each phase counts in the sum that is minimised.
    - `shared`: pairs of arguments (phase, position) that have one layout.
    - `handoffs`: pairs of a result (phase, position) and the argument of another phase that takes it over; its change of
      layout is paid once per run of the phase that made it.

    **Raises:** `NoPlan` when no layout fits all phases.
    """
    started = time.monotonic()
    alone = tuple(search(program, topology, limits, say) for program in programs)
    joined, spans = join(programs, weights)
    pairs = tuple((spans[p].results + r, spans[q].arguments + a) for (p, r), (q, a) in handoffs)
    joined = replace(joined, handoffs=pairs)
    ties = [(_source(joined, spans, a), _source(joined, spans, b)) for a, b in shared]
    whole = search(joined, topology, limits, say, ties=ties)
    moved = [c for c in collectives(joined, topology, whole.choice) if c.operand == -1 and c.operation >= 0]
    handed = sum(c.seconds / joined.multiplicity(joined.operations[c.operation].inputs[0].region) for c in moved)
    found = tuple(_part(program, topology, whole, span, limits) for program, span in zip(programs, spans, strict=True))
    proof = replace(whole.proof, wall_seconds=time.monotonic() - started)
    return Phases(found, alone, tuple(weights), proof, handed)


def _source(joined: Program, spans: Sequence[Span], place: Place) -> int:
    phase, position = place
    return joined.arguments[spans[phase].arguments + position]


def _part(program: Program, topology: Topology, whole: Solution, span: Span, limits: Limits) -> Solution:
    """One phase's share of the joint solution."""
    strategies = whole.choice.strategies[span.operations : span.operations + len(program.operations)]
    values = range(span.values, span.values + len(program.values))
    hubs = {value - span.values: layout for value, layout in whole.choice.hubs.items() if value in values}
    choice = Choice(strategies, hubs)
    found = check(program, topology, choice)
    problem = build(program, topology, whole.problem.budget_bytes, classes(program))
    return Solution(problem, choice, replace(whole.proof, objective_seconds=found.seconds), found)
