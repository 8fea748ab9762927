"""Mixtral 8×7B in plain JAX: a mixture of experts, without sharding code.

The model is that of Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088), §2: a Llama-like block whose feed-forward
half is eight of them, two for each token. There are three ways to compute it:

- `dense`: every expert processes every token, and all except two have weight 0. Decode loses nothing by that: a batch of any
  size needs every expert's weights, and reading them takes most of the time.
- `dispatch`: each expert gets a buffer of `capacity` tokens per group of tokens; matmuls with one-hot arrays move tokens
  there and back (GShard, Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1). If experts are
  sharded over chips, each of the two matmuls is an all-to-all: expert parallelism. Tokens skip experts with a full buffer.

- `ragged`: tokens are sorted by expert, and `lax.ragged_dot` multiplies the rows of each expert by its matrices. No token skips
  an expert. If experts are sharded over chips, each chip computes the rows of its own experts:
  of gathered tokens, or rows that other chips send.

Letters in shapes, beside those of `llama.py`: X experts, N experts of each token, G groups of S tokens, C capacity.

    autoshard search examples/mixtral.py:prefill --topology v5e:4x4 --set batch=16
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload
from examples import llama
from examples.llama import Params, random_matrix, rms_norm

GROUP = 256
"""Tokens that share the experts' buffers: the one-hot products cost GROUP × N × factor multiplications per number."""
CAPACITY_FACTOR = 1.25
"""Room in the buffers, as a multiple of what evenly spread tokens would take (Fedus et al. 2021, arXiv 2101.03961, §2.2)."""


MakeLayer = Callable[[Any, Array], Params]


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes of one Mixtral."""

    experts: int = 8
    chosen: int = 2


# Jiang et al. 2024, table 1; 8x22b: config.json of mistralai/Mixtral-8x22B-v0.1.
SIZES = {
    "8x7b": Config(layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8, vocab=32_000),
    "8x22b": Config(layers=56, d_model=6144, d_ff=16_384, heads=48, kv_heads=8, vocab=32_768),
    "tiny": Config(layers=2, d_model=64, d_ff=128, heads=8, kv_heads=4, d_head=16, vocab=128),
}


def config_of(size: str, layers: int | None = None) -> Config:
    """The published sizes of a Mixtral, cut to its first `layers` layers if that is given."""
    if size not in SIZES:
        raise ValueError(f"The size must be one of {', '.join(SIZES)}, got {size!r}.")
    return SIZES[size] if layers is None else replace(SIZES[size], layers=layers)


def init_layer(config: Config, key: Array) -> Params:
    """One layer's random parameters: Llama's, with a router, and the feed-forward matrices once per expert."""
    own, router, experts = jax.random.split(key, 3)
    layer = llama.init_layer(config, own)
    shapes = {name: layer.pop(name).shape for name in ("w_gate", "w_up", "w_down")}
    keys = jax.random.split(experts, len(shapes))
    each = {
        name: random_matrix(k, (config.experts, *shape), shape[0])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {**layer, **each, "router": random_matrix(router, (config.d_model, config.experts), config.d_model)}


def init_params(config: Config, key: Array, make_layer: MakeLayer | None = None) -> Params:
    """Random parameters; the layers as a list, each by `make_layer` (config, key), `init_layer` by default."""
    layer_key, rest = jax.random.split(key)
    layers = [(make_layer or init_layer)(config, k) for k in jax.random.split(layer_key, config.layers)]
    return {**llama.init_params(replace(config, layers=0), rest, unrolled=True), "layers": layers}


def abstract_params(config: Config, make_layer: MakeLayer | None = None) -> Params:
    """The shapes and dtypes of `init_params`; nothing is allocated."""
    one = jax.eval_shape(lambda: init_params(replace(config, layers=1), jax.random.key(0), make_layer))
    return {**one, "layers": [dict(one["layers"][0]) for _ in range(config.layers)]}


# --- The model


def routed(layer: Params, x: Array, chosen: int) -> tuple[Array, Array]:
    """Per token its experts `[..., N]` and their weights, which sum to 1."""
    logits = jnp.einsum("...e,ex->...x", x, layer["router"], preferred_element_type=jnp.float32)
    best, experts = lax.top_k(logits, chosen)
    return experts, jax.nn.softmax(best)


def dense_experts(layer: Params, x: Array, chosen: int) -> Array:
    """All experts on all tokens `[..., E]`, weighted."""
    experts, weights = routed(layer, x, chosen)
    count = layer["router"].shape[1]
    scale = jnp.sum(jax.nn.one_hot(experts, count) * weights[..., None], axis=-2)  # [..., X]
    gate = jnp.einsum("...e,xef->...xf", x, layer["w_gate"])
    hidden = jax.nn.silu(gate) * jnp.einsum("...e,xef->...xf", x, layer["w_up"])
    hidden = hidden * scale[..., None].astype(hidden.dtype)
    return jnp.einsum("...xf,xfe->...e", hidden, layer["w_down"])


def dispatched_experts(layer: Params, x: Array, chosen: int) -> Array:
    """Each expert on the tokens that chose it; `x` is `[B, T, E]`."""
    groups = x.reshape(-1, min(GROUP, x.shape[1]), x.shape[-1])  # [G, S, E]
    experts, weights = routed(layer, groups, chosen)
    put, fetch = places(experts, weights, layer["router"].shape[1], capacity(groups.shape[1], layer, chosen))
    inputs = jnp.einsum("gsxc,gse->xgce", put.astype(x.dtype), groups)
    gate = jnp.einsum("xgce,xef->xgcf", inputs, layer["w_gate"])
    hidden = jax.nn.silu(gate) * jnp.einsum("xgce,xef->xgcf", inputs, layer["w_up"])
    outputs = jnp.einsum("xgcf,xfe->xgce", hidden, layer["w_down"])
    return jnp.einsum("gsxc,xgce->gse", fetch.astype(x.dtype), outputs).reshape(x.shape)


def ragged_experts(layer: Params, x: Array, chosen: int) -> Array:
    """Each expert on the tokens `[..., E]` that chose it, sorted by expert."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, E]
    experts, weights = routed(layer, tokens, chosen)  # [T, N]
    order = jnp.argsort(experts.reshape(-1))  # [T N]
    sizes = jnp.bincount(experts.reshape(-1), length=layer["router"].shape[1]).astype(jnp.int32)  # [X]
    rows = tokens[order // chosen]
    hidden = jax.nn.silu(lax.ragged_dot(rows, layer["w_gate"], sizes)) * lax.ragged_dot(rows, layer["w_up"], sizes)
    outputs = lax.ragged_dot(hidden, layer["w_down"], sizes)
    weighted = outputs * weights.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(tokens).at[order // chosen].add(weighted).reshape(x.shape)


def capacity(tokens: int, layer: Params, chosen: int) -> int:
    """Tokens of a group for which an expert has room."""
    return max(chosen, int(CAPACITY_FACTOR * tokens * chosen / layer["router"].shape[1]))


def places(experts: Array, weights: Array, count: int, room: int) -> tuple[Array, Array]:
    """Where each token of a group goes, and with what weight it comes back: both `[G, S, X, C]`."""
    wanted = jax.nn.one_hot(experts, count, dtype=jnp.int32)  # [G, S, N, X]
    inorder = wanted.reshape(wanted.shape[0], -1, count)  # [G, S N, X]
    before = (jnp.cumsum(inorder, axis=1) - inorder).reshape(wanted.shape)  # those that came first
    place = jax.nn.one_hot(jnp.where(wanted > 0, before, -1), room)  # [G, S, N, X, C]; none where there is no room
    return jnp.sum(place, axis=2), jnp.sum(place * weights[..., None, None], axis=2)


def prefill_layer(layer: Params, x: Array, chosen: int, feed_forward: Any) -> tuple[Array, dict[str, Array]]:
    """One layer on `x` `[B, T, E]`, and the keys and values `[B, T, K, D]` that it leaves in the cache."""
    x, entry = llama.attention_half(layer, x)
    return x + feed_forward(layer, rms_norm(x, layer["ffn_norm"]), chosen), entry


def prefill_step(params: Params, tokens: Array, *, chosen: int, feed_forward: Any) -> tuple[Array, llama.Cache]:
    """The logits `[B, V]` that follow the last of `tokens` `[B, T]`, and the cache of them all."""
    x, cache = params["embedding"][tokens], []
    for layer in params["layers"]:
        x, entry = prefill_layer(layer, x, chosen, feed_forward)
        cache.append(entry)
    return llama.logits(params, x[:, -1]), cache


def decode_step(
    params: Params,
    cache: llama.Cache,
    tokens: Array,
    position: Array,
    *,
    chosen: int,
    feed_forward: Any = dense_experts,
) -> Any:
    """The logits `[B, V]` that follow `tokens` `[B]`, which stand at `position`, and the cache with them in it."""
    x, new_cache = params["embedding"][tokens], []
    for layer, entry in zip(params["layers"], cache, strict=True):
        x, entry = llama.cached_attention_half(layer, x, entry, position)
        x = x + feed_forward(layer, rms_norm(x, layer["ffn_norm"]), chosen)
        new_cache.append(entry)
    return llama.logits(params, x), new_cache


# --- Workloads

WAYS = {"dense": dense_experts, "dispatch": dispatched_experts, "ragged": ragged_experts}


def decode(
    size: str = "8x7b", batch: int = 64, context: int = 2048, layers: int | None = None, experts: str = "dense"
) -> Workload:
    """One decode step: a token for each of `batch` sequences against a cache of `context` tokens, which is donated.

    `experts` is "dense" or "ragged".
    """
    config = config_of(size, layers)
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    args = (abstract_params(config), llama.abstract_cache(config, batch, context, unrolled=True), tokens, position)
    step = partial(decode_step, chosen=config.chosen, feed_forward=WAYS[experts])
    return Workload(step, args, donate_argnums=(1,), name=f"mixtral-{size}-decode")


def prefill(
    size: str = "8x7b", batch: int = 16, length: int = 1024, layers: int | None = None, experts: str = "dispatch"
) -> Workload:
    """Prefill: `batch` prompts of `length` tokens into a fresh cache; `experts` is "dispatch", "dense" or "ragged"."""
    config = config_of(size, layers)
    args = (abstract_params(config), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    step = partial(prefill_step, chosen=config.chosen, feed_forward=WAYS[experts])
    return Workload(step, args, name=f"mixtral-{size}-prefill")
