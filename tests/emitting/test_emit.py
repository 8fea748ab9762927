"""The emitted program: single changes of layout, exhaustively; whole models under random layouts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from autoshard.auditing import hlo_collectives
from autoshard.emitting import targets
from autoshard.emitting.collectives.reshard_steps import run_step
from autoshard.emitting.program import emit
from autoshard.emitting.sharding import spec_of
from costmodels.machine.topology import parse_topology
from search.formulation.all_pairs import FORBIDDEN
from search.formulation.collective_steps import CollectiveStep
from search.formulation.layouts import Layout
from search.formulation.reshard import ReshardTable, reshard_table
from search.formulation.strategies import Strategy
from search.solve import search
from tests.support.effort import examples
from tests.support.layout_strategies import (
    assert_layouts_do_not_matter,
    blocks,
    cpu_topology,
    mesh_of,
    mesh_shapes,
    pieces,
    quick,
)
from tests.support.models import Block, arguments, function
from tests.support.tracing import trace


def wrong_steps(steps: Sequence[CollectiveStep], shape: tuple[int, ...], mesh_shape: str) -> list[CollectiveStep]:
    """The steps that do not lead from pieces in their source layout to pieces in their target layout."""
    topology = cpu_topology(mesh_shape)
    sizes, mesh = topology.axis_sizes, mesh_of(topology)
    array = np.arange(prod(shape), dtype=np.int32).reshape(shape)
    known = list(dict.fromkeys(layout for step in steps for layout in (step.source, step.target)))

    def check(*found: Array) -> Array:
        own = dict(zip(known, (chips[0] for chips in found), strict=True))
        got = [run_step(step, own[step.source], sizes) for step in steps]
        return jnp.stack([(piece == own[step.target]).all() for step, piece in zip(steps, got, strict=True)])[None]

    everywhere = PartitionSpec(tuple(sizes))
    run = jax.shard_map(check, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    right = jax.jit(run, compiler_options=quick())(*(pieces(array, layout, sizes) for layout in known)).all(axis=0)
    return [step for step, ok in zip(steps, right, strict=True) if not ok]


def table_of(shape: tuple[int, ...], mesh_shape: str) -> ReshardTable:
    return reshard_table(shape, 4.0, cpu_topology(mesh_shape), partial=True)


@pytest.mark.parametrize(
    ("mesh_shape", "shape"),
    [
        pytest.param("2x2x2", (8, 8, 8), marks=pytest.mark.slow),
        pytest.param("2x2x2", (8, 8), marks=pytest.mark.long),
        ("4x2", (8, 8)),
        ("2x3", (6, 12)),
        pytest.param("2x2", (2, 4, 3, 2), marks=pytest.mark.long),
    ],
)
def test_every_step_leads_from_its_source_to_its_target(mesh_shape: str, shape: tuple[int, ...]) -> None:
    steps = table_of(shape, mesh_shape).graph.steps
    for at in range(0, len(steps), 500):
        assert wrong_steps(steps[at : at + 500], shape, mesh_shape) == []


def test_every_path_is_a_chain_of_steps() -> None:
    table = table_of((8, 8, 8), "2x2x2")
    steps = set(table.graph.steps)
    for i, source in enumerate(table.layouts):
        for j, target in enumerate(table.layouts):
            if table.seconds[i, j] < FORBIDDEN:
                path = table.path(source, target)
                assert steps.issuperset(path)
                ends = [(a.target, b.source) for a, b in pairwise(path)]
                assert all(a == b for a, b in ends)
                assert (path[0].source, path[-1].target) == (source, target) if path else source == target


ODD_ROWS = (8 * 521, 512)
"""A prime number of tiles of 8 rows: the TPU compiler finds no blocks of them."""
TO_COLUMNS = CollectiveStep("reduce-scatter", ("x",), Layout(((), ()), ("x",)), Layout(((), ("x",))), target_dim=1)


def test_columns_of_odd_rows_are_scattered_as_others() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    chips = np.random.default_rng(0).integers(-9, 9, (2, *ODD_ROWS)).astype(np.float32)
    run = jax.shard_map(
        lambda piece: run_step(TO_COLUMNS, piece[0], {"x": 2}),
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=PartitionSpec(None, "x"),
    )
    assert (np.asarray(run(chips)) == chips.sum(axis=0)).all()


@pytest.mark.tpu
def test_columns_of_odd_rows_are_scattered_by_the_tpu_compiler() -> None:
    devices = targets.tpu_devices("v5e:2x2", (2, 2), "v5e")
    mesh = targets.mesh_of(devices, {"x": 2, "y": 2})
    run = jax.shard_map(
        lambda piece: run_step(TO_COLUMNS, jnp.tanh(piece), {"x": 2, "y": 2}),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(None, "x"),
        check_vma=False,
    )
    text = jax.jit(run).lower(jax.ShapeDtypeStruct(ODD_ROWS, jnp.bfloat16)).compile().as_text() or ""
    (found,) = hlo_collectives.collectives(text, {"x": 2, "y": 2})
    assert found.kind == "reduce-scatter"


@pytest.mark.long
@given(block=blocks(), shape=mesh_shapes(), seed=st.integers(0, 2**16))
@examples(8, least=3)
def test_layouts_do_not_change_what_a_model_computes(block: Block, shape: str, seed: int) -> None:
    assert_layouts_do_not_matter(function(block), *arguments(block), shape=shape, count=1, seed=seed)


@pytest.mark.slow
@given(block=blocks(), shape=mesh_shapes(), seed=st.integers(0, 2**16))
@settings(max_examples=300)
def test_layouts_never_change_what_a_model_computes(block: Block, shape: str, seed: int) -> None:
    assert_layouts_do_not_matter(function(block), *arguments(block), shape=shape, count=2, seed=seed)


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        (Layout(((), ())), PartitionSpec()),
        (Layout((("x",), ())), PartitionSpec("x")),
        (Layout(((), ("y", "x"))), PartitionSpec(None, ("y", "x"))),
    ],
)
def test_spec_of(layout: Layout, spec: PartitionSpec) -> None:
    assert spec_of(layout) == spec


@pytest.mark.long
def test_gradients_pass_a_split_maximum():
    """JAX has no derivative of a maximum over chips; the emitted program has one."""

    def peaks(x):
        return jnp.sum(jnp.max(x, axis=1) ** 2)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)
    topology = parse_topology("cpu:8")
    traced = trace(peaks, x)
    operations = traced.program.operations
    at = next(i for i, op in enumerate(operations) if op.primitive == "reduce_max")

    def split(operation: int, strategy: Strategy) -> bool:
        kinds = [factor.kind for factor, axes in zip(operations[at].factors, strategy.splits, strict=False) if axes]
        return operation != at or kinds == ["max"]

    choice = search(traced.program, topology, allow=split).choice
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    planned = emit(traced, choice, topology, mesh)
    found, expected = jax.grad(lambda x: planned(x)[0])(x), jax.grad(peaks)(x)
    assert choice.strategies[at].axes == ("x",)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
