"""The chance that buffers of sent rows are too small: binomial tails, and at least what random routers show."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.overflow import overflow_chance, tail
from costmodels.program.grouped import rows_for_each, rows_in_all


@given(st.integers(0, 60), st.floats(0.0, 1.0), st.integers(-1, 61))
def test_the_tail_is_the_sum_of_its_terms(trials: int, chance: float, most: int) -> None:
    terms = (comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(most + 1, trials + 1))
    expected = sum(terms) if most >= 0 else 1.0
    assert tail(trials, chance, most) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("load", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(("rows", "sources", "chips"), [(512, 4, 4), (2048, 16, 4), (8192, 16, 16)])
def test_random_routers_overflow_no_more_often_than_the_bound(rows: int, sources: int, chips: int, load: float) -> None:
    rng, runs = np.random.default_rng(0), 400
    sent, room = rows_for_each(rows, sources, chips, load), rows_in_all(rows, sources, chips, load)
    pairs = rng.multinomial(rows // sources, [1 / chips] * chips, size=(runs, sources))
    beside = pairs.reshape(runs, chips, sources // chips, chips).sum(1)
    found = np.mean((pairs.max((1, 2)) > sent) | (beside.max((1, 2)) > room))
    bound = overflow_chance(rows, sources, chips, load)
    assert found <= bound + 3 * np.sqrt(bound * (1 - bound) / runs)
    assert bound <= 1.0 and (bound < 1.0 or found > 0.3)


def test_buffers_for_the_worst_case_never_overflow() -> None:
    assert overflow_chance(4096, 16, 4, 4.0) == 0.0
    assert overflow_chance(4096, 16, 1, 1.5) == 0.0
    assert overflow_chance(1 << 20, 16, 16, 1.5) < 1e-6 < 0.01 < overflow_chance(2048, 16, 16, 1.0)
