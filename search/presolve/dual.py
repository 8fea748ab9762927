"""A lower bound by reparametrisation, and the states that it fixes to 0.

Moving cost between a node and its edges changes no solution's total. For every reparametrisation,

$$L = \\sum_i \\min_s \\tilde\\theta_i(s) + \\sum_{ij} \\min_{s,t} \\tilde\\theta_{ij}(s, t)$$

is a lower bound. A state whose own minimum exceeds the best known solution can be fixed to 0: reduced-cost fixing. The
sweeps below are sequential reweighted message passing (Kolmogorov, "A New Look at Reweighted Message Passing", 2015),
block-coordinate ascent on the dual of the local polytope's linear program, with tables of a few hundred layouts
instead of as many thousand columns.

Memory rows enter by Lagrange multipliers $\\lambda_r \\ge 0$: $\\lambda_r (b_r(x) - M)$ is added to the cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import NodeBytes, Row
from search.memory.reshard_buffers import Copies
from search.presolve.messages import DualEdge


@dataclass
class Snapshot:
    """The state to restore a dual from; `least` is a proven lower bound of its plans, if there is one."""

    multipliers: np.ndarray
    left: list[np.ndarray]
    right: list[np.ndarray]
    keep: list[np.ndarray]
    least: float = -np.inf


@dataclass(frozen=True, eq=False)
class Ban:
    """The costs of banned pairs of layouts, indexed like the matrix that they stand for."""

    pairs: np.ndarray

    def __getitem__(self, at: Any) -> np.ndarray:
        return FORBIDDEN * self.pairs[at]


class Dual:
    """A reparametrisation of a problem, restricted to the states not yet excluded.

    `keep[i]` are the surviving states of node `i`; `multipliers` the memory rows' $\\lambda_r$ in seconds per byte.
    """

    def __init__(self, problem: Problem, rows: Sequence[Row], keep: Sequence[np.ndarray] | None = None) -> None:
        self.problem, self.rows = problem, rows
        self.keep = list(keep) if keep is not None else [np.arange(len(node.states)) for node in problem.nodes]
        self.multipliers = np.zeros(len(rows))
        self.banned: dict[int, Ban] = {}
        self.fits = True
        self.emptied = False
        self._left = [np.zeros(len(problem.nodes[e.a].states)) for e in problem.edges]
        self._right = [np.zeros(len(problem.nodes[e.b].states)) for e in problem.edges]
        self.order = sorted(range(len(problem.nodes)), key=self._place)
        self._rank = np.argsort(self.order).tolist()
        self._priced: tuple[np.ndarray, dict[int, np.ndarray], dict[int, list[Any]]] = (np.zeros(len(rows)), {}, {})
        self.edges: list[DualEdge] = []
        self._undecided: dict[int, list[DualEdge]] = {}  # found on demand, by node
        self._rebuild()

    def _place(self, i: int) -> tuple[float, int]:
        node = self.problem.nodes[i]
        return (self.problem.program.producers[node.of][0] + 0.5, i) if node.is_hub else (float(node.of), i)

    def _rebuild(self) -> None:
        """Recomputes potentials from the messages, the surviving states and the multipliers; unaffected ones stay."""
        extra_nodes, extra_edges = self._priced_rows()
        edges, made = [], []
        for k, e in enumerate(self.problem.edges):
            extra = (*extra_edges.get(k, ()), *((self.banned[k],) if k in self.banned else ()))
            left, right = self._left[k][self.keep[e.a]], self._right[k][self.keep[e.b]]
            if self.edges and self.edges[k].has(extra, self.keep):
                edges.append(self.edges[k].after(left, right))
            else:
                edges.append(DualEdge(e, extra, left, right, self.keep))
                made.append(k)
        self.edges, self._undecided = edges, {}
        self.theta = []
        for i, node in enumerate(self.problem.nodes):
            theta = node.cost + extra_nodes.get(i, 0.0)
            for k in self.problem.incident[i]:
                theta = theta + (self._left[k] if self.problem.edges[k].a == i else self._right[k])
            self.theta.append(theta[self.keep[i]])
        self._settle(made)

    def _settle(self, edges: Sequence[int]) -> None:
        """Moves the costs of the separable edges among these into their ends; sweeps then leave them out."""
        for k in edges:
            if (edge := self.edges[k]).separable:
                for node in (edge.a, edge.b):
                    self.theta[node] = self.theta[node] + edge.take(node)

    def _priced_rows(self) -> tuple[dict[int, np.ndarray], dict[int, list[Any]]]:
        """Per node and edge the memory cost of its bytes; the same objects while the multipliers are unchanged."""
        if not np.array_equal(self._priced[0], self.multipliers):
            nodes: dict[int, np.ndarray] = {}
            edges: dict[int, list[Any]] = {}
            for row, multiplier in zip(self.rows, self.multipliers, strict=True):
                if multiplier > 0:
                    for i, vector in row.nodes:
                        nodes[i] = nodes.get(i, 0.0) + multiplier * vector
                    for k, table in row.edges:
                        edges.setdefault(k, []).append(multiplier * table)
            self._priced = self.multipliers.copy(), nodes, edges
        return self._priced[1:]

    def priced_bytes(self) -> dict[int, np.ndarray]:
        """Per node and surviving state its bytes at points with a multiplier, weighted by it.

        Reshard buffers count with their least bytes.
        """
        nodes, edges = self._priced_rows()
        found = {i: vector[self.keep[i]] for i, vector in nodes.items()}
        for k, tables in edges.items():
            edge = self.edges[k]
            held = reduce(add, tables)[edge.window]
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
        """Keeps only these states; a caller that wants the others back takes a snapshot before, as costs are moved."""
        self._store()
        self.keep = list(keep)
        self._rebuild()

    def narrow(self, node: int, states: np.ndarray) -> None:
        """Keeps only these states of one node."""
        self._strike({node: np.isin(self.keep[node], states, assume_unique=True)})

    def _strike(self, kept: Mapping[int, np.ndarray]) -> None:
        """Keeps, of some nodes, only the surviving states that a mask selects; only their edges are looked up again."""
        for i, mask in kept.items():
            self.keep[i], self.theta[i] = self.keep[i][mask], self.theta[i][mask]
        touched = sorted({k for i in kept for k in self.problem.incident[i]})
        for k in touched:
            edge = self.edges[k]
            left = edge.left[kept[edge.a]] if edge.a in kept else edge.left
            right = edge.right[kept[edge.b]] if edge.b in kept else edge.right
            self.edges[k] = DualEdge(self.problem.edges[k], edge.extra, left, right, self.keep)
            self._undecided.pop(edge.a, None)
            self._undecided.pop(edge.b, None)
        self._settle(touched)

    @contextmanager
    def held(self, node: int, states: np.ndarray) -> Iterator[None]:
        """Temporarily keeps only these states of one node, then restores everything."""
        before = self.keep, self.theta, self.edges, self._undecided
        messages = [(edge, edge.messages) for edge in self.edges if not edge.separable]
        self.keep, self.theta, self.edges = list(self.keep), list(self.theta), list(self.edges)
        self._undecided = dict(self._undecided)
        try:
            self.narrow(node, states)
            yield
        finally:
            self.keep, self.theta, self.edges, self._undecided = before
            for edge, old in messages:
                edge.messages = old

    def snapshot(self) -> Snapshot:
        """The messages and surviving states, to restore later."""
        self._store()
        return Snapshot(
            self.multipliers, [v.copy() for v in self._left], [v.copy() for v in self._right], list(self.keep)
        )

    def load(self, snapshot: Snapshot) -> None:
        """Restores a snapshot."""
        self.emptied = False
        self.multipliers = snapshot.multipliers
        self._left = [v.copy() for v in snapshot.left]
        self._right = [v.copy() for v in snapshot.right]
        self.keep = list(snapshot.keep)
        self._rebuild()

    def pairs(self) -> int:
        """The number of pairs of layouts of the surviving states, over all edges."""
        return sum(edge.size for edge in self.edges)

    def sweep(self) -> None:
        """One pass forward and one backward."""
        self._pass(self.order, forward=True)
        self._pass(self.order[::-1], forward=False)

    def _pass(self, order: Sequence[int], forward: bool) -> None:
        rank = self._rank
        for i in order:
            theta, here = self.theta[i], rank[i]
            ahead, behind = [], 0
            for edge in self.undecided(i):
                if edge.taken != i:
                    theta = theta + edge.take(i)
                if (rank[edge.b if edge.a == i else edge.a] > here) == forward:
                    ahead.append(edge)
                else:
                    behind += 1
            if ahead:
                share = theta / max(len(ahead), behind)
                for edge in ahead:
                    edge.give(i, share)
                theta = theta - share * len(ahead)
            self.theta[i] = theta

    def undecided(self, node: int) -> list[DualEdge]:
        """The edges of a node that still carry messages: several layouts survive at both ends."""
        found = self._undecided.get(node)
        if found is None:
            edges = map(self.edges.__getitem__, self.problem.incident[node])
            found = self._undecided[node] = [edge for edge in edges if not edge.separable]
        return found

    def bound(self) -> float:
        """The lower bound, in seconds."""
        constant = -float(self.multipliers.sum()) * self.problem.budget_bytes
        starts = np.cumsum([0, *map(len, self.theta)])[:-1]
        least = np.minimum.reduceat(np.concatenate(self.theta), starts) if self.theta else np.zeros(0)
        return constant + sum(least.tolist()) + sum(edge.least for edge in self.edges if edge.taken < 0)

    def objective(self, states: np.ndarray) -> float:
        """Seconds of one step under a choice of states, plus the multipliers' cost of bytes over the budget."""
        total = self.problem.objective(states)
        for row, multiplier in zip(self.rows, self.multipliers, strict=True):
            if multiplier > 0:
                total += multiplier * (row.bytes(self.problem, states) - self.problem.budget_bytes)
        return total

    def excess(self) -> list[np.ndarray]:
        """Per node and surviving state: the rise of the bound if the state is chosen."""
        return [self.excess_of(i) for i in range(len(self.theta))]

    def excess_of(self, node: int) -> np.ndarray:
        """For each surviving state of one node: the rise of the bound if it is chosen."""
        found = self.theta[node] - np.minimum.reduce(self.theta[node])
        for edge in self.undecided(node):
            if edge.taken != node:
                found = found + (edge.minima(node) - edge.least)
        return found

    def pair_excess(self, k: int) -> np.ndarray:
        """For the layout groups of an edge: the least rise of its own term of the bound if a pair is chosen."""
        edge = self.edges[k]
        left, right = edge.rows.minimum(-edge.left), edge.columns.minimum(-edge.right)
        table = edge.table() + left[:, None] + right
        return table - table.min()

    def overfull(self) -> bool:
        """Whether the least bytes of the surviving states already overflow a row with a multiplier."""
        return any(
            sum(float(vector[self.keep[i]].min()) for i, vector in row.nodes) > self.problem.budget_bytes
            for row, multiplier in zip(self.rows, self.multipliers, strict=True)
            if multiplier > 0
        )

    def propagate(self) -> None:
        """Fixes what cannot fit: states or pairs whose bytes, beside the least of all others, overflow a row.

        Without the pairs PaLM's prefill of 64 prompts on v4 4x4x4 takes 2.2 s of a processor and three branches, instead of
        1.6 s and none.
        """
        while self._propagate_once():
            pass

    def _propagate_once(self) -> bool:
        keep, struck = list(self.keep), 0
        bytes_of: dict[NodeBytes, tuple[float, float]] = {}
        ranges: dict[tuple[int, Copies], tuple[float, float]] = {}
        for row in self.rows:
            bytes_of |= {item: _range_of(item, keep) for item in row.nodes if item not in bytes_of}
            ranges |= {key: self._range(*key) for key in row.edges if key not in ranges}
            room = self.problem.budget_bytes
            room -= sum([*(bytes_of[item][0] for item in row.nodes), *(ranges[key][0] for key in row.edges)])
            if room < 0:
                self.fits = False
                return False
            for item in row.nodes:
                if bytes_of[item][1] - bytes_of[item][0] > room:
                    i, held = item.node, item.bytes[keep[item.node]]
                    fits = held - held.min() <= room
                    struck += int((~fits).sum())
                    keep[i] = keep[i][fits]
                    bytes_of = {known: found for known, found in bytes_of.items() if known.node != i}
            for key in row.edges:
                if ranges[key][1] - ranges[key][0] > room:
                    struck += self._ban(*key, room)
                    ranges[key] = self._range(*key)
        if struck:
            self.restrict(keep)
        return struck > 0

    def _range(self, k: int, table: Copies) -> tuple[float, float]:
        """The least and most bytes of an edge's surviving pairs that are not banned."""
        held = self._held(k, table)
        return float(held.min()), float(np.max(held, where=np.isfinite(held), initial=0.0))

    def _held(self, k: int, table: Copies) -> np.ndarray:
        """Bytes of an edge's surviving pairs; banned ones count 0."""
        window = self.edges[k].window
        return np.where(self.banned[k].pairs[window], np.inf, table[window]) if k in self.banned else table[window]

    def _ban(self, k: int, table: Copies, room: float) -> int:
        held = self._held(k, table)
        over = np.isfinite(held) & (held - held.min() > room)
        if not over.any():
            return 0
        self._forbid(k, over)
        return int(over.sum())

    def _forbid(self, k: int, over: np.ndarray) -> None:
        """Bans these of an edge's surviving pairs, in addition to the banned ones."""
        shape = self.problem.edges[k].matrix.shape
        banned = self.banned[k].pairs.copy() if k in self.banned else np.zeros(shape, dtype=bool)
        banned[self.edges[k].window] |= over
        self.banned[k] = Ban(banned)

    def exclude(self, incumbent: float) -> int:
        """Fixes to 0 every state that no solution better than the incumbent can use; returns their number.

        If a node has no state left, no solution here is better: `emptied` becomes true, and nothing is fixed.
        """
        width = max(incumbent - self.bound(), 0.0) + 1e-9 * abs(incumbent)
        kept = [excess <= width for excess in self.excess()]
        self.emptied = not all(mask.any() for mask in kept)
        if self.emptied:
            return 0
        struck = {i: mask for i, mask in enumerate(kept) if not mask.all()}
        self._strike(struck)
        return sum(len(mask) - int(mask.sum()) for mask in struck.values())

    def within(self, width: float) -> list[np.ndarray]:
        """Per node the states whose choice alone lifts the bound by at most `width` seconds."""
        return [keep[excess <= width] for keep, excess in zip(self.keep, self.excess(), strict=True)]


def _range_of(item: NodeBytes, keep: Sequence[np.ndarray]) -> tuple[float, float]:
    """The least and most bytes of a node's surviving states."""
    held = item.bytes[keep[item.node]]
    return float(held.min()), float(held.max())
