"""The solver against brute force, and the laws that a search must obey."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from costmodels.machine.topology import Topology, parse_topology
from costmodels.program.program import Factor, Operation, Program, Use, Value
from search.answer.assignment import choice_of
from search.answer.solution import Solver
from search.cpsat.solver import solve
from search.cpsat.stages import Found, Task
from search.formulation.axis_renaming import rename, renamings
from search.formulation.problem import FORBIDDEN, build
from search.memory.constraints import rows
from search.presolve.ascent import Ascent
from search.presolve.dual import Dual
from search.solve import Limits, NoPlan, search
from tests.support.effort import examples
from tests.support.enumeration import best, enumerable
from tests.support.layout_strategies import random_states
from tests.support.programs import MESHES, TOPOLOGIES, programs, small_programs


def limits_of(program: Program, topology: Topology, part: float) -> Limits:
    """A part of all arrays' bytes is what a chip can hold."""
    return Limits(reserve_bytes=topology.chip.usable_hbm_bytes - part * sum(value.bytes for value in program.values))


def assert_best(program: Program, topology: Topology, part: float, solver: Solver = "presolved") -> None:
    """What the search proves best costs what enumeration finds; nothing fits only where it finds nothing."""
    limits = replace(limits_of(program, topology, part), solver=solver)
    problem = enumerable(build(program, topology, limits.budget_bytes(topology)))
    least = best(problem)
    event("nothing fits" if least == np.inf else "fits")
    try:
        found = search(program, topology, limits)
    except NoPlan as error:
        assert least == np.inf and error.proven
        return
    assert (found.proof.status, found.proof.solver_status) == ("OPTIMAL", "OPTIMAL")
    rounding = 0.0 if solver == "presolved" else found.proof.rounding_seconds
    assert least * (1 - 1e-9) <= found.proof.objective_seconds <= least * (1 + 1e-9) + rounding
    assert rounding <= 1e-4 * least
    assert found.check.seconds == pytest.approx(found.proof.objective_seconds, rel=1e-9)
    assert found.check.faults == () and found.check.peak_bytes <= problem.budget_bytes


@examples(60)
@given(small_programs(), st.sampled_from(MESHES), st.floats(0.3, 1.2))
def test_the_search_equals_enumeration(program, topology, part):
    """On small problems, also where memory binds and in loops, nothing is better than what the search proves best."""
    assert_best(program, topology, part)


@pytest.mark.slow
@settings(max_examples=1500, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(small_programs(), st.sampled_from(MESHES), st.floats(0.3, 1.2))
def test_the_search_equals_enumeration_on_many(program, topology, part):
    """As above, a thousand times and more."""
    assert_best(program, topology, part)


@examples(30)
@given(small_programs(), st.sampled_from(MESHES), st.floats(0.3, 1.2))
def test_cp_sat_unaided_equals_enumeration(program, topology, part):
    """The model as it is built, without presolve, hint or bound, is the problem."""
    assert_best(program, topology, part, "cp-sat")


@examples(40)
@given(programs(), st.sampled_from(TOPOLOGIES))
def test_every_solution_passes_the_checker(program, topology):
    """The checker, which shares no array with the solver, finds the same cost, no fault, and memory within the budget."""
    found = search(program, topology)
    assert found.check.faults == ()
    assert found.check.seconds == pytest.approx(found.proof.objective_seconds, rel=1e-9)
    assert found.check.peak_bytes <= found.problem.budget_bytes
    assert found.proof.gap == 0.0


@examples(20)
@given(programs(), st.sampled_from(TOPOLOGIES), st.integers(0, 2**31), st.floats(0.5, 1.2))
def test_where_a_search_begins_changes_nothing(program, topology, seed, part):
    """A plan to start from, good or bad, fitting or not, leaves the proven cost as it is."""
    room = part * sum(value.bytes for value in program.values)
    limits = Limits(reserve_bytes=topology.chip.usable_hbm_bytes - room)
    states = random_states(build(program, topology, np.inf), np.random.default_rng(seed))
    try:
        plain = search(program, topology, limits)
    except NoPlan:
        with pytest.raises(NoPlan):
            search(program, topology, limits, start=search(program, topology).choice)
        return
    others = [] if states is None else [choice_of(build(program, topology, np.inf), states)]
    for start in (*others, search(program, topology).choice, plain.choice):
        found = search(program, topology, limits, start=start)
        assert found.proof.objective_seconds == pytest.approx(plain.proof.objective_seconds, rel=1e-8)
        assert found.proof.status == "OPTIMAL" and found.check.peak_bytes <= room


@examples(20)
@given(programs(), st.sampled_from(TOPOLOGIES))
def test_cp_sat_alone_finds_the_same(program, topology):
    """CP-SAT on the whole problem, without bound or incumbent, proves the cost that the search proves."""
    found = search(program, topology)
    problem = found.problem
    dual = Dual(problem, rows(problem), [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in problem.nodes])
    answer = solve(dual, rows(problem), None, 3 * found.proof.objective_seconds, 60.0, 60.0)
    assert answer.status == "OPTIMAL"
    assert answer.value == pytest.approx(found.proof.objective_seconds, rel=1e-5)


@examples(20)
@given(programs(), st.sampled_from(TOPOLOGIES), st.integers(0, 3))
def test_what_cp_sat_proves_of_a_branch_is_a_bound(program, topology, sweeps):
    """However rough the dual is that a branch is handed over with, the proven bound holds, and is tight but for rounding."""
    optimum = search(program, topology).proof.objective_seconds
    problem = build(program, topology, topology.chip.usable_hbm_bytes)
    task = Task(problem, Limits(), lambda _: None, False, np.inf, None, time.monotonic())
    found = Found(task.eliminate(None), Ascent(problem, task.memory, 0, lambda _: None))
    ascent = found.ascent
    for _ in range(sweeps):
        ascent.dual.sweep()
    proven = task.decide_part(found, ascent.dual.bound(), np.inf)
    assert proven <= optimum * (1 + 1e-9)
    assert ascent.objective == pytest.approx(optimum, rel=1e-5)
    assert proven >= optimum * (1 - 1e-3)


@examples(25)
@given(programs(), st.sampled_from(TOPOLOGIES), st.floats(0.2, 0.9))
def test_more_memory_never_costs_more(program, topology, part):
    """The optimum is monotone in the budget."""
    whole = sum(value.bytes for value in program.values)

    def cost(budget: float) -> float:
        try:
            return search(
                program, topology, Limits(reserve_bytes=topology.chip.usable_hbm_bytes - budget)
            ).proof.objective_seconds
        except NoPlan:
            return np.inf

    assert cost(whole * 1.5) <= cost(whole * part) * (1 + 1e-9)


@examples(25)
@given(programs(), st.sampled_from(TOPOLOGIES))
def test_the_bound_holds_for_every_choice(program, topology):
    """Whatever has been moved between nodes and edges, no choice of states costs less than the bound."""
    problem = build(program, topology, topology.chip.usable_hbm_bytes)
    dual = Dual(problem, rows(problem))
    draws = np.random.default_rng(0)
    costs = []
    for _ in range(50):
        states = np.array([draws.integers(len(node.states)) for node in problem.nodes])
        costs.append(problem.objective(states))
    for _ in range(5):
        dual.sweep()
        assert dual.bound() <= min(costs) * (1 + 1e-9)


@examples(15)
@given(programs())
def test_an_axis_of_size_one_changes_nothing(program):
    """A mesh axis of size 1 is free."""
    plain, longer = (search(program, parse_topology(text)).proof.objective_seconds for text in ("cpu:2x2", "cpu:2x2x1"))
    assert plain == pytest.approx(longer, rel=1e-12)


@examples(15)
@given(programs())
def test_renaming_interchangeable_axes_changes_no_cost(program):
    """Every renaming of equal axes maps states to states of the same cost."""
    topology = parse_topology("cpu:2x2")
    problem = build(program, topology, topology.chip.usable_hbm_bytes)
    for names in renamings(topology.symmetries()):
        for node in problem.nodes:
            index = {state: s for s, state in enumerate(node.states)}
            image = [index[rename(state, names)] for state in node.states]
            assert node.cost[image] == pytest.approx(node.cost, rel=1e-12)


def test_what_cannot_fit_is_refused():
    """A budget below the arguments' least bytes has no plan, and the search says by how much."""
    topology = parse_topology("cpu:2")
    program = _fixed()
    with pytest.raises(NoPlan) as caught:
        search(program, topology, Limits(reserve_bytes=topology.chip.usable_hbm_bytes - 64))
    assert caught.value.least_bytes > 64


def _fixed() -> Program:
    shape = (64, 64)
    value = Value("x", shape, "bfloat16", 2.0)
    dims = ((0,), (1,))
    factors = tuple(map(Factor, shape))
    source = Operation("x", "argument", factors, (), (Use(0, dims),), op_class="source")
    sink = Operation("result", "result", factors, (Use(0, dims),), (), op_class="sink")
    return Program("identity", (value,), (source, sink), arguments=(0,), results=(1,))
