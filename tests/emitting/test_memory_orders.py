"""Carried arrays go round loops in the order in which the arguments that they were lie in memory."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

import autoshard
from autoshard.auditing.hlo_collectives import estimated_cycles
from autoshard.emitting import targets
from autoshard.emitting.memory_orders import orders_of_values, to_memory_order, to_program_order
from autoshard.emitting.program import emit
from autoshard.emitting.sharding import spec_of
from tests.support.plans import well_linked
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16 = jnp.bfloat16


def attend(q: Any, k: Any) -> Any:
    """Queries `[B, K, G, D]` over keys `[B, S, K, D]`: the matrices are `[S, D]`, so that is how the keys should lie."""
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores).astype(k.dtype), k)


def decode(cache: Any, x: Any, weights: Any, position: Any) -> Any:
    """A cache `[L, B, S, K, D]` that a scan updates and reads."""
    _, batch, _, heads, size = cache.shape

    def layer(x: Any, scanned: Any) -> Any:
        weight, keys = scanned
        q = jnp.einsum("bkgd,de->bkge", x, weight)
        keys = lax.dynamic_update_slice(keys, q[:, None, :, 0], (0, position, 0, 0))
        return x + attend(q, keys), keys

    assert x.shape[:2] == (batch, heads) and x.shape[3] == size
    return lax.scan(layer, x, (weights, cache))[::-1]


def generate(cache: Any, x: Any, weights: Any, position: Any) -> Any:
    def step(state: Any) -> Any:
        at, cache, x = state
        return at + 1, *decode(cache, x, weights, at)

    return lax.while_loop(lambda state: state[0] < position, step, (position - 2, cache, x))[1:]


ORDER = (0, 1, 3, 2, 4)


@pytest.mark.parametrize("fn", [decode, generate])
def test_arrays_that_go_round_in_another_order_are_the_same(fn: Any) -> None:
    random = np.random.default_rng(0)
    shapes = [(3, 4, 16, 4, 8), (4, 4, 2, 8), (3, 8, 8)]
    args = (*(jnp.asarray(random.normal(size=shape) / 4, jnp.float32) for shape in shapes), jnp.int32(5))
    plan = autoshard.search(fn, *args, topology=well_linked("cpu:2x2"), donate_argnums=0)
    traced = trace(fn, *args, donate_argnums=(0,))
    mesh = plan.make_mesh(jax.devices()[:4])
    found = emit(traced, plan.choice, plan.topology, mesh, orders=[ORDER, (), (), ()])
    assert str(jax.make_jaxpr(found)(*args)).count("permutation=(0, 1, 3, 2, 4)") >= 2
    for one, other in zip(jax.jit(found)(*args), fn(*args), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_an_array_has_the_order_of_the_argument_that_it_was() -> None:
    args = (S((3, 4, 16, 4, 8), bf16), S((4, 4, 2, 8), bf16), S((3, 8, 8), bf16), S((), jnp.int32))
    program = trace(generate, *args, donate_argnums=(0,)).program
    found = orders_of_values(program, [ORDER, (0, 1, 2, 3), (), ()])
    assert set(found.values()) == {ORDER}
    assert all(program.values[value].shape == args[0].shape for value in found)
    same = [value for value, each in enumerate(program.values) if each.shape == args[0].shape]
    assert set(found) == set(same)
    assert orders_of_values(program, [(), (), (), ()]) == {}


def test_orders_turn_back() -> None:
    piece = jnp.arange(24).reshape(2, 3, 4)
    assert to_memory_order(piece, (1, 2, 0)).shape == (3, 4, 2)
    np.testing.assert_array_equal(to_program_order(to_memory_order(piece, (1, 2, 0)), (1, 2, 0)), piece)
    assert to_memory_order(piece, ()) is to_program_order(piece, ()) is piece


@pytest.mark.long
@pytest.mark.tpu
def test_a_carried_cache_is_read_as_it_lies() -> None:
    """Two heads fill no tile, so that in the cache's own order each round relays what it reads."""
    args = (S((4, 8, 4096, 2, 128), bf16), S((8, 2, 4, 128), bf16), S((4, 128, 128), bf16), S((), jnp.int32))
    plan = autoshard.search(decode, *args, topology="v5e:1x1", donate_argnums=0)
    traced = trace(decode, *args, donate_argnums=(0,))
    where = plan.topology
    mesh = targets.mesh_of(targets.tpu_devices(where.name, where.shape, where.chip.name), where.axis_sizes)
    cycles = {}
    for order in ((), ORDER):
        run = emit(traced, plan.choice, where, mesh, orders=[order, (), (), ()])
        plain = [NamedSharding(mesh, spec_of(array.layout)) for array in plan.arguments]
        cache = Format(Layout(order), plain[0]) if order else plain[0]
        results = [cache, NamedSharding(mesh, spec_of(plan.results[1].layout))]
        jitted = jax.jit(run, in_shardings=[cache, *plain[1:]], out_shardings=results, donate_argnums=0)
        compiled = jitted.lower(*args).compile()
        text = compiled.as_text() or ""
        assert not re.search(r"bf16\[4,8,\S* copy\(", text)
        cycles[order] = estimated_cycles(text) or 0.0
    assert cycles[ORDER] < cycles[()] / 2


@pytest.mark.long
@pytest.mark.tpu
def test_a_planned_scan_reads_its_cache_as_it_lies() -> None:
    args = (S((4, 8, 4096, 2, 128), bf16), S((8, 2, 4, 128), bf16), S((4, 128, 128), bf16), S((), jnp.int32))
    plan = autoshard.search(decode, *args, topology="v5e:1x1", donate_argnums=0)
    assert plan.arguments[0].order == ORDER
    found = autoshard.audit(plan, decode, *args, target="tpu")
    plain = replace(plan, arguments=tuple(replace(each, order=()) for each in plan.arguments))
    without = autoshard.audit(plain, decode, *args, target="tpu")
    assert found.step_seconds is not None and without.step_seconds is not None
    assert without.step_seconds > 2 * found.step_seconds
