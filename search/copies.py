"""The bytes of copies that changes of layout make, without a table of all pairs of layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Copies:
    """Bytes held by a change of layout: `before[p] + after[q]` from layout `p` to another `q`, and none if it stays.

    It is indexed, added and scaled as the matrix would be that it stands for.
    """

    before: np.ndarray
    after: np.ndarray
    __array_ufunc__ = None  # NumPy's numbers leave the products to us

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return len(self.before), len(self.after)

    def __getitem__(self, at: tuple[Any, ...]) -> np.ndarray:
        p, q = at
        return np.where(np.not_equal(p, q), self.before[p] + self.after[q], 0.0)

    def __add__(self, other: Copies) -> Copies:
        return Copies(self.before + other.before, self.after + other.after)

    def __rmul__(self, factor: float) -> Copies:
        return Copies(factor * self.before, factor * self.after)

    def max(self) -> float:
        """No entry is larger."""
        return float(self.before.max() + self.after.max())
