"""Branches, the prices of memory in them, and what is dropped without one: nothing that is best may be lost."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given
from hypothesis import strategies as st

from costmodels.machine.topology import Topology, parse_topology
from search.answer.solution import Limits
from search.cpsat import branching
from search.cpsat.branching import Branching
from search.cpsat.branching_rule import Probing
from search.cpsat.solver import solve
from search.cpsat.stages import Found, Task
from search.formulation.problem import FORBIDDEN, Problem, build
from search.memory.constraints import rows
from search.presolve.ascent import Ascent
from search.presolve.dual import Dual
from search.presolve.multipliers import raise_bound
from search.presolve.policy import POLICY
from search.presolve.primal import decode, overflow
from search.solve import search
from tests.support.effort import examples
from tests.support.enumeration import best, enumerable, fitting, seconds_of_all
from tests.support.programs import MESHES, TOPOLOGIES, programs, small_programs
from tests.support.tracing import trace

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
            found = Found(task.eliminate(None), ascent, ascent.dual.snapshot())
            Branching(ascent, partial(task.decide_part, found)).run()
    best = least(problem)
    assert ascent.objective == pytest.approx(best, rel=1e-5)
    if np.isfinite(best):
        assert ascent.bound == pytest.approx(best, rel=1e-5)


@examples(60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(small_programs(), st.sampled_from(MESHES), st.floats(0.3, 1.2))
def test_a_branch_of_the_smaller_problem_is_decided_as_the_whole(program, topology, part):
    """However much is eliminated, CP-SAT's answer on what is left is the whole problem's: the smaller one's only if it fits."""
    problem = enumerable(tight(program, topology, part), 3e5)
    optimum = best(problem)
    task = Task(problem, Limits(), lambda _: None, False, np.inf, None, time.monotonic())
    presolved = task.eliminate((1.0, 1.0))
    ascent = Ascent(presolved.problem, presolved.rows, 0, lambda _: None, symmetric=False)
    found = Found(presolved, ascent, ascent.dual.snapshot())
    proven = task.decide_part(found, ascent.dual.bound(), np.inf)
    assert ascent.objective == pytest.approx(optimum, rel=1e-5)
    if np.isfinite(optimum):
        assert optimum * (1 - 1e-3) <= proven <= optimum * (1 + 1e-9)
        assert (overflow(problem, task.memory, found.states) <= 0).all()
        assert problem.objective(found.states) == pytest.approx(optimum, rel=1e-5)


@examples(100, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(small_programs(), st.sampled_from(MESHES), st.floats(0.3, 0.9), st.integers(0, 2**31))
def test_the_sides_of_a_branch_have_every_better_plan(program, topology, part, seed):
    """Both sides have all states together, none twice; if contested, one plan each. Nothing dropped is in a better plan."""
    problem, rng = enumerable(tight(program, topology, part), 3e5), np.random.default_rng(seed)
    seconds = np.where(fitting(problem), seconds_of_all(problem), np.inf)
    ascent = Ascent(problem, rows(problem), 0, lambda _: None, symmetric=False)
    possible = np.argwhere(np.isfinite(seconds))
    assume(len(possible) > 1)
    known = possible[np.argsort(seconds[tuple(possible.T)], kind="stable")]
    ascent.look(known[min(rng.integers(8), len(known) - 1)])
    for _ in range(12):
        ascent.pool.add(np.array([rng.choice(keep) for keep in ascent.dual.keep]))
    told = ascent.pool.best_multipliers(ascent.dual.keep, ascent.objective)
    prices = told.multipliers if told else np.zeros(len(ascent.rows))
    ascent.dual.reprice(np.where(prices > 0, prices, 1e-13 * rng.integers(2)))
    for _ in range(rng.integers(3)):
        ascent.dual.sweep()
    assume(not ascent.has_reached(ascent.dual.bound()))
    mixed = tuple((0.5, known[k]) for k in rng.choice(len(known), 2, replace=False))
    split = Probing(ascent, np.ones(len(problem.nodes)).tolist()).split(mixed)
    event("contested" if split and split.contested else "not contested")
    if split:
        assert sorted([*split.near, *split.far]) == ascent.dual.keep[split.node].tolist()
        assert len({states[split.node] in split.near for _, states in mixed}) == 2 or not split.contested
    if not ascent.dual.emptied:
        inside = np.zeros(seconds.shape, dtype=bool)
        inside[np.ix_(*ascent.dual.keep)] = True
        assert np.min(seconds, where=~inside, initial=np.inf) >= ascent.objective * (1 - 1e-9)
    if not split:
        assert ascent.dual.emptied or ascent.has_reached(ascent.dual.bound()) or max(map(len, ascent.dual.keep)) == 1


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


@examples(60)
@given(programs(), st.sampled_from(TOPOLOGIES[:3]), st.floats(0.25, 1.1), st.randoms(use_true_random=False))
def test_no_prices_prove_more_of_the_plans_seen_than_the_best(program, topology, part, random):
    """At the best prices the least of the plans seen costs what is said, or what is enough; at no others more.

    The mixture is the proof: together its plans fit, and cost as much.
    """
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
    mixed = [(weight, ascent.pool.add(states)) for weight, states in told.mixture]
    rest = 1 - sum(weight for weight, _ in mixed)
    assert -1e-5 <= rest <= 1
    over = sum((weight * plan.over for weight, plan in mixed), np.zeros(len(ascent.rows)))
    assert over.max(initial=0.0) <= 1e-5 * problem.budget_bytes
    costs = sum(weight * plan.seconds for weight, plan in mixed) + (rest * enough if rest > 1e-5 else 0.0)
    assert costs == pytest.approx(told.seconds, rel=1e-4)
    for _ in range(8):
        prices = told.multipliers * np.array([random.choice([0.0, 0.5, 1.0, 2.0]) for _ in told.multipliers])
        prices = prices + random.choice([0.0, 1e-12, 1e-9]) * (np.arange(len(prices)) == random.randrange(len(prices)))
        assert proven(prices) <= told.seconds * (1 + 1e-5)


def test_cp_sat_sees_that_memory_is_nearly_a_linear_program():
    """A tenth of a second of its clock proves six residual layers within 0.6 of their peak; clauses alone find no plan."""

    def layers(weights, x):
        for up, down in weights:
            x = x + jnp.tanh(x @ up) @ down
        return x

    up, down, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 2048), (2048, 512), (32, 512)))
    program, where = trace(layers, [(up, down)] * 6, x).program, parse_topology("v5e:2x2")
    free = search(program, where)
    limits = Limits(memory_bytes=0.6 * free.check.peak_bytes, solver="cp-sat", deterministic_seconds=0.1)
    assert search(program, where, limits).proof.solver_status == "OPTIMAL"
