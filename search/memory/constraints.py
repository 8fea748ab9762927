"""Peak memory as linear rows: at every point of the program, the bytes of what lives there.

The buffers and their lives are those of `search.memory.buffers`. Results are allocated before the program begins
(`search.memory.results_first`). A reshard holds the old and the new array at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import chain
from operator import add
from typing import Any, NamedTuple, TypeVar

import numpy as np

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Program
from search.formulation.layouts import Layout, shards
from search.formulation.problem import Problem, Slot
from search.formulation.reshard import ReshardTable, TableKey
from search.memory.buffers import Buffer, buffers, copy_life, region_ends
from search.memory.chain_buffers import chain_buffer_bytes, chains
from search.memory.conversions import conversions
from search.memory.fused_products import absorbed
from search.memory.order_copies import (
    copied_bytes,
    padded_bytes,
    resliced_bytes,
    sliced_stacks,
    stack_copies,
    stacks_of_loops,
)
from search.memory.reshard_buffers import Copies
from search.memory.results_first import is_given, is_result, results_first
from search.memory.softmax_copies import score_maxima, second_array_bytes
from search.memory.tpu_temporaries import joined_operands, operations_with_temporaries, temporary_bytes

T = TypeVar("T", np.ndarray, Copies)


class NodeBytes(NamedTuple):
    """Bytes of one node, for each of its states; equal to itself only, as parts of several rows are one object."""

    node: int
    bytes: np.ndarray

    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Row:
    """Bytes alive at one point: per node those of its states, per edge those of its reshard buffers."""

    point: int
    nodes: tuple[NodeBytes, ...]
    edges: tuple[tuple[int, Copies], ...]

    def bytes(self, problem: Problem, states: np.ndarray) -> float:
        """Bytes alive under a choice of states."""
        return float(Rows([self]).bytes(problem, states)[0])


class Rows(tuple[Row, ...]):
    """Rows that are summed together: most values at one point live at others, too, and are looked up once for all."""

    def bytes(self, problem: Problem, states: np.ndarray) -> np.ndarray:
        """Per row the bytes alive under a choice of states."""
        nodes, edges, found, start = self._ledger
        at, to = (places.tolist() for places in problem.ends(states))
        held = [vector[states[i]] for i, vector in nodes] + [table.at(at[k], to[k]) for k, table in edges]
        return np.add.reduceat(np.array([*held, 0.0])[found], start)

    @cached_property
    def _ledger(self) -> tuple[list[NodeBytes], list[tuple[int, Copies]], np.ndarray, np.ndarray]:
        """The nodes and edges of all rows, the indices of each row's terms among them, and each row's start.

        Each row's indices end with that of a 0.
        """
        nodes = list(dict.fromkeys(item for row in self for item in row.nodes))
        edges = list(dict.fromkeys(item for row in self for item in row.edges))
        place = {item: at for at, item in enumerate((*nodes, *edges))}
        items = [[*(place[item] for item in (*row.nodes, *row.edges)), len(place)] for row in self]
        start = np.cumsum([0, *map(len, items)], dtype=np.intp)[:-1]
        found = np.array([item for row in items for item in row], dtype=np.intp)
        return nodes, edges, found, start


@dataclass(frozen=True)
class _Term:
    """Bytes of one node (an array over its states) or edge (`Copies`) over some points.

    Equal terms, of which a class has many, have one `key`.
    """

    key: tuple
    kind: str
    index: int
    first: int
    last: int
    table: Any


@cached_analysis
def rows(problem: Problem) -> Rows:
    """The rows that can bind: the points at which the live values are not a subset of those at another point."""
    terms = [*_copy_terms(problem), *_result_terms(problem), *_score_terms(problem)]
    terms += [*_chain_terms(problem), *_temporary_terms(problem)]
    lives = buffers(problem.program)
    ways = [[*_buffer_terms(problem, each), *terms] for each in (lives, *results_first(problem.program, lives))]
    kinds: dict[tuple, int] = {}
    found: list[_Term] = []
    for term in chain.from_iterable(ways):
        if term.key not in kinds:
            kinds[term.key] = len(found)
            found.append(term)
    fullest = [_fullest(problem.program, way, kinds) for way in ways]
    points = [point for at, _ in fullest for point in at]
    counts = np.concatenate([each for _, each in fullest])
    maximal = drop_dominated(counts)
    known: dict[tuple, Any] = {}
    return Rows(_row(points[i], [(found[k], counts[i, k]) for k in np.flatnonzero(counts[i])], known) for i in maximal)


def _fullest(program: Program, terms: list[_Term], kinds: dict[tuple, int]) -> tuple[list[int], np.ndarray]:
    """The points right before a value dies, and the number of live terms of each kind; the first of equal points."""
    points = len(program.operations)
    born: list[list[int]] = [[] for _ in range(points)]
    dead: list[list[int]] = [[] for _ in range(points)]
    for term in terms:
        born[term.first].append(kinds[term.key])
        dead[term.last].append(kinds[term.key])
    alive = np.zeros(len(kinds), dtype=np.int32)
    found: dict[bytes, tuple[int, np.ndarray]] = {}
    grown = False
    for point in range(points):
        for kind in born[point]:
            alive[kind] += 1
        grown = grown or bool(born[point])
        if grown and dead[point]:
            found.setdefault(alive.tobytes(), (point, alive.copy()))
            grown = False
        for kind in dead[point]:
            alive[kind] -= 1
    if not found:
        return [], np.zeros((0, len(kinds)), dtype=np.int32)
    at, counts = zip(*found.values(), strict=True)
    return list(at), np.array(counts)


def drop_dominated(counts: np.ndarray) -> list[int]:
    """The rows of counts that no other row dominates, in order.

    A row that dominates holds the rarest of its kinds. Few rows do, as short-lived values are rare.
    """
    holders: list[list[int]] = [[] for _ in range(counts.shape[1])]
    kept: list[int] = []
    for i in np.argsort(-counts.sum(axis=1, dtype=np.int64), kind="stable").tolist():
        kinds = np.flatnonzero(counts[i])
        likely = min((holders[kind] for kind in kinds), key=len, default=kept)
        held = counts[np.array(likely, dtype=np.intp)[:, None], kinds]
        if not (held >= counts[i, kinds]).all(axis=1).any():
            kept.append(i)
            for kind in kinds:
                holders[kind].append(i)
    return sorted(kept)


def sum_rows(limits: tuple[Row, ...]) -> Row:
    """The bytes at all points, summed: the row to which a single multiplier for all points belongs."""
    nodes = _add_per_index(item for row in limits for item in row.nodes)
    edges = _add_per_index(item for row in limits for item in row.edges)
    return Row(-1, tuple(NodeBytes(*item) for item in nodes.items()), tuple(edges.items()))


def _add_per_index(items: Iterable[tuple[int, T]]) -> dict[int, T]:
    """The sum per index; arrays that occur in many are counted first."""
    total: dict[int, T] = {}
    for (i, array), count in Counter(items).items():
        counted = float(count) * array
        total[i] = total[i] + counted if i in total else counted
    return total


def _row(point: int, terms: list[tuple[_Term, int]], known: dict[tuple, Any]) -> Row:
    """One row; parts that occur in several rows are one object, found in `known`."""
    parts: dict[tuple[str, int], list[tuple[_Term, int]]] = {}
    for term, count in terms:
        parts.setdefault((term.kind, term.index), []).append((term, count))
    sides: dict[str, list[Any]] = {"node": [], "edge": []}
    for (kind, index), found in parts.items():
        key = tuple((term.key, int(count)) for term, count in found)
        if key not in known:
            held = reduce(add, (float(count) * term.table for term, count in found))
            known[key] = NodeBytes(index, held) if kind == "node" else (index, held)
        sides[kind].append(known[key])
    return Row(point, tuple(sides["node"]), tuple(sides["edge"]))


def _buffer_terms(problem: Problem, lives: Iterable[Buffer]) -> Iterator[_Term]:
    tables: dict[tuple, np.ndarray] = {}
    for buffer in lives:
        node, slot = _place(problem, buffer.value)
        key = (node, slot, problem.program.values[buffer.value].bytes)
        if key not in tables:
            tables[key] = _local_bytes(problem, key[2], layouts_at(problem, buffer.value)[1])
        yield _Term(("node", *key), "node", node, buffer.first, buffer.last, tables[key])
        yield from _padding_terms(problem, buffer)


def _padding_terms(problem: Problem, buffer: Buffer) -> Iterator[_Term]:
    """The padding of a loop's stack in tiles, and its copy as a result."""
    program, topology = problem.program, problem.topology
    stack = next((value for value in buffer.members if value in stacks_of_loops(program)), None)
    if stack is None or topology.chip.kind != "tpu" or is_given(program, buffer):
        return
    node, found = layouts_at(problem, stack)
    is_returned = is_result(program, buffer)
    held = np.array([padded_bytes(program, topology, stack, layout, is_returned) for layout in found])
    if held.any():
        yield _node_term("padding", node, buffer.first, buffer.last, held)


def _local_bytes(problem: Problem, array_bytes: float, found: tuple[Layout, ...]) -> np.ndarray:
    return np.array([array_bytes / shards(layout, problem.topology.axis_sizes) for layout in found])


def _place(problem: Problem, value: int) -> Slot:
    """The node that decides a value's layout, and the index of its result, unless the node is a hub."""
    if value in problem.of_hub:
        return problem.of_hub[value], None
    operation, position = problem.program.producers[value]
    return problem.of_operation[operation], position


def layouts_at(problem: Problem, value: int) -> tuple[int, tuple[Layout, ...]]:
    """The node that decides a value's layout, and the layout under each of its states."""
    node, slot = _place(problem, value)
    return node, problem.nodes[node].states if slot is None else problem.spaces[node].outputs[slot]


def _copy_terms(problem: Problem) -> Iterator[_Term]:
    """A reshard holds a second array: where it is made, or through the loop that it is made for."""
    ends = region_ends(problem.program)
    copied: dict[tuple[TableKey, bool, bool], Copies] = {}
    for k, edge in enumerate((*problem.edges, *problem.loops)):
        if edge.table is None:
            continue
        into_hub = edge.members[0][1] is None
        for value, operation in edge.members:
            is_own = value in absorbed(problem.program)
            key = (edge.table.key, into_hub, is_own)
            if key not in copied:
                copied[key] = _copied_bytes(problem, edge.table, into_hub, is_own)
            held = copied[key] if edge.layouts is None else copied[key].restrict(*edge.layouts)
            at = problem.program.producers[value][0]
            first, last = (at, at) if operation is None else copy_life(problem.program, value, operation, ends)
            first = at if is_own else first
            if k < len(problem.edges):
                yield _Term(("edge", k, is_own), "edge", k, first, last, held)
            else:
                yield _Term(("loop", k, is_own), "node", edge.a, first, last, held[edge.rows, edge.columns])


def _result_terms(problem: Problem) -> Iterator[_Term]:
    """A result that is re-tiled is held twice during the copy."""
    for at in problem.program.results:
        if problem.program.operations[at].inputs:
            node = problem.of_operation[at]
            needed = problem.spaces[node].inputs[0]
            held = np.array([copied_bytes(problem.program, problem.topology, at, found) for found in needed])
            if held.any():
                yield _node_term("result", node, at, at, held)


def _score_terms(problem: Problem) -> Iterator[_Term]:
    """Long float32 scores are held twice before their softmax; that is counted at the product that forms them."""
    program, tables = problem.program, dict[tuple, np.ndarray]()
    for scores in score_maxima(program).values():
        node, found = layouts_at(problem, scores.value)
        array = program.values[scores.value]
        key = (node, replace(scores, value=0), array.shape, array.itemsize)
        if key not in tables:
            held = (second_array_bytes(program, problem.topology, scores, layout) for layout in found)
            tables[key] = np.array(list(held))
        if tables[key].any():
            made = program.producers[scores.value][0]
            yield _node_term("scores", node, made, made, tables[key])


def _chain_terms(problem: Problem) -> Iterator[_Term]:
    """The buffers of a chain of grouped matmuls are live while it runs."""
    for at in chains(problem.program):
        node = problem.of_operation[at]
        held = chain_buffer_bytes(problem.program, problem.topology, at, problem.spaces[node].shards)
        yield _node_term("chain", node, at, at, held)


def _temporary_terms(problem: Problem) -> Iterator[_Term]:
    """The arrays that a TPU makes for sorts, running sums, columns, joins, stacks and conversions before loops."""
    program, topology = problem.program, problem.topology
    for at in operations_with_temporaries(program):
        node = problem.of_operation[at]
        needed = problem.spaces[node].inputs[0]
        held = np.array([temporary_bytes(program, topology, at, found) for found in needed])
        if held.any():
            yield _node_term("temporary", node, at, at, held)
    for value, first, last in joined_operands(program) if topology.chip.kind == "tpu" else ():
        node, found = layouts_at(problem, value)
        held = _local_bytes(problem, program.values[value].bytes, found)
        yield _node_term("joined", node, first, last, held)
    for value, count, first, last in stack_copies(program) if topology.chip.kind == "tpu" else ():
        node, found = layouts_at(problem, value)
        held = _local_bytes(problem, program.values[value].bytes, found)
        held = count * np.where(held > topology.chip.on_chip_bytes, held, 0.0)
        if held.any():
            yield _node_term("stacked", node, first, last, held)
    for sliced in sliced_stacks(program) if topology.chip.kind == "tpu" else ():
        node, found = layouts_at(problem, sliced.value)
        held = np.array([resliced_bytes(program, topology, sliced, each) for each in found]).reshape(-1, 2)
        if held.any():
            yield _node_term("resliced", node, sliced.first, sliced.last, held[:, 1])
            yield _node_term("resliced", node, sliced.first, sliced.first, held[:, 0] - held[:, 1])
    for _, part, size, first, last in conversions(program) if topology.chip.kind == "tpu" else ():
        node, found = layouts_at(problem, part)
        yield _node_term("converted", node, first, last, _local_bytes(problem, size, found))


def _node_term(kind: str, node: int, first: int, last: int, held: np.ndarray) -> _Term:
    """Further bytes of a node. The copies of a layer hold the same bytes, so their terms are equal."""
    return _Term((kind, node, held.tobytes()), "node", node, first, last, held)


def _copied_bytes(problem: Problem, table: ReshardTable, into_hub: bool, is_own: bool) -> Copies:
    """Bytes of the second array, per layout before and after: into a hub the old array, else the new one.

    With `is_own` both, of a product that is not an array otherwise.
    """
    bytes_of = _local_bytes(problem, table.array_bytes, table.layouts)
    none, which = np.zeros_like(bytes_of), np.arange(len(bytes_of))
    if is_own:
        return Copies(bytes_of, bytes_of, which, which)
    return Copies(bytes_of, none, which, which) if into_hub else Copies(none, bytes_of, which, which)
