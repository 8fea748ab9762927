"""The bytes of copies that changes of layout make, without a table of all pairs of layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Copies:
    """Bytes held by a change of layout: `before[p] + after[q]`, and none where the layouts `rows[p]` and `columns[q]` are one.

    It is indexed, added and scaled as the matrix would be that it stands for.
    """

    before: np.ndarray
    after: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    __array_ufunc__ = None  # NumPy's numbers leave the products to us

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return len(self.before), len(self.after)

    def __getitem__(self, at: tuple[Any, ...]) -> np.ndarray:
        p, q = at
        return np.where(self.rows[p] != self.columns[q], self.before[p] + self.after[q], 0.0)

    def at(self, p: int, q: int) -> float:
        """One entry; much faster than an array of one."""
        return self.before.item(p) + self.after.item(q) if self.rows.item(p) != self.columns.item(q) else 0.0

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.before + other.before, self.after + other.after, self.rows, self.columns)

    def __rmul__(self, factor: float) -> Copies:
        return Copies(factor * self.before, factor * self.after, self.rows, self.columns)

    def among(self, rows: np.ndarray, columns: np.ndarray) -> Copies:
        """The matrix of these rows and columns."""
        return Copies(self.before[rows], self.after[columns], self.rows[rows], self.columns[columns])

    def max(self) -> float:
        """No entry is larger."""
        return float(self.before.max() + self.after.max())
