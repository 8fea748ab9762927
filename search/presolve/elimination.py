"""A smaller problem with the same optimum: operations between two others are eliminated.

A node $j$ whose edges lead to at most two others, $i$ and $k$, can be minimised out: the edge

$$\\theta_{ik}(x_i, x_k) = \\min_{x_j} \\theta_{ij}(x_i, x_j) + \\theta_j(x_j) + \\theta_{jk}(x_j, x_k)$$

takes its place. A chain of elementwise operations becomes one edge between the matmuls at its ends. A bound
then need not creep along it, and a better layout for the whole chain is one step away.

Memory limits elimination: only nodes and edges that hold a small part of a chip's memory are eliminated, and they
count in the rows with the least bytes that they can hold. So the smaller problem is a relaxation in its rows and exact
in its costs. An optimum of it that fits the whole rows is an optimum of the whole problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import numpy as np

from search.formulation.problem import FORBIDDEN, Edge, Problem
from search.memory.constraints import NodeBytes, Row, Rows
from search.presolve.policy import POLICY

RELAXATIONS = ((0.01, 0.125), (0.01, 1.0), (0.001, 1.0), (0.0001, 1.0))
"""The parts of the budget up to which an array counts as small, and the parts of the rows, the fullest first, that count.

Each is tried if the plan of the one before does not fit. In a training step of Llama 3 8B (775 rows), one row of the
fullest eighth binds: with these, 459 of 1,092 nodes stay, with all rows 784.
"""
_CHUNK = 50_000
"""Numbers compared at a time, few enough to stay in a processor's cache."""


@dataclass(frozen=True)
class _Gone:
    """An eliminated node: its cost, and per edge to it the other end, that end's groups, and the cost by group and state."""

    node: int
    cost: np.ndarray
    edges: tuple[tuple[int, np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class Reduction:
    """A smaller problem: its `problem` and `rows`, the original number of each of its nodes, and the way back."""

    whole: Problem
    problem: Problem
    rows: tuple[Row, ...]
    kept: tuple[int, ...]
    gone: tuple[_Gone, ...]

    @staticmethod
    def none(problem: Problem, rows: tuple[Row, ...]) -> Reduction:
        """The whole problem, with nothing eliminated."""
        return Reduction(problem, problem, rows, tuple(range(len(problem.nodes))), ())

    def expand(self, states: np.ndarray) -> np.ndarray:
        """The states of the whole problem: eliminated nodes take their best states, the last eliminated first."""
        found = np.zeros(len(self.whole.nodes), dtype=int)
        found[list(self.kept)] = states
        for each in reversed(self.gone):
            cost = each.cost
            for other, groups, table in each.edges:
                cost = cost + table[groups[found[other]]]
            found[each.node] = int(np.argmin(cost))
        return found

    def surviving(self, keep: Sequence[np.ndarray], width: float) -> list[np.ndarray]:
        """Per node of the whole problem the states that a plan within `width` seconds of the bound may have.

        **Arguments:**

        - `keep`: the states that survive in the smaller problem.
        """
        found = [np.zeros(0, dtype=int)] * len(self.whole.nodes)
        for node, states in zip(self.kept, keep, strict=True):
            found[node] = states
        for each in reversed(self.gone):
            found[each.node] = _optimal_states(each, found, width)
        return found


def _optimal_states(gone: _Gone, left: Sequence[np.ndarray], width: float) -> np.ndarray:
    """The states of an eliminated node that are optimal, within `width` seconds, beside some surviving neighbours."""
    if len(gone.cost) == 1:
        return np.zeros(1, dtype=int)
    tables = _costs_beside(gone, left)
    one = tables[0] + gone.cost
    other = tables[1] if len(tables) > 1 else np.zeros((1, len(gone.cost)))
    least = np.full(len(gone.cost), np.inf)
    rows = max(1, _CHUNK // other.size)
    if one.size * len(other) > POLICY.eliminated_triples:
        return np.flatnonzero(gone.cost < FORBIDDEN / 2)
    for at in range(0, len(one), rows):
        cost = one[at : at + rows, None, :] + other[None, :, :]
        best = cost.min(axis=2, keepdims=True)
        np.minimum(least, np.where(best < FORBIDDEN / 2, cost - best, np.inf).min(axis=(0, 1)), out=least)
    return np.flatnonzero(least <= width)


def _costs_beside(gone: _Gone, left: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per neighbour the cost of every state of an eliminated node beside each kind of surviving state."""
    found = []
    for other in dict.fromkeys(other for other, _, _ in gone.edges):
        sides = [(groups[left[other]], table) for at, groups, table in gone.edges if at == other]
        kinds = np.unique(np.stack([groups for groups, _ in sides], axis=1), axis=0)
        found.append(np.sum([table[kinds[:, k]] for k, (_, table) in enumerate(sides)], axis=0))
    return found


class _Side:
    """One edge seen from a node: the other end, its groups of states, and the cost by group and own state."""

    def __init__(self, edge: Edge, node: int) -> None:
        if edge.b == node:
            self.other, self._mine, theirs, self._matrix = edge.a, edge.columns, edge.rows, edge.matrix
        else:
            self.other, self._mine, theirs, self._matrix = edge.b, edge.rows, edge.columns, edge.matrix.T
        self._weight = edge.weight
        self.used, self.groups = np.unique(theirs, return_inverse=True)

    @cached_property
    def table(self) -> np.ndarray:
        return self._weight * self._matrix[np.ix_(self.used, self._mine)]


def eliminate(
    problem: Problem, rows: tuple[Row, ...], small_part: float = RELAXATIONS[0][0], rows_part: float = 1.0
) -> Reduction:
    """Eliminates nodes, that with the fewest pairs first.

    Nodes that may hold more than a part of the budget stay, if they do so in the fullest rows.
    """
    worker = _Reducer(problem, _heavy(problem, _fullest(rows, rows_part), small_part))
    worker.run()
    kept = tuple(i for i in range(len(problem.nodes)) if i not in worker.eliminated)
    place = {node: at for at, node in enumerate(kept)}
    alive = sorted(worker.edges)
    edges = tuple(replace(e, a=place[e.a], b=place[e.b]) for e in (worker.edges[k] for k in alive))
    smaller = replace(
        problem,
        nodes=tuple(replace(problem.nodes[i], cost=worker.costs[i]) for i in kept),
        edges=edges,
        loops=(),
    )
    number = {k: at for at, k in enumerate(alive)}
    return Reduction(problem, smaller, _relax_rows(rows, place, number), kept, tuple(worker.gone))


def _relax_rows(rows: tuple[Row, ...], place: dict[int, int], number: dict[int, int]) -> tuple[Row, ...]:
    """The rows with the least bytes of the eliminated nodes; a reshard between equal layouts holds no copy."""
    moved = {item: NodeBytes(place[item.node], item.bytes) for row in rows for item in row.nodes if item.node in place}
    return Rows(_relax_row(row, moved, number) for row in rows)


def _relax_row(row: Row, moved: dict[NodeBytes, NodeBytes], number: dict[int, int]) -> Row:
    nodes = [moved[item] for item in row.nodes if item in moved]
    edges = [(number[k], table) for k, table in row.edges if k in number]
    least = sum(float(item.bytes.min()) for item in row.nodes if item not in moved)
    if nodes:
        nodes[0] = NodeBytes(nodes[0].node, nodes[0].bytes + least)
    return Row(row.point, tuple(nodes), tuple(edges))


class _Reducer:
    def __init__(self, problem: Problem, held: set[int]) -> None:
        self.problem = problem
        self.edges = dict(enumerate(problem.edges))
        self.costs = [node.cost for node in problem.nodes]
        self.incident = [set(found) for found in problem.incident]
        self.gone: list[_Gone] = []
        self.eliminated: set[int] = set()
        self._held = held
        self._next = len(problem.edges)

    def run(self) -> None:
        """Eliminates nodes until none is left that can be."""
        waiting = sorted(range(len(self.problem.nodes)), key=lambda i: len(self.problem.nodes[i].states))
        while waiting:
            later = [i for i in waiting if not self._eliminate(i)]
            if len(later) == len(waiting):
                return
            waiting = later

    def _eliminate(self, node: int) -> bool:
        """Eliminates one node if allowed; returns whether it was eliminated."""
        if node in self._held or not self.incident[node]:
            return False
        sides = [_Side(self.edges[k], node) for k in sorted(self.incident[node])]
        others = sorted({side.other for side in sides})
        if len(others) > 2 and len(self.costs[node]) > 1:
            return False
        meeting = [[side for side in sides if side.other == other] for other in others]
        states = len(self.costs[node])
        if not _small([max(len(side.used) for side in found) for found in meeting], states):
            return False
        ends = [_merge_edges(found) for found in meeting]
        if not _small([len(table) for _, table in ends], states):
            return False
        self.gone.append(_Gone(node, self.costs[node], tuple((s.other, s.groups, s.table) for s in sides)))
        moved = sum(self.edges[k].moved_bytes for k in self.incident[node])
        for k in list(self.incident[node]):
            self._drop(k)
        self.eliminated.add(node)
        if len(ends) == 2 and len(self.costs[node]) > 1:
            matrix = np.minimum(_min_sum(ends[0][1] + self.costs[node], ends[1][1]), FORBIDDEN)
            self._add(Edge(others[0], others[1], ends[0][0], ends[1][0], matrix, 1.0, (), None, moved))
        else:
            own = self.costs[node]  # paid once: by the first of the others, if its one state leaves no choice
            for other, (groups, table) in zip(others, ends, strict=True):
                self.costs[other] = np.minimum(self.costs[other] + (table + own).min(axis=1)[groups], FORBIDDEN)
                own = 0 * own
        return True

    def _drop(self, k: int) -> None:
        edge = self.edges.pop(k)
        self.incident[edge.a].discard(k)
        self.incident[edge.b].discard(k)

    def _add(self, edge: Edge) -> None:
        self.edges[self._next] = edge
        self.incident[edge.a].add(self._next)
        self.incident[edge.b].add(self._next)
        self._next += 1


def _small(groups: list[int], states: int) -> bool:
    """Whether a node with this many groups of states at its ends is worth eliminating."""
    if len(groups) < 2 or states == 1:
        return True
    pairs = groups[0] * groups[1]
    return pairs <= POLICY.eliminated_pairs and pairs * states <= POLICY.eliminated_triples


def _fullest(rows: tuple[Row, ...], part: float) -> list[Row]:
    """A part of the rows: those with the most bytes, with the mean of each node's states."""
    mean = {item: float(item.bytes.mean()) for item in dict.fromkeys(item for row in rows for item in row.nodes)}
    full = [-sum(map(mean.__getitem__, row.nodes)) for row in rows]
    return [rows[r] for r in np.argsort(full, kind="stable")[: ceil(part * len(rows))]]


def _heavy(problem: Problem, rows: Sequence[Row], small_part: float) -> set[int]:
    """The nodes that must stay: those with much memory, or at the end of a reshard with much memory."""
    large = small_part * problem.budget_bytes
    nodes = dict.fromkeys(item for row in rows for item in row.nodes)
    edges = dict.fromkeys(item for row in rows for item in row.edges if item[0] < len(problem.edges))
    found = {i for i, vector in nodes if np.ptp(vector) > large}
    for k, table in edges:
        if table.max() > large:
            found |= {problem.edges[k].a, problem.edges[k].b}
    return found


def _merge_edges(sides: list[_Side]) -> tuple[np.ndarray, np.ndarray]:
    """All edges to one node as one: groups of its states with equal costs, and the cost by group and own state."""
    if len(sides) == 1:
        return sides[0].groups, sides[0].table
    pairs = np.stack([side.groups for side in sides], axis=1)
    unique, groups = np.unique(pairs, axis=0, return_inverse=True)
    return groups.reshape(-1), np.sum([side.table[unique[:, k]] for k, side in enumerate(sides)], axis=0)


def _min_sum(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """$\\min_s L_{ps} + R_{qs}$; states with the same right column are merged first."""
    _, first, group = np.unique(right, axis=1, return_index=True, return_inverse=True)
    best = np.full((left.shape[0], len(first)), np.inf)
    group = group.reshape(-1)
    for s in range(left.shape[1]):
        np.minimum(best[:, group[s]], left[:, s], out=best[:, group[s]])
    other = right[:, first]
    found = np.empty((best.shape[0], other.shape[0]))
    rows = max(1, _CHUNK // other.size)
    for at in range(0, len(best), rows):
        found[at : at + rows] = (best[at : at + rows, None, :] + other[None, :, :]).min(axis=2)
    return found
