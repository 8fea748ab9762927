"""The search, from a program and a topology to a proven plan.

build ──► ascend: sweep the dual, read off plans, strike out states ──► branch, CP-SAT on the leaves ──► checker
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice, Collective, choice_of, collectives
from search.answer.check import Check, check
from search.cpsat.branching import PRECISION, Branching
from search.formulation.layer_folding import classes as folded
from search.formulation.layer_folding import tied, unfolded
from search.formulation.problem import Problem, allowing, build
from search.formulation.strategies import Strategy
from search.memory.constraints import rows
from search.presolve.ascent import TOLERANCE, Ascent, Say
from search.presolve.elimination import SMALL_PARTS, Reduction, reduced
from search.presolve.primal import overflow
from search.presolve.symmetry import tidied
from search.presolve.warm_start import starting_states

RESERVE_PART = 0.05
"""The part of each chip's memory that is left free by default: what a compiler may need beyond the plan."""


@dataclass(frozen=True)
class Limits:
    """When to stop.

    `rounds` bounds the dual's improvement; `deterministic_seconds` is CP-SAT's own clock, which makes the answer the same on
    every machine; `wall_seconds` is a hard stop. `reserve_bytes` of each chip are left free: by default `RESERVE_PART` of it;
    `memory_bytes` is what else a plan may take of each chip, at most.
    """

    rounds: int = 60
    deterministic_seconds: float = 120.0
    wall_seconds: float = 600.0
    reserve_bytes: float | None = None
    memory_bytes: float | None = None

    def budget_bytes(self, topology: Topology) -> float:
        """What a plan may take of each chip's memory."""
        usable = topology.chip.usable_hbm_bytes
        free = usable - (RESERVE_PART * usable if self.reserve_bytes is None else self.reserve_bytes)
        return free if self.memory_bytes is None else min(free, self.memory_bytes)


DEFAULTS = Limits()


@dataclass(frozen=True)
class Proof:
    """How good the plan is known to be, relative to the cost model.

    `gap` is $(\\text{objective} - \\text{bound}) / \\text{objective}$, 0 when the plan is proven best but for
    `rounding_seconds`: what integer rounding inside CP-SAT may have hidden, at most a millionth of the objective.
    `booleans` counts those of the largest CP-SAT model; 0 when the bound reached the plan before any was needed. `stopped`
    says what ended the search before its end: "time limit" or "interrupted". `memory_seconds_per_byte` is the price that the
    bound puts on a chip's memory where the plan's is full: with so much more of it, a plan can gain so much, by the bound.
    """

    status: str
    objective_seconds: float
    bound_seconds: float
    gap: float
    wall_seconds: float
    rounding_seconds: float = 0.0
    booleans: int = 0
    states: int = 0
    branches: int = 0
    stopped: str = ""
    memory_seconds_per_byte: float = 0.0


@dataclass(frozen=True)
class Solution:
    """A plan with its proof and the independent checker's account of it."""

    problem: Problem
    choice: Choice
    proof: Proof
    check: Check

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """What the plan sends, in the program's order."""
        return tuple(collectives(self.problem.program, self.problem.topology, self.choice))


class NoPlan(Exception):
    """No choice fits the memory.

    `least_bytes` is the smallest peak that the search reached, under `states`; `proven` says that nothing fits for sure.
    """

    def __init__(self, problem: Problem, states: np.ndarray, least_bytes: float, proven: bool) -> None:
        super().__init__(f"at least {least_bytes:.0f} bytes are needed, {problem.budget_bytes:.0f} are there")
        self.problem, self.states, self.least_bytes, self.proven = problem, states, least_bytes, proven


def search(
    program: Program,
    topology: Topology,
    limits: Limits = DEFAULTS,
    say: Say = lambda _: None,
    allow: Callable[[int, Strategy], bool] | None = None,
    fold: bool = True,
    ties: Sequence[tuple[int, int]] = (),
    symmetric: bool | None = None,
    cutoff: float = np.inf,
    start: Choice | None = None,
) -> Solution:
    """Finds the fastest plan that fits, and proves it.

    **Arguments:**

    - `allow`: which strategies operations may take, by operation number; all by default. What it forbids is pinned away,
      as an argument's layout is by allowing one strategy of its source. Of a class of like operations the first is asked for.
    - `symmetric`: whether `allow` treats interchangeable mesh axes alike; by default only if there is none.
    - `ties`: pairs of operations that take one strategy, as the same argument of two phases does.
    - `fold`: whether the copies of a layer that a Python loop unrolled take the same strategies (`search.folding`).
    - `cutoff`: seconds; slower plans are not looked for.
    - `start`: a plan to begin with, if it fits; it changes nothing but how long the search takes.

    **Raises:** `NoPlan` when no plan fits the chips' memory, none is allowed, or none is below the cutoff.
    """
    classes = tied(folded(program) if fold else unfolded(program), ties)
    problem = build(program, topology, limits.budget_bytes(topology), classes)
    if allow is not None:
        problem = allowing(problem, allow)
    return solved(problem, limits, say, allow is None if symmetric is None else symmetric, cutoff, start)


def solved(
    problem: Problem,
    limits: Limits = DEFAULTS,
    say: Say = lambda _: None,
    symmetric: bool = False,
    cutoff: float = np.inf,
    start: Choice | None = None,
) -> Solution:
    """Finds the fastest plan of a problem that fits, and proves it.

    **Arguments:**

    - `symmetric`: whether interchangeable mesh axes are alike in it, so that one of them may be taken for the others.
    - `cutoff`: seconds; slower plans are not looked for.
    - `start`: a plan to begin with, if it fits; it changes nothing but how long the search takes.

    **Raises:** `NoPlan` when no plan fits, or none is below the cutoff.
    """
    started = time.monotonic()
    limited = rows(problem)

    def fits(found: _Found) -> bool:
        return not (overflow(problem, limited, found.states) > 0).any()

    run = _Run(limits, started + limits.wall_seconds, say, symmetric, cutoff, start)
    found = run.of(reduced(problem, limited, SMALL_PARTS[0]), fits)
    for part in (*SMALL_PARTS[1:], 0.0):
        if found.best is None or fits(found):
            break
        say("the smaller problem's plan does not fit: less is eliminated")
        smaller = reduced(problem, limited, part) if part else Reduction.none(problem, limited)
        found = run.of(smaller, fits, found)
    if found.best is None:
        raise _no_plan(problem, found)
    choice = choice_of(problem, found.states)
    if symmetric:
        choice = tidied(problem, choice)
    proof = _proof(found, sum(len(node.states) for node in problem.nodes), time.monotonic() - started)
    return Solution(problem, choice, proof, check(problem.program, problem.topology, choice))


@dataclass(frozen=True)
class _Found:
    """What the search of a (smaller) problem came to."""

    smaller: Reduction
    ascent: Ascent
    branching: Branching
    stopped: str

    @property
    def best(self) -> np.ndarray | None:
        return self.ascent.best

    @property
    def states(self) -> np.ndarray:
        """The best states of the whole problem; the leanest where none fits."""
        found = self.ascent.leanest[1] if self.ascent.best is None else self.ascent.best
        return self.smaller.expanded(np.zeros(len(self.smaller.kept), dtype=int) if found is None else found)

    @property
    def seen(self) -> list[np.ndarray]:
        """The states of the whole problem in every plan looked at."""
        return [self.smaller.expanded(states) for states in self.ascent.pool.states]


@dataclass(frozen=True)
class _Run:
    """What one search is told: limits, when to end, whether axes are alike, and what is too slow to be of interest."""

    limits: Limits
    deadline: float
    say: Say
    symmetric: bool
    cutoff: float
    start: Choice | None = None

    def of(
        self, smaller: Reduction, fits: Callable[[_Found], bool] = lambda _: True, before: _Found | None = None
    ) -> _Found:
        """Lifts the bound and lowers the best plan, then branches if they have not met; when interrupted, ends with those.

        A plan that does not fit the whole problem is not worth branches. `before` is a relaxation: its bound holds here, too.
        """
        self.say(f"{len(smaller.whole.nodes)} nodes, {len(smaller.problem.nodes)} after elimination")
        ascent = Ascent(
            smaller.problem, smaller.rows, self.limits.rounds, self.say, self.symmetric, self.deadline, self.cutoff
        )
        branching = Branching(ascent, self.limits.deterministic_seconds)
        stopped = ""
        states = None if self.start is None else starting_states(smaller.whole, self.start)
        if states is not None:
            ascent.begin_with(states[list(smaller.kept)])
        try:
            if before is not None:
                ascent.bound = before.ascent.bound
                for states in before.seen:
                    ascent.look(states[list(smaller.kept)])
                ascent.attempt(before.states[list(smaller.kept)])
            ascent.run(None if before is None else before.ascent.prices)
            if (
                ascent.fits
                and not ascent.closed
                and (ascent.best is None or fits(_Found(smaller, ascent, branching, "")))
            ):
                branching.run()
        except KeyboardInterrupt:
            if ascent.best is None:
                raise
            stopped = "interrupted"
        return _Found(smaller, ascent, branching, stopped or ("time limit" if ascent.late else ""))


def _proof(found: _Found, states: int, wall_seconds: float) -> Proof:
    """What is proven of the best plan."""
    ascent, branching = found.ascent, found.branching
    apart = max(ascent.objective - ascent.bound, 0.0)
    proven = apart <= PRECISION * ascent.objective
    return Proof(
        "OPTIMAL" if proven else "FEASIBLE",
        ascent.objective,
        min(ascent.bound, ascent.objective),
        0.0 if proven else apart / ascent.objective,
        wall_seconds,
        apart if proven and apart > TOLERANCE * ascent.objective else 0.0,
        branching.booleans,
        states,
        branching.branches,
        "" if proven else found.stopped,
        float(ascent.prices.sum()),
    )


def _no_plan(problem: Problem, found: _Found) -> NoPlan:
    ascent, branching = found.ascent, found.branching
    proven = not ascent.fits or ascent.closed or (branching.branches > 0 and branching.unproven == np.inf)
    return NoPlan(problem, found.states, problem.budget_bytes + ascent.leanest[0], proven)
