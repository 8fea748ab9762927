"""Conversions that wait for their products, and sums that stay in HBM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.emitting import emit
from autoshard.emitting.tpu_workarounds.conversion_barriers import find_conversion_barriers
from autoshard.emitting.tpu_workarounds.residual_barriers import find_residual_barriers, residual_barriers
from autoshard.plan import loads
from autoshard.planning.files.plan_file import dumps
from tests.support.plans import well_linked
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


def emitted_barriers(plan: autoshard.Plan, fn: Callable[..., Any], *args: Any) -> int:
    """How many barriers the planned program of a function has."""
    sizes = plan.topology.axis_sizes
    automatic = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic)
    run = emit(trace(fn, *args), plan.choice, plan.topology, mesh)
    return str(jax.make_jaxpr(run)(*jax.tree_util.tree_leaves(args))).count("optimization_barrier")


# --- what waits


def layers(params: Any, x: Any) -> Any:
    for up, down in params:
        x = jnp.tanh(x @ up.astype(bf16)) @ down.astype(bf16)
    return x


WEIGHTS = [(S((2048, 8192), f32), S((8192, 2048), f32))] * 2
X = S((8, 2048), bf16)


def test_conversions_wait_for_what_they_are_multiplied_with() -> None:
    program = trace(layers, WEIGHTS, X).program
    found = find_conversion_barriers(program)
    products = [op for _, op in program.matmuls()][1:]  # the first is ready when its weight is
    assert [program.operations[i].primitive for i in found] == ["convert_element_type"] * len(products)
    for product, (first, awaited) in zip(products, sorted(found.items()), strict=True):
        assert program.operations[first].outputs[0].value == product.inputs[1].value
        assert awaited == product.inputs[0].value


def test_what_cannot_wait_does_not() -> None:
    def all_at_first(weight: Any, x: Any) -> Any:
        converted = weight.astype(bf16)
        return jnp.tanh(x) @ converted

    assert find_conversion_barriers(trace(all_at_first, S((8, 8), f32), S((8, 8), bf16)).program) == {}
    assert (
        find_conversion_barriers(trace(lambda w, v: w.astype(bf16) @ v.astype(bf16), *[S((8, 8), f32)] * 2).program)
        == {}
    )


def test_conversions_wait_only_where_something_is_sent() -> None:
    for topology, count in (("v5e:2x2", 3), ("v5e:1x1", 0)):
        plan = autoshard.search(layers, WEIGHTS, X, topology=topology)
        assert bool(plan.estimate.collectives) == bool(count)
        assert emitted_barriers(plan, layers, WEIGHTS, X) == count


@pytest.mark.long
def test_what_waits_is_computed_and_differentiated_as_written() -> None:
    random = np.random.default_rng(0)
    weights = [(random.normal(size=(16, 64)) / 4, random.normal(size=(64, 16)) / 8) for _ in range(2)]
    weights = jax.tree_util.tree_map(lambda a: jnp.asarray(a, f32), weights)
    x = jnp.asarray(random.normal(size=(8, 16)), bf16)
    plan = autoshard.search(layers, weights, x, topology=well_linked("cpu:2x4"))
    assert plan.estimate.collectives
    for fn in (layers, jax.grad(lambda weights, x: layers(weights, x).sum().astype(f32))):
        planned = (
            plan.apply(layers) if fn is layers else jax.grad(lambda w, x: plan.apply(layers)(w, x).sum().astype(f32))
        )
        found, right = (jax.tree_util.tree_leaves(each(weights, x)) for each in (planned, fn))
        for one, other in zip(found, right, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0.1, atol=0.1)


# --- where long sums rest


def summed(terms: Any, x: Any) -> Any:
    for term in terms:
        x = (x + term).reshape(2, -1) if x.ndim == 1 else (x.reshape(-1) - term)
    return x


def sum_of(terms: Any, x: Any) -> Any:
    for term in terms:
        x = x + term
    return x


def rests(fn: Callable[..., Any], *args: Any) -> list[int]:
    """At which of its additions a function's sum rests, the first being 1."""
    program = trace(fn, *args).program
    added = [op.outputs[0].value for op in program.operations if op.primitive in ("add", "sub", "add_any")]
    return [k for k, value in enumerate(added, 1) if value in find_residual_barriers(program)]


def test_long_sums_of_short_numbers_rest() -> None:
    assert rests(summed, [S((16,), bf16)] * 26, S((16,), bf16)) == [8, 16, 24]
    assert rests(summed, [S((16,), jnp.float16)] * 9, S((16,), jnp.float16)) == [8]
    assert rests(summed, [S((16,), bf16)] * 7, S((16,), bf16)) == []
    for wide in (f32, jnp.int16):
        assert rests(summed, [S((16,), wide)] * 26, S((16,), wide)) == []


@pytest.mark.parametrize(("columns", "chips", "rested"), [(2**20, 1, True), (2**20, 4, False), (2**14, 1, False)])
def test_sums_rest_where_that_frees_more_than_the_memory_on_a_chip(columns: int, chips: int, rested: bool) -> None:
    terms, x = [S((4, columns), bf16)] * 8, S((4, columns), bf16)
    plan = autoshard.search(sum_of, terms, x, topology=f"v5e:1x{chips}", pins={"x": P("y"), "terms.*": P("y")})
    assert plan.program is not None
    for asked, expected in ((None, rested), (True, True), (False, False)):
        emission = replace(plan.emission, residual_barriers=asked)
        assert bool(residual_barriers(plan.program, plan.choice, plan.topology, emission)) == expected
        assert loads(dumps(replace(plan, emission=emission))).emission == emission


def test_sums_that_something_parts_do_not_add_up() -> None:
    def parted(terms: Any, x: Any) -> Any:
        for term in terms:
            x = jnp.tanh(x + term)
        return x

    def looped(terms: Any, x: Any) -> Any:
        return lax.scan(lambda x, term: (x + term, None), x, terms)[0]

    assert rests(parted, [S((16,), bf16)] * 26, S((16,), bf16)) == []
    assert rests(looped, S((26, 16), bf16), S((16,), bf16)) == []


def test_sums_rest_in_programs_for_tpus() -> None:
    args = ([S((2**24,), bf16)] * 17, S((2**24,), bf16))
    for topology, count in (("v5e:2x2", 2), ("cpu:2x2", 0)):
        plan = autoshard.search(summed, *args, topology=topology)
        assert emitted_barriers(plan, summed, *args) == count
