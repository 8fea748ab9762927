"""Random small transformers on random meshes: what the plan runs equals the plain function, and lies where the plan says."""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

import autoshard
from tests.support.effort import examples
from tests.support.layout_strategies import blocks, mesh_shapes
from tests.support.models import Block, arguments, function


@pytest.mark.long
@examples(5, least=3)
@given(block=blocks(), shape=mesh_shapes(), seed=st.integers(0, 2**16))
def test_a_planned_model_computes_what_the_plain_one_does(block: Block, shape: str, seed: int) -> None:
    """Equal results, arguments and results in the planned layouts, a proven plan, and the planned collectives compiled."""
    fn, args = function(block), arguments(block, seed)
    plan = autoshard.search(fn, *args, topology=f"cpu:{shape}")
    assert (plan.proof.status, plan.proof.gap) == ("OPTIMAL", 0.0)

    mesh = plan.make_mesh(jax.devices()[: prod(map(int, shape.split("x")))])
    run = plan.jit(fn, mesh=mesh)
    found, expected = run(*args), jax.jit(fn)(*args)
    for leaf, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(plain), rtol=2e-4, atol=2e-5)

    compiled = run.lower(*args).compile()
    for sides, specs in ((compiled.input_shardings[0], plan.in_specs), (compiled.output_shardings, plan.out_specs)):
        wanted = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        for leaf, place in zip(jax.tree.leaves(sides), jax.tree.leaves(wanted), strict=True):
            assert leaf.is_equivalent_to(place, 6) or leaf == place

    audit = autoshard.audit(plan, fn, *args, target="host", devices=list(mesh.devices.flat))
    assert not [each for each in audit.differences if each.kind in ("missing", "unplanned") and each.counts]


def attention_loss(params, x):
    """Attention with biases of queries, keys and values, as in Flax's `MultiHeadAttention`."""
    q, k, v = (x @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value"))
    return jnp.mean(jnp.square(jax.nn.softmax(q @ k.mT) @ v))


@pytest.mark.long
def test_a_bias_of_keys_has_no_gradient_but_rounding_so_gradients_are_compared_before_the_optimizer() -> None:
    """Softmax ignores what a bias of the keys adds to all scores of a query; Adam makes steps of full size of its rounding."""
    rng = np.random.default_rng(0)
    drawn = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {name: {"kernel": drawn(8, 8), "bias": drawn(8)} for name in ("query", "key", "value")}
    x, gradient = drawn(8, 16, 8), jax.grad(attention_loss)
    plan = autoshard.search(gradient, params, x, topology="cpu:2x4")
    found, plain = plan.jit(gradient)(params, x), jax.jit(gradient)(params, x)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5 * largest)
    rounding = plain["key"]["bias"]
    assert float(jnp.abs(rounding).max()) < 1e-5 * largest
    adam = optax.adam(1e-3, eps=0.0)
    with jax.numpy_dtype_promotion("standard"):  # Optax's step counter meets floats
        step, _ = adam.update(rounding, adam.init(rounding))
    assert float(jnp.abs(jnp.asarray(step)).max()) > 0.9e-3
