"""The price of memory: moved to where the bound is highest, as far as the plans seen tell, until they tell no better.

The bound is concave in the prices of all rows. Each trial shows a plan that is best at its prices, and the plans seen say where
to try next (`search.pool`); it is tried half way there, as the far end is often far too high or too low (the smoothing of
Wentges, "Weighted Dantzig-Wolfe decomposition for linear mixed-integer programming", 1997).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from search.presolve.dual import Snapshot

if TYPE_CHECKING:
    from search.presolve.ascent import Ascent

_PART = 0.5
"""How far each trial goes from the best prices known to those that the plans seen tell."""
_FLAT = 1e-4
"""The part of the bound by which it may still rise, at most, when prices are good enough."""
_FLAT_OF_OPEN = 0.02
"""The same, as a part of what is open."""
_FEEBLE, _PATIENCE = 0.1, 3
"""After how many trials in turn it ends that lift the bound by less than this part of that."""
_GROWTH = 4.0
"""By what factor a price rises while no plan that fits is known."""

Trial = Callable[[], np.ndarray]
"""Lifts the bound at the dual's prices; returns by how much the relaxed plan overflows each row."""


def settled(ascent: Ascent, over: np.ndarray, trial: Trial, trials: int) -> None:
    """Moves the dual's prices to where its bound is highest.

    **Arguments:**

    - `over`: bytes by which the relaxed plan overflows each row at the present prices.
    """
    dual = ascent.dual
    best: tuple[float, Snapshot] = (dual.bound(), dual.snapshot())
    before, feeble = np.inf, 0
    for _ in range(trials):
        told = ascent.pool.best_prices(dual.keep, ascent.objective)
        open_ = ascent.objective - best[0] if np.isfinite(ascent.objective) else 0.0
        little = max(_FLAT * abs(best[0]), _FLAT_OF_OPEN * open_)
        if ascent.reached(best[0]) or ascent.late or (told and told.seconds - best[0] < little):
            break
        if told is None and over.max(initial=0.0) <= 0:
            break
        if told is None:
            prices = _higher(ascent, over)
        else:
            part = _PART if told.seconds < before else 1.0
            prices = best[1].multipliers + part * (told.prices - best[1].multipliers)
            before = told.seconds
        dual.reprice(prices)
        over = trial()
        if dual.emptied:
            return
        rise = dual.bound() - best[0]
        if rise > 0:
            best = dual.bound(), dual.snapshot()
        feeble = feeble + 1 if told is not None and rise < _FEEBLE * little else 0
        if feeble == _PATIENCE:
            break  # the plan that would say more is not among those that are read off the dual
    if dual.bound() < best[0]:
        left = dual.keep
        dual.load(best[1])
        dual.restrict([np.intersect1d(a, b, assume_unique=True) for a, b in zip(dual.keep, left, strict=True)])


def _higher(ascent: Ascent, over: np.ndarray) -> np.ndarray:
    """Prices under which the rows that overflow may not: higher ones, or a first one for that which overflows most."""
    prices = ascent.dual.multipliers.copy()
    priced = (over > 0) & (prices > 0)
    if priced.any():
        prices[priced] *= _GROWTH
    else:
        row = int(np.argmax(over))
        prices[row] = _first(ascent, float(over[row]))
    return prices


def _first(ascent: Ascent, over: float) -> float:
    """The price of a byte at which the dual's tangent, of slope `over`, reaches the best plan: it turns before."""
    most = 1.0 / min(axis.bytes_per_second for axis in ascent.problem.topology.axes)
    lower = ascent.dual.bound()
    rise = ascent.objective - lower if np.isfinite(ascent.objective) else abs(lower)
    return min(rise / over, most) if rise > 0 else most
