"""A plan that a search begins with: what it has to beat, when a problem much like this one was solved before.

It changes neither what is found nor what is proven.
"""

from __future__ import annotations

import numpy as np

from search.answer.assignment import Choice
from search.formulation.problem import Node, Problem
from search.formulation.strategies import Strategy


def starting_states(problem: Problem, choice: Choice) -> np.ndarray | None:
    """The states that a plan stands for; `None` if the problem has not all of them."""
    found = [
        _state(node, choice.strategies[node.operation] if node.operation >= 0 else choice.hubs.get(node.value))
        for node in problem.nodes
    ]
    return None if None in found else np.array(found)


def _state(node: Node, wanted) -> int | None:
    """The state of a node; of those that differ only in what is looped, the first if it has not the very same."""
    if wanted in node.states:
        return node.states.index(wanted)
    if not isinstance(wanted, Strategy):
        return None
    return next((s for s, state in enumerate(node.states) if state[:2] == wanted[:2]), None)
