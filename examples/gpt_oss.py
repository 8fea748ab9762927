"""gpt-oss 20B and 120B in plain JAX: a mixture of experts with attention sinks and sliding windows, without sharding code.

The model is that of OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv 2508.10925), §2, and of the `config.json` of
openai/gpt-oss-20b and -120b. A block is like Mixtral's, but

- the softmax of attention has one more term in its sum, a learned logit per head: the sink;
- every other layer, from the first one on, sees the last `window` positions only, and its cache has no others;
- all matrices of a layer have biases, those of the experts, too;
- an expert's gate and values are clipped, and its values get 1 added to them.

Rotary positions are those of `llama.py`, not YaRN's. Weights are bf16, not MXFP4.

Letters in shapes are those of `llama.py` and `mixtral.py`; W is the window. A layer's cache has S positions, or W if it has a
window and W < S: position p is at p mod W.

    autoshard search examples/gpt_oss.py:decode --topology v5e:4x4
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload
from examples import llama, mixtral
from examples.llama import Params, random_matrix, rms_norm, rotate

LIMIT = 7.0
"""Bound of an expert's gate from above, and of its values on both sides (`swiglu_limit` of config.json)."""
SLOPE = 1.702
"""The gate's sigmoid is that of `SLOPE` times it (model card, §2.2, and openai/gpt-oss)."""


@dataclass(frozen=True)
class Config(mixtral.Config):
    """The sizes of one gpt-oss."""

    window: int = 128


SIZES = {
    "20b": Config(24, 2880, 2880, 64, 8, 64, 201_088, experts=32, chosen=4),
    "120b": Config(36, 2880, 2880, 64, 8, 64, 201_088, experts=128, chosen=4),
    "tiny": Config(2, 64, 64, 8, 4, 16, 128, experts=8, chosen=2, window=4),
}


def config_of(size: str, layers: int | None = None) -> Config:
    """The published sizes of a gpt-oss, cut to its first `layers` layers if that is given."""
    if size not in SIZES:
        raise ValueError(f"The size must be one of {', '.join(SIZES)}, got {size!r}.")
    return SIZES[size] if layers is None else replace(SIZES[size], layers=layers)


def windows(config: Config) -> list[int | None]:
    """The window of each layer; None for a layer that sees all positions."""
    return [None if layer % 2 else config.window for layer in range(config.layers)]


def init_layer(config: Config, key: Array) -> Params:
    """One layer's random parameters: Mixtral's, with biases and the sinks `[H]`."""
    own, biases = jax.random.split(key)
    E, F, H, K, D, X = config.d_model, config.d_ff, config.heads, config.kv_heads, config.d_head, config.experts
    shapes = {"bq": (H, D), "bk": (K, D), "bv": (K, D), "bo": (E,), "sinks": (H,), "router_bias": (X,)}
    shapes |= {"b_gate": (X, F), "b_up": (X, F), "b_down": (X, E)}
    keys = jax.random.split(biases, len(shapes))
    each = {name: random_matrix(k, shape, 1) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {**mixtral.init_layer(config, own), **each}


init_params = partial(mixtral.init_params, make_layer=init_layer)
abstract_params = partial(mixtral.abstract_params, make_layer=init_layer)


def abstract_cache(config: Config, batch: int, context: int) -> llama.Cache:
    """The shapes and dtypes of a key-value cache for `context` tokens, of which a layer with a window keeps the last ones."""
    found = []
    for window in windows(config):
        length = context if window is None else min(window, context)
        entry = jax.ShapeDtypeStruct((batch, length, config.kv_heads, config.d_head), jnp.bfloat16)
        found.append({"k": entry, "v": entry})
    return found


# --- The model


def attend(q: Array, k: Array, v: Array, visible: Array, sinks: Array) -> Array:
    """`llama.attend`, with the sinks `[H]` in the sums of the softmax, to which they bring no value."""
    grouped = q.reshape(*q.shape[:-2], k.shape[2], -1, q.shape[-1])  # [B, ..., K, G, D]
    scores = jnp.einsum("b...kgd,bskd->b...kgs", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, -jnp.inf)
    sink = sinks.reshape(*grouped.shape[-3:-1], 1).astype(jnp.float32)  # [K, G, 1]
    most = lax.stop_gradient(jnp.maximum(jnp.max(scores, -1, keepdims=True), sink))
    weights = jnp.exp(scores - most)
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + jnp.exp(sink - most))
    return jnp.einsum("b...kgs,bskd->b...kgd", weights.astype(v.dtype), v).reshape(q.shape)


def queries_keys_values(layer: Params, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Those of `llama.py`, with biases."""
    q = rotate(jnp.einsum("...e,ehd->...hd", x, layer["wq"]) + layer["bq"], positions)
    k = rotate(jnp.einsum("...e,ekd->...kd", x, layer["wk"]) + layer["bk"], positions)
    return q * q.shape[-1] ** -0.5, k, jnp.einsum("...e,ekd->...kd", x, layer["wv"]) + layer["bv"]


def experts(layer: Params, x: Array, chosen: int) -> Array:
    """Each expert on the tokens `[..., E]` that chose it, sorted by expert."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, E]
    logits = jnp.einsum("te,ex->tx", tokens, layer["router"], preferred_element_type=jnp.float32)
    best, which = lax.top_k(logits + layer["router_bias"].astype(jnp.float32), chosen)
    order = jnp.argsort(which.reshape(-1))  # [T N]
    of, weights = which.reshape(-1)[order], jax.nn.softmax(best).reshape(-1)[order]
    sizes = jnp.bincount(of, length=layer["router"].shape[1]).astype(jnp.int32)  # [X]
    rows = tokens[order // chosen]
    gate = jnp.minimum(lax.ragged_dot(rows, layer["w_gate"], sizes) + layer["b_gate"][of], LIMIT)
    up = jnp.clip(lax.ragged_dot(rows, layer["w_up"], sizes) + layer["b_up"][of], -LIMIT, LIMIT)
    hidden = gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)
    outputs = lax.ragged_dot(hidden, layer["w_down"], sizes) + layer["b_down"][of]
    weighted = outputs * weights[:, None].astype(x.dtype)
    return jnp.zeros_like(tokens).at[order // chosen].add(weighted).reshape(x.shape)


def prefill_layer(layer: Params, x: Array, chosen: int, window: int | None) -> tuple[Array, dict[str, Array]]:
    """One layer on `x` `[B, T, E]`, and the keys and values `[B, T or W, K, D]` that it leaves in the cache."""
    positions = jnp.arange(x.shape[1])
    q, k, v = queries_keys_values(layer, rms_norm(x, layer["attention_norm"]), positions[:, None])
    ahead = positions[:, None, None, None] - positions  # [T, 1, 1, S]
    visible = ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
    x = x + jnp.einsum("bthd,hde->bte", attend(q, k, v, visible, layer["sinks"]), layer["wo"]) + layer["bo"]
    return x + experts(layer, rms_norm(x, layer["ffn_norm"]), chosen), {"k": kept(k, window), "v": kept(v, window)}


def kept(entry: Array, window: int | None) -> Array:
    """The last positions of `entry` `[B, T, K, D]`, each in its place in the cache."""
    length = entry.shape[1]
    if window is None or length <= window:
        return entry
    return jnp.roll(entry[:, length - window :], length % window, axis=1)


def prefill_step(params: Params, tokens: Array, *, config: Config) -> tuple[Array, llama.Cache]:
    """The logits `[B, V]` that follow the last of `tokens` `[B, T]`, and the cache of them all."""
    x, cache = params["embedding"][tokens], []
    for layer, window in zip(params["layers"], windows(config), strict=True):
        x, entry = prefill_layer(layer, x, config.chosen, window)
        cache.append(entry)
    return llama.logits(params, x[:, -1]), cache


def decode_layer(layer: Params, x: Array, cache: dict[str, Array], position: Array, chosen: int) -> Any:
    """One layer on `x` `[B, E]` with its own cache `[B, S or W, K, D]`, of which a window overwrites its oldest position."""
    q, k, v = queries_keys_values(layer, rms_norm(x, layer["attention_norm"]), position)
    length = cache["k"].shape[1]
    at = (0, position % length, 0, 0)
    cache = {name: lax.dynamic_update_slice(cache[name], new[:, None], at) for name, new in (("k", k), ("v", v))}
    visible = jnp.arange(length) <= position  # [S]; all of a window that is full
    attended = attend(q, cache["k"], cache["v"], visible, layer["sinks"])
    x = x + jnp.einsum("bhd,hde->be", attended, layer["wo"]) + layer["bo"]
    return x + experts(layer, rms_norm(x, layer["ffn_norm"]), chosen), cache


def decode_step(params: Params, cache: llama.Cache, tokens: Array, position: Array, *, chosen: int) -> Any:
    """The logits `[B, V]` that follow `tokens` `[B]`, which stand at `position`, and the cache with them in it."""
    x, new_cache = params["embedding"][tokens], []
    for layer, entry in zip(params["layers"], cache, strict=True):
        x, entry = decode_layer(layer, x, entry, position, chosen)
        new_cache.append(entry)
    return llama.logits(params, x), new_cache


# --- Workloads


def decode(size: str = "20b", batch: int = 64, context: int = 2048, layers: int | None = None) -> Workload:
    """One decode step: a token for each of `batch` sequences against a cache of `context` tokens, which is donated."""
    config = config_of(size, layers)
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    args = (abstract_params(config), abstract_cache(config, batch, context), tokens, position)
    step = partial(decode_step, chosen=config.chosen)
    return Workload(step, args, donate_argnums=(1,), name=f"gpt-oss-{size}-decode")


def prefill(size: str = "20b", batch: int = 8, length: int = 1024, layers: int | None = None) -> Workload:
    """Prefill: `batch` prompts of `length` tokens into a fresh cache."""
    config = config_of(size, layers)
    args = (abstract_params(config), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    return Workload(partial(prefill_step, config=config), args, name=f"gpt-oss-{size}-prefill")
