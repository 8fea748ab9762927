"""The time of a matmul with its ring, against a simulation of arrivals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.machine.rings import has_two_ways, hop_seconds, longest_way, waiting_times
from costmodels.machine.topology import parse_topology
from tests.support.effort import examples


def simulated(chips: int, two_ways: bool, work: float, hop: float) -> float:
    """Runs the own piece, then each of the others once it has arrived; hops of one way follow one another."""
    arrives = [hop * (k // 2 + 1) if two_ways else hop * (k + 1) for k in range(chips - 1)]
    now = work / chips
    for at in arrives:
        now = max(now, at) + work / chips
    return now


@given(
    chips=st.integers(2, 17),
    two_ways=st.booleans(),
    work=st.floats(0.0, 8.0),
    hop=st.floats(0.0, 3.0),
)
@examples(100)
def test_the_longest_wait_is_that_of_the_pieces_in_turn(chips: int, two_ways: bool, work: float, hop: float):
    found = max(waiting_times(chips, two_ways and chips >= 4, work, hop))
    assert found == pytest.approx(simulated(chips, two_ways and chips >= 4, work, hop), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "two_ways", "longest"), [("v4:4x4x4", True, 1), ("v5e:4x1", False, 3), ("v5e:2x1", False, 1)]
)
def test_a_line_closes_its_ring_the_other_way(text: str, two_ways: bool, longest: int):
    axis = parse_topology(text).axis("x")
    assert has_two_ways(axis) == two_ways and longest_way(axis, axis.size) == longest
    quick = replace(axis, launch_seconds=0.0)
    assert hop_seconds(quick, 1e6) == pytest.approx(1e6 / axis.bytes_per_second + longest * axis.hop_seconds)
