"""The final decision by CP-SAT among the states that presolve has left of the whole problem.

CP-SAT sees every operation, including those eliminated from the bound's problem, and the exact memory at every point.
The incumbent is its hint, the bound a cut. Where the bound has met the incumbent, the survivors are plans of the same
cost. If they are many, light choices are fixed to the incumbent's, as any of them is as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.answer.solution import Answer
from search.formulation.problem import Problem
from search.memory.constraints import Row
from search.presolve.dual import Dual
from search.presolve.policy import POLICY
from search.presolve.symmetry import surroundings


@dataclass(frozen=True)
class Domains:
    """Per node of the whole problem the surviving states; `complete` if no plan of interest has any other."""

    keep: tuple[np.ndarray, ...]
    complete: bool

    @property
    def count(self) -> int:
        """The number of surviving states."""
        return sum(map(len, self.keep))


def domains(
    problem: Problem, surviving: Sequence[np.ndarray], incumbent: np.ndarray | None, most_pairs: int
) -> Domains | None:
    """The surviving states and the incumbent's.

    Nodes that would add too many pairs of layouts keep the incumbent's alone.

    **Returns:** `None` if they are too many and there is no incumbent.
    """
    left = tuple(surviving)
    if incumbent is not None:
        left = tuple(np.union1d(keep, [state]) for keep, state in zip(left, incumbent, strict=True))
    if sum(_pairs(problem, k, left) for k in range(len(problem.edges))) <= most_pairs:
        return Domains(left, True)
    return None if incumbent is None else Domains(_open_states(problem, left, incumbent, most_pairs), False)


def single_states(incumbent: np.ndarray) -> Domains:
    """The states of one plan alone."""
    return Domains(tuple(np.array([state]) for state in incumbent), False)


def _pairs(problem: Problem, k: int, keep: Sequence[np.ndarray]) -> int:
    """Pairs of layouts of an edge with a choice of them."""
    edge = problem.edges[k]
    if len(keep[edge.a]) == 1 or len(keep[edge.b]) == 1:
        return 0
    return len(np.unique(edge.rows[keep[edge.a]])) * len(np.unique(edge.columns[keep[edge.b]]))


def _open_states(
    problem: Problem, left: Sequence[np.ndarray], incumbent: np.ndarray, most_pairs: int
) -> tuple[np.ndarray, ...]:
    """All states of the nodes with the most bytes around them while the pairs are few; the incumbent's of the others."""
    found = [np.array([state]) for state in incumbent]
    room = most_pairs
    for i in sorted(range(len(left)), key=lambda i: (-surroundings(problem, i), i)):
        before, found[i] = found[i], left[i]
        more = sum(_pairs(problem, k, found) for k in problem.incident[i])
        if more > room:
            found[i] = before
        else:
            room -= more
    return tuple(found)


def answer_on(
    problem: Problem,
    rows: Sequence[Row],
    left: Domains,
    incumbent: np.ndarray | None,
    lower: float,
    most: float,
    deterministic_seconds: float,
    wall_seconds: float,
) -> Answer:
    """CP-SAT's answer on the surviving states of the whole problem.

    **Arguments:**

    - `incumbent`: the best plan known, if it fits.
    - `lower`: seconds, a proven lower bound; without one, the model is as it is built.
    - `most`: seconds; slower plans are not of interest.
    """
    from search.cpsat.solver import solve  # a slow import: `search.cpsat.background` has begun it

    dual = Dual(problem, rows, left.keep)
    if np.isfinite(lower):
        _even_out(dual, most)
    slack = most - dual.bound() if np.isfinite(most) else np.inf
    return solve(dual, rows, incumbent, slack, deterministic_seconds, wall_seconds, lower=lower)


def _even_out(dual: Dual, most: float) -> None:
    """Sweeps until the dual's bound is no longer lifted by much of what is left below `most`."""
    for _ in range(POLICY.survivor_sweeps):
        dual.sweep()
    bound = dual.bound()
    for _ in range(POLICY.more_survivor_sweeps if np.isfinite(most) else 0):
        dual.sweep()
        before, bound = bound, dual.bound()
        if bound - before <= POLICY.survivor_flat_part * (most - bound):
            break
