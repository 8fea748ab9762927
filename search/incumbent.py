"""A good solution to start from: read off the bound's potentials, then improved node by node."""

from __future__ import annotations

import numpy as np

from search.bound import Dual
from search.memory import Row
from search.problem import Problem


def decode(dual: Dual) -> np.ndarray:
    """Chooses states in order: each node takes the state that is cheapest given those already chosen."""
    problem = dual.problem
    chosen = np.full(len(problem.nodes), -1)
    local = np.full(len(problem.nodes), -1)
    for i in dual.order:
        cost = dual.theta[i].copy()
        for k in problem.incident[i]:
            edge = dual.edges[k]
            other = edge.b if edge.a == i else edge.a
            cost += edge.minima(i) if local[other] < 0 else _given(edge, i, local[other])
        local[i] = int(np.argmin(cost))
        chosen[i] = dual.keep[i][local[i]]
    return chosen


def _given(edge, node: int, other: int) -> np.ndarray:
    """The cost of each state of one end, the other end's state being fixed."""
    if node == edge.a:
        return edge.table[edge.rows.group, edge.columns.group[other]] - edge.left - edge.right[other]
    return edge.table[edge.rows.group[other], edge.columns.group] - edge.left[other] - edge.right


def improve(problem: Problem, rows: tuple[Row, ...], states: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Changes one node at a time to its best state until none improves; `penalty` is seconds per byte of each row."""
    states = states.copy()
    priced = [(row, rate) for row, rate in zip(rows, penalty, strict=True) if rate > 0]
    for _ in range(20):
        changed = False
        for i in range(len(problem.nodes)):
            cost = _conditional(problem, states, i)
            for row, rate in priced:
                cost = cost + rate * _conditional_bytes(problem, row, states, i)
            best = int(np.argmin(cost))
            if cost[best] < cost[states[i]] - 1e-15:
                states[i], changed = best, True
        if not changed:
            break
    return states


def _conditional(problem: Problem, states: np.ndarray, i: int) -> np.ndarray:
    cost = problem.nodes[i].cost.copy()
    for k in problem.incident[i]:
        edge = problem.edges[k]
        if edge.a == i:
            cost += edge.weight * edge.matrix[edge.rows, edge.columns[states[edge.b]]]
        else:
            cost += edge.weight * edge.matrix[edge.rows[states[edge.a]], edge.columns]
    return cost


def _conditional_bytes(problem: Problem, row: Row, states: np.ndarray, i: int) -> np.ndarray:
    held = np.zeros(len(problem.nodes[i].states))
    for node, vector in row.nodes:
        if node == i:
            held = held + vector
    for k, table in row.edges:
        edge = problem.edges[k]
        if edge.a == i:
            held = held + table[edge.rows, edge.columns[states[edge.b]]]
        elif edge.b == i:
            held = held + table[edge.rows[states[edge.a]], edge.columns]
    return held


def overflow(problem: Problem, rows: tuple[Row, ...], states: np.ndarray) -> np.ndarray:
    """Bytes over the budget in each row; negative where there is room."""
    return np.array([row.bytes(problem, states) for row in rows]) - problem.budget_bytes
