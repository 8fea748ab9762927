"""Every choice of a small problem, priced at once: the oracle that the search is held against.

Costs and bytes of all choices are arrays with one dimension a node, added up by broadcasting; nothing is shared with the solver
but the problem's own tables.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import assume

from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import Row, rows

MOST_CHOICES = 3e6


def enumerable(problem: Problem, most: float = MOST_CHOICES) -> Problem:
    """The problem, if it has few choices; else Hypothesis draws another."""
    assume(np.prod([float(len(node.states)) for node in problem.nodes]) <= most)
    return problem


def seconds_of_all(problem: Problem) -> np.ndarray:
    """Seconds of every choice; infinite where it is impossible."""
    total = np.zeros(tuple(len(node.states) for node in problem.nodes))
    for i, node in enumerate(problem.nodes):
        total += _along(problem, i, node.cost)
    for edge in problem.edges:
        total += _between(problem, edge.a, edge.b, edge.weight * edge.matrix[np.ix_(edge.rows, edge.columns)])
    total[total >= FORBIDDEN / 2] = np.inf
    return total


def fitting(problem: Problem) -> np.ndarray:
    """Whether every choice keeps to the budget at every point."""
    found = np.ones(tuple(len(node.states) for node in problem.nodes), dtype=bool)
    for row in rows(problem):
        found &= sum(_held(problem, row), np.zeros(1)) <= problem.budget_bytes
    return found


def _held(problem: Problem, row: Row) -> Iterator[np.ndarray]:
    for i, vector in row.nodes:
        yield _along(problem, i, vector)
    for k, table in row.edges:
        edge = problem.edges[k]
        yield _between(problem, edge.a, edge.b, table[edge.rows[:, None], edge.columns])


def _along(problem: Problem, i: int, vector: np.ndarray) -> np.ndarray:
    """A vector over one node's states as an array of all nodes'."""
    return vector.reshape([-1 if k == i else 1 for k in range(len(problem.nodes))])


def _between(problem: Problem, a: int, b: int, table: np.ndarray) -> np.ndarray:
    """A table of two nodes' states as an array of all nodes'."""
    table = table if a < b else table.T
    shape = [1] * len(problem.nodes)
    shape[a], shape[b] = len(problem.nodes[a].states), len(problem.nodes[b].states)
    return table.reshape(shape)


def best(problem: Problem) -> float:
    """The least seconds of any choice that fits; infinite if none does."""
    return float(np.min(seconds_of_all(problem), where=fitting(problem), initial=np.inf))
