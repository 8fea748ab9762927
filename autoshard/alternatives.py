"""What else an operation could have done, and what the step would cost then.

The price of another strategy is that of a whole plan: the operation is held to it, and those around it adapt, one at a time,
and those around them, until none improves. So it is a price that can be had, an upper bound on what the strategy costs at best.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from autoshard.naming import strategy_name
from autoshard.tables import size, time
from search.incumbent import improve, overflow
from search.memory import Row, together
from search.problem import FORBIDDEN, Problem, allowing
from search.solution import choice_of

_TRIED = 4
"""How many strategies of other names are priced, and how many better states of a node are tried for room."""
_STEEP = 10.0
"""What full memory costs where states do not fit, in steps."""
_ROUNDS = 10
"""How often all operations adapt, at most."""


def runner_up(problem: Problem, limits: tuple[Row, ...], states: np.ndarray, operation: int) -> str:
    """The cheapest other strategy of an operation by name, and what the step would cost more under it, at most.

    "WS-2D: contracted over x, output over yz: at most 13.5 ms more"
    """
    name = _name(problem, states, operation)
    found = [plan for plan in _others(problem, limits, states, operation) if _name(problem, plan, operation) != name]
    if not found:
        return ""
    best = min(found, key=lambda plan: (_over(problem, limits, plan) > 0, problem.objective(plan)))
    if (over := _over(problem, limits, best)) > 0:
        return f"{_name(problem, best, operation)}: {size(over)} too large, as found"
    rise = max(problem.objective(best) - problem.objective(states), 0.0)
    return f"{_name(problem, best, operation)}: at most {time(rise)} more"


def _name(problem: Problem, states: np.ndarray, operation: int) -> str:
    return strategy_name(problem.program, problem.topology, choice_of(problem, states), operation)


def _others(problem: Problem, limits: tuple[Row, ...], states: np.ndarray, operation: int) -> Iterator[np.ndarray]:
    """Plans around the likeliest strategies of other names."""
    node = problem.of_operation[operation]
    cost, replies = _with_neighbours(problem, states, node)
    names = {_name(problem, states, operation)}
    for state in np.argsort(cost, kind="stable"):
        if cost[state] >= FORBIDDEN / 2 or len(names) > _TRIED:
            return
        changed = states.copy()
        changed[node] = state
        for neighbour, best in replies.items():
            changed[neighbour] = best[state]
        if _name(problem, changed, operation) in names:
            continue
        names.add(_name(problem, changed, operation))
        squeezed = _squeezed(problem, limits, changed, operation)
        yield _adapted(problem, limits, states, squeezed, node)


def _squeezed(problem: Problem, limits: tuple[Row, ...], states: np.ndarray, operation: int) -> np.ndarray:
    """The same states if they fit, else others with the same strategy of one operation, chosen at a steep price on memory."""
    if _over(problem, limits, states) <= 0:
        return states
    node = problem.of_operation[operation]
    strategy = problem.nodes[node].states[states[node]]
    held = allowing(problem, lambda at, other: at != operation or other == strategy)
    steep = _STEEP * problem.objective(states) / problem.budget_bytes
    return improve(held, (together(limits),), states, np.array([steep]))


def _adapted(
    problem: Problem, limits: tuple[Row, ...], before: np.ndarray, states: np.ndarray, held: int
) -> np.ndarray:
    """Changes one node at a time, all but one, to its best state that takes no more memory than there is, or than was taken.

    Only the neighbours of what is not as it was before have reason to change, then theirs.
    """
    states, most = states.copy(), max(_over(problem, limits, states), 0.0)
    stirred = _around(problem, np.flatnonzero(states != before).tolist())
    for _ in range(_ROUNDS):
        changed = []
        for i in sorted(stirred - {held}):
            now = states[i]
            most = _improved(problem, limits, states, i, most)
            changed += [i] if states[i] != now else []
        if not changed:
            break
        stirred = _around(problem, changed)
    return states


def _around(problem: Problem, nodes: list[int]) -> set[int]:
    """Nodes and their neighbours."""
    edges = [problem.edges[k] for i in nodes for k in problem.incident[i]]
    return {*nodes, *(edge.a for edge in edges), *(edge.b for edge in edges)}


def _improved(problem: Problem, limits: tuple[Row, ...], states: np.ndarray, node: int, most: float) -> float:
    """Gives one node its best state, in place; returns by how many bytes memory may be exceeded from then on."""
    cost, now = _apart_from(problem, states, node, -1), states[node]
    better = np.flatnonzero(cost < cost[now] * (1 - 1e-12))
    for state in better[np.argsort(cost[better], kind="stable")][:_TRIED]:
        states[node] = state
        if (over := _over(problem, limits, states)) <= most:
            return max(over, 0.0)
    states[node] = now
    return most


def _over(problem: Problem, limits: tuple[Row, ...], states: np.ndarray) -> float:
    """By how many bytes the fullest point exceeds the budget."""
    return float(overflow(problem, limits, states).max(initial=-1.0))


def _with_neighbours(problem: Problem, states: np.ndarray, node: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Seconds of every state of one node, each neighbour replying by itself; and the replies, per neighbour and state."""
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
        total = pairs + _apart_from(problem, states, neighbour, node)
        replies[neighbour] = total.argmin(axis=1)
        cost += total.min(axis=1)
    return cost, replies


def _apart_from(problem: Problem, states: np.ndarray, node: int, other: int) -> np.ndarray:
    """Seconds of every state of one node with the changes of layout around it, but for those to another node."""
    cost = problem.nodes[node].cost.copy()
    for k in problem.incident[node]:
        edge = problem.edges[k]
        if edge.a == node and edge.b != other:
            cost += edge.weight * edge.matrix[edge.rows, edge.columns[states[edge.b]]]
        elif edge.b == node and edge.a != other:
            cost += edge.weight * edge.matrix[edge.rows[states[edge.a]], edge.columns]
    return cost
