"""Kernel search: CP-SAT on the states that occur in any of the plans already seen.

Plans read off the dual at one value of the Lagrange multipliers are too large, at another too slow, and each is right
in parts. With only the states that occur in them, and the cheapest others, the problem is small enough to be solved
outright with exact memory: the kernel search of Angelelli, Mansini and Speranza ("Kernel search: A general heuristic
for the multi-dimensional knapsack problem", 2010).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from search.presolve.ascent import Ascent
from search.presolve.dual import Dual
from search.presolve.policy import POLICY


def combine(ascent: Ascent) -> None:
    """Combines the plans seen into better ones if memory leaves a large gap; the dual stays unchanged."""
    if ascent.closed or ascent.late or ascent.objective - ascent.bound < POLICY.kernel_gap * ascent.objective:
        return
    ascent.attempt(combine_plans(ascent))
    ascent.say(f"put together from {len(ascent.pool)} plans: best {ascent.objective:.6e} s")


def combine_plans(ascent: Ascent) -> np.ndarray:
    """The best combination of the plans seen, or of the last of them."""
    from search.cpsat.solver import solve  # a slow import: `search.cpsat.background` has begun it

    dual, seen, best = ascent.dual, ascent.pool.states, ascent.objective
    before = dual.snapshot()
    known = best if np.isfinite(best) else 2 * abs(dual.bound())
    chosen = _chosen(dual, seen, known - dual.bound())
    dual.reprice(np.zeros(len(ascent.rows)))
    dual.restrict(chosen)
    for _ in range(POLICY.kernel_sweeps):
        dual.sweep()
    wall = max(ascent.deadline - time.monotonic(), 0.1)
    slack = max(best - dual.bound(), 0.0)
    answer = solve(dual, ascent.rows, ascent.best, slack, POLICY.kernel_seconds, wall, POLICY.kernel_excess)
    ascent.effort.add(answer)
    dual.load(before)
    return seen[-1] if answer.states is None else answer.states


def _chosen(dual: Dual, seen: Sequence[np.ndarray], width: float) -> list[np.ndarray]:
    """Per node the states of the plans seen, the latest first while they are few, and the cheapest others.

    **Arguments:**

    - `width`: seconds; the most by which the choice of a further state may lift the bound.
    """
    chosen = [np.zeros(len(node.states), dtype=bool) for node in dual.problem.nodes]
    for states in reversed(seen):
        wider = [mask.copy() for mask in chosen]
        for mask, state in zip(wider, states, strict=True):
            mask[state] = True
        if _pairs(dual, wider) > POLICY.kernel_pairs:
            break
        chosen = wider
    excess = dual.excess()
    for _ in range(POLICY.kernel_halvings):
        wider = [mask.copy() for mask in chosen]
        for mask, keep, above in zip(wider, dual.keep, excess, strict=True):
            mask[keep[above <= width]] = True
        if _pairs(dual, wider) <= POLICY.kernel_pairs:
            chosen = wider
            break
        width /= 2
    return [np.flatnonzero(mask) for mask in chosen]


def _pairs(dual: Dual, chosen: Sequence[np.ndarray]) -> int:
    """Pairs of layouts that chosen states leave open, over all edges."""
    return sum(
        _count(edge.rows[chosen[edge.a]], edge.matrix.shape[0])
        * _count(edge.columns[chosen[edge.b]], edge.matrix.shape[1])
        - 1
        for edge in dual.problem.edges
    )


def _count(layouts: np.ndarray, of: int) -> int:
    """The number of distinct layouts among these, of `of` in all."""
    found = np.zeros(of, dtype=bool)
    found[layouts] = True
    return int(np.count_nonzero(found))
