"""Plans whose multi-axis dimensions have one order of mesh axes, where that costs nothing."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from costmodels.machine.topology import parse_topology
from search.answer.assignment import Choice, choice_of, states_of
from search.answer.check import check
from search.formulation.axis_renaming import rename
from search.formulation.problem import FORBIDDEN, Problem, build
from search.presolve.axis_orders import in_order
from search.solve import search
from tests.support.effort import examples
from tests.support.programs import layered, programs

TOPOLOGIES = tuple(map(parse_topology, ("v4:2x2x2", "v5e:2x4", "cpu:2x2x2", "h100:2x4")))


def orders(choice: Choice) -> set[tuple[str, ...]]:
    """The tuples of several axes that split one dimension."""
    states = [strategy.splits for strategy in choice.strategies] + [hub.dims for hub in choice.hubs.values()]
    return {axes for dims in states for axes in dims if len(axes) > 1}


def disorder(choice: Choice) -> int:
    """The dimensions that are out of order in the order of axes that has fewest of them."""
    states = [strategy.splits for strategy in choice.strategies] + [hub.dims for hub in choice.hubs.values()]
    several = [axes for dims in states for axes in dims if len(axes) > 1]
    return min(sum(list(axes) != sorted(axes, key=order.index) for axes in several) for order in permutations("xyz"))


def drawn(problem: Problem, rng: np.random.Generator) -> np.ndarray | None:
    """Random states, improved one by one to the best beside their neighbours."""
    states = np.array([rng.choice(np.flatnonzero(node.cost < FORBIDDEN / 2)) for node in problem.nodes])
    for i in rng.permutation(len(problem.nodes)):
        costs = []
        for s in range(len(problem.nodes[i].states)):
            states[i] = s
            costs.append(problem.objective(states))
        states[i] = int(np.argmin(costs))
    return states if problem.objective(states) < FORBIDDEN / 2 else None


@examples(10)
@given(layered(sizes=(8, 64)) | programs((8, 64)), st.sampled_from(TOPOLOGIES), st.integers(0, 2**16))
def test_axes_in_order_cost_nothing(program, topology, seed):
    """A plan in order costs no more, as the checker counts, too; no more dimensions are out of order."""
    problem = build(program, topology, np.inf)
    states = drawn(problem, np.random.default_rng(seed))
    if states is None:
        return
    before = choice_of(problem, states)
    after = in_order(problem, before)
    assert problem.objective(states_of(problem, after)) <= problem.objective(states) * (1 + 1e-9)
    assert disorder(after) <= disorder(before)
    found, was = check(program, topology, after), check(program, topology, before)
    assert found.seconds <= was.seconds * (1 + 1e-9)
    assert found.faults == was.faults


@examples(20)
@given(layered(sizes=(8, 64)), st.permutations("xyz"))
def test_a_plan_under_other_names_is_brought_into_the_order_of_the_mesh(program, names):
    """Interchangeable axes may have any names; the plan in order has x before y before z."""
    topology = parse_topology("v4:2x2x2")
    problem = build(program, topology, np.inf)
    found = search(program, topology, fold=False).choice
    image = dict(zip("xyz", names, strict=True))
    strategies = tuple(rename(strategy, image) for strategy in found.strategies)
    other = Choice(strategies, {value: rename(hub, image) for value, hub in found.hubs.items()})
    assert all(list(axes) == sorted(axes) for axes in orders(in_order(problem, other)))
