"""Runner-up strategies of an operation, and the step time with each.

The cost of another strategy is the cost of a whole plan. The operation is fixed to the strategy; its neighbours and their
neighbours are re-optimised one at a time until none improves. The result is a feasible upper bound on the strategy's cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from autoshard._util.tables import size, time
from autoshard.naming.strategy_names import strategy_name
from search.answer.assignment import choice_of
from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import Row, sum_rows
from search.presolve.primal import improve, overflow

_TRIED = 4
"""The number of strategies of other names that are costed, and of better states of a node that are tried for memory."""
_STEEP = 10.0
"""The cost of the whole budget, in step times, for states that do not fit."""
_ROUNDS = 10
"""The largest number of rounds of re-optimisation."""


class Alternatives:
    """Alternative strategies of the operations of one plan."""

    def __init__(self, problem: Problem, limits: tuple[Row, ...], states: np.ndarray) -> None:
        self.problem, self.limits, self.states = problem, limits, states

    @cached_property
    def _everywhere(self) -> Row:
        return sum_rows(self.limits)

    def runner_up(self, operation: int) -> str:
        """The cheapest strategy of another name of an operation, and an upper bound on the extra step time under it.

        "WS-2D: contracted over x, output over yz: at most 13.5 ms more"
        """
        name = self._name(self.states, operation)
        found = [plan for plan in self.reoptimised_plans(operation) if self._name(plan, operation) != name]
        if not found:
            return ""
        best = min(found, key=lambda plan: (self._excess_bytes(plan) > 0, self.problem.objective(plan)))
        if (over := self._excess_bytes(best)) > 0:
            return f"{self._name(best, operation)}: the plan found is {size(over)} too large"
        rise = max(self.problem.objective(best) - self.problem.objective(self.states), 0.0)
        return f"{self._name(best, operation)}: at most {time(rise)} more"

    def _name(self, states: np.ndarray, operation: int) -> str:
        return strategy_name(self.problem.program, self.problem.topology, choice_of(self.problem, states), operation)

    def reoptimised_plans(self, operation: int) -> Iterator[np.ndarray]:
        """Re-optimised plans with the most promising strategies of other names."""
        node = self.problem.of_operation[operation]
        cost, replies = _costs_with_replies(self.problem, self.states, node)
        names = {self._name(self.states, operation)}
        for state in np.argsort(cost, kind="stable"):
            if cost[state] >= FORBIDDEN / 2 or len(names) > _TRIED:
                return
            changed = self.states.copy()
            changed[node] = state
            for neighbour, best in replies.items():
                changed[neighbour] = best[state]
            if (name := self._name(changed, operation)) not in names:
                names.add(name)
                yield self._adapt(self._squeeze(changed, node), node)

    def _squeeze(self, states: np.ndarray, held: int) -> np.ndarray:
        """The same states if they fit; otherwise all nodes but one are chosen again with a large multiplier on memory."""
        if self._excess_bytes(states) <= 0:
            return states
        steep = _STEEP * self.problem.objective(states) / self.problem.budget_bytes
        return improve(self.problem, (self._everywhere,), states, np.array([steep]), held)

    def _adapt(self, states: np.ndarray, held: int) -> np.ndarray:
        """The states after improving one node at a time, all but one, without exceeding the budget or the given excess.

        Only neighbours of changed nodes can improve, so each round visits these alone.
        """
        states, most = states.copy(), max(self._excess_bytes(states), 0.0)
        stirred = self.problem.around(np.flatnonzero(states != self.states).tolist())
        for _ in range(_ROUNDS):
            changed = []
            for i in sorted(stirred - {held}):
                now = states[i]
                most = self._improve(states, i, most)
                changed += [i] if states[i] != now else []
            if not changed:
                break
            stirred = self.problem.around(changed)
        return states

    def _improve(self, states: np.ndarray, node: int, most: float) -> float:
        """Gives one node its best state, in place; returns the excess memory in bytes that is allowed from then on."""
        cost, now = _costs_except(self.problem, states, node, -1), states[node]
        better = np.flatnonzero(cost < cost[now] * (1 - 1e-12))
        for state in better[np.argsort(cost[better], kind="stable")][:_TRIED]:
            states[node] = state
            if (over := self._excess_bytes(states)) <= most:
                return max(over, 0.0)
        states[node] = now
        return most

    def _excess_bytes(self, states: np.ndarray) -> float:
        """The bytes by which the peak exceeds the budget."""
        return float(overflow(self.problem, self.limits, states).max(initial=-1.0))


def _costs_with_replies(problem: Problem, states: np.ndarray, node: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Seconds of every state of one node with each neighbour's best reply; and the replies, per neighbour and state."""
    cost, replies = problem.nodes[node].cost.copy(), {}
    shared: dict[int, np.ndarray] = {}
    for k in problem.incident[node]:
        edge = problem.edges[k]
        if edge.a == node:
            pairs, neighbour = edge.matrix[edge.rows][:, edge.columns], edge.b
        else:
            pairs, neighbour = edge.matrix[edge.rows][:, edge.columns].T, edge.a
        shared[neighbour] = shared.get(neighbour, 0.0) + edge.weight * pairs
    for neighbour, pairs in shared.items():
        total = pairs + _costs_except(problem, states, neighbour, node)
        replies[neighbour] = total.argmin(axis=1)
        cost += total.min(axis=1)
    return cost, replies


def _costs_except(problem: Problem, states: np.ndarray, node: int, other: int) -> np.ndarray:
    """Seconds of every state of one node with the reshards around it, except those to another node."""
    cost = problem.nodes[node].cost.copy()
    for k in problem.incident[node]:
        edge = problem.edges[k]
        if edge.a == node and edge.b != other:
            cost += edge.weight * edge.matrix[edge.rows, edge.columns[states[edge.b]]]
        elif edge.b == node and edge.a != other:
            cost += edge.weight * edge.matrix[edge.rows[states[edge.a]], edge.columns]
    return cost
