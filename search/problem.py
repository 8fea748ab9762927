"""The search problem as arrays: nodes that choose a state, edges that price pairs of states, rows that bound memory.

A node is an operation (its states are strategies) or a *hub* (the layout that a value with several uses is kept in; its
states are layouts). An edge is a change of layout between the layout one end provides and the one the other end needs,
priced by the reshard table of the value. With $x_i$ the state of node $i$, the problem is

$$\\min_x \\sum_i \\theta_i(x_i) + \\sum_{(i,j)} \\theta_{ij}(x_i, x_j) \\quad\\text{s.t.}\\quad
  \\sum_i b_{ri}(x_i) + \\sum_{(i,j)} b_{rij}(x_i, x_j) \\le M \\;\\; \\forall r,$$

one row $r$ per point of the program. Repeated regions enter as factors on the costs, so depth does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from costmodels.operations import price
from costmodels.program import Operation, Program
from costmodels.topology import Topology
from search.layouts import Layout
from search.reshard import ReshardTable, reshard_table, step_seconds
from search.strategies import Strategy, StrategySpace, strategy_space

FORBIDDEN = 1e5
"""Seconds that stand for "impossible"; finite, so that differences stay numbers."""


@dataclass(frozen=True)
class Node:
    """A choice: `cost[s]` seconds of state `s`, in one step of the program.

    `operation` is the operation's index, or -1 for the hub of `value`.
    """

    name: str
    operation: int
    value: int
    states: tuple
    cost: np.ndarray


@dataclass(frozen=True)
class Edge:
    """A change of layout from node `a` to node `b`.

    State `s` of `a` provides layout `rows[s]` of the table, state `t` of `b` needs layout `columns[t]`; the pair costs
    `weight * matrix[rows[s], columns[t]]` seconds. `use` is the consumer's operand, or -1 on the way into a hub; `table` is
    `None` for a pairing that allows no change (a donated argument and its result).
    """

    a: int
    b: int
    rows: np.ndarray
    columns: np.ndarray
    matrix: np.ndarray
    weight: float
    value: int
    use: int
    table: ReshardTable | None


@dataclass(frozen=True)
class Problem:
    """Everything the solver and the checker need."""

    program: Program
    topology: Topology
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    spaces: tuple[StrategySpace, ...]
    budget_bytes: float

    @cached_property
    def incident(self) -> tuple[tuple[int, ...], ...]:
        """Per node the edges that touch it."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for k, edge in enumerate(self.edges):
            found[edge.a].append(k)
            found[edge.b].append(k)
        return tuple(tuple(edges) for edges in found)

    @cached_property
    def operation_nodes(self) -> dict[int, int]:
        """Operation to node."""
        return {node.operation: i for i, node in enumerate(self.nodes) if node.operation >= 0}

    @cached_property
    def hub_nodes(self) -> dict[int, int]:
        """Value to its hub's node, for values with several uses."""
        return {node.value: i for i, node in enumerate(self.nodes) if node.operation < 0}

    def objective(self, states: np.ndarray) -> float:
        """Seconds of one step under a choice of states."""
        total = sum(float(node.cost[s]) for node, s in zip(self.nodes, states, strict=True))
        return total + sum(edge_seconds(edge, states) for edge in self.edges)


def edge_seconds(edge: Edge, states: np.ndarray) -> float:
    """Seconds of one edge under a choice of states."""
    return edge.weight * float(edge.matrix[edge.rows[states[edge.a]], edge.columns[states[edge.b]]])


def build(program: Program, topology: Topology, budget_bytes: float) -> Problem:
    """Turns a program and a topology into nodes and edges."""
    spaces = [strategy_space(op, tuple(topology.axis_sizes.items())) for op in program.operations]
    nodes = [_operation_node(program, topology, i, space) for i, space in enumerate(spaces)]
    builder = _Builder(program, topology, spaces, nodes)
    for value in range(len(program.values)):
        builder.connect(value)
    builder.pair_donated()
    return Problem(program, topology, tuple(builder.nodes), tuple(builder.edges), tuple(spaces), budget_bytes)


def allowing(problem: Problem, allow: Callable[[int, Strategy], bool]) -> Problem:
    """The problem with every strategy forbidden that `allow(operation, strategy)` does not allow."""

    def restricted(node: Node) -> Node:
        if node.operation < 0:
            return node
        allowed = np.array([allow(node.operation, state) for state in node.states], dtype=bool)
        return replace(node, cost=np.where(allowed, node.cost, FORBIDDEN))

    return replace(problem, nodes=tuple(restricted(node) for node in problem.nodes))


def _operation_node(program: Program, topology: Topology, i: int, space: StrategySpace) -> Node:
    op = program.operations[i]
    cost = np.zeros(len(space.strategies))
    if op.flops_per_point or op.traffic:
        cost = price(program, op, space.shards, topology.chip).seconds + inside_seconds(program, op, space, topology)
    return Node(op.name, i, -1, space.strategies, cost * program.multiplicity(op.region))


def inside_seconds(program: Program, op: Operation, space: StrategySpace, topology: Topology) -> np.ndarray:
    """Seconds of the all-reduces that run within an operation (the maximum over a split dimension)."""
    found = np.zeros(len(space.strategies))
    for s, reductions in enumerate(space.inside):
        for _, axes in reductions:
            found[s] += step_seconds("all-reduce", axes, inside_payload(program, op, space, s, topology), topology)
    return found


def inside_payload(program: Program, op: Operation, space: StrategySpace, s: int, topology: Topology) -> float:
    """Bytes of the operand of an all-reduce within an operation: its result on one chip."""
    value = program.values[op.outputs[0].value]
    pieces = 1
    for axis in space.outputs[0][s].axes:
        pieces *= topology.axis_sizes[axis]
    return value.bytes / pieces


class _Builder:
    def __init__(self, program: Program, topology: Topology, spaces: list[StrategySpace], nodes: list[Node]) -> None:
        self.program, self.topology, self.spaces = program, topology, spaces
        self.nodes, self.edges = nodes, []

    def connect(self, value: int) -> None:
        """Links a value's producer with its uses, by way of a hub where there are several."""
        uses = self.program.consumers.get(value, ())
        if value not in self.program.producers or not uses:
            return
        at, position = self.program.producers[value]
        provided = self.spaces[at].outputs[position]
        partial = any(layout.partial for layout in provided)
        array = self.program.values[value]
        table = reshard_table(array.shape, array.itemsize, self.topology, partial)
        for consumer, k in uses:
            self._forbid_unknown(consumer, self.spaces[consumer].inputs[k], table)
        if len(table.layouts) == 1:
            return
        source, layouts_of = at, provided
        if len(uses) > 1:
            source, layouts_of = self._hub(value, table), table.layouts
            self._edge(at, source, provided, layouts_of, table, array.region, value, -1)
        for consumer, k in uses:
            needed = self.spaces[consumer].inputs[k]
            region = self.program.operations[consumer].inputs[k].region
            self._edge(source, consumer, layouts_of, needed, table, region, value, k)

    def _hub(self, value: int, table: ReshardTable) -> int:
        name = self.program.values[value].name
        self.nodes.append(Node(name, -1, value, table.layouts, np.zeros(len(table.layouts))))
        return len(self.nodes) - 1

    def _forbid_unknown(self, node: int, needed: tuple[Layout, ...], table: ReshardTable) -> None:
        """Forbids the states that need a partial sum of a value that never is one."""
        unknown = np.array([layout not in table.index for layout in needed])
        if unknown.any():
            self.nodes[node] = replace(self.nodes[node], cost=np.where(unknown, FORBIDDEN, self.nodes[node].cost))

    def _edge(self, a, b, provided, needed, table: ReshardTable, region: int, value: int, use: int) -> None:
        rows = np.array([table.index[layout] for layout in provided], dtype=np.intp)
        columns = np.array([table.index.get(layout, 0) for layout in needed], dtype=np.intp)
        matrix = np.minimum(table.seconds, FORBIDDEN)
        weight = float(self.program.multiplicity(region))
        self.edges.append(Edge(a, b, rows, columns, matrix, weight, value, use, table))

    def pair_donated(self) -> None:
        """A donated argument and the result that takes its memory have one layout."""
        for argument, result in self.program.donated:
            a, b = self.program.arguments[argument], self.program.results[result]
            left, right = self.spaces[a].outputs[0], self.spaces[b].inputs[0]
            index: dict[Layout, int] = {layout: i for i, layout in enumerate(dict.fromkeys((*left, *right)))}
            rows = np.array([index[layout] for layout in left], dtype=np.intp)
            columns = np.array([index[layout] for layout in right], dtype=np.intp)
            matrix = np.where(np.eye(len(index), dtype=bool), 0.0, FORBIDDEN)
            value = self.program.operations[a].outputs[0].value
            self.edges.append(Edge(a, b, rows, columns, matrix, 1.0, value, -2, None))
