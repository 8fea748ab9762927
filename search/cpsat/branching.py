"""What the bound alone does not decide: branch on heavy layouts, and let CP-SAT close the leaves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from search.answer.solution import Answer
from search.cpsat.branching_rule import Probing, Split
from search.formulation.problem import FORBIDDEN
from search.presolve.ascent import Ascent
from search.presolve.dual import Snapshot
from search.presolve.limits import PRECISION
from search.presolve.multipliers import bracket, raise_bound
from search.presolve.primal import decode
from search.presolve.symmetry import surroundings

_FIRST_WINDOW = 1e-6
"""The first window that CP-SAT searches, as a part of the bound."""
_WINDOW_GROWTH = 30.0
"""How much wider each further window is."""
_WIDEST = FORBIDDEN / 100
"""The widest window, in seconds: what lies beyond costs as much as the impossible."""
_LITTLE = 0.01
"""The part of what is open by which two sweeps lift a branch's bound when it is said to stall."""
_FEW = 0.01
"""The part of the surviving states that is struck out then, at most."""
_MUCH = 0.5
"""The part of what is open in another branch by which the bound of one must be higher to be looked at after it."""
_TRIALS = 6
"""How often the multipliers of memory are moved in a branch, at most."""
_SMALL = 10_000
"""Pairs of layouts below which a branch goes to CP-SAT."""
_LARGE, _CLOSE = 200_000, 1e-3
"""The same where so small a part of the best plan is open."""


class Branching:
    """Closes a stalled ascent.

    A branch holds one heavily used layout to some of its states (`search.cpsat.branching_rule`). Each side is swept again, at
    multipliers of its own, and dropped when its bound reaches the best plan known. Depth first, the side of the relaxed plan
    first, unless another branch promises much better plans. `unproven` is the least bound of what the limits, or an
    interruption, left undecided.
    """

    def __init__(self, ascent: Ascent, deterministic_seconds: float) -> None:
        self.ascent, self.dual = ascent, ascent.dual
        self.deterministic_seconds = deterministic_seconds
        self._probing = Probing(ascent, [surroundings(ascent.problem, i) for i in range(len(ascent.problem.nodes))])
        self.branches = 0
        self.unproven = np.inf

    def run(self) -> None:
        """Branches until nothing is open, or time is up; lifts the ascent's bound to what is proven."""
        open_: list[Snapshot] = [self.dual.snapshot()]
        try:
            self._explore(open_)
        finally:
            self._leave(open_)

    def _leave(self, open_: Sequence[Snapshot]) -> None:
        """Lifts the ascent's bound to what is proven, whatever is still open."""
        self.unproven = min([self.unproven, *map(self._bound_of, open_)])
        self.ascent.bound = max(self.ascent.bound, min(self.ascent.objective, self.unproven))

    def _explore(self, open_: list[Snapshot]) -> None:
        """Closes branches, the last one first; what is undecided when time is up, or at an interruption, stays in the list."""
        while open_ and not self.ascent.late:
            self._close_last(open_)

    def _close_last(self, open_: list[Snapshot]) -> None:
        """Closes the last branch, or leaves its two sides in its place."""
        self.dual.load(open_[-1])
        self.branches += 1
        lower = max(open_[-1].least, self._refine())
        rest = len(open_) - 1
        self.ascent.say(f"branch {self.branches}, {rest} open: bound {lower:.6e} s, {self.dual.pairs()} pairs")
        first = self._more_promising(open_, lower)
        if self._is_open(lower) and first is not None:
            later = self.dual.snapshot()
            later.least = lower
            open_[-1:] = [later, open_.pop(first)]
            return
        split = None
        if self._is_open(lower) and self.dual.pairs() > self._small(lower):
            split = self._undecided()
            lower = max(lower, self.dual.bound())
        if split is None and self._is_open(lower):
            lower, split = self._finished(lower)
        open_[-1:] = [] if split is None else self._sides(split, lower)

    def _more_promising(self, open_: Sequence[Snapshot], lower: float) -> int | None:
        """Which open branch promises much better plans than the last one can hold; a good plan may close that unopened."""
        if len(open_) < 2 or not np.isfinite(self.ascent.objective):
            return None
        first = min(range(len(open_) - 1), key=lambda at: open_[at].least)
        promised = open_[first].least
        return first if lower - promised > _MUCH * (self.ascent.objective - promised) else None

    def _small(self, lower: float) -> int:
        """How many pairs a branch with this bound may have to go to CP-SAT."""
        return _LARGE if self.ascent.objective - lower < _CLOSE * self.ascent.objective else _SMALL

    def _finished(self, lower: float) -> tuple[float, Split | None]:
        """Closes a branch by CP-SAT; returns the bound that is proven for it, and what to branch on if that is too coarse.

        It is so where costs differ widely.
        """
        before = self.dual.snapshot()
        proven = self._finish(lower)
        if not self._precise(proven) and not self.ascent.late:
            self.dual.load(before)
            split = self._undecided()
            if split is not None or not self._is_open(self.dual.bound()):
                return max(lower, proven), split
        self.unproven = min(self.unproven, proven)
        return proven, None

    def _undecided(self) -> Split | None:
        """What to branch on, if the best prices of memory and what can be dropped leave anything open."""
        over = self.ascent.attempt(decode(self.dual, thorough=not self.dual.multipliers.any()))
        raise_bound(self.ascent, over, self._try_multipliers, _TRIALS)
        return self._probing.split(bracket(self.ascent)) if self._is_open(self._refine()) else None

    def _try_multipliers(self) -> np.ndarray:
        """Lifts a branch's bound a little; returns by how much the relaxed plan overflows each row."""
        self.dual.sweep()
        self.dual.sweep()
        return self.ascent.look(decode(self.dual, thorough=False)).over

    def _is_open(self, lower: float) -> bool:
        """Whether a branch with this bound may hold a better plan."""
        return not self.ascent.reached(lower) and lower < FORBIDDEN / 2 and not self.dual.emptied

    def _bound_of(self, snapshot: Snapshot) -> float:
        self.dual.load(snapshot)
        return max(snapshot.least, self.dual.bound())

    def _refine(self) -> float:
        """Sweeps one branch until its bound stalls, reaches the best plan, or says that nothing fits; returns the bound."""
        lower = FORBIDDEN if self.dual.overfull() else self.dual.bound()
        while not self.ascent.reached(lower) and lower < FORBIDDEN / 2 and not self.ascent.late:
            self.dual.sweep()
            self.dual.sweep()
            before, lower = lower, self.dual.bound()
            if self.ascent.reached(lower):
                break
            struck = self.dual.exclude(self.ascent.objective) if np.isfinite(self.ascent.objective) else 0
            if self.dual.emptied:
                return self.ascent.objective
            least = (
                _LITTLE * (self.ascent.objective - lower)
                if np.isfinite(self.ascent.objective)
                else _LITTLE * abs(lower)
            )
            if lower - before < least and struck <= _FEW * sum(map(len, self.dual.keep)):
                break
        return lower

    def _sides(self, split: Split, least: float) -> list[Snapshot]:
        """Two branches of one that costs at least so much, the one to look at first last."""
        found = []
        for side in (split.far, split.near):
            snapshot = self.dual.snapshot()
            snapshot.keep[split.node], snapshot.least = side, least
            found.append(snapshot)
        return found

    def _finish(self, lower: float) -> float:
        """`_closed_by_cp_sat`, after which no pair stays banned that only this branch does without."""
        banned = dict(self.dual.banned)
        found = self._closed_by_cp_sat(lower)
        self.dual.banned = banned
        return found

    def _ban_pairs(self, lower: float) -> None:
        """Takes from CP-SAT the pairs that the price of memory excludes, before that is taken off."""
        if np.isfinite(self.ascent.objective):
            self.dual.ban_pairs(max(self.ascent.objective - lower, 0.0) + PRECISION * abs(lower))

    def _closed_by_cp_sat(self, lower: float) -> float:
        """CP-SAT on one branch, the likeliest states first; returns the bound that is proven for it.

        A window of width $\\delta$ keeps the states whose choice alone lifts the bound $L$ by at most $\\delta$. No other
        state occurs in a plan of cost at most $L + \\delta$, so the lesser of $L + \\delta$ and CP-SAT's bound in the
        window is a bound. Costs are rounded down in the integer model: its bound stays valid, but coarser in wide windows.
        """
        width = max(abs(lower), 1e-12) * _FIRST_WINDOW
        if self.dual.multipliers.any():
            self._ban_pairs(lower)
            lower = self._unpriced()
            width = _WIDEST
        every = self.dual.snapshot()
        while not self.ascent.reached(lower):
            room = min(max(self.ascent.objective - lower, 0.0), _WIDEST)
            width = min(width, room)
            proven, known = self._proven_within(every, lower, width)
            if width < room:
                proven = min(proven, lower + width)
            if not known or proven == np.inf or self._precise(proven):
                return min(proven, self.ascent.objective)
            rest = self.ascent.objective - lower
            if width == room and rest > width / 2:
                return proven  # nothing was left out, and no narrower window would round more finely
            width = rest if width == room else width * _WINDOW_GROWTH
        return lower

    def _precise(self, proven: float) -> bool:
        best = self.ascent.objective
        return np.isfinite(best) and best - proven <= PRECISION * best

    def _proven_within(self, every: Snapshot, lower: float, width: float) -> tuple[float, bool]:
        """A bound on all plans of a window, infinite if it holds none, and whether CP-SAT came to an end."""
        self.dual.load(every)
        likely = self.dual.within(width)
        if not all(len(keep) for keep in likely):
            return np.inf, True
        self.dual.restrict(likely)
        answer = self._window(width)
        if answer.status in ("INFEASIBLE", "OPTIMAL"):
            return answer.bound_seconds, True
        return min(answer.bound_seconds, lower + width), False

    def _unpriced(self) -> float:
        """Takes the price off memory (CP-SAT has the rows themselves) and lifts the bound again."""
        self.dual.reprice(np.zeros(len(self.ascent.rows)))
        for _ in range(6):
            self.dual.sweep()
        return self.dual.bound()

    def _window(self, width: float) -> Answer:
        from search.cpsat.solver import solve  # takes long to import: `search.cpsat.background` has begun

        left = sum(len(keep) for keep in self.dual.keep)
        wall = max(self.ascent.deadline - time.monotonic(), 0.1)
        answer = solve(self.dual, self.ascent.rows, self.ascent.best, width, self.deterministic_seconds, wall)
        self.ascent.effort.add(answer)
        self.ascent.say(f"CP-SAT within {width:.2e} s: {left} states, {answer.booleans} booleans, {answer.status}")
        if answer.states is not None:
            self.ascent.offer(answer.states, answer.value)
        return answer
