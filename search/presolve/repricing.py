"""The price of memory in a branch: moved to where the bound is highest, between plans that are too large and too slow.

The bound is concave in the price. Where it is highest, plans that overflow a chip and plans that leave it room cost alike;
in what they differ is what the bound cannot decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from search.presolve.ascent import Ascent
from search.presolve.dual import Snapshot
from search.presolve.primal import decode

_STEP = 1.5
"""By what factor a price changes at first; by its root whenever the direction turns."""
_STEPS = 6
"""How often it is changed, at most."""
_LITTLE = 0.01
"""The part of what is open by which the bound must rise to go on, once plans on both sides are known."""
_FINE = 1.02
"""The factor below which it is left."""


@dataclass
class Bracket:
    """Relaxed plans at about the best price: one that overflows a chip, and one that fits. Either may be missing."""

    bulky: np.ndarray | None = None
    lean: np.ndarray | None = None

    @property
    def known(self) -> bool:
        """Whether both plans are."""
        return self.bulky is not None and self.lean is not None


def bracketed(ascent: Ascent) -> Bracket:
    """Moves the dual's prices to where its bound is highest, and says between which plans that is."""
    dual, bracket = ascent.dual, Bracket()
    best: tuple[float, Snapshot] = (dual.bound(), dual.snapshot())
    step, before = _STEP, 0
    for _ in range(_STEPS):
        states = decode(dual, thorough=False)
        over = ascent.look(states).over
        way = 1 if over.max(initial=-np.inf) > 0 else -1
        if way > 0:
            bracket.bulky = states
        else:
            bracket.lean = states
        if before * way < 0:
            step = float(np.sqrt(step))
        if step < _FINE or not dual.multipliers.any():
            break
        before = way
        dual.reprice(_moved(dual.multipliers, over, step))
        dual.sweep()
        dual.sweep()
        lower = dual.bound()
        rise = lower - best[0]
        if rise > 0:
            best = lower, dual.snapshot()
        if ascent.reached(lower) or (bracket.known and rise < _LITTLE * (ascent.objective - lower)):
            break
    if dual.bound() < best[0]:
        dual.load(best[1])
    return bracket


def _moved(prices: np.ndarray, over: np.ndarray, step: float) -> np.ndarray:
    """Higher prices of rows that overflow, lower ones of rows that do not."""
    moved = np.where(over > 0, prices * step, prices / step)
    fresh = (over > 0) & (prices == 0)
    if fresh.any() and not ((over > 0) & (prices > 0)).any():
        moved[int(np.argmax(np.where(fresh, over, -np.inf)))] = prices.max() * (step - 1)
    return moved
