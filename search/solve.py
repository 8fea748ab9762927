"""The search, from a program and a topology to a proven plan.

merge orders ──► eliminate ──► ascend: bound, incumbent, states fixed by reduced costs ──► CP-SAT ──► checker
                                                      └── branch, if the problem is too large: CP-SAT on every part

CP-SAT decides: its model (`search.cpsat.model`) is the problem, its assignment the plan, its status the verdict. The
steps before it are presolve: they remove states that no better plan has, find a plan to start from, and prove a bound,
the model's cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice
from search.answer.solution import DEFAULTS as DEFAULTS
from search.answer.solution import RESERVE_PART as RESERVE_PART
from search.answer.solution import Limits as Limits
from search.answer.solution import NoPlan as NoPlan
from search.answer.solution import Proof as Proof
from search.answer.solution import Solution as Solution
from search.collector import seldom_collected
from search.cpsat.background import begin_import
from search.cpsat.stages import Task
from search.formulation.layer_folding import classes as folded
from search.formulation.layer_folding import identity_classes, tie
from search.formulation.problem import Problem, build, forbid_strategies
from search.formulation.strategies import Strategy
from search.presolve.elimination import RELAXATIONS
from search.presolve.limits import Say
from search.restrictions import Reshards, restrict_reshards


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
    reshards: Reshards = "all",
) -> Solution:
    """Finds the fastest plan that fits, and proves it.

    **Arguments:**

    - `allow`: the strategies that operations may take, by operation number; all by default. An argument's layout is
      pinned by allowing one strategy of its source. `allow` is called for the first operation of a class.
    - `symmetric`: whether `allow` treats interchangeable mesh axes alike; by default only if there is no `allow`.
    - `ties`: pairs of operations that take one strategy, as the same argument of two phases does.
    - `fold`: whether the copies of a layer that a Python loop unrolled take the same strategies
      (`formulation.layer_folding`).
    - `cutoff`: seconds; slower plans are not searched.
    - `start`: a plan to begin with, if it fits; it only changes the duration of the search.
    - `reshards`: the reshards that the plan may have (`search.restrictions`).

    **Raises:** `NoPlan` when no plan fits the chips' memory, none is allowed, or none is below the cutoff.
    """
    with seldom_collected():
        classes = tie(folded(program) if fold else identity_classes(program), ties)
        problem = build(program, topology, limits.budget_bytes(topology), classes)
        if allow is not None:
            problem = forbid_strategies(problem, allow)
        problem = restrict_reshards(problem, reshards)
        return solve(problem, limits, say, allow is None if symmetric is None else symmetric, cutoff, start)


def solve(
    problem: Problem,
    limits: Limits = DEFAULTS,
    say: Say = lambda _: None,
    symmetric: bool = False,
    cutoff: float = np.inf,
    start: Choice | None = None,
) -> Solution:
    """Finds the fastest plan of a problem that fits, and proves it.

    **Arguments:**

    - `symmetric`: whether interchangeable mesh axes are equivalent in the problem, so that the search may fix one of
      them.
    - `cutoff`: seconds; slower plans are not searched.
    - `start`: a plan to begin with, if it fits; it only changes the duration of the search.

    **Raises:** `NoPlan` when no plan fits, or none is below the cutoff.
    """
    begin_import()
    task = Task(problem, limits, say, symmetric, cutoff, start, time.monotonic())
    if limits.solver == "cp-sat":
        return task.check_found(task.decide_unaided())
    found = None
    for parts in (*RELAXATIONS, None):  # which nodes hold so little memory that they may be eliminated
        presolved = task.eliminate(parts)  # presolve: merged orders of axes, exact variable elimination
        found = task.ascend(presolved, found)  # presolve: a bound, an incumbent, and states fixed by reduced costs
        found = task.decide(found)  # CP-SAT, unless the rest is too large at once
        if found.answer is None:
            found = task.decide(task.branch(found), last=True)  # CP-SAT on every part, then on the rest
        if found.decided:
            break
        say("the smaller problem's plan does not fit: less is eliminated")
    assert found is not None
    return task.check_found(found)
