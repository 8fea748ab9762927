"""Deep programs whose searches took minutes once: many unrolled layers that are not all alike.

Each is in plain JAX at published sizes; nothing is allocated. `search_times.py` measures them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload
from examples import llama, mla
from examples.llama import Params, feed_forward, logits, rms_norm
from examples.mixtral import dense_experts


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _step(batch: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and their position."""
    return jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)


# --- DeepSeek-V3: latent attention, a few dense layers, then mixtures of experts


DEEPSEEK_V3 = mla.Config(
    61, 7168, 128, 512, 128, 64, experts=256, chosen=8, d_expert=2048, d_shared=2048, vocab=129_280
)
"""DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), §4.2; queries are not compressed here."""
DENSE_LAYERS, D_DENSE = 3, 18_432


def _deepseek_step(params: Params, cache: Any, tokens: Array, position: Array, *, chosen: int) -> tuple[Array, Any]:
    def mixed(layer: Params, x: Array) -> Array:
        normed = rms_norm(x, layer["ffn_norm"])
        if "router" not in layer:
            return x + feed_forward(layer, normed)
        return mla.experts_half(layer, x, chosen, dense_experts)

    x, new_cache = params["embedding"][tokens], []
    for layer, entry in zip(params["layers"], cache, strict=True):
        x, entry = mla.cached_attention_half(layer, x, entry, position)
        x = mixed(layer, x)
        new_cache.append(entry)
    return logits(params, x), new_cache


def deepseek_v3(batch: int = 64, context: int = 4096, layers: int | None = None) -> Workload:
    """One decode step of DeepSeek-V3's shape, its layers unrolled."""
    c = DEEPSEEK_V3 if layers is None else replace(DEEPSEEK_V3, layers=layers)
    params = mla.abstract_params(c)
    experts = ("router", "w_gate", "w_up", "w_down", "shared_gate", "shared_up", "shared_down")
    dense = {
        **{name: leaf for name, leaf in params["layers"][0].items() if name not in experts},
        "w_gate": _bf16(c.d_model, D_DENSE),
        "w_up": _bf16(c.d_model, D_DENSE),
        "w_down": _bf16(D_DENSE, c.d_model),
    }
    params["layers"] = [dict(dense) if i < DENSE_LAYERS else layer for i, layer in enumerate(params["layers"])]
    entry = {"latent": _bf16(batch, context, c.latent), "rotated": _bf16(batch, context, c.d_rotated)}
    cache = [dict(entry) for _ in range(c.layers)]
    step = partial(_deepseek_step, chosen=c.chosen)
    return Workload(step, (params, cache, *_step(batch)), (1,), name="deepseek-v3-decode")


# --- Layers that alternate between local and global attention


@dataclass(frozen=True)
class _Attention:
    """How one kind of layer attends; `window` tokens of cache, all of them if 0."""

    heads: int
    kv_heads: int
    d_head: int
    window: int


LOCAL, GLOBAL = _Attention(32, 16, 128, 1024), _Attention(16, 8, 256, 0)
LOCAL_TO_GLOBAL = 5
"""Five local layers to one global: Gemma Team 2025, "Gemma 3 Technical Report" (arXiv 2503.19786), §2."""
D_MODEL, D_FF, VOCAB = 5376, 21_504, 262_144


def alternating(batch: int = 32, context: int = 8192, layers: int = 60) -> Workload:
    """One decode step of a dense model of the size of Gemma 3 27B, its layers unrolled."""
    kinds = [LOCAL if (i + 1) % (LOCAL_TO_GLOBAL + 1) else GLOBAL for i in range(layers)]

    def layer(kind: _Attention) -> Params:
        return {
            "attention_norm": _bf16(D_MODEL),
            "ffn_norm": _bf16(D_MODEL),
            "wq": _bf16(D_MODEL, kind.heads, kind.d_head),
            "wk": _bf16(D_MODEL, kind.kv_heads, kind.d_head),
            "wv": _bf16(D_MODEL, kind.kv_heads, kind.d_head),
            "wo": _bf16(kind.heads, kind.d_head, D_MODEL),
            "w_gate": _bf16(D_MODEL, D_FF),
            "w_up": _bf16(D_MODEL, D_FF),
            "w_down": _bf16(D_FF, D_MODEL),
        }

    def cache(kind: _Attention) -> Params:
        shape = (batch, kind.window or context, kind.kv_heads, kind.d_head)
        return {"k": _bf16(*shape), "v": _bf16(*shape)}

    params = {
        "embedding": _bf16(VOCAB, D_MODEL),
        "layers": [layer(kind) for kind in kinds],
        "norm": _bf16(D_MODEL),
        "head": _bf16(D_MODEL, VOCAB),
    }

    def step(params: Params, cache: Any, tokens: Array, position: Array) -> tuple[Array, Any]:
        x, new_cache = params["embedding"][tokens], []
        for layer, entry in zip(params["layers"], cache, strict=True):
            at = lax.rem(position, entry["k"].shape[1])  # a ring of the last tokens
            x, entry = llama.decode_layer(layer, x, entry, at)
            new_cache.append(entry)
        return logits(params, x), new_cache

    args = (params, [cache(kind) for kind in kinds], *_step(batch))
    return Workload(step, args, (1,), name="alternating-decode")


# --- Weights of one byte


def int8(size: str = "70b", batch: int = 64, context: int = 2048, layers: int | None = None) -> Workload:
    """One decode step of Llama 3, unrolled, with int8 weights and a scale per output column."""
    config = llama.config_of(size, layers)
    plain = llama.abstract_params(config, unrolled=True)

    def quantised(leaf: jax.ShapeDtypeStruct) -> Any:
        if math.prod(leaf.shape) == max(leaf.shape):
            return leaf
        return {"q": jax.ShapeDtypeStruct(leaf.shape, jnp.int8), "scale": _bf16(*leaf.shape[1:])}

    def is_quantised(tree: Any) -> bool:
        return isinstance(tree, dict) and set(tree) == {"q", "scale"}

    def plain_again(leaf: Any) -> Any:
        return leaf["q"].astype(jnp.bfloat16) * leaf["scale"] if is_quantised(leaf) else leaf

    def step(params: Params, cache: Any, tokens: Array, position: Array) -> tuple[Array, Any]:
        return llama.decode_step(jax.tree.map(plain_again, params, is_leaf=is_quantised), cache, tokens, position)

    params = {**plain, "layers": [jax.tree.map(quantised, layer) for layer in plain["layers"]]}
    cache = llama.abstract_cache(config, batch, context, unrolled=True)
    return Workload(step, (params, cache, *_step(batch)), (1,), name=f"llama-3-{size}-int8-decode")
