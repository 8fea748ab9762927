"""Writes of small windows at clipped indices: planned, and run, as scatters of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

import autoshard
from autoshard.tracing.rewrites.row_updates import row_form, writes_windows
from tests.support.layout_strategies import assert_layouts_do_not_matter


def write(cache: Any, position: Any, new: Any) -> Any:
    return lax.dynamic_update_slice(cache, new, (position, 0, 0))


def write_part(cache: Any, position: Any, new: Any) -> Any:
    small = position.astype(jnp.int8)
    return lax.dynamic_update_slice(cache, new, (jnp.int8(3), small, small))


@pytest.mark.parametrize("offset", [0, -50, 50])
@pytest.mark.parametrize(
    ("step", "new"), [(write, (1, 4, 8)), (write, (3, 4, 8)), (write_part, (2, 4, 1)), (write_part, (2, 2, 2))]
)
def test_rows_are_written_where_the_window_was(step: Any, new: tuple[int, ...], offset: int) -> None:
    """Windows begin before, on and past the array; each begins where it fits."""
    rng = np.random.default_rng(0)
    cache, position = jnp.zeros((6, 32, 4, 8)), jnp.asarray(rng.integers(-5, 40, 6) + offset, jnp.int32)
    rows = jnp.asarray(rng.normal(size=(6, *new)), jnp.float32)
    closed = jax.make_jaxpr(jax.vmap(step))(cache, position, rows)
    (eqn,) = [each for each in closed.eqns if writes_windows(each)]
    replaced = closed.jaxpr.replace(eqns=[*closed.eqns[:-1]], outvars=list(eqn.invars))
    operands = jaxpr_as_fun(closed.replace(jaxpr=replaced))(cache, position, rows)
    np.testing.assert_array_equal(jaxpr_as_fun(row_form(eqn))(*operands)[0], jax.vmap(step)(cache, position, rows))


def test_layouts_do_not_matter() -> None:
    """The written dimension may be split, too."""
    rng = np.random.default_rng(0)
    position = jnp.asarray(rng.integers(-40, 40, 4), jnp.int32)
    rows, cache = (jnp.asarray(rng.normal(size=(4, n, 2, 4)), jnp.float32) for n in (2, 16))
    assert_layouts_do_not_matter(jax.vmap(write), cache, position, rows, count=6)


@pytest.mark.parametrize("new", [(9, 4, 8), (32, 4, 8)])
def test_large_and_whole_windows_stay(new: tuple[int, ...]) -> None:
    rows = jnp.zeros((6, *new))
    closed = jax.make_jaxpr(jax.vmap(write))(jnp.zeros((6, 32, 4, 8)), jnp.zeros(6, jnp.int32), rows)
    assert not any(map(writes_windows, closed.eqns))


def test_the_compiler_makes_no_loop() -> None:
    """473 µs without the rewrite (libtpu 0.0.50)."""
    shapes = [((64, 2048, 8, 128), jnp.bfloat16), ((64,), jnp.int32), ((64, 1, 8, 128), jnp.bfloat16)]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    plan = autoshard.search(jax.vmap(write), *args, topology="v5e:1x1", donate_argnums=(0,))
    found = autoshard.audit(plan, jax.vmap(write), *args, target="tpu")
    assert found.ok
    assert found.replay is not None
    assert found.replay.seconds < 20e-6
