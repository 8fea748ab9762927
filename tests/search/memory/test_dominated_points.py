"""Points of a program at which no more is alive than at another need no row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.memory.constraints import drop_dominated

counts = st.tuples(st.integers(1, 8), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.int32, shape, elements=st.integers(0, 2))
)
"""How many values of each kind (columns) are alive at each point (rows)."""


def holds(many: np.ndarray, few: np.ndarray) -> bool:
    return bool((many >= few).all())


@given(counts)
def test_what_is_dropped_is_held_by_a_kept_point_and_no_kept_point_by_another(alive: np.ndarray) -> None:
    kept = drop_dominated(alive)
    assert kept == sorted(set(kept))
    for i, row in enumerate(alive):
        others = [j for j in kept if j != i and holds(alive[j], row)]
        assert bool(others) != (i in kept), (i, kept)
