"""Programs as other people write them, with the names of their dimensions, for comparison with experts' own rules.

Each takes its published sizes, cut to a few layers, and the spelling of public JAX code: stacks of weights along their
second dimension, caches in lists, as `xs` and `ys` or in the carry, with heads, the sequence or the batch first, two caches
joined by their softmax statistics, repeated key and value heads, fused projections, biases, windows, soft caps. Nothing here
names a mesh axis. `rules` are the rule sets that its authors use for the phase.

Letters in shapes: B batch, T new tokens, S tokens of context, L layers, E model, F feed-forward, H query heads, K key and
value heads, G = H / K, D head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard import Workload
from benchmarks.logical_axes import SERVING, Named, RuleSet, abstract, constrain

MASKED = -2.3819763e38


@dataclass(frozen=True)
class Program:
    """A function, its arguments with the names of their dimensions, and the rules of its authors."""

    fn: Callable[..., Any]
    named: tuple[Any, ...]
    donate_argnums: tuple[int, ...]
    rules: tuple[RuleSet, ...] = SERVING

    @property
    def workload(self) -> Workload:
        """The function and abstract arguments, for a search."""
        return Workload(self.fn, abstract(self.named), donate_argnums=self.donate_argnums)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder."""

    E: int
    F: int
    H: int
    K: int
    D: int
    V: int
    layers: int = 2


LLAMA_1B = Sizes(2048, 8192, 32, 8, 64, 128_256)
LLAMA_8B = Sizes(4096, 14_336, 32, 8, 128, 128_256)
LLAMA_70B = Sizes(8192, 28_672, 64, 8, 128, 128_256)
LLAMA2_7B = Sizes(4096, 11_008, 32, 32, 128, 32_000)
MISTRAL_7B = Sizes(4096, 14_336, 32, 8, 128, 32_000)
GEMMA2_9B = Sizes(3584, 14_336, 16, 8, 256, 256_000)
QWEN2_7B = Sizes(3584, 18_944, 28, 4, 128, 152_064)
QWEN3_8B = Sizes(4096, 12_288, 32, 8, 128, 151_936)


# --- what all of them share


def rms(x: Any, scale: Any) -> Any:
    """Root mean square norm in float32."""
    wide = x.astype(jnp.float32)
    return (scale * wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rope(x: Any, positions: Any) -> Any:
    """Rotary positions `[B, T]` of `x` `[B, T, N, D]`, computed in the step."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] / 1e6 ** (jnp.arange(half, dtype=jnp.float32) / half)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def gated(x: Any, layer: Any) -> Any:
    """SwiGLU of `x` `[B, T, E]`."""
    hidden = constrain(jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"]), "batch length act_mlp")
    return constrain(hidden @ layer["down"], "batch length act_embed")


def grouped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Attention of `q` `[B, T, H, D]` over `k`, `v` `[B, S, K, D]`; `mask` broadcasts to `[B, H, T, S]`."""
    b, t, h, d = q.shape
    kh = k.shape[2]
    scores = jnp.einsum("BTHGD,BSHD->BHGTS", q.reshape(b, t, kh, h // kh, d), k) * d**-0.5
    scores = jnp.where(mask, scores.reshape(b, h, t, -1), MASKED)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(k.dtype).reshape(b, kh, h // kh, t, -1)
    return jnp.einsum("BHGTS,BSHD->BTHGD", weights, v).reshape(b, t, h, d)


def repeated(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Attention of `q` `[B, H, T, D]` over `k`, `v` `[B, K, S, D]`, whose heads are repeated."""
    k, v = (jnp.repeat(each, q.shape[1] // each.shape[1], axis=1) for each in (k, v))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v)


def feed_forward(n: Sizes) -> dict[str, Named]:
    """The matrices of `gated`, and the norms of a layer."""
    return {
        "gate": Named((n.E, n.F), "embed mlp"),
        "up": Named((n.E, n.F), "embed mlp"),
        "down": Named((n.F, n.E), "mlp embed"),
        "norm1": Named((n.E,), "norm"),
        "norm2": Named((n.E,), "norm"),
    }


def attention(n: Sizes) -> dict[str, Named]:
    """Projections with heads apart."""
    return {
        "q": Named((n.E, n.H, n.D), "embed q_heads -"),
        "k": Named((n.E, n.K, n.D), "embed kv_heads -"),
        "v": Named((n.E, n.K, n.D), "embed kv_heads -"),
        "o": Named((n.H, n.D, n.E), "q_heads - embed"),
    }


def model(n: Sizes, layers: Any, tied: bool = False) -> dict[str, Any]:
    """Embeddings around layers."""
    head = {} if tied else {"head": Named((n.E, n.V), "embed vocab")}
    table = Named((n.V, n.E), "vocab_in embed")
    return {"table": table, "layers": layers, "norm": Named((n.E,), "norm"), **head}


def token(batch: int) -> tuple[Named, Named]:
    """Tokens and positions of a decode step."""
    return Named((batch, 1), "batch -", jnp.int32), Named((batch, 1), "batch -", jnp.int32)


def embedded(params: Any, tokens: Any) -> Any:
    """`[B, T, E]`."""
    return constrain(params["table"][tokens], "batch length act_embed")


def read_out(params: Any, x: Any) -> Any:
    """Logits `[B, T, V]`."""
    return constrain(rms(x, params["norm"]) @ params["head"], "batch length act_vocab")


def projected(layer: Any, x: Any, positions: Any) -> tuple[Any, Any, Any]:
    """Queries, keys and values `[B, T, N, D]`."""
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, layer[name]) for name in "qkv")
    q = constrain(q, "batch length act_heads -")
    k, v = (constrain(each, "batch length act_kv_heads -") for each in (k, v))
    return rope(q, positions), rope(k, positions), v


def projected_back(layer: Any, attended: Any) -> Any:
    """`[B, T, E]`."""
    return constrain(jnp.einsum("BTNH,NHD->BTD", attended, layer["o"]), "batch length act_embed")


# --- decode: a list of layers, caches in a dictionary, the mask an argument (as in tunix)


def listed_step(params: Any, cache: Any, tokens: Any, positions: Any, mask: Any) -> Any:
    """Caches `[B, S, K, D]` with the index of their end, for each layer."""
    x, new = embedded(params, tokens), {}
    for i, layer in enumerate(params["layers"]):
        entry = cache[f"layer_{i}"]
        q, k, v = projected(layer, rms(x, layer["norm1"]), positions)
        at = (0, entry["end"][0] % entry["k"].shape[1], 0, 0)
        k, v = lax.dynamic_update_slice(entry["k"], k, at), lax.dynamic_update_slice(entry["v"], v, at)
        x = x + projected_back(layer, grouped(q, k, v, mask[:, None]))
        x = x + gated(rms(x, layer["norm2"]), layer)
        new[f"layer_{i}"] = {"k": k, "v": v, "end": entry["end"] + 1}
    return read_out(params, x), new


def listed(n: Sizes = LLAMA_8B, batch: int = 32, context: int = 2048) -> Program:
    """A decode step of tunix's form."""
    held = Named((batch, context, n.K, n.D), "cache_batch - cache_heads -")
    entry = {"k": held, "v": held, "end": Named((batch,), "batch", jnp.int32)}
    params = model(n, [attention(n) | feed_forward(n) for _ in range(n.layers)])
    cache = {f"layer_{i}": dict(entry) for i in range(n.layers)}
    mask = Named((batch, 1, context), "batch - -", jnp.bool_)
    return Program(listed_step, (params, cache, *token(batch), mask), (1,))


# --- decode: biases and few heads (as in tunix's Qwen2)


def biased_step(params: Any, cache: Any, tokens: Any, positions: Any, mask: Any) -> Any:
    """`listed_step` with biases added to the projections before the rotation."""
    x, new = embedded(params, tokens), []
    for layer, (keys, values) in zip(params["layers"], cache, strict=True):
        normed = rms(x, layer["norm1"])
        q, k, v = (jnp.einsum("BTD,DNH->BTNH", normed, layer[name]) + layer[f"{name}_bias"] for name in "qkv")
        q, k = rope(constrain(q, "batch length act_heads -"), positions), rope(k, positions)
        keys, values = (
            lax.dynamic_update_slice(held, constrain(each, "batch length act_kv_heads -"), (0, positions[0, 0], 0, 0))
            for held, each in ((keys, k), (values, v))
        )
        x = x + projected_back(layer, grouped(q, keys, values, mask[:, None]))
        x = x + gated(rms(x, layer["norm2"]), layer)
        new.append((keys, values))
    return read_out(params, x), new


def biased(n: Sizes = QWEN2_7B, batch: int = 32, context: int = 2048) -> Program:
    """A decode step with 28 query heads and 4 key heads."""
    held = Named((batch, context, n.K, n.D), "cache_batch - cache_heads -")
    biases = {
        "q_bias": Named((n.H, n.D), "q_heads -"),
        "k_bias": Named((n.K, n.D), "kv_heads -"),
        "v_bias": Named((n.K, n.D), "kv_heads -"),
    }
    params = model(n, [attention(n) | biases | feed_forward(n) for _ in range(n.layers)])
    mask = Named((batch, 1, context), "batch - -", jnp.bool_)
    return Program(biased_step, (params, [(held, held)] * n.layers, *token(batch), mask), (1,))


# --- decode: soft caps, windows, tied embeddings, fused projections (as in Gemma 2)


def capped_step(params: Any, cache: Any, tokens: Any, positions: Any) -> Any:
    """Every other layer sees a window; scores and logits are capped."""
    x = embedded(params, tokens) * jnp.asarray(params["table"].shape[1] ** 0.5, jnp.bfloat16)
    new = []
    for i, (layer, entry) in enumerate(zip(params["layers"], cache, strict=True)):
        normed = rms(x, 1 + layer["norm1"])
        q = constrain(jnp.einsum("BTD,NDH->BTNH", normed, layer["q"]), "batch length act_heads -")
        k, v = (
            constrain(each, "batch length act_kv_heads -")
            for each in jnp.einsum("BSD,CKDH->CBSKH", normed, layer["kv"])
        )
        q, k = rope(q, positions) * q.shape[-1] ** -0.5, rope(k, positions)
        at = (0, positions[0, 0], 0, 0)
        k, v = (lax.dynamic_update_slice(entry[name], each, at) for name, each in (("k", k), ("v", v)))
        distance = positions[:, :, None] - jnp.arange(k.shape[1])  # [B, T, S]
        visible = (distance >= 0) & ((distance < 4096) | (i % 2 == 1))
        b, t, h, d = q.shape
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", q.reshape(b, t, k.shape[2], -1, d), k).reshape(b, t, h, -1)
        scores = jnp.where(visible[:, :, None], jnp.tanh(scores / 50.0) * 50.0, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(k.dtype)
        attended = jnp.einsum("BTKGS,BSKH->BTKGH", weights.reshape(b, t, k.shape[2], h // k.shape[2], -1), v)
        out = jnp.einsum("BTNH,NHD->BTD", attended.reshape(b, t, h, d), layer["o"])
        x = x + rms(constrain(out, "batch length act_embed"), 1 + layer["post1"])
        gate, up = jnp.einsum("BTD,CFD->CBTF", rms(x, 1 + layer["norm2"]), layer["gating"])
        hidden = constrain(jax.nn.gelu(gate) * up, "batch length act_mlp")
        x = x + rms(constrain(hidden @ layer["down"], "batch length act_embed"), 1 + layer["post2"])
        new.append({"k": k, "v": v})
    logits = jnp.dot(rms(x, 1 + params["norm"]), params["table"].T)
    return constrain(jnp.tanh(logits / 30.0) * 30.0, "batch length act_vocab"), new


def capped(n: Sizes = GEMMA2_9B, batch: int = 16, context: int = 8192) -> Program:
    """A decode step of Gemma's form."""
    held = Named((batch, context, n.K, n.D), "cache_batch - cache_heads -")
    layer = {
        "q": Named((n.H, n.E, n.D), "q_heads embed -"),
        "kv": Named((2, n.K, n.E, n.D), "- kv_heads embed -"),
        "o": Named((n.H, n.D, n.E), "q_heads - embed"),
        "gating": Named((2, n.F, n.E), "- mlp embed"),
        "down": Named((n.F, n.E), "mlp embed"),
        **{name: Named((n.E,), "norm") for name in ("norm1", "norm2", "post1", "post2")},
    }
    params = model(n, [dict(layer) for _ in range(n.layers)], tied=True)
    return Program(capped_step, (params, [{"k": held, "v": held}] * n.layers, *token(batch)), (1,))


# --- decode: heads first, ragged sequences (as in jax-llm-examples)


def ragged_step(params: Any, cache: Any, tokens: Any, starts: Any) -> Any:
    """Caches `[B, K, S, D]` as two lists, one common end, each sequence with its own start."""
    end = cache["end"]
    positions = (end - starts)[:, None]
    x = embedded(params, tokens)
    keys, values = list(cache["k"]), list(cache["v"])
    for i, layer in enumerate(params["layers"]):
        q, k, v = projected(layer, rms(x, layer["norm1"]), positions)
        q, k, v = (jnp.swapaxes(each, 1, 2) for each in (q, k, v))  # [B, N, T, D]
        keys[i] = lax.dynamic_update_slice_in_dim(keys[i], k, end, axis=2)
        values[i] = lax.dynamic_update_slice_in_dim(values[i], v, end, axis=2)
        b, h, t, d = q.shape
        kh, places = keys[i].shape[1], jnp.arange(keys[i].shape[2])
        scores = jnp.einsum("bhgtd,bhsd->bhgts", q.reshape(b, kh, h // kh, t, d), keys[i]) * d**-0.5
        visible = (places >= starts[:, None]) & (places <= end)  # [B, S]
        scores = jnp.where(visible[:, None, None, None], scores.astype(jnp.float32), MASKED)
        attended = jnp.einsum("bhgts,bhsd->bhgtd", jax.nn.softmax(scores, -1).astype(k.dtype), values[i])
        attended = constrain(jnp.swapaxes(attended.reshape(b, h, t, d), 1, 2), "batch length act_heads -")
        x = x + projected_back(layer, attended)
        x = x + gated(rms(x, layer["norm2"]), layer)
    return read_out(params, x), {"k": keys, "v": values, "end": end + 1}


def ragged(n: Sizes = LLAMA_70B, batch: int = 32, context: int = 2048) -> Program:
    """A decode step of jax-llm-examples' form."""
    held = Named((batch, n.K, context, n.D), "cache_batch cache_heads - -")
    params = model(n, [attention(n) | feed_forward(n) for _ in range(n.layers)])
    cache = {"k": [held] * n.layers, "v": [held] * n.layers, "end": Named((), "", jnp.int32)}
    return Program(ragged_step, (params, cache, token(batch)[0], Named((batch,), "batch", jnp.int32)), (1,))
