"""Presolve against enumeration: nothing that a better plan has is taken away, and what is eliminated costs what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given
from hypothesis import strategies as st

from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.formulation.problem import FORBIDDEN, Problem, build
from search.memory.constraints import Row, Rows, rows
from search.presolve.dual import Dual
from search.presolve.elimination import eliminate
from search.presolve.merged_orders import remove_by_merged_orders
from search.presolve.symmetry import possible_states
from tests.support.effort import examples
from tests.support.enumeration import enumerable, fitting, seconds_of_all
from tests.support.programs import MESHES, small_programs

ALIKE = 1e-9


def small(program: Program, topology: Topology, part: float) -> Problem:
    """The problem where a part of all arrays' bytes is a chip's memory; few enough choices to price them all."""
    return enumerable(build(program, topology, part * sum(value.bytes for value in program.values)), 3e5)


def begun(problem: Problem, limits: Sequence[Row], sweeps: int) -> Dual:
    dual = Dual(problem, limits, [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in problem.nodes])
    for _ in range(sweeps):
        dual.sweep()
    return dual


def least_without(problem: Problem, keep: list[np.ndarray], among: np.ndarray) -> float:
    """The least seconds of a plan that has a state which is gone."""
    inside = np.zeros(among.shape, dtype=bool)
    inside[np.ix_(*keep)] = True
    return float(np.min(among, where=~inside, initial=np.inf))


@examples(60)
@given(small_programs(), st.sampled_from(MESHES), st.integers(0, 4), st.floats(0.0, 1.0))
def test_no_better_plan_has_a_state_that_is_struck_out(program, topology, sweeps, part):
    """However rough the dual is: reduced-cost fixing leaves every plan that is faster than the incumbent."""
    problem = small(program, topology, 10.0)
    seconds = seconds_of_all(problem)
    every = np.unique(seconds[np.isfinite(seconds)])
    incumbent = float(every[int(part * (len(every) - 1))])
    dual = begun(problem, rows(problem), sweeps)
    dual.exclude(incumbent)
    assert least_without(problem, dual.keep, seconds) >= incumbent * (1 - ALIKE)


@examples(15)
@given(small_programs(), st.sampled_from(MESHES), st.integers(0, 3), st.integers(0, 99))
def test_messages_that_are_left_out_of_sweeps_are_zero(program, topology, sweeps, seed):
    """What an edge remembers of its messages is what they are, also after a trial with fewer states of a node."""
    problem = small(program, topology, 10.0)
    dual = begun(problem, rows(problem), sweeps)
    before = [dual.excess_of(i) for i in range(len(problem.nodes))]
    node = seed % len(problem.nodes)
    with dual.held(node, dual.keep[node][-1:]):
        dual.sweep()
        messages_are_remembered(dual)
    messages_are_remembered(dual)
    after = [dual.excess_of(i) for i in range(len(problem.nodes))]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def messages_are_remembered(dual: Dual) -> None:
    for k, edge in enumerate(dual.edges):
        if edge.taken >= 0:
            left, right = edge.rows.minimum(-edge.left), edge.columns.minimum(-edge.right)
            least = (edge.table() + left[:, None] + right).min(axis=1 if edge.taken == edge.a else 0)
            np.testing.assert_allclose(least, 0.0, atol=1e-9 * max(dual.bound(), 1e-9), err_msg=str(k))


@examples(60)
@given(small_programs(), st.sampled_from(MESHES), st.floats(0.3, 1.2))
def test_no_plan_that_fits_has_a_state_that_is_propagated_away(program, topology, part):
    """Memory alone strikes out only what occurs in no plan that fits."""
    problem = small(program, topology, part)
    dual = begun(problem, rows(problem), 0)
    dual.propagate()
    seconds = np.where(fitting(problem), seconds_of_all(problem), np.inf)
    if dual.fits:
        assert least_without(problem, dual.keep, seconds) == np.inf
    else:
        assert not np.isfinite(seconds).any()


@examples(60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(small_programs(), st.sampled_from(MESHES), st.integers(0, 2**31))
def test_eliminated_nodes_cost_what_they_did(program, topology, seed):
    """A choice of what is kept costs the least of all ways to choose the rest, and comes back as one of them."""
    problem = small(program, topology, 10.0)
    smaller = eliminate(problem, rows(problem), 1.0)
    assume(smaller.gone)
    rng = np.random.default_rng(seed)
    states = np.array([rng.integers(len(node.states)) for node in smaller.problem.nodes], dtype=int)
    at = [slice(None)] * len(problem.nodes)
    for node, state in zip(smaller.kept, states.tolist(), strict=True):
        at[node] = state
    least = float(np.min(seconds_of_all(problem)[tuple(at)]))
    assume(np.isfinite(least))
    assert smaller.problem.objective(states) == pytest.approx(least, rel=1e-9)
    assert problem.objective(smaller.expand(states)) == pytest.approx(least, rel=1e-9)


@examples(60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(small_programs(), st.sampled_from(MESHES), st.sampled_from([0.01, 0.3, 1.0]), st.integers(0, 2**31))
def test_rows_of_a_smaller_problem_hold_no_more_than_those_of_the_whole(program, topology, rows_part, seed):
    """However few rows decide which nodes stay, a plan that fits the whole rows fits those of the smaller problem."""
    problem = small(program, topology, 10.0)
    whole = rows(problem)
    smaller = eliminate(problem, whole, 0.01, rows_part)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        states = np.array([rng.integers(len(node.states)) for node in problem.nodes], dtype=int)
        held, less = whole.bytes(problem, states), Rows(smaller.rows).bytes(smaller.problem, states[list(smaller.kept)])
        assert (less <= held * (1 + ALIKE)).all()


@examples(60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(small_programs(), st.sampled_from(MESHES), st.integers(0, 4), st.floats(0.0, 2.0))
def test_every_plan_within_a_window_survives_in_the_whole_problem(program, topology, sweeps, width):
    """What the bound of the smaller problem leaves, read back, has all states of every plan within so much of the bound."""
    problem = small(program, topology, 10.0)
    smaller = eliminate(problem, rows(problem), 1.0)
    seconds = seconds_of_all(problem)
    dual = begun(smaller.problem, smaller.rows, sweeps)
    window = width * float(np.min(seconds))
    surviving = smaller.surviving(dual.within(window), window)
    assert least_without(problem, surviving, seconds) >= (dual.bound() + window) * (1 - ALIKE)


@examples(60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(
    small_programs(), st.sampled_from(MESHES), st.floats(0.3, 1.2), st.integers(0, 9), st.sampled_from([1.0, np.inf])
)
def test_merged_orders_leave_a_best_plan(program, topology, part, seed, cutoff):
    """What a coarser problem removes is in no plan below the best it found; where axes are alike, one best plan stays."""
    problem, alike = small(program, topology, part), seed == 0
    if not alike:
        problem = costlier(problem, np.random.default_rng(seed))
    seconds = np.where(fitting(problem), seconds_of_all(problem), np.inf)
    least = float(np.min(seconds))
    keep = possible_states(problem, alike)
    found = remove_by_merged_orders(problem, rows(problem), keep, cutoff * least, lambda _: None)
    left = [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in found.nodes]
    event(f"{'some' if sum(map(len, left)) < sum(map(len, keep)) else 'nothing'} removed")
    if np.isfinite(least):
        assert all(map(len, left)) and float(np.min(seconds[np.ix_(*left)])) == pytest.approx(least, rel=ALIKE)
        assert alike or least_without(problem, left, seconds) >= least * (1 - ALIKE)


def costlier(problem: Problem, rng: np.random.Generator) -> Problem:
    """The problem with random costs of states, which tell orders of axes apart."""
    costs = [edge.weight * edge.matrix[edge.matrix < FORBIDDEN / 2].max() for edge in problem.edges]
    scale = max(costs, default=1e-6)
    nodes = (replace(node, cost=node.cost + scale * rng.random(len(node.cost))) for node in problem.nodes)
    return replace(problem, nodes=tuple(nodes))
