"""The search problem as arrays: nodes that choose a state, edges that price pairs of states, rows that bound memory.

A node is a class of operations with one choice (its states are strategies) or a class of *hubs* (its states are the
layouts in which values with several uses are kept). An edge is a reshard from the layout that one end provides to the
layout that the other end needs, priced by the reshard table of the value. With $x_i$ the state of node $i$, the
problem is

$$\\min_x \\sum_i \\theta_i(x_i) + \\sum_{(i,j)} \\theta_{ij}(x_i, x_j) \\quad\\text{s.t.}\\quad
  \\sum_i b_{ri}(x_i) + \\sum_{(i,j)} b_{rij}(x_i, x_j) \\le M \\;\\; \\forall r,$$

one row $r$ per point of the program. Repeated regions enter as factors on the costs, and the copies of a class as
sums, so depth does not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.operations import cost_key, is_free
from costmodels.program.asynchronous import is_deferred, is_lender, lenders
from costmodels.program.program import CLOSED_INSIDE, Operation, Pinned, Program
from search.formulation.all_pairs import FORBIDDEN as FORBIDDEN
from search.formulation.layer_folding import identity_classes
from search.formulation.layouts import Layout
from search.formulation.overlap import Hiding, group_layouts, hidden_beside, hidden_seconds, ring_seconds_saved
from search.formulation.reshard import ReshardTable, reshard_table
from search.formulation.rings import are_rings, may_ring, work_columns
from search.formulation.strategies import LoopedSide, Strategy, StrategySpace, strategy_space
from search.formulation.strategy_costs import hiding_seconds, product_seconds, strategy_seconds

Slot = tuple[int, int | None]
"""A node and the index of its result or operand; `None` for the layout of a hub."""


@dataclass(frozen=True)
class Node:
    """A choice: `cost[s]` seconds of state `s`, in one step of the program.

    `of` is the first operation of the class; for a hub it is the first value of a class of values.
    """

    name: str
    of: int
    is_hub: bool
    states: tuple
    cost: np.ndarray


@dataclass(frozen=True)
class Edge:
    """A reshard from node `a` to node `b`.

    State `s` of `a` provides layout `rows[s]` of the table, state `t` of `b` needs layout `columns[t]`; the pair costs
    `weight * matrix[rows[s], columns[t]]` seconds. `members` are the reshards that it stands for, each a value and the
    consumer's operation (`None` on the way into a hub). `table` is `None` for a pair of values with one layout (a donated
    argument and its result). If `a` is `b`, a class feeds its own next copy, and the cost is part of the node's.
    `moved_bytes` are the bytes, of whole arrays, that may be resharded here in one step. If a product hides a part of
    its collectives, states with one layout but different times to hide behind differ: `layouts` are then the layouts
    of the rows and columns.
    """

    a: int
    b: int
    rows: np.ndarray
    columns: np.ndarray
    matrix: np.ndarray
    weight: float
    members: tuple[tuple[int, int | None], ...]
    table: ReshardTable | None
    moved_bytes: float = 0.0
    layouts: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def value(self) -> int:
        """The resharded value; the first of several."""
        return self.members[0][0]


@dataclass(frozen=True)
class Problem:
    """The input of the solver and the checker.

    `of_operation` and `of_hub` give the node that decides for an operation and for a value with several uses; `loops`
    the edges of a node with itself.
    """

    program: Program
    topology: Topology
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    loops: tuple[Edge, ...]
    spaces: tuple[StrategySpace, ...]
    of_operation: tuple[int, ...]
    of_hub: dict[int, int]
    budget_bytes: float

    @cached_property
    def incident(self) -> tuple[tuple[int, ...], ...]:
        """Per node the edges that touch it."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for k, edge in enumerate(self.edges):
            found[edge.a].append(k)
            found[edge.b].append(k)
        return tuple(tuple(edges) for edges in found)

    def around(self, nodes: Collection[int]) -> set[int]:
        """Nodes and their neighbours."""
        edges = [self.edges[k] for i in nodes for k in self.incident[i]]
        return {*nodes, *(edge.a for edge in edges), *(edge.b for edge in edges)}

    def ends(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per edge the row and the column of its table under a choice of states."""
        (a, row_start, rows), (b, column_start, columns) = self._packed_ends
        return rows[row_start + states[a]], columns[column_start + states[b]]

    @cached_property
    def _packed_ends(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
        """For rows and columns: each edge's node, the start of its states among those of all edges, and those."""
        none = [np.zeros(0, dtype=np.intp)]
        sides = ([(e.a, e.rows) for e in self.edges], [(e.b, e.columns) for e in self.edges])
        return tuple(
            (
                np.array([node for node, _ in side], dtype=np.intp),
                np.cumsum([0, *(len(places) for _, places in side)], dtype=np.intp)[:-1],
                np.concatenate([places for _, places in side] or none),
            )
            for side in sides
        )

    def space(self, operation: int) -> StrategySpace:
        """The strategies of an operation, in the order of its node's states."""
        return self.spaces[self.of_operation[operation]]

    def objective(self, states: np.ndarray) -> float:
        """Seconds of one step under a choice of states."""
        total = sum(float(node.cost[s]) for node, s in zip(self.nodes, states, strict=True))
        return total + sum(edge_seconds(edge, states) for edge in self.edges)


def edge_seconds(edge: Edge, states: Sequence[int] | Mapping[int, int] | np.ndarray) -> float:
    """Seconds of one edge under a choice of states."""
    return edge.weight * float(edge.matrix[edge.rows[states[edge.a]], edge.columns[states[edge.b]]])


def build(program: Program, topology: Topology, budget_bytes: float, classes: Sequence[int] | None = None) -> Problem:
    """Turns a program and a topology into nodes and edges.

    **Arguments:**

    - `classes`: per operation the first operation of its class (`search.formulation.layer_folding.classes`);
      operations of a class take one strategy. By default each operation is its own.
    """
    builder = _Builder(program, topology, identity_classes(program) if classes is None else classes)
    for value in range(len(program.values)):
        builder.connect(value)
    builder.pair_donated()
    builder.hand_over()
    return builder.build(budget_bytes)


def forbid_strategies(problem: Problem, allow: Callable[[int, Strategy], bool]) -> Problem:
    """The problem with every strategy forbidden for which `allow(operation, strategy)` is false."""

    def restrict(node: Node) -> Node:
        if node.is_hub:
            return node
        allowed = np.array([allow(node.of, state) for state in node.states], dtype=bool)
        return replace(node, cost=np.where(allowed, node.cost, FORBIDDEN))

    return replace(problem, nodes=tuple(restrict(node) for node in problem.nodes))


def _obeys(layout: Layout, pinned: Pinned) -> bool:
    """Whether a layout is the user's pinned one."""
    same = all(axes is None or dim == axes for dim, axes in zip(layout.dims, pinned, strict=True))
    return same and not layout.partial


@dataclass
class _Draft:
    """An edge under construction."""

    a: int
    b: int
    rows: np.ndarray
    columns: np.ndarray
    matrix: np.ndarray
    table: ReshardTable | None
    weight: float
    members: list[tuple[int, int | None]]
    layouts: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def moved_bytes(self) -> float:
        return self.weight * self.table.array_bytes if self.table else 0.0


class _Builder:
    """Nodes by class, then edges by value; edges that price the same pair by the same table are one."""

    def __init__(self, program: Program, topology: Topology, classes: Sequence[int]) -> None:
        self.program, self.topology = program, topology
        self.sizes = tuple(topology.axis_sizes.items())
        self.nodes: list[Node] = []
        self.spaces: list[StrategySpace] = []
        self.of_hub: dict[int, int] = {}
        self._hubs: dict[tuple[int, int], int] = {}
        self._partial: dict[tuple[int, int], bool] = {}
        self._drafts: dict[tuple, _Draft] = {}
        self._index: dict[tuple, np.ndarray] = {}
        self._work: dict[tuple, np.ndarray] = {}
        node_of = {first: self._node(first) for first in dict.fromkeys(classes)}
        self.of_operation = tuple(node_of[first] for first in classes)
        self._price_nodes()

    def _node(self, i: int) -> int:
        op = self.program.operations[i]
        space = strategy_space(op, self.sizes, self.topology.pricing.looped)
        self.spaces.append(space)
        cost = np.zeros(len(space.strategies))
        if op.pinned is not None:
            allowed = [_obeys(layout, op.pinned) for layout in space.outputs[0]]
            cost = np.where(allowed, 0.0, FORBIDDEN)
        self.nodes.append(Node(op.name, i, False, space.strategies, cost))
        return len(self.nodes) - 1

    def _price_nodes(self) -> None:
        """Seconds of the operations of each class, all together; copies may differ in their reads from memory."""
        runs: dict[tuple, float] = {}
        first: dict[tuple, Operation] = {}
        for node, op in zip(self.of_operation, self.program.operations, strict=True):
            if not is_free(self.program, op) or any(factor.kind in CLOSED_INSIDE for factor in op.factors):
                key = (node, cost_key(self.program, op))
                runs[key] = runs.get(key, 0.0) + self.program.multiplicity(op.region)
                first.setdefault(key, op)
        for key, op in first.items():
            node, space = self.nodes[key[0]], self.spaces[key[0]]
            cost = strategy_seconds(self.program, op, space, self.topology)
            self.nodes[key[0]] = replace(node, cost=node.cost + runs[key] * cost)

    def connect(self, value: int) -> None:
        """Links a value's producer with its uses, through a hub if there are several."""
        uses = self.program.consumers.get(value, ())
        if value not in self.program.producers or not uses:
            return
        at, position = self.program.producers[value]
        source = self.of_operation[at]
        provided = self.spaces[source].outputs[position]
        array = self.program.values[value]
        table = self._table(value, source, position)
        for consumer, k in uses:
            self._forbid_unknown(self.of_operation[consumer], k, table)
        if len(table.layouts) == 1:
            return
        slot: Slot = (source, position)
        made: int | None = at
        if len(uses) > 1:
            hub = self._hub(value, source, position, table)
            behind = (self._hiding_groups(at, "result", array.region), None)
            self._edge(slot, provided, (hub, None), table.layouts, table, array.region, (value, None), behind)
            slot, provided, made = (hub, None), table.layouts, None
        for consumer, k in uses:
            node = self.of_operation[consumer]
            region = self.program.operations[consumer].inputs[k].region
            behind = (self._hiding_groups(made, "result", region), self._hiding_groups(consumer, k, region))
            self._edge(slot, provided, (node, k), self.spaces[node].inputs[k], table, region, (value, consumer), behind)

    def _table(self, value: int, source: int, position: int) -> ReshardTable:
        """The reshards of a value: with partial sums if a possible strategy of its class makes one."""
        array = self.program.values[value]
        if (source, position) not in self._partial:
            possible = self.nodes[source].cost < FORBIDDEN / 2
            provided = compress(self.spaces[source].outputs[position], possible)
            self._partial[source, position] = any(layout.partial for layout in provided)
        return reshard_table(array.shape, array.itemsize, self.topology, self._partial[source, position])

    def _hub(self, value: int, source: int, position: int, table: ReshardTable) -> int:
        """The node that decides a value's layout: one for all copies of it."""
        if (source, position) not in self._hubs:
            name = self.program.values[value].name
            self._hubs[source, position] = len(self.nodes)
            self.nodes.append(Node(name, value, True, table.layouts, np.zeros(len(table.layouts))))
        self.of_hub[value] = self._hubs[source, position]
        return self.of_hub[value]

    def _forbid_unknown(self, node: int, operand: int, table: ReshardTable) -> None:
        """Forbids the states that need a partial sum of a value that never is one."""
        key = (node, operand, table.key, "unknown")
        if key in self._index:
            return
        unknown = np.array([layout not in table.index for layout in self.spaces[node].inputs[operand]])
        self._index[key] = unknown
        if unknown.any():
            self.nodes[node] = replace(self.nodes[node], cost=np.where(unknown, FORBIDDEN, self.nodes[node].cost))

    def _hiding_groups(self, operation: int | None, which: LoopedSide, region: int) -> Hiding | None:
        """The product that the reshard of an operand or the result can hide behind, if it runs as often."""
        pricing = self.topology.pricing
        if operation is None or not pricing.hides:
            return None
        op = self.program.operations[operation]
        if op.op_class != "matmul" or op.region != region:
            return None
        if pricing.asynchronous:
            return self._beside(operation, which)
        return self._looped(operation, which) if may_ring(op) else None

    def _looped(self, operation: int, which: LoopedSide) -> Hiding:
        """The time of a product that is looped with the reshard of an operand or the result."""
        op, node = self.program.operations[operation], self.of_operation[operation]
        space, rings = self.spaces[node], are_rings(self.topology.pricing)
        key = (node, cost_key(self.program, op), which if rings else None)
        if key not in self._work:
            if rings:
                self._work[key] = work_columns(self.program, op, which, space.shards, self.topology)
            else:
                self._work[key] = product_seconds(self.program, op, space.shards, self.topology)
        chosen = np.array([state.looped == which for state in space.strategies])
        work = self._work[key]
        return Hiding((key, which), np.where(chosen[:, None] if work.ndim > 1 else chosen, work, 0.0))

    def _beside(self, operation: int, which: LoopedSide) -> Hiding:
        """The time of a product that hides an asynchronous reshard."""
        op, node = self.program.operations[operation], self.of_operation[operation]
        space = self.spaces[node]
        lent = is_lender(self.program, operation), *(self.of_operation[i] for i in lenders(self.program, operation))
        key = (node, cost_key(self.program, op), is_deferred(self.program, operation), lent, which)
        if key not in self._work:
            partial = np.array([bool(layout.partial) for layout in space.outputs[0]], dtype=bool)
            self._work[key] = hiding_seconds(self.program, operation, which, space.shards, partial, self.topology)
        return Hiding(key, self._work[key])

    def _edge(
        self,
        source: Slot,
        provided: Sequence[Layout],
        target: Slot,
        needed: Sequence[Layout],
        table: ReshardTable,
        region: int,
        member: tuple[int, int | None],
        behind: tuple[Hiding | None, Hiding | None] = (None, None),
    ) -> None:
        """Adds one reshard; `source` and `target` are a node and the index of its result or operand."""
        weight = float(self.program.multiplicity(region))
        key = (source, target, table.key, *(each and each.key for each in behind))
        if key in self._drafts:
            self._drafts[key].weight += weight
            self._drafts[key].members.append(member)
            return
        rows, columns = self._places((*source, "out"), provided, table), self._places((*target, "in"), needed, table)
        matrix, layouts_of = table.seconds, None
        if any(behind):
            before, rows = group_layouts(rows, behind[0])
            after, columns = group_layouts(columns, behind[1])
            layouts_of = (before.layouts, after.layouts)
            matrix = matrix[np.ix_(*layouts_of)]
            if self.topology.pricing.asynchronous:
                matrix = matrix - hidden_beside(matrix, before, after)
            elif table.loops is not None and table.loops.rings is not None:
                matrix = matrix - ring_seconds_saved(table.loops.rings, table.ends, before, after)
            else:
                matrix = matrix - hidden_seconds(table.ends, before, after)
        self._drafts[key] = _Draft(source[0], target[0], rows, columns, matrix, table, weight, [member], layouts_of)

    def _places(self, slot: tuple, layouts_of: Sequence[Layout], table: ReshardTable) -> np.ndarray:
        """The index of each state's layout in a table; 0 for layouts that the table lacks."""
        key = (slot, table.key)
        if key not in self._index:
            self._index[key] = np.array([table.index.get(layout, 0) for layout in layouts_of], dtype=np.intp)
        return self._index[key]

    def pair_donated(self) -> None:
        """A donated argument and the result that takes its memory have one layout."""
        for argument, result in self.program.donated:
            at, sink = self.program.arguments[argument], self.program.results[result]
            a, b = self.of_operation[at], self.of_operation[sink]
            member = (self.program.operations[at].outputs[0].value, None)
            if ("donated", a, b) in self._drafts:
                self._drafts["donated", a, b].members.append(member)
                continue
            left, right = self.spaces[a].outputs[0], self.spaces[b].inputs[0]
            index: dict[Layout, int] = {layout: i for i, layout in enumerate(dict.fromkeys((*left, *right)))}
            rows = np.array([index[layout] for layout in left], dtype=np.intp)
            columns = np.array([index[layout] for layout in right], dtype=np.intp)
            matrix = np.where(np.eye(len(index), dtype=bool), 0.0, FORBIDDEN)
            self._drafts["donated", a, b] = _Draft(a, b, rows, columns, matrix, None, 1.0, [member])

    def hand_over(self) -> None:
        """Adds the reshards of results that other phases take as arguments."""
        for result, argument in self.program.handoffs:
            sink, at = self.program.results[result], self.program.arguments[argument]
            a, b = self.of_operation[sink], self.of_operation[at]
            value = self.program.operations[sink].inputs[0].value
            array = self.program.values[value]
            table = reshard_table(array.shape, array.itemsize, self.topology, False)
            provided, needed = self.spaces[a].inputs[0], self.spaces[b].outputs[0]
            unknown = np.array([layout not in table.index for layout in needed])
            self.nodes[b] = replace(self.nodes[b], cost=np.where(unknown, FORBIDDEN, self.nodes[b].cost))
            region = self.program.operations[sink].inputs[0].region
            self._edge((a, 0), provided, (b, 0), needed, table, region, (value, sink))

    def build(self, budget_bytes: float) -> Problem:
        """The problem; a node's reshards to itself are added to its own cost."""
        edges = [
            Edge(d.a, d.b, d.rows, d.columns, d.matrix, d.weight, tuple(d.members), d.table, d.moved_bytes, d.layouts)
            for d in self._drafts.values()
        ]
        loops = tuple(edge for edge in edges if edge.a == edge.b)
        for edge in loops:
            node = self.nodes[edge.a]
            own = np.minimum(node.cost + edge.weight * edge.matrix[edge.rows, edge.columns], FORBIDDEN)
            self.nodes[edge.a] = replace(node, cost=own)
        return Problem(
            self.program,
            self.topology,
            tuple(self.nodes),
            tuple(edge for edge in edges if edge.a != edge.b),
            loops,
            tuple(self.spaces),
            self.of_operation,
            self.of_hub,
            budget_bytes,
        )
