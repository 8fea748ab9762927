"""The plans that a search has looked at, and the prices of memory that are best as far as they tell.

At prices $\\lambda \\ge 0$ of the bytes by which rows overflow, a plan of $c_k$ seconds that is $g_k$ bytes over costs
$c_k + \\lambda g_k$. What is proven at those prices is the least of it over all plans. Over the plans seen it is a function
that lies above, and is highest where a linear programme says: the master problem of Dantzig and Wolfe ("Decomposition principle
for linear programs", 1960), or Kelley's cutting planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import Row
from search.presolve.primal import overflow


@dataclass(frozen=True, eq=False)
class Seen:
    """A plan that was looked at: the states of its nodes, its seconds, and by how many bytes it overflows each row."""

    states: np.ndarray
    seconds: float
    over: np.ndarray

    @property
    def fits(self) -> bool:
        """Whether it overflows no row."""
        return bool((self.over <= 0).all())


@dataclass(frozen=True, eq=False)
class BestPrices:
    """The rows' prices, in seconds per byte, that prove most of the plans seen, and the seconds that they prove."""

    prices: np.ndarray
    seconds: float


class Pool:
    """The plans seen, each once."""

    def __init__(self, problem: Problem, rows: tuple[Row, ...]) -> None:
        self.problem, self.rows = problem, rows
        self._plans: dict[bytes, Seen] = {}
        self._start = np.cumsum([0, *(len(node.states) for node in problem.nodes)])

    def __len__(self) -> int:
        return len(self._plans)

    def add(self, states: np.ndarray) -> Seen:
        """Remembers a plan, whether it fits or not: parts of it may be right."""
        key = states.tobytes()
        if key not in self._plans:
            over = overflow(self.problem, self.rows, states)
            self._plans[key] = Seen(states, self.problem.objective(states), over)
        return self._plans[key]

    @property
    def states(self) -> list[np.ndarray]:
        """The states of every plan, in the order in which they were seen."""
        return [plan.states for plan in self._plans.values()]

    def best_prices(self, keep: Sequence[np.ndarray], most: float) -> BestPrices | None:
        """The best prices as far as the possible plans of these states tell; `None` if they tell nothing.

        **Arguments:**

        - `keep`: per node the states that are left.
        - `most`: seconds; to prove more is of no use. Infinite if no plan that fits is known.
        """
        plans = [plan for plan in self._within(keep) if plan.seconds < FORBIDDEN / 2]
        if not plans or (not np.isfinite(most) and not any(plan.fits for plan in plans)):
            return None
        return _best(plans, most, self.problem.budget_bytes)

    def _within(self, keep: Sequence[np.ndarray]) -> list[Seen]:
        plans = list(self._plans.values())
        if not plans:
            return []
        left = np.zeros(self._start[-1], dtype=bool)
        left[np.concatenate([start + states for start, states in zip(self._start, keep, strict=False)])] = True
        inside = left[np.array([plan.states for plan in plans]) + self._start[:-1]].all(axis=1)
        return [plans[k] for k in np.flatnonzero(inside).tolist()]


def _best(plans: Sequence[Seen], most: float, budget_bytes: float) -> BestPrices | None:
    """Solves the master problem in seconds of about 1 and in budgets of memory."""
    from ortools.linear_solver import pywraplp  # most runs do without

    solver = pywraplp.Solver.CreateSolver("GLOP")
    over = np.array([plan.over for plan in plans])
    rows = np.flatnonzero((over > 0).any(axis=0))
    seconds = [plan.seconds for plan in plans]
    least = min(seconds)
    unit = max(max(seconds) - least, 1e-9 * abs(least), 1e-30)
    prices = [solver.NumVar(0.0, solver.infinity(), "") for _ in rows]
    highest = (most - least) / unit if np.isfinite(most) else solver.infinity()
    proven = solver.NumVar(-solver.infinity(), highest, "")
    for plan, beyond in zip(plans, over[:, rows] / budget_bytes, strict=True):
        cut = solver.Constraint(-solver.infinity(), (plan.seconds - least) / unit)
        cut.SetCoefficient(proven, 1.0)
        for price, part in zip(prices, beyond, strict=True):
            cut.SetCoefficient(price, -float(part))
    solver.Maximize(proven)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return None
    found = np.zeros(over.shape[1])
    found[rows] = [max(price.solution_value(), 0.0) * unit / budget_bytes for price in prices]
    return BestPrices(found, proven.solution_value() * unit + least)
