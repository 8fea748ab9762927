"""A warm start: a plan of a similar problem that the search must beat.

It changes neither the result nor the proof.
"""

from __future__ import annotations

import numpy as np

from search.answer.assignment import Choice
from search.formulation.problem import Node, Problem
from search.formulation.strategies import Strategy


def starting_states(problem: Problem, choice: Choice) -> np.ndarray | None:
    """The states of a plan; `None` if the problem lacks one of them."""
    found = [
        _state(node, choice.hubs.get(node.of) if node.is_hub else choice.strategies[node.of]) for node in problem.nodes
    ]
    return None if None in found else np.array(found)


def _state(node: Node, wanted) -> int | None:
    """The state of a node; of those that differ only in the looped collective, the first if the exact one is missing."""
    if wanted in node.states:
        return node.states.index(wanted)
    if not isinstance(wanted, Strategy):
        return None
    return next((s for s, state in enumerate(node.states) if state[:2] == wanted[:2]), None)
