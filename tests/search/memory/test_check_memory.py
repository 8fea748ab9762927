"""The checker's memory against the solver's rows: equal on every plan, and each fault planted in the rows is found."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from costmodels.machine import Topology, parse_topology
from costmodels.program import Program
from search import Limits, NoPlan, search
from search.answer.assignment import choice_of
from search.answer.check_memory import _Account, alive_bytes
from search.formulation.problem import Problem, build
from search.memory import buffers, constraints
from tests.support.effort import examples, mostly_long
from tests.support.layout_strategies import blocks, random_states, traced_on
from tests.support.loops import NUMBERS, loops
from tests.support.models import Block, arguments, function
from tests.support.programs import MESHES, layered, programs, unrolled
from tests.support.tracing import trace

TOPOLOGIES = [*MESHES, parse_topology("v5e:2x2")]


def drawn_states(problem: Problem, seed: int) -> np.ndarray:
    """A plan drawn at random."""
    states = random_states(problem, np.random.default_rng(seed))
    assume(states is not None)
    assert states is not None
    return states


def largest_difference(program: Program, topology: Topology, states: np.ndarray) -> float:
    """By how many bytes the solver's rows exceed the checker, at most, or its fullest point the fullest row."""
    problem = build(program, topology, np.inf)
    alive = alive_bytes(program, topology, choice_of(problem, states))
    limits = constraints.rows(problem)
    held = limits.bytes(problem, states)
    over = [bytes_ - alive[row.point] for row, bytes_ in zip(limits, held, strict=True)]
    return max(*over, abs(max(alive) - max(held)), 0.0)


@examples(60)
@given(programs() | layered(), st.sampled_from(TOPOLOGIES), st.integers(0, 2**31))
def test_rows_and_checker_count_the_same(program, topology, seed):
    """Whatever the plan: no row is fuller than its point, and no point than the fullest row."""
    problem = build(program, topology, np.inf)
    assert largest_difference(program, topology, drawn_states(problem, seed)) <= 1e-6


@pytest.mark.long
@examples(25)
@given(blocks(), st.sampled_from(TOPOLOGIES), st.integers(0, 2**31))
def test_rows_and_checker_count_the_same_of_transformers(block, topology, seed):
    """With loops, views, updates in place and donated caches."""
    traced = traced_on(topology, function(block), *arguments(block))
    problem = build(traced.program, topology, np.inf)
    states = drawn_states(problem, seed)
    assert largest_difference(traced.program, topology, states) <= 1e-6


@examples(40)
@given(loops())
def test_rows_and_checker_let_arrays_of_loops_live_as_long(case):
    """Stacks that loops update in place, read, pile up and copy: who shares memory, from when to when."""
    fn, stacks, donated = case
    args = (jnp.int32(5), *NUMBERS[:stacks])
    program = trace(fn, *args, donate_argnums=tuple(donated)).program
    rows = {(each.value, each.first, each.last) for each in buffers.buffers(program)}
    assert rows == {(min(each.values), each.first, each.last) for each in _Account(program).lives()}


def test_rows_and_checker_follow_work_as_deep_as_a_model_of_many_layers():
    def layers(x, w):
        for _ in range(400):
            x = x + jnp.tanh(x)
        y = x @ w
        for _ in range(400):
            y = jnp.tanh(y)
        return y

    program = trace(layers, *(jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2))).program
    topology = parse_topology("cpu:1")
    only = np.zeros(len(build(program, topology, np.inf).nodes), dtype=int)  # one chip: each node has one state
    assert largest_difference(program, topology, only) <= 1e-6


# --- faults planted in the rows

PARTS = {
    "an array is freed after its first operation": (
        "buffers",
        lambda found: tuple(replace(b, last=b.first) for b in found),
    ),
    "arguments are not counted": ("buffers", lambda found: tuple(b for b in found if b.first > 0)),
    "what shares memory is counted once too often": ("buffers", lambda found: (*found, found[-1])),
    "loops end at once": ("region_ends", lambda ends: dict.fromkeys(ends, 0)),
    "a view is an array": ("views", lambda found: frozenset()),
    "copies die at birth": ("copy_life", lambda life: (life[0], life[0])),
    "copies take no memory": ("_copied_bytes", lambda held: 0.0 * held),
    "what is fused takes memory": ("is_inlined", lambda fused: False),
}
_OF_BUFFERS = {"region_ends", "views", "is_inlined"}
"""The parts that decide which arrays live when; the others make rows of them."""


@pytest.mark.parametrize("fault", mostly_long(PARTS, "copies die at birth"))
def test_a_fault_in_the_rows_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function that rows are made of, with a fault, differs from the checker on some plan of a decode step."""
    name, spoil = PARTS[fault]
    block = Block(decode=True, scanned=True, gated=True)
    topology = parse_topology("cpu:2x2")
    program = traced_on(topology, function(block), *arguments(block)).program
    problem = build(program, topology, np.inf)
    drawn = [random_states(problem, np.random.default_rng(seed)) for seed in range(12)]
    plans = [states for states in drawn if states is not None]
    assert plans and max(largest_difference(program, topology, states) for states in plans) <= 1e-6
    room = buffers if name in _OF_BUFFERS else constraints
    right = getattr(room, name)
    monkeypatch.setattr(room, name, lambda *args: spoil(right(*args)))
    assert max(largest_difference(program, topology, states) for states in plans) > 0


def test_a_plan_that_only_faulty_rows_let_fit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself says so: its checker finds more bytes than a chip holds."""
    program = unrolled(2, True, 8, 64, 64)
    topology = parse_topology("cpu:2x2")
    limits = Limits(reserve_bytes=0.0, memory_bytes=0.2 * sum(value.bytes for value in program.values))
    with pytest.raises(NoPlan):
        search(program, topology, limits)
    monkeypatch.setattr(constraints, "buffers", lambda program: ())
    found = search(program, topology, limits)
    assert found.check.peak_bytes > found.problem.budget_bytes
    assert any("more than" in fault for fault in found.check.faults)
