"""Random graphs of einsums under random layouts: results equal, compiled collectives as planned.

    JAX_NUM_CPU_DEVICES=16 python -m tests.support.emitting.einsum_graphs EXAMPLES

runs the law on meshes of up to sixteen devices, in a process of its own: the other tests have eight.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

MESH_SHAPES = ("2x2", "2x4", "4x2", "2x2x2", "8", "3x2")
LARGER_MESH_SHAPES = ("2x2x4", "4x2x2", "4x4", "2x8", "16", "2x4x2")
SIZES = {"a": 4, "b": 8, "c": 16, "d": 6, "e": 16}
"""The size of each dimension, by its letter; 6 is divided by few meshes."""

PRIMES = {"a": 3, "b": 7, "c": 13, "d": 5, "e": 11}
"""Sizes that few meshes divide."""


@dataclass(frozen=True)
class Node:
    """One step of a graph: an einsum of two earlier values, or their sum, or the hyperbolic tangent of one."""

    kind: str
    operands: tuple[int, ...]
    dims: str


@dataclass(frozen=True)
class Graph:
    """Arguments by their letters, then nodes; the values that nothing uses are the results."""

    arguments: tuple[str, ...]
    nodes: tuple[Node, ...]

    def __call__(self, *arguments: Any) -> list[Any]:
        dims, values = list(self.arguments), list(arguments)
        for node in self.nodes:
            taken = [values[i] for i in node.operands]
            if node.kind == "einsum":
                spec = ",".join(dims[i] for i in node.operands) + "->" + node.dims
                values.append(jnp.einsum(spec, *taken))
            elif node.kind == "add":
                values.append(taken[0] + taken[1])
            else:
                values.append(jnp.abs(taken[0]))
            dims.append(node.dims)
        used = {i for node in self.nodes for i in node.operands}
        return [value for i, value in enumerate(values) if i not in used]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Two or three arguments of up to three dimensions and up to four nodes, no two alike: a compiler makes one of those."""
    letters = st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True).map("".join)
    dims = [draw(letters) for _ in range(draw(st.integers(2, 3)))]
    arguments, nodes = tuple(dims), []
    for _ in range(draw(st.integers(1, 4))):
        node = draw(_node(tuple(dims)))
        if not any(_alike(node, other) for other in nodes):
            nodes.append(node)
            dims.append(node.dims)
    return Graph(arguments, tuple(nodes))


def _alike(a: Node, b: Node) -> bool:
    return (a.kind, sorted(a.operands), a.dims) == (b.kind, sorted(b.operands), b.dims)


@st.composite
def _node(draw: st.DrawFn, dims: tuple[str, ...]) -> Node:
    at = st.integers(0, len(dims) - 1)
    left = draw(at)
    alike = [i for i, other in enumerate(dims) if other == dims[left] and i != left]
    kind = draw(st.sampled_from(("einsum", "einsum", "einsum", "abs", "add" if alike else "einsum")))
    if kind == "add":
        return Node(kind, (left, draw(st.sampled_from(alike))), dims[left])
    if kind == "abs":
        return Node(kind, (left,), dims[left])
    right = draw(at)
    known = sorted(set(dims[left] + dims[right]))
    kept = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    return Node(kind, (left, right), "".join(kept))


def arguments_of(graph: Graph, sizes: Mapping[str, int] = SIZES) -> list[Any]:
    """Integers, which add up to the same bits in any order, even where they overflow."""
    rng = np.random.default_rng(0)
    shapes = [tuple(sizes[letter] for letter in dims) for dims in graph.arguments]
    return [jnp.asarray(rng.integers(-2, 3, shape), jnp.int32) for shape in shapes]


def assert_as_planned(graph: Graph, mesh_shape: str, seed: int) -> None:
    """Runs a graph under one random choice of layouts: results equal to the bit, and nothing on the wire but the plan."""
    from autoshard.auditing import hlo_collectives
    from autoshard.emitting.program import emit
    from tests.support.layout_strategies import cpu_topology, mesh_of, problem_of, quick, random_choices
    from tests.support.tracing import trace

    topology, arguments = cpu_topology(mesh_shape), arguments_of(graph)
    traced = trace(graph, *arguments)
    (choice,) = random_choices(problem_of(traced, topology), np.random.default_rng(seed), 1)
    mesh = mesh_of(topology)
    flat = [*arguments, *traced.constants]
    program = jax.jit(emit(traced, choice, topology, mesh), compiler_options=quick())
    run = program.lower(*flat).compile()
    for found, expected in zip(run(*flat), jax.tree.leaves(graph(*arguments)), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    compiled = hlo_collectives.collectives(run.as_text() or "", topology.axis_sizes)
    assert differences(traced.program, topology, choice, compiled) == []


def computed_alike(program: Any, choice: Any) -> list[int]:
    """Per value the first one that the same operation makes of the same operands in the same pieces, as compilers see it."""
    first: dict[Any, int] = {}
    found = list(range(len(program.values)))
    for i, op in enumerate(program.operations):
        key = (op.primitive, tuple((found[use.value], use.dims) for use in op.inputs), op.factors, choice.strategies[i])
        for use in op.outputs if op.inputs else ():
            found[use.value] = first.setdefault((key, use.dims), use.value)
    return found


def differences(program: Any, topology: Any, choice: Any, compiled: Sequence[Any]) -> list[str]:
    """Compiled collectives that were not planned, and planned ones that were not compiled."""
    from autoshard.auditing.matching import axes_of, match_collectives
    from autoshard.planning.records import PlannedCollective
    from search.answer.assignment import collectives

    sent = collectives(program, topology, choice)
    planned = [PlannedCollective(each.kind, each.axes, each.bytes, each.count, each.seconds, "") for each in sent]
    own = [each for each in compiled if axes_of(each, topology)]
    same = computed_alike(program, choice)
    pairs = match_collectives(planned, [same[each.value] for each in sent], own, topology)
    alone = [pair for pair in pairs if not (pair.planned and pair.compiled)]
    return [f"{'unplanned' if pair.compiled else 'missing'}: {(*pair.planned, *pair.compiled)}" for pair in alone]


def main(examples: int) -> None:
    """The law on larger meshes."""

    @given(graph=graphs(), mesh_shape=st.sampled_from(LARGER_MESH_SHAPES), seed=st.integers(0, 2**16))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    def law(graph: Graph, mesh_shape: str, seed: int) -> None:
        assert_as_planned(graph, mesh_shape, seed)

    law()


if __name__ == "__main__":
    main(int(sys.argv[1]))
