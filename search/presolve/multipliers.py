"""Maximises the Lagrangian dual over the multipliers of the memory rows, by a stabilised cutting-plane method.

At multipliers $\\lambda \\ge 0$ of the bytes by which rows overflow, a plan of $c_k$ seconds that is $g_k$ bytes over
costs $c_k + \\lambda g_k$. Its least value over all plans is a bound on those that fit, concave in $\\lambda$. The
least value over the plans seen lies above the bound, and a linear program finds its maximum: the master problem of
Dantzig and Wolfe ("Decomposition principle for linear programs", 1960), or Kelley's cutting planes. The next trial
lies half way there, as the maximum is often far too high or too low (the smoothing of Wentges, "Weighted Dantzig-Wolfe
decomposition for linear mixed-integer programming", 1997). The same method serves the root and, in fewer trials, every
branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import Row
from search.presolve.dual import Dual, Snapshot
from search.presolve.policy import POLICY
from search.presolve.primal import overflow

# --- The plans that were looked at

_LEAST_WEIGHT = 1e-6
"""The weight below which a plan has none but for rounding."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A plan seen: the states of its nodes, its seconds, and the bytes by which it overflows each row."""

    states: np.ndarray
    seconds: float
    over: np.ndarray

    @property
    def fits(self) -> bool:
        """Whether it overflows no row."""
        return bool((self.over <= 0).all())

    def priced(self, multipliers: np.ndarray) -> float:
        """Seconds at these multipliers."""
        return self.seconds + float(multipliers @ self.over)


Mixture = tuple[tuple[float, np.ndarray], ...]
"""Weights, of which the sum is 1 or less, and the states of the plans that have them."""


@dataclass(frozen=True, eq=False)
class Best:
    """The multipliers, in seconds per byte, with the highest bound over the plans seen, and that bound in seconds.

    `mixture` is the dual solution of the master problem: the plans that limit the bound.
    """

    multipliers: np.ndarray
    seconds: float
    mixture: Mixture = ()


class Pool:
    """The plans seen, each once."""

    def __init__(self, problem: Problem, rows: tuple[Row, ...]) -> None:
        self.problem, self.rows = problem, rows
        self._plans: dict[bytes, Seen] = {}
        self._start = np.cumsum([0, *(len(node.states) for node in problem.nodes)])

    def add(self, states: np.ndarray) -> Seen:
        """Remembers a plan, feasible or not: parts of it may be right."""
        key = states.tobytes()
        if key not in self._plans:
            over = overflow(self.problem, self.rows, states)
            self._plans[key] = Seen(states, self.problem.objective(states), over)
        return self._plans[key]

    @property
    def states(self) -> list[np.ndarray]:
        """The states of every plan, in the order in which they were seen."""
        return [plan.states for plan in self._plans.values()]

    def within(self, keep: Sequence[np.ndarray]) -> list[Seen]:
        """The plans that these states allow."""
        plans = [plan for plan in self._plans.values() if plan.seconds < FORBIDDEN / 2]
        if not plans:
            return []
        left = np.zeros(self._start[-1], dtype=bool)
        left[np.concatenate([start + states for start, states in zip(self._start, keep, strict=False)])] = True
        inside = left[np.array([plan.states for plan in plans]) + self._start[:-1]].all(axis=1)
        return [plans[k] for k in np.flatnonzero(inside).tolist()]

    def best_multipliers(self, keep: Sequence[np.ndarray], most: float) -> Best | None:
        """The best multipliers by the plans that these states allow; `None` if there is no such plan.

        **Arguments:**

        - `keep`: per node the states that are left.
        - `most`: seconds; a higher bound is of no use. Infinite if no plan that fits is known.
        """
        plans = self.within(keep)
        if not plans or (not np.isfinite(most) and not any(plan.fits for plan in plans)):
            return None
        return _solve_master(plans, most, self.problem.budget_bytes)


def _solve_master(plans: Sequence[Seen], most: float, budget_bytes: float) -> Best | None:
    """Solves the master problem by GLOP, in seconds of about 1 and in budgets of memory."""
    from ortools.math_opt.python import mathopt  # imported here: not needed if memory does not bind

    over = np.array([plan.over for plan in plans])
    rows = np.flatnonzero((over > 0).any(axis=0))
    seconds = [plan.seconds for plan in plans]
    least = min(seconds)
    unit = max(max(seconds) - least, 1e-9 * abs(least), 1e-30)
    model = mathopt.Model()
    prices = [model.add_variable(lb=0.0) for _ in rows]
    proven = model.add_variable(ub=(most - least) / unit if np.isfinite(most) else np.inf)
    limits = []
    for plan, beyond in zip(plans, (over[:, rows] / budget_bytes).tolist(), strict=True):
        limit = model.add_linear_constraint(ub=(plan.seconds - least) / unit)
        limit.set_coefficient(proven, 1.0)
        for price, part in zip(prices, beyond, strict=True):
            limit.set_coefficient(price, -part)
        limits.append(limit)
    model.maximize(proven)
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        return None
    found = np.zeros(over.shape[1])
    found[rows] = [max(value, 0.0) * unit / budget_bytes for value in result.variable_values(prices)]
    weights = zip(result.dual_values(limits), plans, strict=True)
    mixed = tuple((weight, plan.states) for weight, plan in weights if weight > _LEAST_WEIGHT)
    return Best(found, result.variable_values(proven) * unit + least, mixed)


# --- Trials


class Search(Protocol):
    """The state of a search: its dual, plans, and best plan so far."""

    dual: Dual
    pool: Pool
    objective: float

    def has_reached(self, lower: float) -> bool:
        """Whether a bound has reached the best plan."""
        ...

    @property
    def late(self) -> bool:
        """Whether time is up."""
        ...


Trial = Callable[[], np.ndarray]
"""Lifts the bound at the dual's multipliers; returns the relaxed plan's overflow of each row."""


def raise_bound(search: Search, over: np.ndarray, trial: Trial, trials: int) -> None:
    """Moves the dual's multipliers towards its highest bound.

    **Arguments:**

    - `over`: bytes by which the relaxed plan overflows each row at the present multipliers.
    - `trials`: the most trials.
    """
    dual = search.dual
    best: tuple[float, Snapshot] = (dual.bound(), dual.snapshot())
    before, feeble = np.inf, 0
    for _ in range(trials):
        told = search.pool.best_multipliers(dual.keep, search.objective)
        open_ = search.objective - best[0] if np.isfinite(search.objective) else 0.0
        little = max(POLICY.settled_part * abs(best[0]), POLICY.settled_part_of_open * open_)
        if search.has_reached(best[0]) or search.late or (told and told.seconds - best[0] < little):
            break
        if told is None and over.max(initial=0.0) <= 0:
            break
        if told is None:
            multipliers = _higher(search, over)
        else:
            part = POLICY.step_part if told.seconds < before else 1.0
            multipliers = best[1].multipliers + part * (told.multipliers - best[1].multipliers)
            before = told.seconds
        dual.reprice(multipliers)
        over = trial()
        if dual.emptied:
            return
        rise = dual.bound() - best[0]
        if rise > 0:
            best = dual.bound(), dual.snapshot()
        feeble = feeble + 1 if told is not None and rise < POLICY.feeble_part * little else 0
        if feeble == POLICY.feeble_trials:
            break  # the informative plan is not among those that are read off the dual
    if dual.bound() < best[0]:
        left = dual.keep
        dual.load(best[1])
        dual.restrict([np.intersect1d(a, b, assume_unique=True) for a, b in zip(dual.keep, left, strict=True)])


def _higher(search: Search, over: np.ndarray) -> np.ndarray:
    """Multipliers under which overflowing rows may fit: higher ones, or a first one for the row with most overflow."""
    multipliers = search.dual.multipliers.copy()
    priced = (over > 0) & (multipliers > 0)
    if priced.any():
        multipliers[priced] *= POLICY.growth
    else:
        row = int(np.argmax(over))
        multipliers[row] = _first_multiplier(search, float(over[row]))
    return multipliers


def _first_multiplier(search: Search, over: float) -> float:
    """The multiplier at which the dual's tangent, of slope `over`, reaches the best plan; the bound turns before."""
    most = 1.0 / min(axis.bytes_per_second for axis in search.dual.problem.topology.axes)
    lower = search.dual.bound()
    rise = search.objective - lower if np.isfinite(search.objective) else abs(lower)
    return min(rise / over, most) if rise > 0 else most


def mixture(search: Search) -> Mixture:
    """The plans that prove the dual's best multipliers, with their weights; none without such a proof.

    Each overflows some row or costs too much, and together, by weight, they do neither. Their differences are the
    choices that multipliers cannot settle.
    """
    told = search.pool.best_multipliers(search.dual.keep, search.objective)
    return told.mixture if told else ()
