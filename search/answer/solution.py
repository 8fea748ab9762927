"""Plans with their proofs, and the limits of a search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from costmodels.machine.topology import Topology
from search.answer.assignment import Choice, Collective, collectives, local_slices
from search.answer.check import Check
from search.formulation.problem import Problem

RESERVE_PART = 0.05
"""The part of each chip's memory that is reserved by default, for the compiler's needs beyond the plan."""

Solver = Literal["presolved", "cp-sat"]
"""CP-SAT after presolve, or on the unreduced model: the reference, for small problems."""


@dataclass(frozen=True)
class Limits:
    """The limits of a search, and its solver.

    `rounds` bounds the dual's improvement. `deterministic_seconds` is CP-SAT's own clock, which makes the answer
    reproducible on every machine. `wall_seconds` is a hard stop. `reserve_bytes` of each chip are left free, by default
    `RESERVE_PART` of it. `memory_bytes` bounds the rest that a plan may take of each chip.
    """

    rounds: int = 60
    deterministic_seconds: float = 120.0
    wall_seconds: float = 600.0
    reserve_bytes: float | None = None
    memory_bytes: float | None = None
    solver: Solver = "presolved"

    def budget_bytes(self, topology: Topology) -> float:
        """The bytes that a plan may take of each chip's memory."""
        usable = topology.chip.usable_hbm_bytes
        free = usable - (RESERVE_PART * usable if self.reserve_bytes is None else self.reserve_bytes)
        return free if self.memory_bytes is None else min(free, self.memory_bytes)


DEFAULTS = Limits()


@dataclass(frozen=True)
class Answer:
    """CP-SAT's answer: its status, the states (or `None`), their cost, and a bound that holds despite rounding.

    `booleans` and `constraints` are the model's size, `seconds` the time to build and to solve it.
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
        """The empty answer: there was nothing to decide."""
        return Answer("INFEASIBLE", None, np.inf, np.inf, 0)


@dataclass
class Effort:
    """CP-SAT's work in one search: the size of its largest model, and the seconds of all."""

    booleans: int = 0
    constraints: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> None:
        """Adds an answer to the totals."""
        self.booleans = max(self.booleans, answer.booleans)
        self.constraints = max(self.constraints, answer.constraints)
        self.seconds += answer.seconds


@dataclass(frozen=True)
class Proof:
    """The proven quality of the plan, relative to the cost model, and the work of presolve and solver.

    `gap` is $(\\text{objective} - \\text{bound}) / \\text{objective}$. It is 0 when the plan is proven best up to
    `rounding_seconds`: the most that integer rounding inside CP-SAT may have hidden, at most a millionth of the
    objective (more without presolve, which makes the integers finer).

    `solver` and its version decide last, on the strategies and layouts that presolve has left: `fixed_by_presolve` of
    all `states` are fixed by then. `solver_status` is the solver's own term, `booleans` and `constraints` are the size
    of its largest model. `presolve_bound_seconds` is the bound that presolve had proven; the model has it as a cut. If
    the solver could not decide the whole at once, the problem was divided into `branches` parts, each decided in the
    same way; 0 if not. `presolve_seconds` and `solver_seconds` are the time of each, `wall_seconds` the total. A plan
    from a file that predates these fields has no `solver`.

    `stopped` says why the search ended early: "time limit" or "interrupted". `memory_seconds_per_byte` is the Lagrange
    multiplier of a chip's memory in the bound, where the plan's memory is full: by the bound, a plan can gain this
    much for each byte more.
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
        """The solver columns of a table of searches."""
        names = ("solver", "solver_status", "booleans", "constraints", "states", "fixed_by_presolve", "branches")
        seconds = ("presolve_bound_seconds", "presolve_seconds", "solver_seconds")
        return {name: getattr(self, name) for name in (*names, *seconds)}


@dataclass(frozen=True)
class Solution:
    """A plan with its proof and the independent checker's recomputation."""

    problem: Problem
    choice: Choice
    proof: Proof
    check: Check

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives of the plan, in program order."""
        return tuple(collectives(self.problem.program, self.problem.topology, self.choice))

    @cached_property
    def slices(self) -> tuple[Collective, ...]:
        """The local slices of the plan, in program order."""
        return local_slices(self.problem.program, self.problem.topology, self.choice)


class NoPlan(Exception):
    """No choice fits the memory.

    `least_bytes` is the smallest peak that the search reached, under `states`; `proven` says that nothing fits for
    certain.
    """

    def __init__(self, problem: Problem, states: np.ndarray, least_bytes: float, proven: bool) -> None:
        super().__init__(f"at least {least_bytes:.0f} bytes are needed, {problem.budget_bytes:.0f} are available")
        self.problem, self.states, self.least_bytes, self.proven = problem, states, least_bytes, proven
