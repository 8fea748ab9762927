"""Laws of the whole search: folding, pins, phases, ranking, interruptions, and what must change nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from costmodels.machine.topology import Topology, parse_topology
from costmodels.program.program import Program
from search.answer.assignment import states_of
from search.cpsat.stages import Task
from search.formulation.layer_folding import classes
from search.formulation.problem import Problem, build
from search.k_best import _Parts, rank
from search.phases import TooSlow, search_phases
from search.presolve.symmetry import rename
from search.solve import DEFAULTS, Limits, NoPlan, search
from tests.support.effort import examples
from tests.support.enumeration import enumerable, fitting, seconds_of_all
from tests.support.programs import MESHES, TOPOLOGIES, layered, programs, small_programs, unrolled

SIZES = (4, 6, 8, 64)
SMALL = st.sampled_from(TOPOLOGIES)
CASES = 25
KEEPING = [parse_topology(text) for text in ("v4:2x1x1", "v5e:2x2")]
"""Chips that keep small arrays between operations: copies of a layer then differ by what feeds them."""


def best_uniform(program: Program, topology: Topology, alike: tuple[int, ...]) -> float:
    """By enumeration: the least cost of a choice under which like operations and like values are laid out alike."""
    problem = build(program, topology, topology.chip.usable_hbm_bytes)
    folded = build(program, topology, topology.chip.usable_hbm_bytes, alike)
    node_of: list[int] = [0] * len(problem.nodes)
    for i, node in enumerate(problem.of_operation):
        node_of[node] = folded.of_operation[i]
    for value, node in problem.of_hub.items():
        node_of[node] = folded.of_hub[value]
    sizes = [len(node.states) for node in folded.nodes]
    assume(np.prod([float(size) for size in sizes]) <= 1.5e4)
    best = np.inf
    for chosen in product(
        *map(range, sizes)
    ):  # of the unfolded problem: folding adds up costs, which is what is tested
        best = min(best, problem.objective(np.array(chosen)[node_of]))
    return best


# --- folding


@examples(CASES)
@given(layered(least=3, most=6), SMALL)
def test_layers_are_found_again(program, topology):
    """Every layer but perhaps the first and the last shares its operations with another; weights share their layouts."""
    alike = classes(program)
    found = search(program, topology)
    for i, first in enumerate(alike):
        assert found.choice.strategies[i] == found.choice.strategies[first]
        assert program.operations[i].signature == program.operations[first].signature
    assert len(set(alike)) < len(alike)


@examples(CASES)
@given(layered(sizes=(4, 64, 512)), SMALL | st.sampled_from(KEEPING))
def test_folding_is_a_restriction(program, topology):
    """Layers laid out alike cost no less than layers that may differ; both are what the checker counts."""
    folded, free = search(program, topology), search(program, topology, fold=False)
    assert folded.check.seconds >= free.check.seconds * (1 - 1e-9)
    for found in (folded, free):
        assert found.proof.gap == 0.0 and not found.check.faults
        assert found.check.seconds == pytest.approx(found.proof.objective_seconds, rel=1e-9)


@examples(CASES)
@given(layered(least=3, most=4, sizes=(2, 3)), st.sampled_from(MESHES))
def test_folded_is_the_best_with_like_layers(program, topology):
    """The folded optimum is the least over all choices that treat copies alike, by enumeration of the unfolded problem."""
    least = best_uniform(program, topology, classes(program))
    assert search(program, topology).proof.objective_seconds == pytest.approx(least, rel=1e-9)


# --- what must change nothing


@examples(CASES)
@given(layered() | programs(), SMALL)
def test_elimination_is_exact(program, topology):
    """The problem without the operations between two others has the whole problem's optimum."""
    problem = build(program, topology, topology.chip.usable_hbm_bytes, classes(program))
    task = Task(problem, DEFAULTS, lambda _: None, True, np.inf, None, time.monotonic())
    whole = task.check_found(task.decide(task.branch(task.ascend(task.eliminate(None))), last=True))
    assert whole.proof.objective_seconds == pytest.approx(search(program, topology).proof.objective_seconds, rel=1e-9)


@examples(CASES)
@given(layered(), SMALL, st.randoms(use_true_random=False))
def test_the_order_of_independent_operations_changes_nothing(program, topology, random):
    """Operations in any order that their operands allow cost the same."""
    other = reordered(program, random)
    plain, shuffled = (search(each, topology, fold=False).proof.objective_seconds for each in (program, other))
    assert plain == pytest.approx(shuffled, rel=1e-9)


def reordered(program: Program, random) -> Program:
    """The program with its operations in another order; results keep their places at the end."""
    waiting, order, known = list(range(len(program.operations))), [], set()
    while waiting:
        ready = [i for i in waiting if all(use.value in known for use in program.operations[i].inputs)]
        at = random.choice(ready)
        waiting.remove(at)
        order.append(at)
        known.update(use.value for use in program.operations[at].outputs)
    place = {old: new for new, old in enumerate(order)}
    return replace(
        program,
        operations=tuple(program.operations[i] for i in order),
        arguments=tuple(place[i] for i in program.arguments),
        results=tuple(place[i] for i in program.results),
    )


@examples(CASES)
@given(programs(), st.sampled_from(("cpu:2x2", "cpu:2x4")))
def test_names_of_axes_change_nothing(program, text):
    """A mesh whose axes have other names, or come in another order, has the same optimum."""
    topology = parse_topology(text)
    named = replace(topology, axes=tuple(replace(axis, name=f"_{axis.name}") for axis in reversed(topology.axes)))
    plain, other = (search(program, each).proof.objective_seconds for each in (topology, named))
    assert plain == pytest.approx(other, rel=1e-9)


# --- pins


@examples(CASES)
@given(layered() | programs(), SMALL, st.data())
def test_a_pin_never_helps_and_is_kept(program, topology, data):
    """Deciding a layout costs something or nothing, and the plan has it; axes that a pin names are no longer alike."""
    at = data.draw(st.sampled_from(program.arguments))
    free = search(program, topology)
    layouts = free.problem.space(at).outputs[0]
    pinned = data.draw(st.sampled_from([layout for layout in layouts if not layout.partial]))
    operations = list(program.operations)
    operations[at] = replace(operations[at], pinned=pinned.dims)
    held = search(replace(program, operations=tuple(operations)), topology)
    assert held.proof.objective_seconds >= free.proof.objective_seconds * (1 - 1e-9)
    assert (
        held.problem.space(at).outputs[0][states_of(held.problem, held.choice)[held.problem.of_operation[at]]] == pinned
    )


# --- phases


@examples(10)
@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.sampled_from(SIZES), st.floats(0.1, 50.0), SMALL)
def test_sharing_costs_no_less_than_the_phases_alone(few, inner, hidden, weight, topology):
    """The joint optimum is at least the weighted sum of the separate ones, and all phases have the shared layouts."""
    phases = [unrolled(2, False, tokens, inner, hidden) for tokens in (64, few)]
    shared = [((0, i), (1, i)) for i in range(1, len(phases[0].arguments))]
    found = search_phases(phases, (1.0, weight), topology, shared)
    alone = sum(w * each.proof.objective_seconds for w, each in zip((1.0, weight), found.alone, strict=True))
    total = sum(w * each.check.seconds for w, each in zip((1.0, weight), found.solutions, strict=True))
    assert found.proof.status == "OPTIMAL"
    assert total == pytest.approx(found.proof.objective_seconds, rel=1e-9)
    assert total >= alone * (1 - 1e-9)
    for (_, a), (_, b) in shared:
        one, other = (
            s.choice.strategies[p.arguments[i]] for s, p, i in zip(found.solutions, phases, (a, b), strict=True)
        )
        assert one == other


@examples(8)
@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.floats(0.0, 1.0), SMALL)
def test_a_phase_keeps_to_its_limit(inner, hidden, part, topology):
    """Under a limit the phase is no slower than it, the sum no less than without, and the bound no more than the sum."""
    phases = [unrolled(2, False, tokens, inner, hidden) for tokens in (64, 4)]
    shared = [((0, i), (1, i)) for i in range(1, len(phases[0].arguments))]
    free = search_phases(phases, (1.0, 1.0), topology, shared)
    least, most = free.alone[1].check.seconds, free.solutions[1].check.seconds
    limit = least + part * (most - least) * 1.1 + 1e-12
    try:
        held = search_phases(phases, (1.0, 1.0), topology, shared, at_most=(1, limit))
    except TooSlow as error:
        assert error.least_seconds > limit
        return
    assert held.solutions[1].check.seconds <= limit
    total = sum(each.check.seconds for each in held.solutions)
    assert total == pytest.approx(held.proof.objective_seconds, rel=1e-9)
    assert free.proof.objective_seconds * (1 - 1e-9) <= held.proof.objective_seconds
    assert held.proof.bound_seconds <= total * (1 + 1e-9)
    with pytest.raises(TooSlow):
        search_phases(phases, (1.0, 1.0), topology, shared, at_most=(1, least * 0.99))


# --- ranking


@examples(CASES)
@given(small_programs(), st.sampled_from(MESHES), st.integers(1, 5))
def test_the_k_best_are_those_of_enumeration(program, topology, k):
    """Sorted, distinct in how matmuls are split, and the least of each kind that there is."""
    best = search(program, topology)
    enumerable(best.problem, 3e5)
    parts = _Parts(best, DEFAULTS, lambda _: None)
    found = rank(best, k)
    assert found.proven
    kinds = [kind(parts, states_of(best.problem, each.choice)) for each in found.solutions]
    assert len(set(kinds)) == len(kinds)
    wanted = sorted(least_by_kind(best.problem, parts).values())[:k]
    assert [each.check.seconds for each in found.solutions] == pytest.approx(wanted, rel=1e-9)


def kind(parts: _Parts, states: np.ndarray) -> tuple[int, ...]:
    """How each matmul that matters is split."""
    return tuple(int(parts.labels[node][states[node]]) for node in parts.nodes)


def least_by_kind(problem: Problem, parts: _Parts) -> dict[tuple[int, ...], float]:
    """By enumeration the least cost of every way to split the matmuls."""
    least: dict[tuple[int, ...], float] = {}
    for states in np.argwhere(fitting(problem) & np.isfinite(seconds := seconds_of_all(problem))):
        key, value = kind(parts, states), float(seconds[tuple(states)])
        least[key] = min(least.get(key, np.inf), value)
    return least


# --- ends


class _Interrupter:
    """Listens to a search, and interrupts it when it has said so many lines."""

    def __init__(self, lines: int) -> None:
        self.left = lines

    def __call__(self, line: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@examples(CASES)
@given(programs(), SMALL, st.floats(0.3, 0.9), st.integers(1, 12))
def test_an_interruption_keeps_the_best_plan(program, topology, part, lines):
    """What is found by then is a plan with a bound that holds; before there is any, the interruption goes on its way."""
    room = part * sum(value.bytes for value in program.values)
    limits = Limits(reserve_bytes=0.0, memory_bytes=room)
    try:
        optimum = search(program, topology, limits).proof.objective_seconds
        found = search(program, topology, limits, _Interrupter(lines))
    except (KeyboardInterrupt, NoPlan):
        return
    proof = found.proof
    assert proof.bound_seconds <= optimum * (1 + 1e-9) and optimum <= proof.objective_seconds * (1 + 1e-9)
    assert not found.check.faults and found.check.peak_bytes <= room
    assert proof.stopped in ("", "interrupted") and (proof.status == "OPTIMAL") == (proof.gap == 0.0)


@examples(CASES)
@given(programs(), SMALL)
def test_no_time_is_enough_for_a_plan(program, topology):
    """With the time limit passed already, there is a plan with a bound that holds, and the proof says why it ended."""
    optimum = search(program, topology).proof.objective_seconds
    proof = search(program, topology, Limits(wall_seconds=0.0)).proof
    assert proof.bound_seconds <= optimum * (1 + 1e-9) and optimum <= proof.objective_seconds * (1 + 1e-9)
    assert proof.stopped == ("" if proof.status == "OPTIMAL" else "time limit")


def test_renamed_states_are_states():
    """A strategy with two axes swapped is one of the space, whatever is split."""
    topology = parse_topology("cpu:2x2")
    program = unrolled(2, True, 8, 8, 8)
    problem = build(program, topology, topology.chip.usable_hbm_bytes)
    for node in problem.nodes:
        assert {rename(state, {"x": "y", "y": "x"}) for state in node.states} == set(node.states)
