"""Joint search over several phases: one layout for shared arguments, and the least weighted sum of times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

from costmodels.machine.topology import Topology
from costmodels.program.joined import Span, join
from costmodels.program.program import Program
from search.answer.assignment import Choice, collectives
from search.answer.check import check
from search.formulation.layer_folding import classes
from search.formulation.problem import build
from search.presolve.limits import PRECISION, Say
from search.solve import DEFAULTS, Limits, Proof, Solution, search

Place = tuple[int, int]
"""A phase, and the position of one of its arguments or results."""


@dataclass(frozen=True)
class Phases:
    """The phases' solutions under one layout of the shared arguments.

    `proof` is about the weighted sum, with handoffs; `alone` are the phases' solutions without sharing;
    `handoff_seconds` is the time to reshard the handed-over arrays, once.
    """

    solutions: tuple[Solution, ...]
    alone: tuple[Solution, ...]
    weights: tuple[float, ...]
    proof: Proof
    handoff_seconds: float


class TooSlow(Exception):
    """No layout of the shared arguments keeps a phase under its limit; `least_seconds` is the least found for it."""

    def __init__(self, phase: int, least_seconds: float) -> None:
        super().__init__(f"phase {phase} takes at least {least_seconds} s")
        self.phase, self.least_seconds = phase, least_seconds


def search_phases(
    programs: Sequence[Program],
    weights: Sequence[float],
    topology: Topology,
    shared: Sequence[tuple[Place, Place]],
    handoffs: Sequence[tuple[Place, Place]] = (),
    limits: Limits = DEFAULTS,
    say: Say = lambda _: None,
    at_most: tuple[int, float] | None = None,
    cutoff: float = inf,
) -> Phases:
    """Finds the layouts of several phases together.

    **Arguments:**

    - `weights`: how often each phase counts in the minimised sum.
    - `shared`: pairs of arguments (phase, position) that have one layout.
    - `handoffs`: pairs of a result (phase, position) and the argument of another phase that takes it over; its reshard
      is paid once per run of the phase that made it.

    - `at_most`: a phase, and its limit in seconds. The phase's weight is raised until it keeps the limit, no further
      than needed. The proof's bound is the Lagrangian one, and a gap may remain between it and the plan.
    - `cutoff`: seconds; plans whose weighted sum is larger are not searched, and phases are not searched alone.

    **Raises:** `NoPlan` when no layout fits all phases, or none is below the cutoff; `TooSlow`.
    """
    started = time.monotonic()
    alone = search_alone(programs, topology, limits, say) if cutoff == inf else ()
    if alone and at_most is not None and alone[at_most[0]].proof.bound_seconds > at_most[1]:
        raise TooSlow(at_most[0], alone[at_most[0]].check.seconds)
    joint = _Joint(programs, topology, tuple(shared), tuple(handoffs), limits, say)
    found = joint.solve_weighted(weights, weights, cutoff)
    if at_most is not None and found.solutions[at_most[0]].check.seconds > at_most[1]:
        found = _keep_limit(joint, weights, *at_most, found)
    return replace(found, alone=alone, proof=replace(found.proof, wall_seconds=time.monotonic() - started))


def search_alone(
    programs: Sequence[Program], topology: Topology, limits: Limits = DEFAULTS, say: Say = lambda _: None
) -> tuple[Solution, ...]:
    """The solution of each phase without sharing.

    **Raises:** `NoPlan` when a phase does not fit.
    """
    return tuple(search(program, topology, limits, say) for program in programs)


@dataclass(frozen=True)
class _Joint:
    """Phases with a joint layout, under any weights."""

    programs: Sequence[Program]
    topology: Topology
    shared: tuple[tuple[Place, Place], ...]
    handoffs: tuple[tuple[Place, Place], ...]
    limits: Limits
    say: Say

    def solve_weighted(self, used: Sequence[float], asked: Sequence[float], cutoff: float = inf) -> Phases:
        """The best plans under some weights, and their sum under the requested weights."""
        joined, spans = join(self.programs, used)
        pairs = tuple((spans[p].results + r, spans[q].arguments + a) for (p, r), (q, a) in self.handoffs)
        joined = replace(joined, handoffs=pairs)
        ties = [(_source(joined, spans, a), _source(joined, spans, b)) for a, b in self.shared]
        whole = search(joined, self.topology, self.limits, self.say, ties=ties, cutoff=cutoff)
        parts = zip(self.programs, spans, strict=True)
        found = tuple(_part(program, self.topology, whole, span) for program, span in parts)
        handed = _handover_seconds(joined, self.topology, whole.choice)
        return Phases(found, (), tuple(asked), whole.proof, handed)


def _handover_seconds(joined: Program, topology: Topology, choice: Choice) -> float:
    """Seconds of all handoffs, once."""
    found = 0.0
    for each in collectives(joined, topology, choice):
        if each.operation is not None and each.operand is None:
            found += each.seconds / joined.multiplicity(joined.operations[each.operation].inputs[0].region)
    return found


_HEAVIEST = 1e5
"""The largest factor by which a phase's weight is raised to make it keep its limit."""
_TRIALS = 15
"""The number of factors tried: growing until the phase keeps its limit, then bisecting on a logarithmic scale."""


def _keep_limit(joint: _Joint, weights: Sequence[float], phase: int, most: float, first: Phases) -> Phases:
    """The least weighted sum found under which a phase keeps to its limit, with the Lagrangian bound on any such sum.

    With the weight raised by $\\lambda$, $\\min_x \\sum_p w_p t_p(x) + \\lambda (t_q(x) - T)$ is a bound for every
    $\\lambda$.
    """
    bound, best = first.proof.bound_seconds, None
    low, high, factor = 1.0, inf, 4.0
    for _ in range(_TRIALS):
        raised = [weight * factor if p == phase else weight for p, weight in enumerate(weights)]
        found = joint.solve_weighted(raised, weights)
        extra = (factor - 1) * weights[phase]
        bound = max(bound, found.proof.bound_seconds - extra * most)
        took = found.solutions[phase].check.seconds
        if took <= most:
            high, total = factor, found.proof.objective_seconds - extra * took
            if best is None or total < best.proof.objective_seconds:
                best = replace(found, proof=replace(found.proof, objective_seconds=total))
        else:
            low = factor
        if factor >= _HEAVIEST and best is None:
            raise TooSlow(phase, took)
        if high < 1.05 * low:
            break
        factor = min(16 * factor, _HEAVIEST) if high == inf else sqrt(low * high)
    if best is None:
        raise TooSlow(phase, first.solutions[phase].check.seconds)
    objective = best.proof.objective_seconds
    gap = max(objective - bound, 0.0) / objective
    status = "OPTIMAL" if gap <= PRECISION else "FEASIBLE"
    proof = replace(best.proof, bound_seconds=min(bound, objective), gap=gap if gap > PRECISION else 0.0, status=status)
    return replace(best, proof=proof)


def _source(joined: Program, spans: Sequence[Span], place: Place) -> int:
    phase, position = place
    return joined.arguments[spans[phase].arguments + position]


def _part(program: Program, topology: Topology, whole: Solution, span: Span) -> Solution:
    """One phase's share of the joint solution."""
    strategies = whole.choice.strategies[span.operations : span.operations + len(program.operations)]
    values = range(span.values, span.values + len(program.values))
    hubs = {value - span.values: layout for value, layout in whole.choice.hubs.items() if value in values}
    choice = Choice(strategies, hubs)
    found = check(program, topology, choice)
    problem = build(program, topology, whole.problem.budget_bytes, classes(program))
    return Solution(problem, choice, replace(whole.proof, objective_seconds=found.seconds), found)
