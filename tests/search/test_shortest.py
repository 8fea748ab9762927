"""Shortest paths: as by relaxing all edges of all nodes, whatever is left out because it is known already."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from costmodels.machine import parse_topology
from search.formulation.all_pairs import FORBIDDEN, Edges, all_pairs
from search.formulation.collective_steps import emittable, steps_from
from search.formulation.layouts import layouts
from search.formulation.reshard import reshard_table
from search.memory.reshard_buffers import Copies
from tests.support.effort import examples
from tests.support.strategies import topologies

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 8, 12, 64, 1024]), min_size=0, max_size=3).map(tuple)


def relaxed(edges: Edges, count: int) -> np.ndarray:
    """Every edge for every start, as often as there are nodes or until nothing is shortened."""
    distance = np.where(np.eye(count, dtype=bool), 0.0, np.inf)
    for _ in range(count):
        before = distance.copy()
        np.minimum.at(distance.T, edges.target, before.T[edges.source] + edges.price[:, None])
        if np.array_equal(before, distance):
            break
    return distance


alike = st.sampled_from(["cpu:2x2", "v4:2x2x2", "v5e:4x4", "2xv4:2x2"]).map(parse_topology)
meshes = topologies().filter(lambda t: len(t.axes) <= 3) | alike


@given(meshes, shapes, st.sampled_from([1.0, 2.0, 4.0]), st.booleans())
@examples(60)
def test_changes_of_layout_cost_what_relaxing_everything_finds(topology, shape, itemsize, partial) -> None:
    table = reshard_table(shape, itemsize, topology, partial)
    edges = Edges(table.graph.source, table.graph.target, table.step_seconds)
    expected = np.minimum(relaxed(edges, len(table.layouts)), FORBIDDEN)
    np.testing.assert_allclose(table.seconds, expected, rtol=1e-12)


@given(meshes, shapes, st.sampled_from([1.0, 2.0, 4.0]), st.booleans())
@examples(60)
def test_graphs_have_every_layout_and_every_step_of_their_shape(topology, shape, itemsize, partial) -> None:
    """As listed for the shape alone, though shapes share one graph; steps that the compiler rewrites cost infinitely."""
    table, sizes = reshard_table(shape, itemsize, topology, partial), topology.axis_sizes
    graph = table.graph
    assert graph.layouts == layouts(shape, tuple(sizes.items()), partial)
    single = {step for layout in graph.layouts for step in steps_from(layout, sizes) if step.target in graph.index}
    assert {step for step in graph.steps if step.kind != "collective-permute"} == single
    for step, source, target, part, seconds in zip(
        graph.steps, graph.source, graph.target, graph.fraction, table.step_seconds, strict=True
    ):
        assert (graph.layouts[source], graph.layouts[target]) == (step.source, step.target)
        assert part == step.payload(1.0, sizes)
        assert np.isinf(seconds) == (not emittable(step, shape, itemsize, topology))


vectors = st.lists(st.floats(0, 1e12), min_size=3, max_size=3).map(np.array)


@given(vectors, vectors, vectors, vectors, st.floats(0, 9))
def test_copies_are_what_their_matrix_is(a, b, c, d, factor) -> None:
    def matrix(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.where(np.eye(3, dtype=bool), 0.0, before[:, None] + after)

    everywhere = np.ix_(range(3), range(3))
    which = np.arange(3)
    both = Copies(a, b, which, which) + np.float64(factor) * Copies(c, d, which, which)
    np.testing.assert_allclose(both[everywhere], matrix(a, b) + factor * matrix(c, d), rtol=1e-12)
    assert both[everywhere].max() <= both.max() * (1 + 1e-12)
    assert both[1, 2] == both[everywhere][1, 2]


@given(st.integers(1, 12), st.data())
def test_without_images_or_bits_any_graph_will_do(count: int, data) -> None:
    nodes = st.integers(0, count - 1)
    drawn = data.draw(
        st.lists(st.tuples(nodes, nodes, st.floats(0, 9)), max_size=40).map(lambda e: sorted(e, key=lambda t: t[1]))
    )
    source, target, price = (np.array(column) for column in zip(*drawn, strict=True)) if drawn else np.zeros((3, 0))
    edges = Edges(source.astype(int), target.astype(int), price.astype(float))
    found = all_pairs(edges, np.zeros(count, dtype=int), np.arange(count)[None])
    np.testing.assert_allclose(found, relaxed(edges, count), rtol=1e-12)
