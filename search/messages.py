"""One edge's share of the costs, and what it says to its ends.

A table of two layouts' pairs is looked up in the matrix that all edges of one array share. Only small ones are kept; of the
others, rows are gathered, added up and compared a few at a time, in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from search.problem import Edge

_KEPT = 250_000
"""The most pairs of a table that is kept."""
_CHUNK = 100_000
"""Pairs compared at a time."""


class Groups:
    """States of one end of an edge grouped by the layout they share."""

    def __init__(self, layouts_of: np.ndarray) -> None:
        self.unique, self.group = np.unique(layouts_of, return_inverse=True)
        self._order = np.argsort(self.group, kind="stable")
        self._starts = np.searchsorted(self.group[self._order], np.arange(len(self.unique)))

    def minimum(self, vector: np.ndarray) -> np.ndarray:
        """The smallest entry of each group."""
        return np.minimum.reduceat(vector[self._order], self._starts)


class DualEdge:
    """An edge's share of the costs: `table[p, q] - left[s] - right[t]` for states `s`, `t` in layout groups `p`, `q`.

    `extra` is added to the edge's own costs: whatever can be indexed as a matrix of all pairs of layouts.
    """

    def __init__(
        self,
        edge: Edge,
        extra: Sequence[Any],
        left: np.ndarray,
        right: np.ndarray,
        keep: Sequence[np.ndarray],
    ) -> None:
        self.a, self.b = edge.a, edge.b
        self.rows, self.columns = Groups(edge.rows[keep[edge.a]]), Groups(edge.columns[keep[edge.b]])
        self.left, self.right = left, right
        self._weight, self._matrix, self.extra = edge.weight, edge.matrix, extra
        self._all_columns = len(self.columns.unique) == edge.matrix.shape[1]
        self._kept = self._looked_up(0, len(self.rows.unique)) if self.size <= _KEPT else None

    @property
    def size(self) -> int:
        """How many pairs of layouts there are."""
        return len(self.rows.unique) * len(self.columns.unique)

    @property
    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the pairs are in a matrix of all pairs of layouts."""
        return self.rows.unique[:, None], self.columns.unique

    def table(self) -> np.ndarray:
        """The cost of each pair of layouts."""
        return self._part(0, len(self.rows.unique))

    def row(self, p: int) -> np.ndarray:
        """The cost of each pair with one layout of `a`."""
        return self._part(p, p + 1)[0]

    def column(self, q: int) -> np.ndarray:
        """The cost of each pair with one layout of `b`."""
        if self._kept is not None:
            return self._kept[:, q]
        at = self.rows.unique, self.columns.unique[q]
        return sum((extra[at] for extra in self.extra), self._weight * self._matrix[at])

    def _part(self, first: int, last: int) -> np.ndarray:
        return self._looked_up(first, last) if self._kept is None else self._kept[first:last]

    def _looked_up(self, first: int, last: int) -> np.ndarray:
        rows, columns = self.rows.unique[first:last], self.columns.unique
        part = self._matrix[rows]
        part = self._weight * (part if self._all_columns else part.take(columns, axis=1))
        for extra in self.extra:
            part = part + extra[rows[:, None], columns]
        return part

    def parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The table, some rows at a time."""
        count = len(self.rows.unique)
        step = max(1, _CHUNK // len(self.columns.unique))
        for first in range(0, count, step):
            last = min(first + step, count)
            yield slice(first, last), self._part(first, last)

    def least_over_columns(self, vector: np.ndarray) -> np.ndarray:
        """Per layout of `a` the least cost, with `vector`, by state of `b`, added."""
        added = self.columns.minimum(vector)
        return np.concatenate([(part + added).min(axis=1) for _, part in self.parts()])

    def least_over_rows(self, vector: np.ndarray) -> np.ndarray:
        """Per layout of `b` the least cost, with `vector`, by state of `a`, added."""
        added = self.rows.minimum(vector)[:, None]
        least = np.full(len(self.columns.unique), np.inf)
        for rows, part in self.parts():
            np.minimum(least, (part + added[rows]).min(axis=0), out=least)
        return least

    def minima(self, node: int) -> np.ndarray:
        """For each state of one end, the smallest cost over the states of the other."""
        if node == self.a:
            return self.least_over_columns(-self.right)[self.rows.group] - self.left
        return self.least_over_rows(-self.left)[self.columns.group] - self.right

    def move(self, node: int, cost: np.ndarray) -> None:
        """Takes `cost` out of the edge (to give it to the node)."""
        if node == self.a:
            self.left = self.left + cost
        else:
            self.right = self.right + cost

    @property
    def strength(self) -> float:
        """By how much the median pair costs more than the best; of a large table, of as many rows as are compared at once."""
        if self._kept is not None:
            return float(np.median(self._kept) - self._kept.min())
        every = max(1, self.size // _CHUNK)
        some = np.concatenate([self.row(p) for p in range(0, len(self.rows.unique), every)])
        return float(np.median(some) - some.min())
