"""Lifting the bound and lowering the best plan until they meet or stall."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from search.bound import Dual
from search.incumbent import decode, improve, overflow
from search.memory import Row, together
from search.problem import FORBIDDEN, Node, Problem
from search.symmetry import representatives

Say = Callable[[str], None]

TOLERANCE = 1e-9
"""Relative difference between bound and plan that counts as none."""
_PRICED_ROWS = 3
"""How many memory rows are priced, one after the other."""
_NEAR = 0.03
"""With a plan to start from, the part of it by which the bound may be below it where others are read off the dual."""
_READING = 3
"""And in every how many turns they are."""
_BISECTIONS = 14
"""Trials for one row's price."""


class Ascent:
    """The state of one search: the dual, the best plan so far, and the bound that is proven for the whole problem.

    `fits` is false when the least bytes of everything already overflow a chip. `leanest` is the solution with the least
    overflow seen, and that overflow in bytes. `prices` are the rows' multipliers, in seconds per byte, at the best bound that
    was found without branching. Only plans below `cutoff` seconds are looked for. At `deadline`, of the monotonic clock, it
    ends with what it has.
    """

    def __init__(
        self,
        problem: Problem,
        rows: tuple[Row, ...],
        rounds: int,
        say: Say,
        symmetric: bool = True,
        deadline: float = np.inf,
        cutoff: float = np.inf,
    ) -> None:
        self.problem, self.rows, self.rounds, self.say, self.deadline = problem, rows, rounds, say, deadline
        self._together = together(self.rows)
        self.dual = Dual(problem, self.rows, [_possible(node) for node in problem.nodes])
        self.best: np.ndarray | None = None
        self.objective = cutoff
        self.bound = -np.inf
        self.leanest: tuple[float, np.ndarray | None] = (np.inf, None)
        self.prices = np.zeros(len(rows))
        self._given = False
        if symmetric:
            self._hold_symmetry()

    def begin_with(self, states: np.ndarray) -> None:
        """Starts from a plan: if it fits, fewer are read off the dual while its bound is far away."""
        if (overflow(self.problem, self.rows, states) <= 0).all():
            self.offer(states, self.problem.objective(states))
        self._given = self.best is not None

    def _hold_symmetry(self) -> None:
        held = representatives(self.problem)
        if held is not None:
            node, kept = held
            keep = list(self.dual.keep)
            keep[node] = np.intersect1d(keep[node], kept)
            self.dual.restrict(keep)

    @property
    def fits(self) -> bool:
        """Whether the least bytes of everything, side by side, fit a chip."""
        return self.dual.fits

    def reached(self, lower: float) -> bool:
        """Whether a bound has reached the best plan, or the cutoff."""
        return np.isfinite(self.objective) and lower >= self.objective * (1 - TOLERANCE)

    @property
    def closed(self) -> bool:
        """Whether the best plan is proven best."""
        return self.reached(self.bound)

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return time.monotonic() > self.deadline

    def offer(self, states: np.ndarray, value: float) -> None:
        """Keeps a plan that fits if it is better than the best so far."""
        if value < min(self.objective, FORBIDDEN / 2):
            self.best, self.objective = states, value

    def _near(self, lower: float) -> bool:
        """Whether a bound is so near the best plan that what is read off the dual may well be better."""
        return lower >= self.objective * (1 - _NEAR)

    def run(self) -> None:
        """Lifts the bound until it stalls, first without memory, then with a price on the rows that overflow."""
        self.dual.propagate()
        if not self.fits:
            self.attempt(np.array([keep[0] for keep in self.dual.keep]))
            return
        over = self.lift(self.rounds)
        self._given = False
        for _ in range(_PRICED_ROWS):
            if self.closed or self.late or not len(over) or float(over.max()) <= 0:
                return
            over = self._price_row(int(np.argmax(over)))
            self.prices = self.dual.multipliers.copy()

    def lift(self, rounds: int) -> np.ndarray:
        """Alternates sweeps, incumbents and exclusion; returns by how much the last relaxed solution overflows each row."""
        stalled, lower = 0, -np.inf
        over = np.zeros(0)
        for turn in range(rounds):
            for _ in range(3):
                self.dual.sweep()
            before, lower = lower, self.dual.bound()
            self.bound = max(self.bound, lower)
            if not self._given or (turn % _READING == 0 and self._near(lower) and not self.closed):
                over = self.attempt(decode(self.dual))
            struck = self.dual.exclude(self.objective) if np.isfinite(self.objective) else 0
            self.say(f"turn {turn}: bound {lower:.6e} s, best {self.objective:.6e} s, struck {struck}")
            stalled = stalled + 1 if lower - before < 1e-5 * abs(lower) and not struck else 0
            if self.closed or self.late or stalled >= 2:
                break
        return over if len(over) or self.closed else self.attempt(decode(self.dual))

    def _price_row(self, row: int) -> np.ndarray:
        """Finds the multiplier of one row at which the relaxed solution begins to fit, by bisection on a concave dual."""
        low, high = 0.0, np.inf
        base = self.dual.multipliers.copy()
        best = (self.dual.bound(), base)
        trial = 1.0 / min(axis.bytes_per_second for axis in self.problem.topology.axes)
        over = np.zeros(len(self.rows))
        for _ in range(_BISECTIONS):
            multipliers = base.copy()
            multipliers[row] = trial
            self.dual.reprice(multipliers)
            over = self.lift(rounds=4)
            if self.closed or self.late:
                return over
            best = max(best, (self.dual.bound(), multipliers), key=lambda pair: pair[0])
            low, high = (trial, high) if over[row] > 0 else (low, trial)
            trial = 4 * low if not np.isfinite(high) else high / 8 if low == 0 else float(np.sqrt(low * high))
            if low > 0 and high < 1.1 * low:
                break
        self.dual.reprice(best[1])
        return self.lift(rounds=4)

    def attempt(self, states: np.ndarray) -> np.ndarray:
        """Improves a solution and keeps the best that fits; returns the bytes by which the relaxed one overflows each row.

        A solution that does not fit is improved again with a steep price on memory.
        """
        steep = 10 * abs(self.bound) if np.isfinite(self.bound) else FORBIDDEN / 100
        everywhere = np.array([max(steep, 1e-9) / self.problem.budget_bytes])
        relaxed = None
        for limits, price in ((self.rows, self.dual.multipliers), ((self._together,), everywhere)):
            improved = improve(self.problem, limits, states, price)
            over = overflow(self.problem, self.rows, improved)
            relaxed = over if relaxed is None else relaxed
            worst = float(over.max(initial=-np.inf))
            value = self.problem.objective(improved)
            if worst < self.leanest[0] and value < FORBIDDEN / 2:
                self.leanest = worst, improved
            if worst <= 0:
                self.offer(improved, value)
                break
        return relaxed


def _possible(node: Node) -> np.ndarray:
    """The states that are not forbidden; all of them if every one is, which the search then reports."""
    possible = np.flatnonzero(node.cost < FORBIDDEN / 2)
    return possible if len(possible) else np.arange(len(node.states))
