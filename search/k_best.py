"""The k best plans that differ in a significant matmul, in order.

Plans count as different if a matmul that takes a significant part of the step is split in another way: over other axes
along its contracted dimensions, its output, its rows, or one of its batch dimensions. Mesh axes that the topology does
not distinguish count as one. The plans other than a known best are partitioned (Lawler 1972, Murty 1968): the $i$-th
part keeps the splits of the first $i - 1$ matmuls, and forbids that of the $i$-th. The best of each part is found by
the same search, with the k-th best cost as its cutoff.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from costmodels.program.program import Operation, Program
from search.answer.assignment import states_of
from search.formulation.problem import FORBIDDEN, Node
from search.formulation.strategies import Strategy
from search.presolve.limits import Say
from search.presolve.symmetry import axis_classes
from search.solve import DEFAULTS, Limits, NoPlan, Solution, solve

MATTERS = 0.01
"""The part of the step from which on a matmul's strategy is significant."""

Banned = Mapping[int, frozenset[int]]
"""Node to the labels that its states must not have."""


@dataclass(frozen=True)
class Ranking:
    """The best plans in order; `proven` says that each is optimal, and that no other plan comes between."""

    solutions: tuple[Solution, ...]
    proven: bool


def rank(best: Solution, k: int, limits: Limits = DEFAULTS, say: Say = lambda _: None) -> Ranking:
    """The k best plans of a problem with a known best; fewer if there are no more.

    **Arguments:**

    - `limits`: for the search of each part; `wall_seconds` for all of them together.
    """
    parts = _Parts(best, limits, say)
    order = count()
    waiting: list[tuple[float, int, Solution, Banned]] = [(best.check.seconds, next(order), best, {})]
    found: list[Solution] = []
    while waiting and len(found) < k:
        _, _, solution, banned = heapq.heappop(waiting)
        found.append(solution)
        if len(found) == k:
            break
        for part in parts.of(solution, banned):
            rest = k - len(found)
            cutoff = heapq.nsmallest(rest, waiting)[-1][0] if len(waiting) >= rest else np.inf
            other = parts.best(part, cutoff)
            if other is not None:
                heapq.heappush(waiting, (other.check.seconds, next(order), other, part))
    return Ranking(tuple(found), parts.proven and best.proof.status == "OPTIMAL")


class _Parts:
    """Parts of a problem: the forbidden splits of each significant matmul."""

    def __init__(self, best: Solution, limits: Limits, say: Say) -> None:
        self.problem, self.limits, self.say = best.problem, limits, say
        self.deadline = time.monotonic() + limits.wall_seconds
        self.nodes = _significant_nodes(best)
        alike = axis_classes(self.problem)
        program = self.problem.program
        self.labels = {node: _labels(program, self.problem.nodes[node], alike) for node in self.nodes}
        self.proven = True

    def of(self, solution: Solution, banned: Banned) -> Iterator[Banned]:
        """The parts of all plans whose splits differ from a solution's."""
        states = states_of(self.problem, solution.choice)
        kept = dict(banned)
        for node in self.nodes:
            labels = self.labels[node]
            now = int(labels[states[node]])
            yield kept | {node: kept.get(node, frozenset()) | {now}}
            kept[node] = frozenset(range(int(labels.max()) + 1)) - {now}

    def best(self, banned: Banned, cutoff: float) -> Solution | None:
        """The best plan of a part, if it has one below the cutoff."""
        nodes = list(self.problem.nodes)
        for node, labels in banned.items():
            out = np.isin(self.labels[node], list(labels))
            nodes[node] = replace(nodes[node], cost=np.where(out, FORBIDDEN, nodes[node].cost))
            if (nodes[node].cost >= FORBIDDEN / 2).all():
                return None
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.proven = False
            return None
        limits = replace(self.limits, wall_seconds=left)
        try:
            found = solve(replace(self.problem, nodes=tuple(nodes)), limits, self.say, True, cutoff)
        except NoPlan as error:
            self.proven = self.proven and error.proven
            return None
        self.proven = self.proven and found.proof.status == "OPTIMAL"
        return found


def _significant_nodes(best: Solution) -> list[int]:
    """The nodes of significant matmuls, the heaviest first."""
    problem, states = best.problem, states_of(best.problem, best.choice)
    cost: dict[int, float] = {}
    for i, _ in problem.program.matmuls():
        node = problem.of_operation[i]
        cost[node] = float(problem.nodes[node].cost[states[node]])
    least = MATTERS * best.check.seconds
    return sorted((node for node, seconds in cost.items() if seconds >= least), key=lambda node: -cost[node])


def _labels(program: Program, node: Node, alike: Mapping[str, int]) -> np.ndarray:
    """A number per strategy, shared by those that differ by a swap of like axes, by their order, or within a role."""
    op = program.operations[node.of]
    roles = [_role(op, factor) for factor in range(len(op.factors))]
    numbers: dict[object, int] = {}

    def key(state: Strategy) -> tuple:
        return tuple(
            sorted((role, alike[axis]) for role, split in zip(roles, state.splits, strict=True) for axis in split)
        )

    return np.array([numbers.setdefault(key(state), len(numbers)) for state in node.states])


def _role(op: Operation, factor: int) -> tuple[int, ...]:
    """The role of a factor in a matmul: the operands and results that have it.

    A factor that all have is its own role.
    """
    has = tuple(int(any(factor in dim for dim in use.dims)) for use in (*op.inputs, *op.outputs))
    return (*has, factor) if all(has) else has
