"""DeepSeek-V2 in plain JAX: multi-head latent attention and many small experts, without sharding code.

The model is that of DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), §2, in the form of its Lite version, which does not
compress queries. One latent vector per token gives the keys and values of all heads; the cache holds that vector and one
rotated key for all heads. In decode the key and value matrices are absorbed into the queries and the output (§2.1.2), so
attention is over the latents themselves. Besides the routed experts, those of `mixtral.py`, there are shared ones: here one
wider feed-forward block.

Letters in shapes, beside those of `mixtral.py`: H heads, L the latent's size, D the size of a head, R of its rotated part.

    autoshard search examples/mla.py:decode --topology v5e:4x4 --set batch=64
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload
from examples.llama import Params, feed_forward, logits, random_matrix, rms_norm, rotate
from examples.mixtral import dense_experts, dispatched_experts


@dataclass(frozen=True)
class Config:
    """The sizes of one DeepSeek-V2; `d_shared` is the width of its shared experts together."""

    layers: int
    d_model: int
    heads: int
    latent: int
    d_head: int
    d_rotated: int
    experts: int
    chosen: int
    d_expert: int
    d_shared: int
    vocab: int = 102_400


# DeepSeek-AI 2024, appendix B; its first layer, which has no experts, is left out.
SIZES = {
    "lite": Config(26, 2048, 16, 512, 128, 64, experts=64, chosen=6, d_expert=1408, d_shared=2816),
    "tiny": Config(2, 64, 8, 32, 16, 8, experts=8, chosen=2, d_expert=32, d_shared=64, vocab=128),
}


def config_of(size: str, layers: int | None = None) -> Config:
    """The published sizes of a DeepSeek-V2, cut to its first `layers` layers if that is given."""
    if size not in SIZES:
        raise ValueError(f"The size must be one of {', '.join(SIZES)}, got {size!r}.")
    return SIZES[size] if layers is None else replace(SIZES[size], layers=layers)


def init_layer(c: Config, key: Array) -> Params:
    """One layer's random parameters: matrices from N(0, 1 / fan-in), norm scales 1."""
    E, H, L, D, R, X = c.d_model, c.heads, c.latent, c.d_head, c.d_rotated, c.experts
    shapes = {  # name: (shape, the axes that the matrix product sums over)
        "wq": ((E, H, D), (0,)),
        "wq_rotated": ((E, H, R), (0,)),
        "w_latent": ((E, L), (0,)),
        "wk_rotated": ((E, R), (0,)),
        "wk": ((L, H, D), (0,)),
        "wv": ((L, H, D), (0,)),
        "wo": ((H, D, E), (0, 1)),
        "router": ((E, X), (0,)),
        "w_gate": ((X, E, c.d_expert), (1,)),
        "w_up": ((X, E, c.d_expert), (1,)),
        "w_down": ((X, c.d_expert, E), (1,)),
        "shared_gate": ((E, c.d_shared), (0,)),
        "shared_up": ((E, c.d_shared), (0,)),
        "shared_down": ((c.d_shared, E), (0,)),
    }
    matrices = {
        name: random_matrix(jax.random.fold_in(key, i), shape, math.prod(shape[axis] for axis in summed))
        for i, (name, (shape, summed)) in enumerate(shapes.items())
    }
    norms = {"attention_norm": (E,), "ffn_norm": (E,), "latent_norm": (L,)}
    return {**matrices, **{name: jnp.ones(shape, jnp.bfloat16) for name, shape in norms.items()}}


def init_params(config: Config, key: Array) -> Params:
    """Random parameters; the layers as a list."""
    keys = jax.random.split(key, config.layers + 2)
    return {
        "embedding": random_matrix(keys[0], (config.vocab, config.d_model), 1),
        "layers": [init_layer(config, k) for k in keys[2:]],
        "norm": jnp.ones((config.d_model,), jnp.bfloat16),
        "head": random_matrix(keys[1], (config.d_model, config.vocab), config.d_model),
    }


def abstract_params(config: Config) -> Params:
    """The shapes and dtypes of `init_params`; nothing is allocated."""
    one = jax.eval_shape(lambda: init_params(replace(config, layers=1), jax.random.key(0)))
    return {**one, "layers": [dict(one["layers"][0]) for _ in range(config.layers)]}


# --- The model


def latents(layer: Params, x: Array, positions: Array) -> dict[str, Array]:
    """The cache entries of tokens `[..., E]`: latents `[..., L]` and rotated keys `[..., R]`."""
    latent = rms_norm(jnp.einsum("...e,el->...l", x, layer["w_latent"]), layer["latent_norm"])
    return {"latent": latent, "rotated": rotate(jnp.einsum("...e,er->...r", x, layer["wk_rotated"]), positions)}


def experts_half(layer: Params, x: Array, chosen: int, routed: Any) -> Array:
    """Shared and routed experts, added to `x`."""
    normed = rms_norm(x, layer["ffn_norm"])
    shared = {name: layer[f"shared_{name[2:]}"] for name in ("w_gate", "w_up", "w_down")}
    return x + feed_forward(shared, normed) + routed(layer, normed, chosen)


def attended(layer: Params, scores: Array, visible: Array) -> Array:
    """Attention weights of float32 scores, in bf16."""
    scale = (layer["wq"].shape[-1] + layer["wq_rotated"].shape[-1]) ** -0.5
    return jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf)).astype(jnp.bfloat16)


def decode_layer(layer: Params, x: Array, cache: Params, position: Array, chosen: int) -> tuple[Array, Params]:
    """One layer on `x` `[B, E]` with its own cache of latents `[B, S, L]` and rotated keys `[B, S, R]`."""
    x, cache = cached_attention_half(layer, x, cache, position)
    return experts_half(layer, x, chosen, dense_experts), cache


def cached_attention_half(layer: Params, x: Array, cache: Params, position: Array) -> tuple[Array, Params]:
    """The first half of `decode_layer`."""
    normed = rms_norm(x, layer["attention_norm"])
    new = latents(layer, normed, position)
    cache = {name: lax.dynamic_update_slice(cache[name], new[name][:, None], (0, position, 0)) for name in cache}
    absorbed = jnp.einsum("bhd,lhd->bhl", jnp.einsum("be,ehd->bhd", normed, layer["wq"]), layer["wk"])
    rotated = rotate(jnp.einsum("be,ehr->bhr", normed, layer["wq_rotated"]), position)
    f32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bhl,bsl->bhs", absorbed, cache["latent"], **f32)
    scores = scores + jnp.einsum("bhr,bsr->bhs", rotated, cache["rotated"], **f32)
    weights = attended(layer, scores, jnp.arange(scores.shape[-1]) <= position)
    values = jnp.einsum("bhl,lhd->bhd", jnp.einsum("bhs,bsl->bhl", weights, cache["latent"]), layer["wv"])
    return x + jnp.einsum("bhd,hde->be", values, layer["wo"]), cache


def prefill_layer(layer: Params, x: Array, chosen: int) -> tuple[Array, Params]:
    """One layer on `x` `[B, T, E]`, and the latents and rotated keys that it leaves in the cache."""
    positions = jnp.arange(x.shape[1])
    normed = rms_norm(x, layer["attention_norm"])
    entry = latents(layer, normed, positions)
    keys = jnp.einsum("bsl,lhd->bshd", entry["latent"], layer["wk"])
    queries = jnp.einsum("bte,ehd->bthd", normed, layer["wq"])
    rotated = rotate(jnp.einsum("bte,ehr->bthr", normed, layer["wq_rotated"]), positions[:, None])
    f32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys, **f32)
    scores = scores + jnp.einsum("bthr,bsr->bhts", rotated, entry["rotated"], **f32)
    weights = attended(layer, scores, positions[:, None] >= positions)
    values = jnp.einsum("bhts,bshd->bthd", weights, jnp.einsum("bsl,lhd->bshd", entry["latent"], layer["wv"]))
    x = x + jnp.einsum("bthd,hde->bte", values, layer["wo"])
    return experts_half(layer, x, chosen, dispatched_experts), entry


def decode_step(params: Params, cache: Any, tokens: Array, position: Array, *, chosen: int) -> tuple[Array, Any]:
    """The logits `[B, V]` that follow `tokens` `[B]`, which stand at `position`, and the cache with them in it."""
    x, new_cache = params["embedding"][tokens], []
    for layer, entry in zip(params["layers"], cache, strict=True):
        x, entry = decode_layer(layer, x, entry, position, chosen)
        new_cache.append(entry)
    return logits(params, x), new_cache


def prefill_step(params: Params, tokens: Array, *, chosen: int) -> tuple[Array, Any]:
    """The logits `[B, V]` that follow the last of `tokens` `[B, T]`, and the cache of them all."""
    x, cache = params["embedding"][tokens], []
    for layer in params["layers"]:
        x, entry = prefill_layer(layer, x, chosen)
        cache.append(entry)
    return logits(params, x[:, -1]), cache


# --- Workloads


def decode(size: str = "lite", batch: int = 64, context: int = 2048, layers: int | None = None) -> Workload:
    """One decode step: a token for each of `batch` sequences against a cache of `context` tokens, which is donated."""
    c = config_of(size, layers)
    sizes = {"latent": c.latent, "rotated": c.d_rotated}
    cache = [
        {name: jax.ShapeDtypeStruct((batch, context, n), jnp.bfloat16) for name, n in sizes.items()}
        for _ in range(c.layers)
    ]
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    step = partial(decode_step, chosen=c.chosen)
    return Workload(step, (abstract_params(c), cache, tokens, position), (1,), name=f"deepseek-v2-{size}-decode")


def prefill(size: str = "lite", batch: int = 16, length: int = 1024, layers: int | None = None) -> Workload:
    """Prefill: `batch` prompts of `length` tokens into a fresh cache."""
    c = config_of(size, layers)
    args = (abstract_params(c), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    return Workload(partial(prefill_step, chosen=c.chosen), args, name=f"deepseek-v2-{size}-prefill")
