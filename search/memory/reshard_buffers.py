"""The bytes of the second arrays that reshards hold, without a table of all pairs of layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Copies:
    """Bytes held by a reshard: `before[p] + after[q]`, and none if the layouts `rows[p]` and `columns[q]` are equal.

    It supports indexing, addition and scaling like the matrix that it stands for.
    """

    before: np.ndarray
    after: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    __array_ufunc__ = None  # NumPy's scalars leave the products to this class

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return len(self.before), len(self.after)

    def __getitem__(self, at: tuple[Any, ...]) -> np.ndarray:
        p, q = at
        return np.where(self.rows[p] != self.columns[q], self.before[p] + self.after[q], 0.0)

    def at(self, p: int, q: int) -> float:
        """One entry, much faster than by an array index."""
        return self.before.item(p) + self.after.item(q) if self.rows.item(p) != self.columns.item(q) else 0.0

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.before + other.before, self.after + other.after, self.rows, self.columns)

    def __rmul__(self, factor: float) -> Copies:
        return Copies(factor * self.before, factor * self.after, self.rows, self.columns)

    def restrict(self, rows: np.ndarray, columns: np.ndarray) -> Copies:
        """The matrix restricted to these rows and columns."""
        return Copies(self.before[rows], self.after[columns], self.rows[rows], self.columns[columns])

    def max(self) -> float:
        """An upper bound of the entries."""
        return float(self.before.max() + self.after.max())
