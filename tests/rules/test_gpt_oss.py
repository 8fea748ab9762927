"""The example gpt-oss: sinks are a further logit of the softmax, and caches of windows hold what decode needs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard
from autoshard.tracing.trace import trace
from costmodels.program.grouped import grouped
from examples import gpt_oss
from tests.support.layout_strategies import quick

CONFIG = gpt_oss.SIZES["tiny"]


@pytest.mark.long
def test_a_sink_is_a_logit_without_a_value() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 4, 8), *[(2, 5, 2, 8)] * 2))
    sinks, visible = jnp.asarray([0.0, 9.0, -3.0, 1.0]), jnp.arange(5) <= 3
    found = gpt_oss.attend(q, k, v, visible, sinks)
    scores = jnp.einsum("bhd,bshd->bhs", q, jnp.repeat(k, 2, axis=2))
    joined = jnp.concatenate([jnp.where(visible, scores, -jnp.inf), jnp.tile(sinks[:, None], (2, 1, 1))], -1)
    expected = jnp.einsum("bhs,bshd->bhd", jax.nn.softmax(joined)[..., :-1], jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_decode_goes_on_where_prefill_ends() -> None:
    """After six positions, of which a window of four has overwritten two."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gpt_oss.init_params(CONFIG, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, CONFIG.vocab)
    whole = jax.jit(partial(gpt_oss.prefill_step, config=CONFIG), compiler_options=quick())
    step = jax.jit(partial(gpt_oss.decode_step, chosen=CONFIG.chosen), compiler_options=quick())
    _, cache = whole(params, tokens[:, :6])
    room = gpt_oss.abstract_cache(CONFIG, 2, 7)
    added = [(0, 0), (0, 1), (0, 0), (0, 0)]
    grown = jax.tree.map(lambda kept, of: kept if kept.shape == of.shape else jnp.pad(kept, added), cache, room)
    found, _ = step(params, grown, tokens[:, 6], jnp.int32(6))
    np.testing.assert_allclose(found, whole(params, tokens)[0], rtol=2e-4, atol=2e-4)


def test_the_experts_of_a_layer_are_one_chain_with_their_biases() -> None:
    work = gpt_oss.decode("tiny", batch=8, context=16)
    operations = trace(work.fn, *work.args, chains=True).program.operations
    chains = [found for op in operations if (found := grouped(op))]
    assert [(each.gathers, each.adds, each.tables) for each in chains] == [(True, True, (2, 1))] * CONFIG.layers


@pytest.mark.long
def test_the_caches_of_windows_are_planned_at_their_size() -> None:
    work = gpt_oss.decode("tiny", batch=8, context=16)
    plan = autoshard.search(work.fn, *work.args, topology="cpu:2", donate_argnums=work.donate_argnums)
    shapes = [each.shape for each in plan.arguments if each.path.startswith("cache") and each.path.endswith("['k']")]
    assert [shape[1] for shape in shapes] == [CONFIG.window, 16]
    assert all(f"bfloat16[{','.join(map(str, shape))}]" in str(plan.explain()) for shape in shapes)
