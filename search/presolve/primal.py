"""A good solution to start from: read off the bound's potentials, then improved node by node."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from search.formulation.problem import Problem
from search.memory.constraints import Row, Rows
from search.memory.reshard_buffers import Copies
from search.presolve.dual import Dual
from search.presolve.messages import DualEdge
from search.presolve.policy import POLICY


def decode(dual: Dual, thorough: bool = True) -> np.ndarray:
    """The best of the states read off a dual in several ways, each improved over forests of nodes.

    If not `thorough`, in one way only.
    """
    found: list[tuple[float, np.ndarray]] = []
    forests: list[_Forest] = []
    if not thorough:
        return _improve(dual, _greedy(dual, dual.order, 0.0), forests)
    bound = dual.bound()
    for order in (dual.order, _grow_forest(dual), dual.order[::-1]):
        for alike in (0.0, POLICY.alike * abs(bound)):
            states = _improve(dual, _greedy(dual, order, alike), forests)
            found.append((dual.objective(states), states))
            if found[-1][0] <= bound * (1 + POLICY.alike):
                return states
    return min(found, key=lambda each: each[0])[1]


def _improve(dual: Dual, local: np.ndarray, forests: list[_Forest]) -> np.ndarray:
    """States after the improvement by forests, numbered as in the problem.

    The forests are drawn on demand and reused.
    """
    for which in range(POLICY.forests):
        if which == len(forests):
            forests.append(_Forest(dual, np.random.default_rng(which).permutation(len(local))))
        improved = forests[which].best(local)
        if (improved == local).all():
            break
        local = improved
    return np.array([keep[s] for keep, s in zip(dual.keep, local, strict=True)])


def _grow_forest(dual: Dual) -> list[int]:
    """The nodes in an order in which each has the strongest possible ties to those before it.

    Layouts that differ only in the order of axes cost the same. If two regions of the program are read off separately,
    they may choose two of them, and pay where they meet. Grown from one seed, each follows its predecessors.
    """
    strength = [edge.strength for edge in dual.edges]
    order: list[int] = []
    seen: set[int] = set()
    for seed in dual.order:
        heap = [] if seed in seen else [(0.0, seed)]
        while heap:
            i = heappop(heap)[1]
            if i in seen:
                continue
            seen.add(i)
            order.append(i)
            for k in dual.problem.incident[i]:
                edge = dual.edges[k]
                other = edge.b if edge.a == i else edge.a
                if other not in seen:
                    heappush(heap, (-strength[k], other))
    return order


def _greedy(dual: Dual, order: Sequence[int], alike: float) -> np.ndarray:
    """Chooses states in order: each node takes the cheapest state given those already chosen.

    Among states within `alike` of the cheapest, which sweeps may not have evened out yet, it takes the first.
    """
    problem = dual.problem
    local = np.full(len(problem.nodes), -1)
    for i in order:
        cost = dual.theta[i].copy()
        for edge in dual.undecided(i):
            other = edge.b if edge.a == i else edge.a
            cost += edge.minima(i) if local[other] < 0 else _conditional_costs(edge, i, local[other])
        local[i] = int(np.argmax(cost <= cost.min() + alike))
    return local


class _Forest:
    """Nodes whose edges among each other form no cycle: given all others, their best states are found exactly.

    Nodes join in a given order unless they would close a cycle; several edges between two nodes count as one. Nodes
    without an edge that carries messages are optimal already.
    """

    def __init__(self, dual: Dual, order: np.ndarray) -> None:
        self.dual = dual
        self.tree = np.full(len(order), -1)  # per node its tree, -1 outside
        self.links: dict[int, dict[int, list[DualEdge]]] = {}  # node -> neighbour in its tree -> edges
        for i in order.tolist():
            self._join(i)

    def _join(self, i: int) -> None:
        near: dict[int, list[DualEdge]] = {}
        for edge in self.dual.undecided(i):
            near.setdefault(edge.b if edge.a == i else edge.a, []).append(edge)
        if not near:
            return
        inside = {other: edges for other, edges in near.items() if self.tree[other] >= 0}
        trees = [self.tree[other] for other in inside]
        if len(set(trees)) < len(trees):
            return
        self.links[i] = inside
        self.tree[i] = i
        for other, edges in inside.items():
            self.links[other][i] = edges
            self.tree[self.tree == self.tree[other]] = i

    def best(self, local: np.ndarray) -> np.ndarray:
        """The best states of the forest's nodes, given those of all others."""
        found = local.copy()
        seen: set[int] = set()
        for root in self.links:
            if root not in seen:
                self._solve(root, local, found, seen)
        return found

    def _solve(self, root: int, local: np.ndarray, found: np.ndarray, seen: set[int]) -> None:
        order, parent = [root], {root: -1}
        for i in order:
            for other in self.links[i]:
                if other != parent[i]:
                    parent[other] = i
                    order.append(other)
        seen.update(order)
        cost = {i: self._costs_outside_tree(i, local) for i in order}
        for i in reversed(order[1:]):
            cost[parent[i]] = cost[parent[i]] + self._reply(i, parent[i], cost[i])
        for i in order:
            total = cost[i]
            if parent[i] >= 0:
                total = total + sum(
                    _conditional_costs(edge, i, int(found[parent[i]])) for edge in self.links[i][parent[i]]
                )
            found[i] = int(np.argmin(total))

    def _costs_outside_tree(self, i: int, local: np.ndarray) -> np.ndarray:
        """The cost of each state of a node beside the states of the nodes that are not in its tree."""
        cost = self.dual.theta[i]
        for edge in self.dual.undecided(i):
            other = edge.b if edge.a == i else edge.a
            if other not in self.links[i]:
                cost = cost + _conditional_costs(edge, i, local[other])
        return cost

    def _reply(self, i: int, parent: int, cost: np.ndarray) -> np.ndarray:
        """For each state of the parent, the least cost of a node and its subtree."""
        edges = self.links[i][parent]
        if len(edges) > 1:
            return (sum(_pairs(edge, i) for edge in edges) + cost[:, None]).min(axis=0)
        edge = edges[0]
        if i == edge.a:
            return edge.least_over_rows(edge.left - cost)[edge.columns.group] - edge.right
        return edge.least_over_columns(edge.right - cost)[edge.rows.group] - edge.left


def _pairs(edge: DualEdge, node: int) -> np.ndarray:
    """The cost of every pair of states, those of `node` first."""
    found = edge.table()[np.ix_(edge.rows.group, edge.columns.group)] - edge.left[:, None] - edge.right
    return found if node == edge.a else found.T


def _conditional_costs(edge: DualEdge, node: int, other: int) -> np.ndarray:
    """The cost of each state of one end, the other end's state being fixed."""
    if node == edge.a:
        return edge.column(edge.columns.group[other])[edge.rows.group] - edge.left - edge.right[other]
    return edge.row(edge.rows.group[other])[edge.columns.group] - edge.left[other] - edge.right


def improve(
    problem: Problem, rows: tuple[Row, ...], states: np.ndarray, penalty: np.ndarray, held: int = -1
) -> np.ndarray:
    """Changes one node at a time, except the held one, to its best state until none improves.

    **Arguments:**

    - `penalty`: seconds per byte of each row.
    """
    states = states.copy()
    own, copies = _priced(problem, rows, penalty)
    doubtful = set(range(len(problem.nodes))) - {held}
    for _ in range(POLICY.improvements):
        changed = set()
        for i in sorted(doubtful):
            cost = own[i].copy()
            for k in problem.incident[i]:
                edge = problem.edges[k]
                if edge.a == i:
                    at = edge.rows, edge.columns[states[edge.b]]
                else:
                    at = edge.rows[states[edge.a]], edge.columns
                cost += edge.weight * edge.matrix[at]
                if k in copies:
                    cost += copies[k][at]
            best = int(np.argmin(cost))
            if cost[best] < cost[states[i]] - 1e-15:
                states[i] = best
                changed.add(i)
        if not changed:
            break
        doubtful = problem.around(changed) - {held}
    return states


def _priced(problem: Problem, rows: tuple[Row, ...], penalty: np.ndarray) -> tuple[list[np.ndarray], dict[int, Copies]]:
    """Per node the cost of each state with that of its bytes, and per edge the cost of its copies' bytes, over all rows."""
    own, copies = [node.cost for node in problem.nodes], dict[int, Copies]()
    for row, rate in zip(rows, penalty.tolist(), strict=True):
        if rate > 0:
            for i, held in row.nodes:
                own[i] = own[i] + rate * held
            for k, table in row.edges:
                copies[k] = copies[k] + rate * table if k in copies else rate * table
    return own, copies


def overflow(problem: Problem, rows: tuple[Row, ...], states: np.ndarray) -> np.ndarray:
    """Bytes over the budget in each row; negative where the row has room."""
    return (rows if isinstance(rows, Rows) else Rows(rows)).bytes(problem, states) - problem.budget_bytes
