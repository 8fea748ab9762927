"""One edge's share of the costs, and its messages to its ends.

A table of pairs of layouts is looked up in the matrix that all edges of one array share. Only small tables are kept.
The rows of others are gathered, summed and compared a few at a time, in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np

from search.formulation.problem import Edge

_KEPT = 250_000
"""The most pairs of a table that is kept."""
_CHUNK = 100_000
"""Pairs compared at a time."""


Messages = tuple[np.ndarray, np.ndarray, float | None, int]
"""Those of `DualEdge.left` and `right`, the least cost of a pair if it is known, and the end whose minima are 0."""


class Groups:
    """States of one end of an edge grouped by the layout they share.

    **Arguments:**

    - `layouts_of`: the layout of each state; `count`: the number of layouts there are.
    """

    def __init__(self, layouts_of: np.ndarray, count: int) -> None:
        used = np.zeros(count, dtype=bool)
        used[layouts_of] = True
        self.unique = np.flatnonzero(used)
        self.group = (np.cumsum(used) - 1)[layouts_of]
        self._alone = len(self.unique) == len(layouts_of)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.group, kind="stable")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.searchsorted(self.group[self._order], np.arange(len(self.unique)))

    def minimum(self, vector: np.ndarray) -> np.ndarray:
        """The smallest entry of each group."""
        sorted_ = vector[self._order]
        return sorted_ if self._alone else np.minimum.reduceat(sorted_, self._starts)

    def maximum(self, vector: np.ndarray) -> np.ndarray:
        """The largest entry of each group."""
        sorted_ = vector[self._order]
        return sorted_ if self._alone else np.maximum.reduceat(sorted_, self._starts)


class DualEdge:
    """An edge's share of the costs: `table[p, q] - left[s] - right[t]` for states `s`, `t` in layout groups `p`, `q`.

    `extra` is added to the edge's own costs: anything indexed like a matrix of all pairs of layouts. `separable` says
    that one end has a single layout left: the edge's messages are then final. `taken` is the end whose `minima` are all
    0, as they were taken last, or -1.
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
        rows, columns = edge.matrix.shape
        self.rows, self.columns = Groups(edge.rows[keep[edge.a]], rows), Groups(edge.columns[keep[edge.b]], columns)
        self.left, self.right = left, right
        self._ends = keep[edge.a], keep[edge.b]
        self._weight, self._matrix, self.extra = edge.weight, edge.matrix, extra
        self._all_columns = len(self.columns.unique) == columns
        self._kept = self._looked_up(0, len(self.rows.unique)) if self.size <= _KEPT else None
        self._least: float | None = None
        self.taken = -1
        self._strength: float | None = None
        self.separable = len(self.rows.unique) == 1 or len(self.columns.unique) == 1

    def has(self, extra: Sequence[Any], keep: Sequence[np.ndarray]) -> bool:
        """Whether it was made of these extra costs and surviving states."""
        same = self._ends[0] is keep[self.a] and self._ends[1] is keep[self.b] and len(extra) == len(self.extra)
        return same and all(one is other for one, other in zip(extra, self.extra, strict=True))

    def after(self, left: np.ndarray, right: np.ndarray) -> DualEdge:
        """The same edge with other messages."""
        found = copy(self)
        found.left, found.right, found._least, found.taken = left, right, None, -1
        return found

    @property
    def messages(self) -> Messages:
        """The messages to both ends, with what is known of them: to be set again, as no array is changed in place."""
        return self.left, self.right, self._least, self.taken

    @messages.setter
    def messages(self, old: Messages) -> None:
        self.left, self.right, self._least, self.taken = old

    @property
    def size(self) -> int:
        """The number of pairs of layouts."""
        return len(self.rows.unique) * len(self.columns.unique)

    @property
    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the pairs in a matrix of all pairs of layouts."""
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

    def least_over_columns(self, right: np.ndarray) -> np.ndarray:
        """Per layout of `a` the least cost less `right`, by state of `b`."""
        taken = self.columns.maximum(right)
        if self._kept is not None:
            return np.minimum.reduce(self._kept - taken, axis=1)
        return np.concatenate([(part - taken).min(axis=1) for _, part in self.parts()])

    def least_over_rows(self, left: np.ndarray) -> np.ndarray:
        """Per layout of `b` the least cost less `left`, by state of `a`."""
        taken = self.rows.maximum(left)[:, None]
        if self._kept is not None:
            return np.minimum.reduce(self._kept - taken, axis=0)
        least = np.full(len(self.columns.unique), np.inf)
        for rows, part in self.parts():
            np.minimum(least, (part - taken[rows]).min(axis=0), out=least)
        return least

    def minima(self, node: int) -> np.ndarray:
        """For each state of one end, the smallest cost over the states of the other."""
        if self.taken == node:
            return np.zeros(len(self.left if node == self.a else self.right))
        if node == self.a:
            return self.least_over_columns(self.right)[self.rows.group] - self.left
        return self.least_over_rows(self.left)[self.columns.group] - self.right

    def take(self, node: int) -> np.ndarray:
        """Moves the `minima` of one end out of the edge, to give them to the node."""
        if node == self.a:
            whole = self.least_over_columns(self.right)[self.rows.group]
            found, self.left = whole - self.left, whole
        else:
            whole = self.least_over_rows(self.left)[self.columns.group]
            found, self.right = whole - self.right, whole
        self._least, self.taken = 0.0, node
        return found

    def give(self, node: int, cost: np.ndarray) -> None:
        """Adds a cost to each state of an end."""
        if node == self.a:
            self.left = self.left - cost
        else:
            self.right = self.right - cost
        self._least, self.taken = None, -1

    @property
    def least(self) -> float:
        """The smallest cost of any pair."""
        if self._least is None:
            self._least = float(self.minima(self.a).min())
        return self._least

    @property
    def strength(self) -> float:
        """The excess of the median pair over the best; of a large table, over as many rows as are compared at once."""
        if self._strength is None:
            every = 1 if self._kept is not None else max(1, self.size // _CHUNK)
            some = np.concatenate([self.row(p) for p in range(0, len(self.rows.unique), every)])
            self._strength = float(np.median(some) - some.min())
        return self._strength
