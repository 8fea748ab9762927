"""Plans with their proofs, and the limits of a search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from costmodels.machine.topology import Topology
from search.answer.assignment import Choice, Collective, collectives
from search.answer.check import Check
from search.formulation.problem import Problem

RESERVE_PART = 0.05
"""The part of each chip's memory that is left free by default: what a compiler may need beyond the plan."""

Solver = Literal["presolved", "cp-sat"]
"""CP-SAT after our presolve, or on the model as it is built: the reference, for small problems."""


@dataclass(frozen=True)
class Limits:
    """When to stop, and with which solver.

    `rounds` bounds the dual's improvement; `deterministic_seconds` is CP-SAT's own clock, which makes the answer the same on
    every machine; `wall_seconds` is a hard stop. `reserve_bytes` of each chip are left free: by default `RESERVE_PART` of it;
    `memory_bytes` is what else a plan may take of each chip, at most.
    """

    rounds: int = 60
    deterministic_seconds: float = 120.0
    wall_seconds: float = 600.0
    reserve_bytes: float | None = None
    memory_bytes: float | None = None
    solver: Solver = "presolved"

    def budget_bytes(self, topology: Topology) -> float:
        """What a plan may take of each chip's memory."""
        usable = topology.chip.usable_hbm_bytes
        free = usable - (RESERVE_PART * usable if self.reserve_bytes is None else self.reserve_bytes)
        return free if self.memory_bytes is None else min(free, self.memory_bytes)


DEFAULTS = Limits()


@dataclass(frozen=True)
class Answer:
    """What CP-SAT found: its status, the states (or `None`) and their cost, and a bound in seconds despite rounding.

    `booleans` and `constraints` are the model's size, `seconds` how long it took to build and to solve.
    """

    status: str
    states: np.ndarray | None
    value: float
    bound_seconds: float
    booleans: int
    constraints: int = 0
    seconds: float = 0.0

    @staticmethod
    def none() -> Answer:
        """No answer: there was nothing to decide."""
        return Answer("INFEASIBLE", None, np.inf, np.inf, 0)


@dataclass
class Effort:
    """What CP-SAT did in one search: the size of its largest model, and the seconds of all."""

    booleans: int = 0
    constraints: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        """Counts an answer."""
        self.booleans = max(self.booleans, answer.booleans)
        self.constraints = max(self.constraints, answer.constraints)
        self.seconds += answer.seconds


@dataclass(frozen=True)
class Proof:
    """How good the plan is known to be, relative to the cost model, and what presolve and solver each did.

    `gap` is $(\\text{objective} - \\text{bound}) / \\text{objective}$, 0 when the plan is proven best but for
    `rounding_seconds`: what integer rounding inside CP-SAT may have hidden, at most a millionth of the objective
    (more without presolve, which makes the integers finer).

    `solver` and its version decide last, on the strategies and layouts that presolve has left: `fixed_by_presolve` of all
    `states` are gone by then. `solver_status` is the solver's own word for it, `booleans` and `constraints` the size of its
    largest model. `presolve_bound_seconds` is what presolve had proven before; the model has it as a cut. Where the solver
    could not decide the whole at once, the problem was divided into `branches` parts, each decided in the same way; 0 if not.
    `presolve_seconds` and `solver_seconds` are what each took, `wall_seconds` everything. A plan of a file that was written
    before these were kept has no `solver`.

    `stopped` says what ended the search before its end: "time limit" or "interrupted". `memory_seconds_per_byte` is the price
    that the bound puts on a chip's memory where the plan's is full: with so much more of it, a plan can gain so much, by the
    bound.
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
    solver: str = ""
    solver_status: str = ""
    constraints: int = 0
    fixed_by_presolve: int = 0
    presolve_bound_seconds: float = 0.0
    presolve_seconds: float = 0.0
    solver_seconds: float = 0.0

    def account(self) -> dict[str, Any]:
        """Who did what: the columns that a table of searches has of it."""
        names = ("solver", "solver_status", "booleans", "constraints", "states", "fixed_by_presolve", "branches")
        seconds = ("presolve_bound_seconds", "presolve_seconds", "solver_seconds")
        return {name: getattr(self, name) for name in (*names, *seconds)}


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
