"""Problems restricted to sums: against their definition and against enumeration."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.answer.assignment import moves
from search.formulation.layouts import Layout
from search.formulation.problem import build
from search.formulation.reshard import reshard_table
from search.restrictions import allowed_pairs, restrict_reshards
from search.solve import NoPlan, search
from tests.support.effort import examples
from tests.support.enumeration import best, enumerable
from tests.support.programs import MESHES, TOPOLOGIES, programs, small_programs


@pytest.mark.parametrize("topology", TOPOLOGIES[:2], ids=lambda each: each.name)
def test_sums_leave_every_dimension_as_it_was_and_slices_only_split_more(topology) -> None:
    graph = reshard_table((8, 8), 4, topology, True).graph
    sums, slices = (allowed_pairs(graph, each) for each in (False, True))
    for i, source in enumerate(graph.layouts):
        for j, target in enumerate(graph.layouts):
            assert sums[i, j] == (target == Layout(source.dims))
            finer = all(b[: len(a)] == a for a, b in zip(source.dims, target.dims, strict=True))
            assert slices[i, j] == (finer and not target.partial)


@examples(40)
@given(small_programs(), st.sampled_from(MESHES))
def test_the_restricted_search_equals_enumeration(program, topology) -> None:
    problem = enumerable(restrict_reshards(build(program, topology, np.inf), "sums"))
    least = best(problem)
    try:
        found = search(program, topology, reshards="sums")
    except NoPlan as error:
        assert least == np.inf and error.proven
        return
    assert found.proof.objective_seconds == pytest.approx(least, rel=1e-9)
    assert found.check.faults == ()


@examples(30)
@given(programs(), st.sampled_from(TOPOLOGIES))
def test_each_further_kind_of_reshard_only_helps(program, topology) -> None:
    """Plans without other reshards than sums have no others, and cost no less than plans that may have them."""
    seconds = [search(program, topology).proof.objective_seconds]
    for reshards in ("sums and slices", "sums"):
        try:
            found = search(program, topology, reshards=reshards)
        except NoPlan:
            seconds.append(np.inf)
            continue
        seconds.append(found.proof.objective_seconds)
        for move in moves(program, found.choice):
            assert not move.target.partial
            if reshards == "sums":
                assert move.target.dims == move.source.dims
    assert all(one <= other * (1 + 1e-9) for one, other in pairwise(seconds))


def test_unknown_restrictions_are_refused() -> None:
    with pytest.raises(ValueError, match="reshards must be one of all, sums and slices, sums, got 'gathers'"):
        restrict_reshards(None, "gathers")  # pyright: ignore[reportArgumentType]
