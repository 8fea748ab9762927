"""Branches, the prices of memory in them, and what is dropped without one: nothing that is best may be lost."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from costmodels.machine.topology import Topology
from search.answer.solution import Limits
from search.cpsat import branching
from search.cpsat.branching import Branching
from search.cpsat.kernel import _combined
from search.cpsat.solver import solve
from search.cpsat.stages import Found, Task
from search.formulation.problem import FORBIDDEN, Problem, build
from search.memory.constraints import rows
from search.presolve.ascent import Ascent
from search.presolve.dual import Dual
from search.presolve.multipliers import bracket, raise_bound
from search.presolve.policy import POLICY
from search.presolve.primal import decode, overflow
from tests.support.effort import examples
from tests.support.programs import TOPOLOGIES, programs

ROUNDING = 2e-9
"""Seconds by which a sum changes when it is formed anew beside the price of the impossible."""


def tight(program, topology: Topology, part: float) -> Problem:
    """The problem where a part of all arrays' bytes is a chip's memory."""
    return build(program, topology, part * sum(value.bytes for value in program.values))


def begun(problem: Problem) -> Ascent:
    """A search that has looked at few plans, with a price on memory that is only about right."""
    ascent = Ascent(problem, rows(problem), 1, lambda _: None, symmetric=False)
    ascent.run()
    return ascent


def least(problem: Problem) -> float:
    """The optimum, by CP-SAT alone; infinite where nothing fits."""
    dual = Dual(problem, rows(problem), [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in problem.nodes])
    answer = solve(dual, rows(problem), None, FORBIDDEN / 100, 60.0, 60.0)
    return np.inf if answer.status == "INFEASIBLE" else answer.value


@examples(30)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1))
def test_branches_alone_find_the_optimum(program, topology, part):
    """Without CP-SAT's help but for what is decided, branching comes to CP-SAT's optimum, or proves that nothing fits."""
    problem = tight(program, topology, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branching, "POLICY", replace(POLICY, small_pairs=0, close_pairs=0))
        ascent = begun(problem)
        if ascent.fits and not ascent.closed:
            task = Task(problem, Limits(), lambda _: None, False, np.inf, None, time.monotonic())
            found = Found(task.eliminate(0.0), ascent, ascent.dual.snapshot())
            Branching(ascent, partial(task._decide_part, found)).run()
    best = least(problem)
    assert ascent.objective == pytest.approx(best, rel=1e-5)
    if np.isfinite(best):
        assert ascent.bound == pytest.approx(best, rel=1e-5)


@examples(30)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1), st.randoms(use_true_random=False))
def test_holding_a_node_is_a_restriction_for_a_while(program, topology, part, random):
    """While a node is held the bound is that of the restricted problem; afterwards everything is as it was."""
    dual = begun(tight(program, topology, part)).dual
    node = random.randrange(len(dual.keep))
    side = np.array(sorted(random.sample(dual.keep[node].tolist(), random.randint(1, len(dual.keep[node])))))
    before, theta = dual.bound(), [each.copy() for each in dual.theta]
    with dual.held(node, side):
        held = dual.bound()
        dual.sweep()
    assert dual.bound() == before
    assert all((a == b).all() for a, b in zip(theta, dual.theta, strict=True))
    assert held >= before - ROUNDING - 1e-9 * abs(before)
    dual.restrict([side if i == node else keep for i, keep in enumerate(dual.keep)])
    assert dual.bound() == pytest.approx(held, rel=1e-9, abs=ROUNDING)


def moved(dual: Dual, how: str, random) -> None:
    """One of the things that happen to a dual in a search."""
    i = random.randrange(len(dual.keep))
    half = dual.keep[i][: max(1, len(dual.keep[i]) // 2)]
    match how:
        case "sweep":
            dual.sweep()
        case "reprice":
            dual.reprice(np.array([random.random() * 1e-9 for _ in dual.rows]))
        case "narrow":
            dual.narrow(i, half)
        case "restrict":
            dual.restrict([half if k == i else keep for k, keep in enumerate(dual.keep)])
        case "hold":
            with dual.held(i, half):
                dual.sweep()
        case "exclude":
            dual.exclude(dual.bound() + random.random() * abs(dual.bound()))
        case "come back":
            before = dual.snapshot()
            dual.narrow(i, half)
            dual.sweep()
            dual.load(before)


MOVES = ("sweep", "reprice", "narrow", "restrict", "hold", "exclude", "come back")


@examples(40)
@given(
    programs(),
    st.sampled_from(TOPOLOGIES[:3]),
    st.lists(st.sampled_from(MOVES), max_size=8),
    st.randoms(use_true_random=False),
)
def test_whatever_is_moved_plans_cost_what_they_did(program, topology, moves, random):
    """The potentials of a plan add up to its cost, and its bound is the sum of their least, also where edges are left out."""
    problem = tight(program, topology, 1.0)
    dual = Dual(problem, rows(problem), [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in problem.nodes])
    for how in moves:
        moved(dual, how, random)
    places = [random.randrange(len(keep)) for keep in dual.keep]
    constant = -dual.multipliers.sum() * problem.budget_bytes
    ends = [(edge, edge.rows.group[places[edge.a]], edge.columns.group[places[edge.b]]) for edge in dual.edges]
    paid = sum(theta[place] for theta, place in zip(dual.theta, places, strict=True))
    paid += sum(e.table()[p, q] - e.left[places[e.a]] - e.right[places[e.b]] for e, p, q in ends)
    states = np.array([keep[place] for keep, place in zip(dual.keep, places, strict=True)])
    assert constant + paid == pytest.approx(dual.objective(states), rel=1e-9, abs=ROUNDING)
    least_of = [
        float((e.table()[e.rows.group][:, e.columns.group] - e.left[:, None] - e.right).min()) for e in dual.edges
    ]
    summed = constant + sum(float(theta.min()) for theta in dual.theta) + sum(least_of)
    assert dual.bound() == pytest.approx(summed, rel=1e-9, abs=ROUNDING)


@examples(30)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1))
def test_prices_are_settled_where_the_bound_is_highest(program, topology, part):
    """The bound does not sink, and stays below every plan; each trial is made at prices that the plans seen tell."""
    problem = tight(program, topology, part)
    ascent = begun(problem)
    assume(ascent.fits)
    dual, before = ascent.dual, ascent.dual.bound()

    def trial() -> np.ndarray:
        dual.sweep()
        return ascent.look(decode(dual)).over

    raise_bound(ascent, ascent.look(decode(dual)).over, trial, 6)
    assert dual.bound() >= before - ROUNDING - 1e-9 * abs(before)
    assert dual.bound() <= least(problem) * (1 + 1e-9) + ROUNDING


@examples(30)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1))
def test_the_plans_of_a_bracket_are_the_best_at_the_multipliers(program, topology, part):
    """Of two plans one overflows and one does not; of the plans seen in what is left, none of its kind costs less."""
    problem = tight(program, topology, part)
    ascent = begun(problem)
    assume(ascent.fits)
    found, multipliers = bracket(ascent), ascent.dual.multipliers
    for states, fits in ((found.lean, True), (found.bulky, False)):
        alike = [plan for plan in ascent.pool.within(ascent.dual.keep) if plan.fits == fits]
        assert (states is None) == (not alike)
        if states is not None:
            assert bool(overflow(problem, ascent.rows, states).max(initial=-np.inf) <= 0) == fits
            assert ascent.pool.add(states).priced(multipliers) == min(plan.priced(multipliers) for plan in alike)


@examples(60)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1), st.randoms(use_true_random=False))
def test_no_prices_prove_more_of_the_plans_seen_than_the_best(program, topology, part, random):
    """At the best prices the least of the plans seen costs what is said, or what is enough; at no others more."""
    problem = tight(program, topology, part)
    ascent = begun(problem)
    keep = [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in problem.nodes]
    for _ in range(8):
        ascent.pool.add(np.array([random.choice(states.tolist()) for states in keep]))
    plans = [ascent.pool.add(states) for states in ascent.pool.states]
    plans = [plan for plan in plans if plan.seconds < FORBIDDEN / 2]
    enough = random.choice([np.inf, ascent.objective, 0.5 * min(plan.seconds for plan in plans)])
    told = ascent.pool.best_multipliers(keep, enough)
    if told is None:
        assert enough == np.inf and not any(plan.fits for plan in plans)
        event("the plans tell nothing")
        return

    def proven(prices: np.ndarray) -> float:
        return min(enough, *(plan.seconds + float(prices @ plan.over) for plan in plans), np.inf)

    assert proven(told.multipliers) == pytest.approx(told.seconds, rel=1e-5)
    for _ in range(8):
        prices = told.multipliers * np.array([random.choice([0.0, 0.5, 1.0, 2.0]) for _ in told.multipliers])
        prices = prices + random.choice([0.0, 1e-12, 1e-9]) * (np.arange(len(prices)) == random.randrange(len(prices)))
        assert proven(prices) <= told.seconds * (1 + 1e-5)


@examples(20)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1))
def test_plans_put_together_fit_and_leave_the_dual_as_it_was(program, topology, part):
    """What is put together from the plans seen is a plan that fits, or one of those seen."""
    problem = tight(program, topology, part)
    ascent = begun(problem)
    seen = tuple(ascent.pool.states)
    assume(ascent.fits and seen)
    before = ascent.dual.bound()
    found = _combined(ascent)
    assert ascent.dual.bound() == pytest.approx(before, rel=1e-9, abs=ROUNDING)
    if not any((found == states).all() for states in seen):
        assert (overflow(problem, ascent.rows, found) <= 0).all()
