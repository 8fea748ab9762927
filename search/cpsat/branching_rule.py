"""The branching rule, with strong branching to drop sides.

A side of a decision whose bound reaches the best plan in a short trial is dropped, and the other is fixed (as in
strong branching: Applegate, Bixby, Chvátal and Cook, "Finding cuts in the TSP", 1995). Of the remaining decisions, the
rule prefers those that a Lagrange multiplier cannot settle: at the best multiplier some plans that are too large and
some that fit cost the same, and the rule takes the array whose bytes differ most among them, by their weights in the
dual of the master problem. Without such plans it takes the array that depends most on the multipliers, or else the node
with the most bytes around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.presolve.ascent import Ascent
from search.presolve.multipliers import Mixture
from search.presolve.policy import POLICY
from search.presolve.primal import decode


@dataclass(frozen=True)
class Split:
    """A partition of one node's surviving states: the side of the relaxed plan, and the other.

    `contested` are the seconds, at the memory multipliers, by which plans at the best multipliers differ here.
    """

    node: int
    near: np.ndarray
    far: np.ndarray
    contested: float = 0.0


class Probing:
    """Finds the decision to branch on, and drops the sides that cannot beat the best plan."""

    def __init__(self, ascent: Ascent, weights: Sequence[float]) -> None:
        self.ascent, self.dual, self.weights = ascent, ascent.dual, weights

    def split(self, mixed: Mixture) -> Split | None:
        """The decision to branch on, of those of which no side was dropped; `None` if none is left or needed."""
        while splits := self._splits(mixed):
            found = [split for split in splits if not self._drop_side(split)]
            if found:
                return max(found, key=lambda split: split.contested)  # the first, if none is contested
            self.dual.sweep()
            self.dual.sweep()
            if self.ascent.has_reached(self.dual.bound()):
                return None
            self.dual.exclude(self.ascent.objective)
            if self.dual.emptied:
                return None
        return None

    def _drop_side(self, split: Split) -> bool:
        """Whether the far side cannot hold a better plan; then only the near side is kept."""
        lower = self.dual.bound()
        above = self.dual.excess_of(split.node)[np.isin(self.dual.keep[split.node], split.far)].min()
        if above < POLICY.hopeful_part * (self.ascent.objective - lower):
            return False
        if not self.ascent.has_reached(lower + above) and not self.ascent.has_reached(
            self._bound_of(split.node, split.far)
        ):
            return False
        self.dual.narrow(split.node, split.near)
        return True

    def _bound_of(self, node: int, side: np.ndarray) -> float:
        with self.dual.held(node, side):
            self.dual.sweep()
            return self.dual.bound()

    def _splits(self, mixed: Mixture) -> list[Split]:
        """One split of each candidate node for branching."""
        relaxed = decode(self.dual, thorough=False)
        held = self.dual.priced_bytes()
        contested = self._contested(mixed, held)
        found = [self._by_bytes(i, relaxed, held[i], between, apart) for i, (apart, between) in contested.items()]
        for node in self._candidates(held):
            if node in contested:
                continue
            if node in held and np.ptp(held[node]) > 0:
                found.append(self._by_bytes(node, relaxed, held[node], (held[node].min() + held[node].max()) / 2))
            else:
                keep = self.dual.keep[node]
                likeliest = keep == relaxed[node]
                found.append(Split(node, keep[likeliest], keep[~likeliest]))
        return [split for split in found if len(split.near) and len(split.far)]  # bytes may differ by rounding alone

    def _by_bytes(
        self, node: int, relaxed: np.ndarray, held: np.ndarray, between: float, contested: float = 0.0
    ) -> Split:
        """States that hold less than some bytes, and those that hold more."""
        keep = self.dual.keep[node]
        lean = held <= between
        near = lean if lean[keep == relaxed[node]].all() else ~lean
        return Split(node, keep[near], keep[~near], contested)

    def _contested(self, mixed: Mixture, held: dict[int, np.ndarray]) -> dict[int, tuple[float, float]]:
        """Nodes where the plans of a mixture hold different bytes: mean difference from the mean, and the mean.

        Both are in seconds at the multipliers.
        """
        if len(mixed) < 2:
            return {}
        found, weights = {}, np.array([weight for weight, _ in mixed])
        for i, bytes_of in held.items():
            at = [bytes_of[self.dual.keep[i] == states[i]] for _, states in mixed]
            if all(each.size for each in at) and any(each[0] != at[0][0] for each in at):
                values = np.array([each[0] for each in at])
                mean = float(np.average(values, weights=weights))
                found[i] = float(np.average(np.abs(values - mean), weights=weights)), mean
        return found

    def _candidates(self, held: dict[int, np.ndarray]) -> list[int]:
        """The undecided nodes that depend most on the multipliers, and those with the most bytes around them."""
        least = (
            POLICY.contested_part * (self.ascent.objective - self.dual.bound())
            if np.isfinite(self.ascent.objective)
            else 0.0
        )
        spread = {i: float(np.ptp(bytes_of)) for i, bytes_of in held.items()}
        undecided = [i for i, keep in enumerate(self.dual.keep) if len(keep) > 1]
        priced = [i for i in undecided if spread.get(i, 0.0) > least]
        others = sorted(set(undecided) - set(priced), key=lambda i: (-self.weights[i], i))
        return (
            sorted(priced, key=lambda i: (-spread[i], i))[: POLICY.priced_candidates]
            + others[: POLICY.other_candidates]
        )
