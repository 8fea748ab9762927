"""The program is the plan: random einsum graphs under random layouts, and every change of layout of a value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import prod

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jax.sharding import PartitionSpec

from autoshard.auditing.hlo_collectives import collectives
from autoshard.auditing.matching import match_collectives
from autoshard.emitting import run_step
from autoshard.planning.records import PlannedCollective
from search import Layout
from search.formulation.all_pairs import FORBIDDEN
from search.formulation.reshard import ReshardTable, reshard_table
from tests.support.effort import examples
from tests.support.emitting import einsum_graphs
from tests.support.emitting.einsum_graphs import MESH_SHAPES, Graph, assert_as_planned, graphs
from tests.support.emitting.sixteen_devices import check_on_sixteen_devices
from tests.support.layout_strategies import cpu_topology, mesh_of, pieces, quick


@given(graph=graphs(), mesh_shape=st.sampled_from(MESH_SHAPES), seed=st.integers(0, 2**16))
@examples(10)
def test_compiled_collectives_are_the_planned_ones(graph: Graph, mesh_shape: str, seed: int) -> None:
    assert_as_planned(graph, mesh_shape, seed)


@pytest.mark.slow
@given(graph=graphs(), mesh_shape=st.sampled_from(MESH_SHAPES), seed=st.integers(0, 2**16))
@settings(max_examples=300)
def test_compiled_collectives_are_always_the_planned_ones(graph: Graph, mesh_shape: str, seed: int) -> None:
    assert_as_planned(graph, mesh_shape, seed)


@pytest.mark.long
def test_also_on_sixteen_devices() -> None:
    check_on_sixteen_devices(einsum_graphs.__name__, 5)


@pytest.mark.slow
def test_always_on_sixteen_devices() -> None:
    check_on_sixteen_devices(einsum_graphs.__name__, 200)


# --- Every change of layout of a three-dimensional value over a 2×2×2 mesh

SHAPE, CUBE = (8, 8, 8), "2x2x2"
Change = tuple[Layout, Layout]


def table() -> ReshardTable:
    return reshard_table(SHAPE, 4.0, cpu_topology(CUBE), partial=True)


def renamed(change: Change, axes: dict[str, str], dims: tuple[int, ...]) -> Change:
    def of(layout: Layout) -> Layout:
        split = tuple(tuple(axes[axis] for axis in layout.dims[i]) for i in dims)
        return Layout(split, tuple(sorted(axes[axis] for axis in layout.partial)))

    return of(change[0]), of(change[1])


def changes() -> list[Change]:
    """One of all changes that are the same but for the names of equal axes and the order of equal dimensions."""
    found, known = [], table()
    names = [dict(zip("xyz", order, strict=True)) for order in permutations("xyz")]
    orders = list(permutations(range(len(SHAPE))))
    seen: set[Change] = set()
    for i, source in enumerate(known.layouts):
        for j, target in enumerate(known.layouts):
            if i != j and known.seconds[i, j] < FORBIDDEN and (source, target) not in seen:
                seen.update(renamed((source, target), axes, dims) for axes in names for dims in orders)
                found.append((source, target))
    return found


def assert_changed_as_planned(some: Sequence[Change]) -> None:
    """Each change by its own steps, on an array of its own, all in one program."""
    topology, known = cpu_topology(CUBE), table()
    sizes, mesh = topology.axis_sizes, mesh_of(topology)
    paths = [known.path(*change) for change in some]
    array = np.arange(prod(SHAPE), dtype=np.int32).reshape(SHAPE)
    given_pieces = [pieces(array + 7 * k, source, sizes) for k, (source, _) in enumerate(some)]
    expected = [pieces(array + 7 * k, target, sizes) for k, (_, target) in enumerate(some)]

    def change(*chips: Array) -> list[Array]:
        found = []
        for path, own in zip(paths, chips, strict=True):
            piece = own[0]
            for step in path:
                piece = run_step(step, piece, sizes)
            found.append(piece[None])
        return found

    everywhere = PartitionSpec(tuple(sizes))
    run = jax.shard_map(change, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    program = jax.jit(run, compiler_options=quick()).lower(*given_pieces).compile()
    placed = [jax.device_put(each, jax.sharding.NamedSharding(mesh, everywhere)) for each in given_pieces]
    for found, right in zip(program(*placed), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found), right)
    sent = [(k, step) for k, path in enumerate(paths) for step in path if step.kind != "slice"]
    planned = [
        PlannedCollective(step.kind, step.axes, step.payload(array.nbytes, sizes), 1, 0.0, "") for _, step in sent
    ]
    compiled = collectives(program.as_text() or "", sizes)
    pairs = match_collectives(planned, [k for k, _ in sent], compiled, topology)
    assert [pair for pair in pairs if not (pair.planned and pair.compiled)] == []


@pytest.mark.long
def test_every_change_of_layout_compiles_to_its_collectives() -> None:
    every = changes()
    assert len(every) > 600
    for at in range(0, len(every), 170):
        assert_changed_as_planned(every[at : at + 170])
