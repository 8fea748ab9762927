"""Every choice of a small problem, priced at once: the oracle that the search is held against.

Costs and bytes of all choices are arrays with one dimension a node, added up by broadcasting; nothing is shared with the solver
but the problem's own tables.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume

from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.formulation.problem import FORBIDDEN, Problem, build
from search.memory.constraints import Row, rows
from search.solve import Limits, NoPlan, search

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


def assert_search_equals_enumeration(program: Program, topology: Topology, part: float) -> None:
    """The search finds the least seconds of any choice within a part of all arrays' bytes, or that none fits."""
    whole = part * sum(value.bytes for value in program.values)
    least = best(enumerable(build(program, topology, whole)))
    try:
        found = search(program, topology, Limits(reserve_bytes=topology.chip.usable_hbm_bytes - whole))
    except NoPlan:
        assert least == np.inf
        return
    assert found.proof.status == "OPTIMAL"
    assert found.proof.objective_seconds == pytest.approx(least, rel=1e-9)
