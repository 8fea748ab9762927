"""The PaLM example: its sizes are the published ones, and its two phases are one model."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import palm
from tests.support.effort import mostly_long

TINY = palm.SIZES["tiny"]
CONTEXT = 16  # one shape of cache and of tokens throughout: each phase is compiled once


def parameters(config: palm.Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(palm.abstract_params(config)))


@cache
def tiny_params(weights: str = "bf16"):
    key = jax.random.key(0, impl="rbg")  # compiles in a fifth of the default's time
    return jax.jit(lambda key: palm.init_params(TINY, key, weights))(key)


@cache
def float32_params():
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tiny_params())


@cache
def tiny_tokens():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, TINY.vocab)


def shapes(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def longer(kv_cache, filler: float = 0.0):
    """The cache with room for `CONTEXT` tokens, the new ones filled with what no step may look at."""
    room = CONTEXT - kv_cache["k"].shape[2]
    return jax.tree.map(lambda kv: jnp.pad(kv, ((0, 0), (0, 0), (0, room), (0, 0)), constant_values=filler), kv_cache)


@pytest.mark.parametrize(
    ("size", "heads", "published"),
    [
        # Chowdhery et al. 2022, table 1, says 8.63, 62.50 and 540.35 billion.
        ("8b", 16, 8.632e9),
        ("62b", 32, 62.496e9),
        ("540b", 48, 540.357e9),
        ("540b", 64, 558.174e9),  # Pope et al. 2022: padding to 64 heads adds 18 B
    ],
)
def test_parameter_count_is_the_published_one(size: str, heads: int, published: float):
    config = replace(palm.SIZES[size], padded_heads=heads)
    L, E, F, H, D, V = config.layers, config.d_model, config.d_ff, heads, config.d_head, config.vocab
    matrices = L * (3 * E * F + 2 * E * H * D + 2 * E * D) + V * E
    norm_scales = (L + 1) * E
    assert parameters(config) == matrices + norm_scales
    assert matrices == pytest.approx(published, abs=0.001e9)


def test_multiquery_cache_takes_120832_bytes_a_token():
    cache = palm.abstract_cache(palm.SIZES["540b"], batch=1, context=1)
    assert sum(kv.size * kv.dtype.itemsize for kv in cache.values()) == 2 * 2 * 118 * 256 == 120_832


def test_multihead_has_as_many_parameters_and_a_cache_32_times_as_large():
    # Heads of 128 instead of 256 (Pope et al. 2022, §4.2); 64 of them keep keys and values, where one of 256 did.
    multihead, one = (palm.abstract_cache(palm.SIZES[size], 1, 1)["k"].size for size in ("540b-multihead", "540b"))
    assert multihead == 32 * one
    assert parameters(palm.SIZES["540b-multihead"]) == pytest.approx(parameters(palm.SIZES["540b"]), rel=0.03)


@pytest.mark.parametrize("weights", mostly_long(["bf16", "int8"], "bf16"))
def test_abstract_params_are_those_that_init_makes(weights: str):
    def described(params):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)

    assert described(tiny_params(weights)) == described(palm.abstract_params(TINY, weights))


def test_int8_halves_the_layers():
    def layer_bytes(weights: str) -> int:
        layers = palm.abstract_params(palm.SIZES["540b"], weights)["layers"]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))

    assert layer_bytes("int8") == pytest.approx(layer_bytes("bf16") / 2, rel=1e-3)


@pytest.mark.long
def test_prefill_then_decode_equals_a_longer_prefill():
    params, tokens = float32_params(), tiny_tokens()
    expected, expected_cache = jax.jit(palm.prefill_step)(params, tokens)
    _, cache = jax.jit(palm.prefill_step)(params, tokens[:, :7])
    cache = longer(cache, filler=7.0)
    for position in (7, 8):
        logits, cache = jax.jit(palm.decode_step)(params, cache, tokens[:, position], jnp.int32(position))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for name in ("k", "v"):
        np.testing.assert_allclose(cache[name][:, :, :9], expected_cache[name], rtol=1e-5, atol=1e-5)
        assert (cache[name][:, :, 9:] == 7.0).all()


@pytest.mark.long
def test_a_cache_of_eight_bits_is_half_as_large_and_nearly_as_good():
    bf16, fp8 = (palm.abstract_cache(palm.SIZES["540b"], 64, 2048, cache)["k"] for cache in ("bf16", "fp8"))
    assert fp8.size * fp8.dtype.itemsize * 2 == bf16.size * bf16.dtype.itemsize
    work = palm.prefill("tiny", batch=2, length=7, cache="fp8")
    params, tokens = palm.init_params(TINY, jax.random.key(0, impl="rbg")), tiny_tokens()
    expected, _ = jax.jit(palm.prefill_step)(params, tokens[:, :8])
    _, cache = jax.jit(work.fn)(params, tokens[:, :7])
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("float8_e4m3fn")}
    logits, _ = jax.jit(palm.decode_step)(params, longer(cache, filler=0.0), tokens[:, 7], jnp.int32(7))
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    with pytest.raises(ValueError, match="The cache is one of bf16, fp8, not 'int4'"):
        palm.decode("tiny", cache="int4")


@pytest.mark.long
@pytest.mark.parametrize("variant", [{}, {"multihead": True}, {"parallel": False}], ids=str)
def test_decode_alone_equals_prefill(variant: dict[str, bool]):
    config, tokens = replace(TINY, **variant), tiny_tokens()
    bf16 = jax.jit(lambda key: palm.init_params(config, key))(jax.random.key(0, impl="rbg"))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), bf16)
    expected, _ = jax.jit(palm.prefill_step)(params, tokens)
    cache = jax.tree.map(lambda kv: jnp.zeros(kv.shape, jnp.float32), palm.abstract_cache(config, 2, CONTEXT))
    for position in range(9):
        logits, cache = jax.jit(palm.decode_step)(params, cache, tokens[:, position], jnp.int32(position))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_later_tokens_do_not_change_the_cache_of_earlier_ones():
    params, tokens = float32_params(), tiny_tokens()
    _, cache = jax.jit(palm.prefill_step)(params, tokens)
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % TINY.vocab)
    _, other = jax.jit(palm.prefill_step)(params, changed)
    assert (cache["k"][:, :, :4] == other["k"][:, :, :4]).all()
    assert (cache["k"][:, :, 4] != other["k"][:, :, 4]).any()


@pytest.mark.long
def test_attention_sees_distances_not_positions():
    # Rotary positions: q at m and k at n meet only through m - n.
    q, k = jax.random.normal(jax.random.key(2), (2, TINY.d_head))
    positions = jnp.arange(300)
    cos, sin = palm.rotary(positions, TINY.d_head, jnp.dtype(jnp.float32))
    turned = [palm.rotate(x, cos, sin) for x in (q, k)]
    scores = turned[0] @ turned[1].T
    np.testing.assert_allclose(scores[257, 250], scores[7, 0], rtol=1e-3)
    assert abs(scores[257, 250] - scores[256, 250]) > 1e-3


@pytest.mark.long
def test_int8_is_close_to_bf16():
    tokens = tiny_tokens()
    prefill = jax.jit(palm.prefill_step)
    bf16, int8 = (np.asarray(prefill(tiny_params(weights), tokens)[0]) for weights in ("bf16", "int8"))
    assert bf16.dtype == int8.dtype == np.float32
    assert np.linalg.norm(int8 - bf16) < 0.03 * np.linalg.norm(bf16)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_workloads_run_and_decode_takes_its_cache(weights: str):
    prefill = palm.prefill("tiny", batch=2, length=9, weights=weights)
    params, tokens = tiny_params(weights), tiny_tokens()
    assert shapes(prefill.args) == shapes((params, tokens))
    _, cache = jax.jit(prefill.fn)(params, tokens)

    decode = palm.decode("tiny", batch=2, context=CONTEXT, weights=weights)
    cache = longer(cache)
    args = (params, cache, tokens[:, -1], jnp.int32(9))
    assert shapes(decode.args) == shapes(args)
    logits, new = jax.jit(decode.fn, donate_argnums=decode.donate_argnums)(*args)
    assert logits.shape == (2, TINY.vocab)
    assert logits.dtype == jnp.float32
    assert shapes(new) == shapes(palm.abstract_cache(TINY, 2, CONTEXT))
    assert cache["k"].is_deleted()
    assert cache["v"].is_deleted()


def test_depth_can_be_cut():
    args = palm.decode("540b", layers=8).args
    assert args[0]["layers"]["wq"].shape == (8, 18_432, 64, 256)
    assert args[1]["k"].shape == (8, 64, 2048, 256)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="The size must be one of 8b, 62b, 540b, 540b-multihead, 540b-serial, tiny, got '7b'"
    ):
        palm.decode("7b")
    with pytest.raises(ValueError, match="weights must be 'bf16' or 'int8', got 'fp8'"):
        palm.prefill("tiny", weights="fp8")
