"""One order of mesh axes in dimensions that several axes split, wherever the cost is the same.

`P(("x", "y"))` and `P(("y", "x"))` often cost the same. A plan with both is harder to read, and the partitioner of XLA has
to move shards from one order to the other. So a node with another order is changed to the common one, together with the
neighbours that this needs, if no node and no edge costs more. The common order is the mesh's, unless another one leaves
fewer dimensions out of order: x before y may cost more than y before x everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    def is_costlier(self, number: int, edge: Edge, new: tuple[int, int], old: tuple[int, int]) -> bool:
        """Whether the edge of a number costs more with new states of its ends than with the old ones."""
        return self._at(number, edge, new) > self._at(number, edge, old) * (1 + _SAME)

    def _at(self, number: int, edge: Edge, ends: tuple[int, int]) -> float:
        key = (number, *ends)
        if key not in self._seconds:
            self._seconds[key] = edge_seconds(edge, {edge.a: ends[0], edge.b: ends[1]})
        return self._seconds[key]


class _Orders:
    """Changes of a plan's axes to one order, node by node."""

    def __init__(self, problem: Problem, order: Sequence[str], known: _Known) -> None:
        self.problem, self.known = problem, known
        self.place = {axis: order.index(axis) if axis in order else -1 for axis in problem.topology.axis_sizes}
        self.counted: dict[tuple[int, int], int] = {}
        self.images: dict[tuple[int, int, Change], int | None] = {}
        self._moves: list[_Move] | None = None

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
        if self._moves is None or self._moves[0].states is not states:
            self._moves = [_Move(self, states, change) for change in self.changes]
        closures = [(move, move.closure(node)) for move in self._moves]
        move, changed = min(closures, key=lambda pair: pair[0].disorder(pair[1]))
        return move.applied(changed) if move.disorder(changed) < 0 else states

    def image(self, node: int, state: int, change: Change) -> int | None:
        """The state that a change makes of a node's state; None if there is none, or if it costs more."""
        if (node, state, change) not in self.images:
            found = self.known.index(node).get(change(self.problem.nodes[node].states[state]))
            cost = self.problem.nodes[node].cost
            self.images[node, state, change] = (
                None if found is None or cost[found] > cost[state] * (1 + _SAME) else found
            )
        return self.images[node, state, change]


class _Move:
    """One change of any of the states: a node takes the neighbours along whose edge with it would otherwise cost more."""

    def __init__(self, orders: _Orders, states: States, change: Change) -> None:
        self.orders, self.states, self.change = orders, states, change
        self.problem, self.known = orders.problem, orders.known
        self._followers: dict[int, list[int]] = {}
        self._closures: dict[int, frozenset[int]] = {}
        self._disorder: dict[frozenset[int], float] = {}

    def closure(self, node: int) -> frozenset[int]:
        """The nodes that change with a node, up to one that cannot."""
        changed, waiting = {node}, [node]
        while waiting and self._image(waiting[-1]) is not None:
            i = waiting.pop()
            changed.update(self._closures.get(i, ()))
            new = [other for other in self._following(i) if other not in changed]
            changed.update(new)
            waiting += new
        self._closures[node] = frozenset(changed)
        return self._closures[node]

    def disorder(self, changed: frozenset[int]) -> float:
        """The dimensions out of order, more than before; infinite if a node cannot change, or if an edge then costs more."""
        if changed not in self._disorder:
            self._disorder[changed] = np.inf
            edges = {k for i in changed for k in self.problem.incident[i]}
            if None not in map(self._image, changed) and all(self._is_kept(k, changed) for k in edges):
                old, new = self.states, self.applied(changed)
                count = self.orders.disorder
                self._disorder[changed] = sum(count(i, new[i]) - count(i, old[i]) for i in changed)
        return self._disorder[changed]

    def applied(self, changed: frozenset[int]) -> States:
        """The states after the change of these nodes."""
        return [
            image if i in changed and (image := self._image(i)) is not None else s for i, s in enumerate(self.states)
        ]

    def _image(self, node: int) -> int | None:
        return self.orders.image(node, self.states[node], self.change)

    def _following(self, node: int) -> list[int]:
        """The neighbours whose edge with a node costs more if it changes alone."""
        if node not in self._followers:
            self._followers[node] = [
                edge.b if edge.a == node else edge.a
                for k in self.problem.incident[node]
                if self._costs_more(k, edge := self.problem.edges[k], edge.a == node, edge.b == node)
            ]
        return self._followers[node]

    def _is_kept(self, k: int, changed: frozenset[int]) -> bool:
        """Whether an edge costs no more; with one end that changes it does not, or the other would change, too."""
        edge = self.problem.edges[k]
        return edge.a not in changed or edge.b not in changed or not self._costs_more(k, edge, True, True)

    def _costs_more(self, k: int, edge: Edge, changes_a: bool, changes_b: bool) -> bool:
        old = (self.states[edge.a], self.states[edge.b])
        a, b = self._image(edge.a) if changes_a else old[0], self._image(edge.b) if changes_b else old[1]
        return a is not None and b is not None and self.known.is_costlier(k, edge, (a, b), old)


ENDS = ("source", "sink")


def _renaming(names: Mapping[str, str]) -> Change:
    return lambda state: rename(state, names)
