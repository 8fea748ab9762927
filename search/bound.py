"""A lower bound by reparametrisation, and the states it excludes.

Moving cost between a node and its edges changes no solution's total. Whatever has been moved,

$$L = \\sum_i \\min_s \\tilde\\theta_i(s) + \\sum_{ij} \\min_{s,t} \\tilde\\theta_{ij}(s, t)$$

is a lower bound, and a state whose own minimum exceeds the best known solution by itself can be struck out: reduced-cost
fixing. The sweeps below are sequential reweighted message passing (Kolmogorov, "A New Look at Reweighted Message
Passing", 2015), block-coordinate ascent on the dual of the same local polytope that a linear program would solve,
with tables of a few hundred layouts instead of as many thousand columns.

Memory rows enter by Lagrange multipliers $\\lambda_r \\ge 0$: $\\lambda_r (b_r(x) - M)$ is added to the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.memory import Row
from search.problem import FORBIDDEN, Edge, Problem


class _Groups:
    """States of one end of an edge grouped by the layout they share."""

    def __init__(self, layouts_of: np.ndarray) -> None:
        self.unique, self.group = np.unique(layouts_of, return_inverse=True)
        self._order = np.argsort(self.group, kind="stable")
        self._starts = np.searchsorted(self.group[self._order], np.arange(len(self.unique)))

    def minimum(self, vector: np.ndarray) -> np.ndarray:
        """The smallest entry of each group."""
        return np.minimum.reduceat(vector[self._order], self._starts)


class _DualEdge:
    """An edge's share of the costs: `table[p, q] - left[s] - right[t]` for states `s`, `t` in layout groups `p`, `q`."""

    def __init__(self, edge: Edge, extra: np.ndarray | None, left: np.ndarray, right: np.ndarray, keep) -> None:
        self.a, self.b = edge.a, edge.b
        self.rows, self.columns = _Groups(edge.rows[keep[edge.a]]), _Groups(edge.columns[keep[edge.b]])
        window = np.ix_(self.rows.unique, self.columns.unique)
        self.table = edge.weight * edge.matrix[window]
        if extra is not None:
            self.table = self.table + extra[window]
        self.left, self.right = left, right

    def minima(self, node: int) -> np.ndarray:
        """For each state of one end, the smallest cost over the states of the other."""
        if node == self.a:
            best = (self.table + self.columns.minimum(-self.right)).min(axis=1)
            return best[self.rows.group] - self.left
        best = (self.table + self.rows.minimum(-self.left)[:, None]).min(axis=0)
        return best[self.columns.group] - self.right

    def move(self, node: int, cost: np.ndarray) -> None:
        """Takes `cost` out of the edge (to give it to the node)."""
        if node == self.a:
            self.left = self.left + cost
        else:
            self.right = self.right + cost


@dataclass
class Snapshot:
    """What a dual can be restored from."""

    multipliers: np.ndarray
    left: list[np.ndarray]
    right: list[np.ndarray]
    keep: list[np.ndarray]


class Dual:
    """A reparametrisation of a problem, restricted to the states not yet excluded.

    `keep[i]` are the surviving states of node `i`; `multipliers` the memory rows' $\\lambda_r$ in seconds per byte.
    """

    def __init__(self, problem: Problem, rows: Sequence[Row], keep: Sequence[np.ndarray] | None = None) -> None:
        self.problem, self.rows = problem, rows
        self.keep = list(keep) if keep is not None else [np.arange(len(node.states)) for node in problem.nodes]
        self.multipliers = np.zeros(len(rows))
        self.banned: dict[int, np.ndarray] = {}
        self.fits = True
        self.emptied = False
        self._left = [np.zeros(len(problem.nodes[e.a].states)) for e in problem.edges]
        self._right = [np.zeros(len(problem.nodes[e.b].states)) for e in problem.edges]
        self.order = sorted(range(len(problem.nodes)), key=self._place)
        self.rank = np.empty(len(self.order), dtype=int)
        self.rank[self.order] = np.arange(len(self.order))
        self._rebuild()

    def _place(self, i: int) -> tuple[float, int]:
        node = self.problem.nodes[i]
        return (
            (float(node.operation), i)
            if node.operation >= 0
            else (self.problem.program.producers[node.value][0] + 0.5, i)
        )

    def _rebuild(self) -> None:
        """Recomputes potentials from the messages, the surviving states and the multipliers."""
        extra_nodes, extra_edges = self._priced_rows()
        for k, banned in self.banned.items():
            extra_edges[k] = extra_edges.get(k, 0.0) + FORBIDDEN * banned
        self.edges = [
            _DualEdge(e, extra_edges.get(k), self._left[k][self.keep[e.a]], self._right[k][self.keep[e.b]], self.keep)
            for k, e in enumerate(self.problem.edges)
        ]
        self.theta = []
        for i, node in enumerate(self.problem.nodes):
            theta = node.cost + extra_nodes.get(i, 0.0)
            for k in self.problem.incident[i]:
                theta = theta + (self._left[k] if self.problem.edges[k].a == i else self._right[k])
            self.theta.append(theta[self.keep[i]])

    def _priced_rows(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        nodes: dict[int, np.ndarray] = {}
        edges: dict[int, np.ndarray] = {}
        for row, multiplier in zip(self.rows, self.multipliers, strict=True):
            if multiplier > 0:
                for i, vector in row.nodes:
                    nodes[i] = nodes.get(i, 0.0) + multiplier * vector
                for k, table in row.edges:
                    edges[k] = edges.get(k, 0.0) + multiplier * table
        return nodes, edges

    def priced_bytes(self) -> dict[int, np.ndarray]:
        """Per node and surviving state the bytes it holds at priced points, times their price; of copies the least."""
        nodes, edges = self._priced_rows()
        found = {i: vector[self.keep[i]] for i, vector in nodes.items()}
        for k, table in edges.items():
            edge = self.edges[k]
            held = table[self._window(k)]
            for node, least, groups in (
                (edge.a, held.min(axis=1), edge.rows),
                (edge.b, held.min(axis=0), edge.columns),
            ):
                found[node] = found.get(node, 0.0) + least[groups.group]
        return found

    def _store(self) -> None:
        for k, edge in enumerate(self.edges):
            self._left[k][self.keep[edge.a]] = edge.left
            self._right[k][self.keep[edge.b]] = edge.right

    def reprice(self, multipliers: np.ndarray) -> None:
        """Sets the memory rows' multipliers."""
        self._store()
        self.multipliers = multipliers
        self._rebuild()

    def restrict(self, keep: Sequence[np.ndarray]) -> None:
        """Keeps only these states."""
        self._store()
        self.keep = list(keep)
        self._rebuild()

    def snapshot(self) -> Snapshot:
        """The messages and surviving states, to come back to."""
        self._store()
        return Snapshot(
            self.multipliers, [v.copy() for v in self._left], [v.copy() for v in self._right], list(self.keep)
        )

    def load(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot."""
        self.multipliers = snapshot.multipliers
        self._left = [v.copy() for v in snapshot.left]
        self._right = [v.copy() for v in snapshot.right]
        self.keep = list(snapshot.keep)
        self._rebuild()

    def pairs(self) -> int:
        """How many pairs of layouts the surviving states make, over all edges."""
        return sum(edge.table.size for edge in self.edges)

    def sweep(self) -> None:
        """One pass forward and one back."""
        self._pass(self.order, forward=True)
        self._pass(self.order[::-1], forward=False)

    def _pass(self, order: Sequence[int], forward: bool) -> None:
        for i in order:
            theta = self.theta[i]
            ahead, behind = [], 0
            for k in self.problem.incident[i]:
                edge = self.edges[k]
                found = edge.minima(i)
                edge.move(i, found)
                theta = theta + found
                other = edge.b if edge.a == i else edge.a
                if (self.rank[other] > self.rank[i]) == forward:
                    ahead.append(edge)
                else:
                    behind += 1
            if ahead:
                share = theta / max(len(ahead), behind)
                for edge in ahead:
                    edge.move(i, -share)
                theta = theta - share * len(ahead)
            self.theta[i] = theta

    def bound(self) -> float:
        """The lower bound, in seconds."""
        constant = -float(self.multipliers.sum()) * self.problem.budget_bytes
        nodes = sum(float(theta.min()) for theta in self.theta)
        return constant + nodes + sum(float(edge.minima(edge.a).min()) for edge in self.edges)

    def excess(self) -> list[np.ndarray]:
        """Per node and surviving state: by how much the bound rises if the state is chosen."""
        found = [theta - theta.min() for theta in self.theta]
        for edge in self.edges:
            for end in (edge.a, edge.b):
                minima = edge.minima(end)
                found[end] = found[end] + (minima - minima.min())
        return found

    def pair_excess(self, k: int) -> np.ndarray:
        """For the layout groups of an edge: by how much its own term of the bound rises, at least, if a pair is chosen."""
        edge = self.edges[k]
        left, right = edge.rows.minimum(-edge.left), edge.columns.minimum(-edge.right)
        table = edge.table + left[:, None] + right
        return table - table.min()

    def propagate(self) -> None:
        """Strikes out what cannot fit: a state or pair whose bytes, beside the least of all others, overflow a row."""
        while self._propagate_once():
            pass

    def _propagate_once(self) -> bool:
        keep, struck = list(self.keep), 0
        for row in self.rows:
            nodes = {i: vector[keep[i]] for i, vector in row.nodes}
            edges = {k: self._held(k, table) for k, table in row.edges}
            least = [float(found.min()) for found in (*nodes.values(), *edges.values())]
            room = self.problem.budget_bytes - sum(least)
            if room < 0:
                self.fits = False
                return False
            for i, held in nodes.items():
                fits = held - held.min() <= room
                if not fits.all():
                    struck += int((~fits).sum())
                    keep[i] = keep[i][fits]
            for k in edges:
                struck += self._ban(k, row, room)
        if struck:
            self.restrict(keep)
        return struck > 0

    def _window(self, k: int) -> tuple[np.ndarray, ...]:
        return np.ix_(self.edges[k].rows.unique, self.edges[k].columns.unique)

    def _held(self, k: int, table: np.ndarray) -> np.ndarray:
        """Bytes of an edge's surviving pairs; those already banned count for nothing."""
        held = table[self._window(k)]
        return np.where(self.banned[k][self._window(k)], np.inf, held) if k in self.banned else held

    def _ban(self, k: int, row: Row, room: float) -> int:
        table = dict(row.edges)[k]
        held = self._held(k, table)
        over = np.isfinite(held) & (held - held.min() > room)
        if not over.any():
            return 0
        banned = self.banned.setdefault(k, np.zeros(table.shape, dtype=bool))
        rows, columns = np.nonzero(over)
        banned[self.edges[k].rows.unique[rows], self.edges[k].columns.unique[columns]] = True
        return int(over.sum())

    def ban_pairs(self, width: float) -> None:
        """Strikes out every pair of layouts whose choice alone lifts the bound by more than `width` seconds."""
        for k, edge in enumerate(self.edges):
            a, b = self.theta[edge.a], self.theta[edge.b]
            ends = edge.rows.minimum(a - a.min())[:, None] + edge.columns.minimum(b - b.min())
            over = self.pair_excess(k) + ends > width
            if over.any():
                banned = self.banned.get(k, np.zeros(self.problem.edges[k].matrix.shape, dtype=bool)).copy()
                banned[self._window(k)] |= over
                self.banned[k] = banned
        self.restrict(self.keep)

    def exclude(self, incumbent: float) -> int:
        """Strikes out every state that no solution better than the incumbent can use; returns how many.

        Where a node has no state left, no solution here is better: `emptied` becomes true, and nothing is struck out.
        """
        kept = self.within(max(incumbent - self.bound(), 0.0) + 1e-9 * abs(incumbent))
        self.emptied = not all(len(keep) for keep in kept)
        if self.emptied:
            return 0
        struck = sum(len(keep) for keep in self.keep) - sum(len(keep) for keep in kept)
        if struck:
            self.restrict(kept)
        return struck

    def within(self, width: float) -> list[np.ndarray]:
        """Per node the states whose choice alone lifts the bound by at most `width` seconds."""
        return [keep[excess <= width] for keep, excess in zip(self.keep, self.excess(), strict=True)]
