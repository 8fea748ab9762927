"""What is computed again, what is overwritten, and what is made before a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import autoshard
from autoshard.emitting import targets
from autoshard.emitting.tpu_workarounds import conversion_barriers
from autoshard.tracing.blocks import BarrierStep
from autoshard.tracing.loops.invariants import hoist
from tests.support.plans import well_linked
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


# --- what is computed again, and what is overwritten


def computed_again(weights: Any, x: Any) -> Any:
    """What a `jax.checkpoint` computes on the way back is not what was computed before: that is not kept."""

    @jax.checkpoint
    def block(x: Any, up: Any) -> Any:
        return x + jnp.tanh(x @ up) @ up.T

    def loss(weights: Any) -> Any:
        y = x
        for up in weights:
            y = block(y, up)
        return jnp.sum(y.astype(f32) ** 2)

    return jax.grad(loss)(weights)


def gathered_results(weights: Any, moments: Any, x: Any) -> Any:
    """New weights, gathered from the chips that keep their moments: the old ones are overwritten, not copied."""
    for weight in weights:
        x = x + jnp.tanh(x @ weight)
    scale = jnp.mean(x.astype(f32))
    return [(w.astype(f32) - scale * m).astype(bf16) for w, m in zip(weights, moments, strict=True)], moments


@pytest.mark.long
@pytest.mark.tpu
def test_what_is_to_be_computed_again_is() -> None:
    args = ([S((512, 512), bf16)] * 4, S((1024, 512), bf16))
    plan = autoshard.search(computed_again, *args, topology="v5e:1x1")
    found = autoshard.audit(plan, computed_again, *args, target="tpu")
    assert found.flops == pytest.approx(found.planned_flops)


def barriers(fn: Callable[..., Any], *args: Any) -> list[int]:
    """Of how many values the barriers of a function are, loops included."""
    return [len(step.values) for step in steps_of(trace(fn, *args).block) if isinstance(step, BarrierStep)]


def steps_of(block: Any) -> Iterator[Any]:
    for step in block.steps:
        yield step
        yield from steps_of(step.body) if hasattr(step, "body") else ()


def test_only_what_was_read_before_is_kept_apart() -> None:
    x, w = S((8, 8), f32), S((8, 8), f32)

    def block(x: Any, w: Any) -> Any:
        return jnp.tanh(jnp.sin(x) @ w)

    def scanned(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, w: (jax.checkpoint(block)(x, w), None), x, jnp.stack([w, w]))[0].sum()

    again = jax.value_and_grad(lambda x, w: jax.checkpoint(block)(x, w).sum(), argnums=(0, 1))
    assert barriers(again, x, w) == [3]  # with the result's gradient
    assert barriers(jax.grad(lambda x, w: jax.checkpoint(block)(x, w).sum()), x, w) == []  # the result is not needed
    assert barriers(lambda x, w: jax.checkpoint(block)(x, w), x, w) == []  # nothing is computed again
    shared = jax.value_and_grad(lambda x, w: jax.checkpoint(block, prevent_cse=False)(x, w).sum())
    assert barriers(shared, x, w) == []
    assert barriers(jax.value_and_grad(scanned), x, w) == []  # of a round, nothing was made before
    assert barriers(lambda x, w: lax.optimization_barrier((x, w))[0] @ w, x, w) == [2]


@pytest.mark.long
def test_what_is_kept_apart_is_computed_as_written() -> None:
    random = np.random.default_rng(2)
    weights = [jnp.asarray(random.normal(size=(16, 16)) / 4, f32) for _ in range(3)]
    x = jnp.asarray(random.normal(size=(32, 16)), f32)
    plan = autoshard.search(computed_again, weights, x, topology=well_linked("cpu:2x4"))
    for found, right in zip(plan.apply(computed_again)(weights, x), computed_again(weights, x), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.tpu
@pytest.mark.long
def test_what_gathered_results_overwrite_is_not_copied() -> None:
    args = ([S((2048, 2048), bf16)] * 4, [S((2048, 2048), f32)] * 4, S((4096, 2048), bf16))
    pins = {"weights.*": PartitionSpec(), "moments.*": PartitionSpec(("x", "y"))}
    plan = autoshard.search(gathered_results, *args, topology="v5e:2x2", donate_argnums=(0, 1), pins=pins)
    assert [each.bytes for each in plan.estimate.collectives if each.kind == "all-gather"] == [2048 * 2048 * 2] * 4
    where = plan.topology
    mesh = targets.mesh_of(targets.tpu_devices(where.name, where.shape, where.chip.name), where.axis_sizes)
    text = plan.jit(gathered_results, mesh=mesh).lower(*args).compile().as_text()
    assert not re.search(r" = bf16\[2048,2048\]\S* copy\(", text)


# --- what stays the same in every round of a loop


def moved(step: Callable[..., Any], fixed: int, *args: Any) -> list[str]:
    body = jax.make_jaxpr(step)(*args).jaxpr
    return [eqn.primitive.name for eqn in hoist(body, body.invars[:fixed]).before]


def test_what_does_not_grow_is_made_before_the_loop() -> None:
    w, v, x = S((8, 8), f32), S((8,), f32), S((8, 8), bf16)
    assert moved(lambda w, x: x @ w.astype(bf16), 1, w, x) == ["convert_element_type"]
    assert moved(lambda w, x: x @ w.T.astype(bf16), 1, w, x) == ["transpose", "convert_element_type"]
    assert moved(lambda w, x: x @ w.T, 1, w, w) == []  # only shows it
    assert moved(lambda x, w: w @ x.astype(f32), 1, x, w) == []  # takes more memory than it saves
    assert moved(lambda v, x: x + jnp.exp(v[:, None] * v[None, :]), 1, v, w) == []
    assert moved(lambda v, x: x * jnp.sum(v), 1, v, w) == []  # one number
    assert moved(lambda w, x: x + jax.jit(jnp.sin)(w) @ w, 1, w, w) == ["jit", "dot_general"]
    assert moved(lambda w, x: x + w, 1, w, w) == []


@pytest.mark.long
def test_loops_compute_what_they_are_written_to() -> None:
    def fn(w: Any, b: Any, x: Any) -> Any:
        def body(c: Any, row: Any) -> Any:
            c = jnp.tanh(c @ jnp.exp(w) + b.T.astype(bf16).astype(f32) + row)
            return c, c.sum() + jnp.sum(b * 2.0)

        c, sums = lax.scan(body, x, x)
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ jnp.sin(w).T), (0, c))[1], sums

    random = np.random.default_rng(1)
    args = [jnp.asarray(random.normal(size=(8, 8)) / 8, f32) for _ in range(3)]
    plan = autoshard.search(fn, *args, topology=well_linked("cpu:2x4"))
    for found, right in zip(plan.apply(fn)(*args), fn(*args), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-2, atol=1e-2)
    once = [op for op in plan.operations if op.primitive in ("exp", "sin")]
    assert len(once) == 2 and all(op.count == 1 for op in once)


def test_what_makes_a_weight_is_looked_at_once_however_often_it_is_used() -> None:
    def product(weight, x):
        for _ in range(12):
            weight = 2 * weight + 3 * weight
        return jnp.tanh(x @ x) @ weight

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    program = trace(product, square, square).program
    (_, last) = (op for _, op in program.matmuls())
    given = {use.value for op in program.operations if op.op_class == "source" for use in op.outputs}
    assert len(list(conversion_barriers.first_operands(program, last.inputs[1].value, given))) == 2
