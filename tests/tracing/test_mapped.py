"""A `shard_map` in the user's code goes into a plan as what it computes; its layouts are pins where they can be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard import TraceError
from tests.support.layout_strategies import assert_layouts_do_not_matter
from tests.support.tracing import trace

X = jnp.arange(64.0).reshape(8, 8) / 64
W = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)


LONG_AXES = ({"t": 2, "d": 2}, {"d": 1, "t": 8})


def _mesh(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def exchanges(x: Array, w: Array) -> tuple[Array, ...]:
    """Every collective, over axes `d` and `t`."""
    y = lax.psum(jnp.tanh(x @ w) + lax.axis_index("t").astype(jnp.float32), "t")

    def step(carry: Array, _: None) -> tuple[Array, Array]:
        return carry * lax.axis_index("d").astype(jnp.float32), lax.pmax(carry, "t")

    carry, highest = lax.scan(step, y, None, length=2)
    gathered = lax.all_gather(x, "t", axis=1, tiled=True)
    apart = lax.all_gather(x, ("d", "t"), axis=1)
    scattered = lax.psum_scatter(y, "t", scatter_dimension=1, tiled=True)
    n = lax.axis_size("t")
    moved = lax.ppermute(x, "t", [(k, (k + 1) % n) for k in range(n)])
    swapped = lax.all_to_all(gathered, "t", 1, 0, tiled=True)
    stacked = lax.all_to_all(gathered[:n], "t", 0, 1)
    return y, highest, gathered.sum()[None], apart.sum(1), scattered, moved, swapped, stacked, carry


OUT = (P("d"), P(None, "d"), P("d"), P("d", "t"), P("d", "t"), P("d", "t"), P("d", "t"), P("d", "t"), P("d"))


@pytest.mark.long
@pytest.mark.parametrize("axes", [{"d": 2, "t": 4}, *LONG_AXES, {"d": 1, "t": 1}])
def test_it_computes_what_it_did(axes: dict[str, int]) -> None:
    mesh = _mesh(**axes)

    def fn(x: Array, w: Array) -> Any:
        return jax.shard_map(exchanges, mesh=mesh, in_specs=(P("d", "t"), P("t")), out_specs=OUT, check_vma=False)(
            x * 2, w
        )

    traced = assert_layouts_do_not_matter(fn, X, W)
    warning = traced.program.warnings[0]
    assert warning.startswith("the shard_map at test_mapped.py:")
    sources = {op.source for op in traced.program.operations if op.source}
    assert all(source.startswith("test_mapped.py:") for source in sources)


@pytest.mark.long
def test_with_checked_replication() -> None:
    mesh = _mesh(d=2, t=4)

    def body(x: Array, w: Array) -> Any:
        def step(c: Array, _: None) -> tuple[Array, Array]:
            return c * (1 + lax.axis_index("d").astype(jnp.float32)), lax.psum(c, "t")

        carry, piled = lax.scan(step, jnp.tanh(x @ w), None, length=2)
        total = lax.while_loop(lambda c: c < 9, lambda c: c + 1, lax.pmax(carry.max(), ("d", "t")))
        return lax.psum(carry, "t"), piled, lax.cond(total > 0, lambda: total, lambda: -total)

    def fn(x: Array, w: Array) -> Any:
        return jax.shard_map(body, mesh=mesh, in_specs=(P("d", "t"), P("t")), out_specs=(P("d"), P(None, "d"), P()))(
            x, w
        )

    assert_layouts_do_not_matter(fn, X, W)


def test_axes_of_several_dimensions() -> None:
    mesh = _mesh(d=2, t=4)

    def fn(x: Array) -> Any:
        specs = P(("t", "d"))
        return jax.shard_map(
            lambda a: a * lax.axis_index(("t", "d")).astype(jnp.float32) + lax.psum(a, "d"),
            mesh=mesh,
            in_specs=specs,
            out_specs=specs,
        )(x)

    assert_layouts_do_not_matter(fn, X)


def test_its_layouts_are_pins_on_a_topology_with_its_axes() -> None:
    mesh = _mesh(x=2, y=4)

    def fn(x: Array, w: Array) -> Any:
        megatron = jax.shard_map(
            lambda x, w: lax.psum(x @ w, "y"), mesh=mesh, in_specs=(P("x", "y"), P("y")), out_specs=P("x")
        )
        return megatron(x, w)

    plan = autoshard.search(fn, X, W, topology="cpu:2x4")
    assert plan.in_specs == (P("x", "y"), P("y"))
    assert plan.out_specs == P("x")
    np.testing.assert_allclose(plan.jit(fn)(X, W), X @ W, rtol=1e-5)
    other = autoshard.search(fn, X, W, topology="cpu:8")
    assert any("names axes that cpu:8 does not have (y): it is ignored" in text for text in other.warnings)


def test_groups_within_an_axis_are_refused() -> None:
    mesh = _mesh(d=2, t=4)

    def fn(x: Array) -> Any:
        groups = [[0, 1], [2, 3]]
        return jax.shard_map(
            lambda a: lax.psum(a, "t", axis_index_groups=groups),
            mesh=mesh,
            in_specs=P("d", "t"),
            out_specs=P("d", "t"),
            check_vma=False,
        )(x)

    with pytest.raises(TraceError, match="psum with axis_index_groups is not supported inside a shard_map"):
        trace(fn, X)
