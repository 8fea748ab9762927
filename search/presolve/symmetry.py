"""Interchangeable mesh axes: one representative suffices of a choice and its images under renaming.

If axes have equal size and links, renaming them turns every solution into another of the same cost and memory. One
node may therefore be fixed to one representative of each orbit of its states without losing an optimum.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search.answer.assignment import Choice
from search.formulation.axis_renaming import rename, renamings
from search.formulation.problem import FORBIDDEN, Problem


def interchangeable(problem: Problem) -> list[tuple[str, ...]]:
    """Groups of axes that neither the topology nor a pin distinguishes."""
    pinned = {axis for op in problem.program.operations for axes in op.pinned or () for axis in axes or ()}
    groups = (tuple(axis for axis in group if axis not in pinned) for group in problem.topology.symmetries())
    return [group for group in groups if len(group) > 1]


def axis_classes(problem: Problem) -> dict[str, int]:
    """Axis to a number that interchangeable axes share."""
    names = list(problem.topology.axis_sizes)
    first = {axis: group[0] for group in interchangeable(problem) for axis in group}
    return {axis: names.index(first.get(axis, axis)) for axis in names}


def representatives(problem: Problem) -> tuple[int, np.ndarray] | None:
    """The node to fix, and the states that it may keep; `None` when no axes are interchangeable.

    The node chosen is the one with the most costly surroundings: an orbit fixed there breaks most ties.
    """
    groups = interchangeable(problem)
    if not groups or not problem.nodes:
        return None
    weights = [surroundings(problem, i) for i in range(len(problem.nodes))]
    node = int(np.argmax(weights))
    states = problem.nodes[node].states
    index = {state: s for s, state in enumerate(states)}
    names = renamings(groups)
    least = [min(index.get(rename(state, image), s) for image in names) for s, state in enumerate(states)]
    return node, np.flatnonzero(np.array(least) == np.arange(len(states)))


def possible_states(problem: Problem, symmetric: bool) -> list[np.ndarray]:
    """Per node the states that are not forbidden, or all if every one is, which the search then reports.

    If the problem is `symmetric`, one node keeps one of each orbit.
    """
    keep = [np.flatnonzero(node.cost < FORBIDDEN / 2) for node in problem.nodes]
    keep = [some if len(some) else np.arange(len(node.states)) for some, node in zip(keep, problem.nodes, strict=True)]
    held = representatives(problem) if symmetric else None
    if held is not None:
        node, kept = held
        keep[node] = np.intersect1d(keep[node], kept)
    return keep


def canonicalise_axes(problem: Problem, choice: Choice) -> Choice:
    """The same plan with interchangeable axes renamed so that the largest arrays use them in order, x before y.

    Renaming changes no cost; it makes plans easier to read and to compare.
    """
    program = problem.program
    largest = sorted(choice.hubs, key=lambda value: -program.values[value].bytes)
    sources = sorted(program.arguments, key=lambda i: -program.values[program.operations[i].outputs[0].value].bytes)

    def order(names: Mapping[str, str]) -> tuple:
        held = [rename(choice.strategies[i], names)[0] for i in sources]
        return (*held, *(rename(choice.hubs[value], names)[0] for value in largest))

    names = min(renamings(interchangeable(problem)), key=order)
    strategies = tuple(rename(strategy, names) for strategy in choice.strategies)
    return Choice(strategies, {value: rename(layout, names) for value, layout in choice.hubs.items()})


def surroundings(problem: Problem, i: int) -> float:
    """Bytes that may be resharded around a node in one step."""
    return sum(problem.edges[k].moved_bytes for k in problem.incident[i])
