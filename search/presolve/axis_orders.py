"""One order of mesh axes in dimensions that several axes split, wherever the cost is the same.

`P(("x", "y"))` and `P(("y", "x"))` often cost the same. A plan with both is harder to read, and the partitioner of XLA has
to move shards from one order to the other. So a node with another order is changed to the common one, together with the
neighbours that this needs, if no node and no edge costs more. The common order is the mesh's, unless another one leaves
fewer dimensions out of order: x before y may cost more than y before x everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import permutations

import numpy as np

from search.answer.assignment import Choice, choice_of, states_of
from search.formulation.axis_renaming import rename, renamings
from search.formulation.layouts import Axes, Layout
from search.formulation.problem import Edge, Problem, edge_seconds
from search.formulation.strategies import Strategy
from search.presolve.symmetry import interchangeable

State = Strategy | Layout
States = list[int]
"""The state of each node."""
Change = Callable[[State], State]

_SAME = 1e-12
"""The part of a cost by which two sums of the same terms may differ."""


def in_order(problem: Problem, choice: Choice) -> Choice:
    """The same plan with as few dimensions as found whose axes are not in one common order."""
    states: States = states_of(problem, choice).tolist()
    used = [axis for axis, size in problem.topology.axis_sizes.items() if size > 1]
    known = _Known(problem)
    best, least = states, -1
    for order in permutations(used):
        orders = _Orders(problem, order, known)
        found = orders.tidied(states)
        left = sum(map(orders.disorder, range(len(found)), found))
        if least < 0 or left < least:
            best, least = found, left
        if not least:
            break
    return choice_of(problem, np.array(best))


class _Known:
    """Numbers of a problem that all orders need."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._index: dict[int, Mapping[State, int]] = {}
        self._seconds: dict[tuple[int, int, int], float] = {}

    def index(self, node: int) -> Mapping[State, int]:
        """The number of each state of a node."""
        if node not in self._index:
            self._index[node] = {state: s for s, state in enumerate(self.problem.nodes[node].states)}
        return self._index[node]

    def seconds(self, number: int, edge: Edge, states: States) -> float:
        """Seconds of the edge of a number under a choice of states."""
        key = (number, states[edge.a], states[edge.b])
        if key not in self._seconds:
            self._seconds[key] = edge_seconds(edge, states)
        return self._seconds[key]


class _Orders:
    """Changes of a plan's axes to one order, node by node."""

    def __init__(self, problem: Problem, order: Sequence[str], known: _Known) -> None:
        self.problem, self.known = problem, known
        self.place = {axis: order.index(axis) if axis in order else -1 for axis in problem.topology.axis_sizes}
        self.counted: dict[tuple[int, int], int] = {}
        self.images: dict[tuple[int, int, Change], int | None] = {}

    def tidied(self, states: States) -> States:
        """The states after all changes that cost nothing."""
        for node in self.by_weight(states):
            if self.disorder(node, states[node]):
                states = self.improved(states, node)
        return states

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Sorting of every dimension's axes, then the renamings of interchangeable axes."""
        names = renamings(interchangeable(self.problem))[1:]
        return (self._sorted, *(_renaming(each) for each in names))

    def _sorted(self, state: State) -> State:
        def alike(dims: Sequence[Axes]) -> tuple[Axes, ...]:
            return tuple(tuple(sorted(axes, key=self.place.__getitem__)) for axes in dims)

        if isinstance(state, Layout):
            return state._replace(dims=alike(state.dims))
        return state._replace(splits=alike(state.splits))

    def by_weight(self, states: States) -> list[int]:
        """The nodes in whose states some axes are out of order, arguments and results first."""
        operations = self.problem.program.operations
        nodes = self.problem.nodes
        found = [i for i in range(len(nodes)) if self.disorder(i, states[i])]
        return sorted(found, key=lambda i: nodes[i].is_hub or operations[nodes[i].of].op_class not in ENDS)

    def disorder(self, node: int, state: int) -> int:
        """The number of dimensions of a state whose axes are not in the order."""
        if (node, state) not in self.counted:
            chosen = self.problem.nodes[node].states[state]
            dims = chosen.dims if isinstance(chosen, Layout) else chosen.splits
            places = ([self.place[axis] for axis in axes] for axes in dims)
            self.counted[node, state] = sum(each != sorted(each) for each in places)
        return self.counted[node, state]

    def improved(self, states: States, node: int) -> States:
        """The states after the change of a node that leaves the fewest dimensions out of order; as they are if none does."""
        found = (self._changed(states, node, change) for change in self.changes)
        better = [(self._total(new, states), new) for new in found if new is not None]
        least = min(better, key=lambda pair: pair[0], default=(0, states))
        return least[1] if least[0] < 0 else states

    def _total(self, new: States, old: States) -> int:
        """The dimensions out of order, more than before."""
        changed = [i for i, (one, other) in enumerate(zip(new, old, strict=True)) if one != other]
        return sum(self.disorder(i, new[i]) - self.disorder(i, old[i]) for i in changed)

    def _changed(self, states: States, node: int, change: Change) -> States | None:
        """The states with a change of one node and of the neighbours that would otherwise cost more; None if it costs more."""
        new, changed, waiting = states.copy(), {node}, [node]
        while waiting:
            i = waiting.pop()
            if (image := self._image(i, states[i], change)) is None:
                return None
            new[i] = image
            for other in self._costlier(i, new, states):
                if other not in changed:
                    changed.add(other)
                    waiting.append(other)
        whole = {i for each in changed for i in self._costlier(each, new, states)}
        return None if whole else new

    def _costlier(self, node: int, new: States, old: States) -> Iterator[int]:
        """The neighbours of a node whose edge with it costs more than before."""
        for k in self.problem.incident[node]:
            edge = self.problem.edges[k]
            if self.known.seconds(k, edge, new) > self.known.seconds(k, edge, old) * (1 + _SAME):
                yield edge.b if edge.a == node else edge.a

    def _image(self, node: int, state: int, change: Change) -> int | None:
        """The state that a change makes of a node's state; None if there is none, or if it costs more."""
        if (node, state, change) not in self.images:
            found = self.known.index(node).get(change(self.problem.nodes[node].states[state]))
            cost = self.problem.nodes[node].cost
            self.images[node, state, change] = (
                None if found is None or cost[found] > cost[state] * (1 + _SAME) else found
            )
        return self.images[node, state, change]


ENDS = ("source", "sink")


def _renaming(names: Mapping[str, str]) -> Change:
    return lambda state: rename(state, names)
