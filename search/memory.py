"""Peak memory as linear rows: at every point of the program, the bytes of what lives there.

An array lives from the operation that makes it to its last use; one that enters a loop lives until the loop ends. Arrays
that share memory (a donated argument and its result, a loop's carry, an update in place) are one buffer. What a compiler
keeps inside a fused kernel takes no memory: results of fused operations count only where an unfused operation, a loop
or the caller needs them. A change of layout holds the old and the new array at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costmodels.program import Program
from search.layouts import Layout, shards
from search.problem import Edge, Problem

IN_PLACE = (
    "dynamic_update_slice",
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
)


@dataclass(frozen=True)
class Row:
    """Bytes alive at one point: per node a vector over its states, per edge a table over the layouts of its ends."""

    point: int
    nodes: tuple[tuple[int, np.ndarray], ...]
    edges: tuple[tuple[int, np.ndarray], ...]

    def bytes(self, problem: Problem, states: np.ndarray) -> float:
        """Bytes alive under a choice of states."""
        held = sum(float(vector[states[i]]) for i, vector in self.nodes)
        return held + sum(float(table[_ends(problem.edges[k], states)]) for k, table in self.edges)


def _ends(edge: Edge, states: np.ndarray) -> tuple[int, int]:
    return int(edge.rows[states[edge.a]]), int(edge.columns[states[edge.b]])


@dataclass(frozen=True)
class Buffer:
    """Arrays that share memory: the array that stands for them, and the first and last point at which they live."""

    value: int
    members: tuple[int, ...]
    first: int
    last: int


def buffers(program: Program) -> tuple[Buffer, ...]:
    """Every buffer that takes memory, with its life."""
    groups = _Groups(program)
    last = last_uses(program)
    for i, op in enumerate(program.operations):
        if op.primitive == "loop_constant" or (op.primitive in IN_PLACE and last[op.inputs[0].value] <= i):
            groups.join(op.inputs[0].value, op.outputs[0].value)
        if op.primitive == "loop_carry":
            groups.join(op.outputs[0].value, op.outputs[1].value)
            for use in op.inputs:
                if _ends_here(program, use.value, i, last):
                    groups.join(op.outputs[0].value, use.value)
    for argument, result in program.donated:
        given, taken = program.operations[program.arguments[argument]], program.operations[program.results[result]]
        groups.join(given.outputs[0].value, taken.inputs[0].value)
    return tuple(_buffer(program, members, last) for members in groups.found() if _takes_memory(program, members))


def _ends_here(program: Program, value: int, carry: int, last: dict[int, int]) -> bool:
    """Whether nothing but the carry needs an array that enters the loop, or that a loop's round updates in place."""
    made_by = program.operations[program.producers[value][0]]
    if made_by.region == program.operations[carry].region:
        return len(program.consumers[value]) == 1
    return made_by.primitive in IN_PLACE


class _Groups:
    """Union-find over values."""

    def __init__(self, program: Program) -> None:
        self._root = list(range(len(program.values)))

    def root(self, value: int) -> int:
        while self._root[value] != value:
            value = self._root[value]
        return value

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self._root[b] = a

    def found(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for value in range(len(self._root)):
            groups.setdefault(self.root(value), []).append(value)
        return list(groups.values())


def region_ends(program: Program) -> dict[int, int]:
    """Region to its last operation, regions inside it included."""
    ends: dict[int, int] = {}
    for i, op in enumerate(program.operations):
        region = op.region
        while region >= 0:
            ends[region] = max(ends.get(region, i), i)
            region = program.regions[region].parent
    return ends


def last_uses(program: Program) -> dict[int, int]:
    """Value to the last point at which it lives: its last use, or the end of the loop that it enters."""
    ends = region_ends(program)
    last = {value: at for value, (at, _) in program.producers.items()}
    for value, uses in program.consumers.items():
        for at, _ in uses:
            last[value] = max(last[value], _until(program, at, ends))
    for op in program.operations:
        if op.op_class == "source":
            last[op.outputs[0].value] = len(program.operations) - 1
    return last


def _until(program: Program, operation: int, ends: dict[int, int]) -> int:
    """Until when an operand of this operation is needed."""
    op = program.operations[operation]
    inner = [use.region for use in op.outputs if use.region != op.region]
    if op.op_class == "boundary" and inner:
        return max(ends.get(region, operation) for region in inner)
    return operation


def _takes_memory(program: Program, members: list[int]) -> bool:
    return any(_materialised(program, value) for value in members if value in program.producers)


def _materialised(program: Program, value: int) -> bool:
    made_by = program.operations[program.producers[value][0]]
    if made_by.primitive == "loop_slice":
        return False
    if made_by.op_class != "fused":
        return True
    return any(program.operations[at].op_class != "fused" for at, _ in program.consumers.get(value, ()))


def _buffer(program: Program, members: list[int], last: dict[int, int]) -> Buffer:
    made = [value for value in members if value in program.producers]
    first = min(program.producers[value][0] for value in made)
    whole = any(program.operations[program.producers[value][0]].op_class == "source" for value in made)
    end = max(last[value] for value in made)
    return Buffer(made[0], tuple(members), 0 if whole else first, end)


def rows(problem: Problem) -> tuple[Row, ...]:
    """The rows that can bind: one per point whose live set is not part of another point's."""
    terms = [*_buffer_terms(problem), *_copy_terms(problem)]
    points = len(problem.program.operations)
    alive = [frozenset(k for k, term in enumerate(terms) if term[2] <= t <= term[3]) for t in range(points)]
    first_with = {live: t for t, live in reversed(list(enumerate(alive)))}
    maximal = [(t, live) for live, t in first_with.items() if not any(live < other for other in first_with)]
    return tuple(_row(t, [terms[k] for k in sorted(live)]) for t, live in sorted(maximal, key=lambda pair: pair[0]))


def together(limits: tuple[Row, ...]) -> Row:
    """The bytes at all points, added up: what a price on memory everywhere is paid for."""
    nodes: dict[int, np.ndarray] = {}
    edges: dict[int, np.ndarray] = {}
    for row in limits:
        for i, vector in row.nodes:
            nodes[i] = nodes.get(i, 0.0) + vector
        for k, table in row.edges:
            edges[k] = edges.get(k, 0.0) + table
    return Row(-1, tuple(nodes.items()), tuple(edges.items()))


def _row(point: int, terms: list[tuple]) -> Row:
    nodes: dict[int, np.ndarray] = {}
    edges: dict[int, np.ndarray] = {}
    for kind, index, _, _, table in terms:
        found = nodes if kind == "node" else edges
        found[index] = found[index] + table if index in found else table
    return Row(point, tuple(nodes.items()), tuple(edges.items()))


def _local_bytes(problem: Problem, value: int, found: tuple[Layout, ...]) -> np.ndarray:
    sizes, total = problem.topology.axis_sizes, problem.program.values[value].bytes
    return np.array([total / shards(layout, sizes) for layout in found])


def _buffer_terms(problem: Problem) -> list[tuple]:
    found = []
    for buffer in buffers(problem.program):
        node, layouts_of = layouts_at(problem, buffer.value)
        found.append(("node", node, buffer.first, buffer.last, _local_bytes(problem, buffer.value, layouts_of)))
    return found


def layouts_at(problem: Problem, value: int) -> tuple[int, tuple[Layout, ...]]:
    """The node that decides how a value is kept, and the layout under each of its states."""
    if value in problem.hub_nodes:
        node = problem.hub_nodes[value]
        return node, problem.nodes[node].states
    operation, position = problem.program.producers[value]
    node = problem.operation_nodes[operation]
    return node, problem.spaces[operation].outputs[position]


def _copy_terms(problem: Problem) -> list[tuple]:
    """A change of layout holds a second array: where it is made, or through the loop that it is made for."""
    found = []
    ends = region_ends(problem.program)
    for k, edge in enumerate(problem.edges):
        if edge.table is None:
            continue
        bytes_of = _local_bytes(problem, edge.value, edge.table.layouts)
        different = ~np.eye(len(bytes_of), dtype=bool)
        if edge.use < 0:
            at = problem.program.producers[edge.value][0]
            found.append(("edge", k, at, at, different * bytes_of[:, None]))
        else:
            at = problem.nodes[edge.b].operation
            life = copy_life(problem.program, edge.value, at, ends)
            found.append(("edge", k, *life, different * bytes_of[None, :]))
    return found


def copy_life(program: Program, value: int, operation: int, ends: dict[int, int]) -> tuple[int, int]:
    """The first and last point at which an operand's changed copy lives.

    Compilers start a gather early, to hide it behind the matmul before the one that needs it: so the copy lives from there,
    once its source is made, to the operation; through the whole loop if it is made for one.
    """
    region = program.operations[operation].inputs[0].region
    ahead = [i for i, op in program.matmuls() if i < operation and op.region == region]
    made = program.producers[value][0]
    first = max(ahead[-1], made) if ahead and program.operations[operation].op_class == "matmul" else operation
    return first, _until(program, operation, ends)
