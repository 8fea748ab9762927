"""Numbers of chips that divide little: 3, 5, 6, 7, 12, 24 and 48, and a slice with a missing row."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard
from benchmarks.uneven import workload
from tests.support.models import Block, arguments, function

BLOCK = Block(batch=1, context=64, d_model=512, d_ff=1024, kv_heads=4, queries_per_kv=1, d_head=128, vocab=512)


def _search(topology: str | Path) -> autoshard.Plan:
    return autoshard.search(function(BLOCK), *arguments(BLOCK), topology=topology, donate_argnums=1)


def _assert_runs(plan: autoshard.Plan, mesh: jax.sharding.Mesh | None = None) -> None:
    """Two steps with placed arguments equal those of the function."""
    mesh = mesh or plan.make_mesh(jax.devices()[: plan.topology.size])
    args = arguments(BLOCK)
    params, cache, *rest = plan.place(args, mesh=mesh)
    step = plan.jit(function(BLOCK), mesh)
    _, cache = step(params, cache, *rest)
    found, _ = step(params, cache, *rest)
    want, _ = function(BLOCK)(args[0], function(BLOCK)(*args)[1], *args[2:])
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    "chips", [3, pytest.param(5, marks=pytest.mark.slow), 6, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_model_of_even_sizes_is_padded_and_runs(chips: int) -> None:
    plan = _search(f"cpu:{chips}")
    assert plan.proof.status == "OPTIMAL"
    assert plan.padding
    assert all(each.padded % chips == 0 for each in plan.padding)
    _assert_runs(plan)


@pytest.mark.long
def test_a_mesh_with_a_missing_row_is_planned_and_runs(tmp_path: Path) -> None:
    """Rows of two chips, four of them, of which the third is missing: three rows, which are no ring."""
    described = tmp_path / "missing.toml"
    described.write_text('chip = "cpu"\nshape = [3, 2]\nname = "cpu:4x2 without its third row"\n')
    plan = _search(described)
    assert (plan.topology.name, plan.topology.size) == ("cpu:4x2 without its third row", 6)
    assert any(each.size % 3 and each.padded % 3 == 0 for each in plan.padding)
    _assert_runs(plan, plan.make_mesh([each for k, each in enumerate(jax.devices()[:8]) if k not in (4, 5)]))


@pytest.mark.parametrize(
    ("topology", "chips", "is_sold"),
    [
        ("cpu:3", 3, True),
        ("v5e:5", 5, False),
        ("v5e:2x3", 6, False),
        ("h100:6", 6, False),
        ("v5p:7", 7, False),
        ("v5e:3x4", 12, False),
        ("h100:3x8", 24, True),
        ("h100:8x6", 48, False),
    ],
)
def test_any_number_of_chips_is_planned_and_a_slice_that_nobody_sells_is_said(
    topology: str, chips: int, is_sold: bool
) -> None:
    def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ up) @ down

    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 1024), (1024, 4101), (4101, 1024))]
    plan = autoshard.search(mlp, *args, topology=topology)
    assert (plan.topology.size, plan.proof.status) == (chips, "OPTIMAL")
    assert any("no such machine to rent" in text for text in plan.warnings) == (not is_sold)


MISSING = 'chip = "v4"\nshape = [3, 4, 4]\n[axes.x]\nwraparound = false\n'
"""A cube of v4 chips without one of its planes: along x the ring is open."""


THREE_AXES = [pytest.param(each, marks=pytest.mark.slow) for each in ("v4:2x3x4", "v4:3x4x4", MISSING)]


@pytest.mark.long
@pytest.mark.parametrize(
    "topology",
    ["v5e:3x4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("h100:3x8", "h100:8x6")), *THREE_AXES],
)
def test_a_published_model_on_12_24_and_48_chips(topology: str, tmp_path: Path) -> None:
    if topology == MISSING:
        (tmp_path / "missing.toml").write_text(MISSING)
        topology = str(tmp_path / "missing.toml")
    work = workload("gpt2-xl", "decode", 16)

    def planned(padding: bool) -> autoshard.Plan:
        return autoshard.search(
            work.fn, *work.args, topology=topology, donate_argnums=work.donate_argnums, padding=padding
        )

    plan, plain = planned(True), planned(False)
    assert plan.proof.status == "OPTIMAL"
    assert plan.padding
    assert plan.estimate.seconds < plain.estimate.seconds
    sizes = plan.topology.axis_sizes
    for array in plan.sources:
        for n, axes in zip(array.shape, array.layout.dims, strict=True):
            assert all(n % sizes[axis] == 0 for axis in axes)
