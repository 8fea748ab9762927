"""The ascent: lifts the bound and improves the best plan until they meet or stall."""

from __future__ import annotations

import time

import numpy as np

from search.answer.solution import Effort
from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import Row, sum_rows
from search.presolve.dual import Dual
from search.presolve.limits import TOLERANCE, Say
from search.presolve.multipliers import Pool, Seen, raise_bound
from search.presolve.policy import POLICY
from search.presolve.primal import decode, improve
from search.presolve.symmetry import possible_states


class Ascent:
    """The state of one search: the dual, the best plan so far, and the proven bound of the whole problem.

    `fits` is false if the least bytes of all arrays already overflow a chip. `leanest` is the solution with the least
    overflow seen, and that overflow in bytes. `prices` are the rows' multipliers, in seconds per byte, at the best
    bound found without branching. `pool` holds the plans seen, feasible or not. Only plans below `cutoff` seconds are
    searched. At `deadline`, on the monotonic clock, the ascent ends with its current state.
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
        self._together = sum_rows(self.rows)
        self.dual = Dual(problem, self.rows, possible_states(problem, symmetric))
        self.best: np.ndarray | None = None
        self.whole: np.ndarray | None = None
        self.objective = cutoff
        self.bound = -np.inf
        self.leanest: tuple[float, np.ndarray | None] = (np.inf, None)
        self.prices = np.zeros(len(rows))
        self.pool = Pool(problem, rows)
        self.effort = Effort()
        self._given = False

    def begin_with(self, states: np.ndarray) -> None:
        """Starts from a plan. If it fits, fewer plans are read off the dual while its bound is far away."""
        self.look(states)
        self._given = self.best is not None

    @property
    def fits(self) -> bool:
        """Whether the least bytes of all arrays together fit a chip."""
        return self.dual.fits

    def has_reached(self, lower: float) -> bool:
        """Whether a bound has reached the best plan, or the cutoff."""
        return np.isfinite(self.objective) and lower >= self.objective * (1 - TOLERANCE)

    @property
    def closed(self) -> bool:
        """Whether the best plan is proven best."""
        return self.has_reached(self.bound)

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return time.monotonic() > self.deadline

    def look(self, states: np.ndarray) -> Seen:
        """Remembers a plan, and keeps it if it fits and is better than the best so far."""
        seen = self.pool.add(states)
        if seen.fits:
            self.offer(seen.states, seen.seconds)
        return seen

    def offer(self, states: np.ndarray, value: float, whole: np.ndarray | None = None) -> None:
        """Keeps a plan that fits if it is better than the best so far, and its states of the `whole` problem if known."""
        if value < min(self.objective, FORBIDDEN / 2):
            self.best, self.objective, self.whole = states, value, whole

    def _is_near(self, lower: float) -> bool:
        """Whether a bound is so near the best plan that a plan read off the dual is likely to be better."""
        return lower >= self.objective * (1 - POLICY.near)

    def run(self, prices: np.ndarray | None = None) -> None:
        """Lifts the bound until it stalls, first without memory, then with multipliers on the rows that overflow.

        With `prices` that were good for a similar problem, it starts from those.
        """
        self.dual.propagate()
        if not self.fits:
            self.attempt(np.array([keep[0] for keep in self.dual.keep]))
            return
        if prices is not None and prices.any():
            self.dual.reprice(prices)
            self.prices = prices
            self._given = self.best is not None
        over = self.lift(self.rounds)
        self._given = False
        if over.max(initial=0.0) > 0 or self.dual.multipliers.any():
            raise_bound(self, over, self.settle, POLICY.trials)
            self.bound = max(self.bound, self.dual.bound())
            self.prices = self.dual.multipliers.copy()

    def lift(self, rounds: int) -> np.ndarray:
        """Alternates sweeps, incumbents and reduced-cost fixing.

        Returns the last relaxed solution's overflow of each row.
        """
        stalled, idle, lower = 0, 0, -np.inf
        over = None
        for turn in range(rounds):
            for _ in range(3):
                self.dual.sweep()
            before, lower = lower, self.dual.bound()
            self.bound = max(self.bound, lower)
            if self._reads(turn, idle, lower):
                best = self.objective
                over = self.attempt(decode(self.dual, thorough=turn % POLICY.reading == 0))
                idle = idle + 1 if self.objective == best and self.best is not None else 0
            struck = self.dual.exclude(self.objective) if np.isfinite(self.objective) else 0
            self.say(f"turn {turn}: bound {lower:.6e} s, best {self.objective:.6e} s, fixed {struck}")
            little = POLICY.flat_part if over is None or over.max(initial=0.0) <= 0 else POLICY.flat_part_to_price
            open_ = self.objective - lower if np.isfinite(self.objective) else 0.0
            flat = lower - before < max(little * abs(lower), POLICY.flat_part_of_open * open_)
            stalled = stalled + 1 if flat and struck <= POLICY.few_struck * sum(map(len, self.dual.keep)) else 0
            if self.closed or self.late or stalled >= 2:
                break
        return self.attempt(decode(self.dual, thorough=False)) if over is None else over

    def _reads(self, turn: int, idle: int, lower: float) -> bool:
        """Whether a plan is read off the dual in this turn: less often if one is given, or if the last gave nothing."""
        if not self._given and idle < POLICY.reading:
            return True
        return turn % POLICY.reading == 0 and not self.closed and (not self._given or self._is_near(lower))

    def settle(self) -> np.ndarray:
        """Like `lift`, for one trial of multipliers, at the root or in a branch: one incumbent, one fixing."""
        lower = -np.inf
        for _ in range(POLICY.settling):
            for _ in range(3):
                self.dual.sweep()
            before, lower = lower, self.dual.bound()
            if lower - before < POLICY.flat_part * abs(lower) or self.late:
                break
        over = self.attempt(decode(self.dual, thorough=False))
        struck = self.dual.exclude(self.objective) if np.isfinite(self.objective) else 0
        self.say(
            f"multiplier {self.dual.multipliers.max():.3e}: bound {lower:.6e} s, best {self.objective:.6e} s, fixed {struck}"
        )
        return over

    def attempt(self, states: np.ndarray) -> np.ndarray:
        """Improves a solution and keeps the best that fits.

        Returns the bytes by which the relaxed one overflows each row.

        A solution that does not fit is improved again with high memory multipliers.
        """
        steep = 10 * abs(self.bound) if np.isfinite(self.bound) else FORBIDDEN / 100
        everywhere = np.array([max(steep, 1e-9) / self.problem.budget_bytes])
        relaxed = None
        for limits, price in ((self.rows, self.dual.multipliers), ((self._together,), everywhere)):
            improved = self.look(improve(self.problem, limits, states, price))
            relaxed = improved.over if relaxed is None else relaxed
            worst = float(improved.over.max(initial=-np.inf))
            if worst < self.leanest[0] and improved.seconds < FORBIDDEN / 2:
                self.leanest = worst, improved.states
            if improved.fits:
                break
        return relaxed
