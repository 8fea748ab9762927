"""Lifting the bound and lowering the best plan until they meet or stall."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from search.bound import Dual
from search.incumbent import decode, improve, overflow
from search.kernel import combined
from search.memory import Row, together
from search.problem import FORBIDDEN, Node, Problem
from search.symmetry import representatives

Say = Callable[[str], None]

TOLERANCE = 1e-9
"""Relative difference between bound and plan that counts as none."""
_PRICED_ROWS = 3
"""How many memory rows are priced, one after the other."""
_REPAIRS = 8
"""How often the prices of overflowing rows are raised to make a plan fit."""
_RAISE = 1.3
"""By what factor."""
_LITTLE = 1e-5
"""The part of the bound that a turn lifts it by when it is said to stall."""
_LITTLE_OF_OPEN = 3e-3
"""The part of what is open that is little, too."""
_FEW = 1e-3
"""The part of the surviving states that is struck out by such a turn, at most."""
_LITTLE_TO_PRICE = 3e-4
"""The same while memory overflows, so that another price of it will lift the bound more."""
_FLAT = 1e-4
"""The part of the bound within which both sides of a row's best price lie when it is good enough."""
_FLAT_OF_OPEN = 0.02
"""The same, as a part of what is open."""
_NEAR = 0.03
"""With a plan to start from, the part of it by which the bound may be below it where others are read off the dual."""
_READING = 3
"""In every how many turns they are; without a plan to start from, in how many they are read in more than one way."""
_MUCH = 1e-3
"""The part of the best plan that is open when it is worth putting others together."""
_BISECTIONS = 14
"""Trials for one row's price."""
_SETTLING = 4
"""How often, at most, the bound is lifted for one trial."""


class Ascent:
    """The state of one search: the dual, the best plan so far, and the bound that is proven for the whole problem.

    `fits` is false when the least bytes of everything already overflow a chip. `leanest` is the solution with the least
    overflow seen, and that overflow in bytes. `prices` are the rows' multipliers, in seconds per byte, at the best bound that
    was found without branching. `seen` are the plans that were looked at, fitting or not. Only plans below `cutoff` seconds are
    looked for. At `deadline`, of the monotonic clock, it ends with what it has.
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
        self.seen: dict[bytes, np.ndarray] = {}
        self._given = self._combined = False
        if symmetric:
            self._hold_symmetry()

    def begin_with(self, states: np.ndarray) -> None:
        """Starts from a plan: if it fits, fewer are read off the dual while its bound is far away."""
        self.look(states)
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

    def look(self, states: np.ndarray) -> None:
        """Remembers a plan, whether it fits or not: parts of it may be right."""
        self.seen[states.tobytes()] = states

    def offer(self, states: np.ndarray, value: float) -> None:
        """Keeps a plan that fits if it is better than the best so far."""
        if value < min(self.objective, FORBIDDEN / 2):
            self.best, self.objective = states, value

    def _near(self, lower: float) -> bool:
        """Whether a bound is so near the best plan that what is read off the dual may well be better."""
        return lower >= self.objective * (1 - _NEAR)

    def run(self, prices: np.ndarray | None = None) -> None:
        """Lifts the bound until it stalls, first without memory, then with a price on the rows that overflow.

        With `prices` that were good for a problem much like this one, from those.
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
        for _ in range(_PRICED_ROWS):
            unpriced = np.where(self.dual.multipliers > 0, -np.inf, over)
            if self.closed or self.late or unpriced.max(initial=-np.inf) <= 0:
                break
            over = self._price_row(int(np.argmax(unpriced)), over)
            self.prices = self.dual.multipliers.copy()
            self._combine()
        self._combine()

    def _combine(self) -> None:
        """Once, where a price of memory leaves much open: puts the plans seen together to better ones."""
        if self._combined or self.closed or self.late or not self.dual.multipliers.any():
            return
        if np.isfinite(self.objective) and self.objective - self.bound < _MUCH * self.objective:
            return
        self._combined = True
        before = self.objective
        self.attempt(combined(self.dual, self.rows, tuple(self.seen.values()), self.best, before, self.deadline))
        self.say(f"put together from {len(self.seen)} plans: best {self.objective:.6e} s")

    def lift(self, rounds: int) -> np.ndarray:
        """Alternates sweeps, incumbents and exclusion; returns by how much the last relaxed solution overflows each row."""
        stalled, lower = 0, -np.inf
        over = None
        for turn in range(rounds):
            for _ in range(3):
                self.dual.sweep()
            before, lower = lower, self.dual.bound()
            self.bound = max(self.bound, lower)
            if not self._given or (turn % _READING == 0 and self._near(lower) and not self.closed):
                over = self.attempt(decode(self.dual, thorough=turn % _READING == 0))
            struck = self.dual.exclude(self.objective) if np.isfinite(self.objective) else 0
            self.say(f"turn {turn}: bound {lower:.6e} s, best {self.objective:.6e} s, struck {struck}")
            little = _LITTLE if over is None or over.max(initial=0.0) <= 0 else _LITTLE_TO_PRICE
            open_ = self.objective - lower if np.isfinite(self.objective) else 0.0
            flat = lower - before < max(little * abs(lower), _LITTLE_OF_OPEN * open_)
            stalled = stalled + 1 if flat and struck <= _FEW * sum(map(len, self.dual.keep)) else 0
            if self.closed or self.late or stalled >= 2:
                break
        return self.attempt(decode(self.dual, thorough=False)) if over is None else over

    def _price_row(self, row: int, over: np.ndarray) -> np.ndarray:
        """Finds the multiplier of one row at which the relaxed solution begins to fit, by bisection on a concave dual.

        Returns by how much rows overflow: at the best bound, or where this row fits and others do not.
        """
        beside = np.full(len(self.rows), -np.inf)
        base = self.dual.multipliers.copy()
        low, high = float(base[row]), np.inf
        best = (self.dual.bound(), base)
        trial = low + self._first_price(float(over[row]))
        below = above = -np.inf
        for _ in range(_BISECTIONS):
            multipliers = base.copy()
            multipliers[row] = trial
            self.dual.reprice(multipliers)
            over = self._settle()
            if self.closed or self.late:
                return over
            found = self.dual.bound()
            best = max(best, (found, multipliers), key=lambda pair: pair[0])
            low, high = (trial, high) if over[row] > 0 else (low, trial)
            below, above = (found, above) if over[row] > 0 else (below, found)
            beside = over if over[row] <= 0 else beside
            trial = 4 * low if not np.isfinite(high) else high / 8 if low == 0 else float(np.sqrt(low * high))
            open_ = self.objective - best[0] if np.isfinite(self.objective) else 0.0
            flat = best[0] - min(below, above) < max(_FLAT * abs(best[0]), _FLAT_OF_OPEN * open_)
            worse = base.any() and best[1] is base  # beside the price of another row, this one's has little to add
            if (low > 0 and high < 1.1 * low) or flat or worse:
                break
        self.dual.reprice(best[1])
        return np.maximum(self.lift(rounds=4), beside)

    def _settle(self) -> np.ndarray:
        """As `lift`, for one trial of a price: one incumbent and one exclusion, once the bound has risen."""
        lower = -np.inf
        for _ in range(_SETTLING):
            for _ in range(3):
                self.dual.sweep()
            before, lower = lower, self.dual.bound()
            if lower - before < _LITTLE * abs(lower) or self.late:
                break
        self.bound = max(self.bound, lower)
        over = self.attempt(decode(self.dual, thorough=False))
        struck = self.dual.exclude(self.objective) if np.isfinite(self.objective) else 0
        self.say(
            f"price {self.dual.multipliers.max():.3e}: bound {lower:.6e} s, best {self.objective:.6e} s, struck {struck}"
        )
        return over

    def _first_price(self, over: float) -> float:
        """The price of a byte at which the dual's tangent, of slope `over`, reaches the best plan: it turns before."""
        most = 1.0 / min(axis.bytes_per_second for axis in self.problem.topology.axes)
        if self.dual.multipliers.any():
            most = self.dual.multipliers.max() / 4
        lower = self.dual.bound()
        rise = self.objective - lower if np.isfinite(self.objective) else abs(lower)
        return min(rise / over, most) if rise > 0 and over > 0 else most

    def attempt(self, states: np.ndarray) -> np.ndarray:
        """Improves a solution and keeps the best that fits; returns the bytes by which the relaxed one overflows each row.

        A solution that does not fit is improved again with a steep price on memory.
        """
        steep = 10 * abs(self.bound) if np.isfinite(self.bound) else FORBIDDEN / 100
        everywhere = np.array([max(steep, 1e-9) / self.problem.budget_bytes])
        relaxed = None
        for limits, price in ((self.rows, self.dual.multipliers), ((self._together,), everywhere)):
            improved = improve(self.problem, limits, states, price)
            self.look(improved)
            over = overflow(self.problem, self.rows, improved)
            relaxed = over if relaxed is None else relaxed
            worst = float(over.max(initial=-np.inf))
            value = self.problem.objective(improved)
            if worst < self.leanest[0] and value < FORBIDDEN / 2:
                self.leanest = worst, improved
            if worst <= 0:
                self.offer(improved, value)
                break
            if limits is self.rows and price.any() and value < self.objective:
                self._repair(improved, price)
        return relaxed

    def _repair(self, states: np.ndarray, price: np.ndarray) -> None:
        """Raises the price of the rows that overflow until they fit, and keeps what comes out if it is better."""
        least = float(price.max())
        for _ in range(_REPAIRS):
            over = overflow(self.problem, self.rows, states)
            if float(over.max()) <= 0:
                self.offer(states, self.problem.objective(states))
                return
            price = np.where(over > 0, np.maximum(price * _RAISE, least), price)
            states = improve(self.problem, self.rows, states, price)
            self.look(states)
            if self.problem.objective(states) >= self.objective:
                return


def _possible(node: Node) -> np.ndarray:
    """The states that are not forbidden; all of them if every one is, which the search then reports."""
    possible = np.flatnonzero(node.cost < FORBIDDEN / 2)
    return possible if len(possible) else np.arange(len(node.states))
