"""Small planned functions, their arguments, and comparison of what they compute.

| name | is |
|---|---|
| `well_linked` | a topology in which communication takes no time |
| `planned_block` | a planned transformer block, its function and arguments |
| `small_plan` | the plan of one product |
| `palm_decode`, `palm_prefill` | tiny PaLM workloads and arguments |
| `drawn` | random arrays of given shapes |
| `assert_close`, `assert_placed` | pytrees are equal up to rounding; arrays have the planned shardings |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import autoshard
from costmodels.machine import Topology, parse_topology
from examples import palm
from tests.support import models


def well_linked(name: str) -> Topology:
    """Devices between which nothing takes time, so that plans split what they can."""
    found = parse_topology(name)
    fast = (replace(axis, bytes_per_second=1e15, hop_seconds=0.0, launch_seconds=0.0) for axis in found.axes)
    return replace(found, axes=tuple(fast))


def assert_close(got: Any, wanted: Any, rtol: float = 2e-4) -> None:
    """Equal up to rounding: relative to the largest number of each array."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max(initial=1e-30)))


def assert_placed(arrays: Any, specs: Any, mesh: jax.sharding.Mesh) -> None:
    flat = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    for array, spec in zip(jax.tree.leaves(arrays), flat, strict=True):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


BLOCK = models.Block(decode=False)


@functools.cache
def planned_block() -> tuple[autoshard.Plan, Callable[..., Any], tuple[Any, ...]]:
    """A plan with collectives in it, its function, and arguments."""
    fn, args = models.function(BLOCK), models.arguments(BLOCK)
    return autoshard.search(fn, *args, topology=well_linked("cpu:2x4")), fn, args


def drawn(shapes: Any) -> Any:
    """Arrays of these shapes and types: small random numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.2, a.dtype), shapes)


def palm_decode() -> tuple[Any, tuple[Any, ...]]:
    workload = palm.decode(size="tiny", batch=8, context=32)
    return workload, (*drawn(workload.args[:2]), jnp.arange(8, dtype=jnp.int32), jnp.int32(5))


def palm_prefill() -> tuple[Any, tuple[Any, ...]]:
    workload = palm.prefill(size="tiny", batch=2, length=16)
    return workload, (drawn(workload.args[0]), jnp.arange(32, dtype=jnp.int32).reshape(2, 16))


@functools.cache
def small_plan() -> autoshard.Plan:
    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"]).max(axis=0)

    args = {"w": jnp.ones((8, 4))}, jnp.ones((4, 8))
    return autoshard.search(fn, *args, topology="cpu:2x2", name="small")
