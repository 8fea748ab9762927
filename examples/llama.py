"""Llama 3 8B, 70B and 405B in plain JAX: one decode step and prefill, without sharding code.

The model is that of Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv 2407.21783), §3.2: grouped-query
attention, SwiGLU, RMS norm before each of the two halves of a block, rotary positions, no biases, input and output
embeddings apart. Numbers are bf16; norm statistics, softmax and logits are float32.

The layers come in two forms. `unrolled=False` stacks them in one array per weight and scans over it; `unrolled=True`, the
form in which most checkpoints and frameworks have them, is a Python loop over a list of layers.

Letters in shapes: B batch, T new tokens, S tokens of context, L layers, E `d_model`, F `d_ff`, H query heads, K key and
value heads, G = H / K, D `d_head`, V vocabulary. `...` is `B` in decode and `B, T` in prefill.

    autoshard search examples/llama.py:decode --topology v5p:4x4x8 --set size=405b --set unrolled=true
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload

Params = dict[str, Any]  # nested; a leaf is an array or, in an abstract tree, a jax.ShapeDtypeStruct
Cache = Any  # stacked: {"k": [L, B, S, K, D], "v": ...}; unrolled: a list of {"k": [B, S, K, D], "v": ...}


@dataclass(frozen=True)
class Config:
    """The sizes of one Llama."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    d_head: int = 128
    vocab: int = 128_256


# Grattafiori et al. 2024, table 3.
SIZES = {
    "8b": Config(layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8),
    "70b": Config(layers=80, d_model=8192, d_ff=28_672, heads=64, kv_heads=8),
    "405b": Config(layers=126, d_model=16_384, d_ff=53_248, heads=128, kv_heads=8),
    "tiny": Config(layers=2, d_model=64, d_ff=128, heads=8, kv_heads=4, d_head=16, vocab=128),
}


def config_of(size: str, layers: int | None = None) -> Config:
    """The published sizes of a Llama 3, cut to its first `layers` layers if that is given."""
    if size not in SIZES:
        raise ValueError(f"The size must be one of {', '.join(SIZES)}, got {size!r}.")
    config = SIZES[size]
    return config if layers is None else replace(config, layers=layers)


# --- Parameters


def init_layer(config: Config, key: Array) -> Params:
    """One layer's random parameters: matrices from N(0, 1 / fan-in), norm scales 1."""
    E, F, H, K, D = config.d_model, config.d_ff, config.heads, config.kv_heads, config.d_head
    shapes = {  # name: (shape, how many leading axes the matrix product sums over)
        "wq": ((E, H, D), 1),
        "wk": ((E, K, D), 1),
        "wv": ((E, K, D), 1),
        "wo": ((H, D, E), 2),
        "w_gate": ((E, F), 1),
        "w_up": ((E, F), 1),
        "w_down": ((F, E), 1),
    }
    keys = jax.random.split(key, len(shapes))
    matrices = {
        name: random_matrix(matrix_key, shape, math.prod(shape[:summed]))
        for matrix_key, (name, (shape, summed)) in zip(keys, shapes.items(), strict=True)
    }
    return {**matrices, "attention_norm": jnp.ones((E,), jnp.bfloat16), "ffn_norm": jnp.ones((E,), jnp.bfloat16)}


def random_matrix(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5


def init_params(config: Config, key: Array, unrolled: bool = False) -> Params:
    """Random parameters; the layers as a list if `unrolled`, else stacked."""
    layer_key, embedding_key, head_key = jax.random.split(key, 3)
    keys = jax.random.split(layer_key, config.layers)
    each = [init_layer(config, k) for k in keys] if unrolled else jax.vmap(lambda k: init_layer(config, k))(keys)
    return {
        "embedding": random_matrix(embedding_key, (config.vocab, config.d_model), 1),
        "layers": each,
        "norm": jnp.ones((config.d_model,), jnp.bfloat16),
        "head": random_matrix(head_key, (config.d_model, config.vocab), config.d_model),
    }


def abstract_params(config: Config, unrolled: bool = False) -> Params:
    """The shapes and dtypes of `init_params`; nothing is allocated."""
    one = jax.eval_shape(lambda: init_params(replace(config, layers=1), jax.random.key(0), unrolled=True))
    layer = one["layers"][0]
    if unrolled:
        return {**one, "layers": [dict(layer) for _ in range(config.layers)]}
    stacked = {name: jax.ShapeDtypeStruct((config.layers, *leaf.shape), leaf.dtype) for name, leaf in layer.items()}
    return {**one, "layers": stacked}


def abstract_cache(config: Config, batch: int, context: int, unrolled: bool = False) -> Cache:
    """The shapes and dtypes of a key-value cache for `context` tokens."""
    shape = (batch, context, config.kv_heads, config.d_head)
    if unrolled:
        entry = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        return [{"k": entry, "v": entry} for _ in range(config.layers)]
    entry = jax.ShapeDtypeStruct((config.layers, *shape), jnp.bfloat16)
    return {"k": entry, "v": entry}


# --- The model


def decode_step(params: Params, cache: Cache, tokens: Array, position: Array) -> tuple[Array, Cache]:
    """The logits `[B, V]` that follow `tokens` `[B]`, which stand at `position`, and the cache with them in it."""
    x = params["embedding"][tokens]  # [B, E]
    if isinstance(params["layers"], list):
        new_cache = []
        for layer, entry in zip(params["layers"], cache, strict=True):
            x, entry = decode_layer(layer, x, entry, position)
            new_cache.append(entry)
        return logits(params, x), new_cache

    def layer_step(x, scanned):
        layer, entry = scanned
        return decode_layer(layer, x, entry, position)

    x, cache = lax.scan(layer_step, x, (params["layers"], cache))
    return logits(params, x), cache


def decode_layer(layer: Params, x: Array, cache: dict[str, Array], position: Array) -> tuple[Array, dict[str, Array]]:
    """One layer on `x` `[B, E]` with its own cache `[B, S, K, D]`."""
    x, cache = cached_attention_half(layer, x, cache, position)
    return x + feed_forward(layer, rms_norm(x, layer["ffn_norm"])), cache


def cached_attention_half(
    layer: Params, x: Array, cache: dict[str, Array], position: Array
) -> tuple[Array, dict[str, Array]]:
    """The first half of `decode_layer`."""
    normed = rms_norm(x, layer["attention_norm"])
    q, k, v = queries_keys_values(layer, normed, position)  # [B, H, D], 2 × [B, K, D]
    new = {"k": k, "v": v}
    at = (0, position, 0, 0)
    cache = {name: lax.dynamic_update_slice(cache[name], new[name][:, None], at) for name in cache}
    visible = jnp.arange(cache["k"].shape[1]) <= position  # [S]
    return x + jnp.einsum("bhd,hde->be", attend(q, cache["k"], cache["v"], visible), layer["wo"]), cache


def prefill_step(params: Params, tokens: Array) -> tuple[Array, Cache]:
    """The logits `[B, V]` that follow the last of `tokens` `[B, T]`, and the cache of them all."""
    x = params["embedding"][tokens]  # [B, T, E]
    if isinstance(params["layers"], list):
        cache = []
        for layer in params["layers"]:
            x, entry = prefill_layer(layer, x)
            cache.append(entry)
    else:
        x, cache = lax.scan(lambda x, layer: prefill_layer(layer, x), x, params["layers"])
    return logits(params, x[:, -1]), cache


def prefill_layer(layer: Params, x: Array) -> tuple[Array, dict[str, Array]]:
    """One layer on `x` `[B, T, E]`, and the keys and values `[B, T, K, D]` that it leaves in the cache."""
    x, entry = attention_half(layer, x)
    return x + feed_forward(layer, rms_norm(x, layer["ffn_norm"])), entry


def attention_half(layer: Params, x: Array) -> tuple[Array, dict[str, Array]]:
    """The first half of `prefill_layer`."""
    positions = jnp.arange(x.shape[1])
    normed = rms_norm(x, layer["attention_norm"])
    q, k, v = queries_keys_values(layer, normed, positions[:, None])  # [B, T, H, D], 2 × [B, T, K, D]
    visible = positions[:, None, None, None] >= positions  # [T, 1, 1, S]: causal
    return x + jnp.einsum("bthd,hde->bte", attend(q, k, v, visible), layer["wo"]), {"k": k, "v": v}


def queries_keys_values(layer: Params, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries `[..., H, D]`, scaled by $1/\\sqrt D$, keys and values `[..., K, D]`."""
    q = rotate(jnp.einsum("...e,ehd->...hd", x, layer["wq"]), positions)
    k = rotate(jnp.einsum("...e,ekd->...kd", x, layer["wk"]), positions)
    return q * q.shape[-1] ** -0.5, k, jnp.einsum("...e,ekd->...kd", x, layer["wv"])


def attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Grouped-query attention: `q` `[B, ..., H, D]` over `k` and `v` `[B, S, K, D]`, G query heads to each of theirs."""
    grouped = q.reshape(*q.shape[:-2], k.shape[2], -1, q.shape[-1])  # [B, ..., K, G, D]
    scores = jnp.einsum("b...kgd,bskd->b...kgs", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("b...kgs,bskd->b...kgd", weights, v).reshape(q.shape)


def feed_forward(layer: Params, x: Array) -> Array:
    gate = jnp.einsum("...e,ef->...f", x, layer["w_gate"])
    up = jnp.einsum("...e,ef->...f", x, layer["w_up"])
    return jnp.einsum("...f,fe->...e", jax.nn.silu(gate) * up, layer["w_down"])


def rms_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + 1e-5)).astype(x.dtype) * scale


def rotate(x: Array, positions: Array) -> Array:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) with base 500,000; `positions` broadcasts over `x[..., 0]`."""
    # Angles in float32: bf16 has 8 bits and would make position 257 the same as 256.
    half = x.shape[-1] // 2
    frequencies = 500_000.0 ** (-jnp.arange(half).astype(jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def logits(params: Params, x: Array) -> Array:
    """float32 logits `[B, V]` of `x` `[B, E]`."""
    normed = rms_norm(x, params["norm"])
    return jnp.einsum("be,ev->bv", normed, params["head"], preferred_element_type=jnp.float32)


# --- Workloads


def decode(
    size: str = "70b", batch: int = 64, context: int = 2048, unrolled: bool = False, layers: int | None = None
) -> Workload:
    """One decode step: a token for each of `batch` sequences against a cache of `context` tokens, which is donated."""
    config = config_of(size, layers)
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    cache = abstract_cache(config, batch, context, unrolled)
    args = (abstract_params(config, unrolled), cache, tokens, position)
    return Workload(decode_step, args, donate_argnums=(1,), name=f"llama-3-{size}-decode")


def prefill(
    size: str = "70b", batch: int = 1, length: int = 2048, unrolled: bool = False, layers: int | None = None
) -> Workload:
    """Prefill: `batch` prompts of `length` tokens into a fresh cache."""
    config = config_of(size, layers)
    args = (abstract_params(config, unrolled), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    return Workload(prefill_step, args, name=f"llama-3-{size}-prefill")
