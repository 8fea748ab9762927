"""Branch and bound for problems too large for one CP-SAT call: branch on heavy layouts, solve the parts by CP-SAT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from search.cpsat.branching_rule import Probing, Split
from search.formulation.problem import FORBIDDEN
from search.presolve.ascent import Ascent
from search.presolve.dual import Snapshot
from search.presolve.limits import PRECISION
from search.presolve.multipliers import mixture, raise_bound
from search.presolve.policy import POLICY
from search.presolve.primal import decode
from search.presolve.symmetry import surroundings

Decide = Callable[[float, float], float]
"""CP-SAT on the states that the dual has left, given a bound in seconds and a time limit; returns the proven bound."""


class Branching:
    """Closes a stalled ascent.

    A branch restricts one heavily used layout to some of its states (`search.cpsat.branching_rule`). Each side is
    swept again with multipliers of its own, and dropped when its bound reaches the best plan known. The search is
    depth first, beginning with the side of the relaxed plan. `unproven` is the least bound of the branches left
    undecided by the limits or by an interruption.
    """

    def __init__(self, ascent: Ascent, decide: Decide) -> None:
        self.ascent, self.dual, self.decide = ascent, ascent.dual, decide
        self._probing = Probing(ascent, [surroundings(ascent.problem, i) for i in range(len(ascent.problem.nodes))])
        self.branches = 0
        self.unproven = np.inf

    def run(self) -> None:
        """Branches until nothing is open or time is up, then lifts the ascent's bound to what is proven."""
        open_: list[Snapshot] = [self.dual.snapshot()]
        try:
            self._explore(open_)
        finally:
            self._leave(open_)

    def _leave(self, open_: Sequence[Snapshot]) -> None:
        """Lifts the ascent's bound to what is proven despite the branches still open."""
        self.unproven = min([self.unproven, *map(self._bound_of, open_)])
        self.ascent.bound = max(self.ascent.bound, min(self.ascent.objective, self.unproven))

    def _explore(self, open_: list[Snapshot]) -> None:
        """Closes branches, the last one first; those undecided at the deadline or an interruption stay in the list."""
        while open_ and not self.ascent.late:
            self._close_last(open_)

    def _close_last(self, open_: list[Snapshot]) -> None:
        """Closes the last branch, or replaces it by its two sides."""
        self.dual.load(open_[-1])
        self.branches += 1
        lower = max(open_[-1].least, self._refine())
        rest = len(open_) - 1
        pairs, best = self.dual.pairs(), self.ascent.objective
        self.ascent.say(f"branch {self.branches}, {rest} open: bound {lower:.6e} s, best {best:.6e} s, {pairs} pairs")
        split = None
        if self._is_open(lower) and pairs > self._small(lower):
            split = self._next_split()
            lower = max(lower, self.dual.bound())
        if split is None and self._is_open(lower):
            lower, split = self._finish(lower)
        open_[-1:] = [] if split is None else self._sides(split, lower)

    def _small(self, lower: float) -> int:
        """The most pairs that a branch with this bound may have to go to CP-SAT."""
        return (
            POLICY.close_pairs
            if self.ascent.objective - lower < POLICY.close_part * self.ascent.objective
            else POLICY.small_pairs
        )

    def _finish(self, lower: float) -> tuple[float, Split | None]:
        """Closes a branch by CP-SAT; returns the proven bound, and the decision to branch on if that is too coarse.

        It is too coarse if costs differ widely, or if CP-SAT did not finish.
        """
        before = self.dual.snapshot()
        proven = self.decide(lower, POLICY.part_seconds)
        if not self._precise(proven) and not self.ascent.late:
            self.dual.load(before)
            split = self._next_split()
            if split is not None or not self._is_open(self.dual.bound()):
                return max(lower, proven), split
            proven = max(proven, self.decide(lower, np.inf))  # there is nothing left to divide
        self.unproven = min(self.unproven, proven)
        return proven, None

    def _next_split(self) -> Split | None:
        """The decision to branch on, if the best Lagrange multipliers and reduced-cost fixing leave anything open."""
        over = self.ascent.attempt(decode(self.dual, thorough=not self.dual.multipliers.any()))
        raise_bound(self.ascent, over, self._try_multipliers, POLICY.branch_trials)
        return self._probing.split(mixture(self.ascent)) if self._is_open(self._refine()) else None

    def _try_multipliers(self) -> np.ndarray:
        """Lifts a branch's bound a little; returns the relaxed plan's overflow of each row."""
        self.dual.sweep()
        self.dual.sweep()
        return self.ascent.look(decode(self.dual, thorough=False)).over

    def _is_open(self, lower: float) -> bool:
        """Whether a branch with this bound may hold a better plan."""
        return not self.ascent.has_reached(lower) and lower < FORBIDDEN / 2 and not self.dual.emptied

    def _bound_of(self, snapshot: Snapshot) -> float:
        self.dual.load(snapshot)
        return max(snapshot.least, self.dual.bound())

    def _refine(self) -> float:
        """Sweeps one branch until its bound stalls, reaches the best plan, or proves that nothing fits.

        Returns the bound.
        """
        lower = FORBIDDEN if self.dual.overfull() else self.dual.bound()
        while not self.ascent.has_reached(lower) and lower < FORBIDDEN / 2 and not self.ascent.late:
            self.dual.sweep()
            self.dual.sweep()
            before, lower = lower, self.dual.bound()
            if self.ascent.has_reached(lower):
                break
            struck = self.dual.exclude(self.ascent.objective) if np.isfinite(self.ascent.objective) else 0
            if self.dual.emptied:
                return self.ascent.objective
            least = (
                POLICY.branch_flat_part * (self.ascent.objective - lower)
                if np.isfinite(self.ascent.objective)
                else POLICY.branch_flat_part * abs(lower)
            )
            if lower - before < least and struck <= POLICY.branch_few_struck * sum(map(len, self.dual.keep)):
                break
        return lower

    def _sides(self, split: Split, least: float) -> list[Snapshot]:
        """The two sides of a branch whose plans cost at least this much, in stack order: the last is closed first."""
        found = []
        for side in (split.far, split.near):
            snapshot = self.dual.snapshot()
            snapshot.keep[split.node], snapshot.least = side, least
            found.append(snapshot)
        return found

    def _precise(self, proven: float) -> bool:
        best = self.ascent.objective
        return proven == np.inf or (np.isfinite(best) and best - proven <= PRECISION * best)
