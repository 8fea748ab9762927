"""PaLM 8B, 62B and 540B in plain JAX: one decode step and prefill, without sharding code.

The model is that of Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways" (arXiv 2204.02311), §2:
attention and feed-forward network in parallel from one norm, multiquery attention (one key and value head), SwiGLU,
rotary positions, no biases, input and output embeddings tied. Numbers are bf16; norm statistics, softmax and logits are
float32. Inference-only parts (padded heads, int8 weights) are those of Pope et al. 2022, "Efficiently Scaling Transformer
Inference" (arXiv 2211.05102). So are two variants of 540B: multihead attention ("540b-multihead") and serial attention and
feed-forward network ("540b-serial").

Letters in shapes: B batch, T new tokens, S tokens of context, L layers, E `d_model`, F `d_ff`, H heads, D `d_head`,
V vocabulary. `...` is `B` in decode and `B, T` in prefill.

`decode` and `prefill` return workloads to search, for instance

    autoshard search examples/palm.py:decode --topology v4:4x4x4 --set batch=64
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload

Params = dict[str, Any]  # nested; a leaf is an array or, in an abstract tree, a jax.ShapeDtypeStruct
Cache = dict[str, Array]  # {"k": [L, B, S, D], "v": [L, B, S, D]}; of multihead attention [L, B, S, H, D]
Rotation = tuple[Array, Array]  # cosine and sine, [..., D] each


# --- Sizes


@dataclass(frozen=True)
class Config:
    """The sizes of one PaLM.

    `heads` is the number of heads the model was trained with; weights exist for `padded_heads`, which divide over
    the chips. `max_context` is the length it was trained at; rotary positions set no limit of their own. With
    `multihead` every head has keys and values of its own; without `parallel` the feed-forward network follows attention,
    behind a norm of its own.
    """

    layers: int
    d_model: int
    d_ff: int
    heads: int
    padded_heads: int
    d_head: int = 256
    vocab: int = 256_128
    max_context: int = 2048
    multihead: bool = False
    parallel: bool = True

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """The dimension that keys and values have for heads, if they have one."""
        return (self.padded_heads,) if self.multihead else ()


# Layers, d_model, heads, d_ff = 4 d_model and d_head = 256: Chowdhery et al. 2022, table 1; 2048 tokens: the same, §5.
# The vocabulary of 256 k padded to 256,128 and 48 heads padded to 64: the code released with Pope et al. 2022
# (google-research/scaling_transformer_inference_efficiency, checkpoint.HParams). Multihead with heads of 128, so that it
# has as many parameters, and the serial block: Pope et al. 2022, §4.2 and §4.3.
SIZES = {
    "8b": Config(layers=32, d_model=4096, d_ff=16_384, heads=16, padded_heads=16),
    "62b": Config(layers=64, d_model=8192, d_ff=32_768, heads=32, padded_heads=32),
    "540b": Config(layers=118, d_model=18_432, d_ff=73_728, heads=48, padded_heads=64),
    "540b-multihead": Config(
        layers=118, d_model=18_432, d_ff=73_728, heads=48, padded_heads=64, d_head=128, multihead=True
    ),
    "540b-serial": Config(layers=118, d_model=18_432, d_ff=73_728, heads=48, padded_heads=64, parallel=False),
    "tiny": Config(layers=2, d_model=64, d_ff=128, heads=8, padded_heads=8, d_head=16, vocab=128, max_context=64),
}


def config_of(size: str, layers: int | None = None) -> Config:
    """The published sizes of a PaLM, cut to its first `layers` layers if that is given."""
    if size not in SIZES:
        raise ValueError(f"The size must be one of {', '.join(SIZES)}, got {size!r}.")
    config = SIZES[size]
    return config if layers is None else replace(config, layers=layers)


# --- Parameters


def init_params(config: Config, key: Array, weights: str = "bf16") -> Params:
    """Random parameters: embedding from N(0, 1), every other matrix from N(0, 1 / fan-in), norm scales 1 (PaLM §5).

    With `weights="int8"` the matrices of the layers are quantised; the embedding stays bf16, as in Pope et al. 2022.
    """
    if weights not in ("bf16", "int8"):
        raise ValueError(f"weights must be 'bf16' or 'int8', got {weights!r}.")
    L, E, F, H, D = config.layers, config.d_model, config.d_ff, config.padded_heads, config.d_head
    store = quantise if weights == "int8" else lambda matrix, summed: matrix
    shapes = {  # name: (shape, the axes that the matrix product sums over)
        "wq": ((L, E, H, D), (1,)),
        "wk": ((L, E, *config.kv_heads, D), (1,)),
        "wv": ((L, E, *config.kv_heads, D), (1,)),
        "wi_gate": ((L, E, F), (1,)),
        "wi_up": ((L, E, F), (1,)),
        "wo": ((L, H, D, E), (1, 2)),
        "wo_ffn": ((L, F, E), (1,)),
    }
    embedding_key, *keys = jax.random.split(key, 1 + len(shapes))
    layers = {
        name: store(random_matrix(matrix_key, shape, summed), summed)
        for matrix_key, (name, (shape, summed)) in zip(keys, shapes.items(), strict=True)
    }
    norms = ("scale",) if config.parallel else ("scale", "scale_ffn")
    return {
        "embedding": random_matrix(embedding_key, (config.vocab, E), ()),
        "layers": {**{norm: jnp.ones((L, E), jnp.bfloat16) for norm in norms}, **layers},
        "scale": jnp.ones((E,), jnp.bfloat16),
    }


def random_matrix(key: Array, shape: tuple[int, ...], summed: tuple[int, ...]) -> Array:
    fan_in = math.prod(shape[axis] for axis in summed)
    return jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5


def quantise(matrix: Array, summed: tuple[int, ...]) -> dict[str, Array]:
    """int8 values and a bf16 scale per output channel: the product with `matrix` is that with `q`, times `scale`."""
    largest = jnp.max(jnp.abs(matrix), axis=summed, keepdims=True).astype(jnp.float32)
    scale = (largest / 127).astype(jnp.bfloat16)
    q = jnp.round(matrix.astype(jnp.float32) / scale.astype(jnp.float32))
    return {"q": jnp.clip(q, -127, 127).astype(jnp.int8), "scale": jnp.squeeze(scale, summed)}


def abstract_params(config: Config, weights: str = "bf16") -> Params:
    """The shapes and dtypes of `init_params`; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), weights))


def abstract_cache(
    config: Config, batch: int, context: int | None = None, cache: str = "bf16"
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a key-value cache for `context` tokens (`max_context` unless given)."""
    tokens = config.max_context if context is None else context
    shape = (config.layers, batch, tokens, *config.kv_heads, config.d_head)
    entry = jax.ShapeDtypeStruct(shape, cache_dtype(cache))
    return {"k": entry, "v": entry}


def cache_dtype(cache: str) -> jnp.dtype:
    """The dtype of keys and values in the cache; they are multiplied as bf16."""
    if cache not in CACHES:
        raise ValueError(f"The cache is one of {', '.join(CACHES)}, not {cache!r}.")
    return jnp.dtype(CACHES[cache])


CACHES = {"bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}


# --- The model


def decode_step(params: Params, cache: Cache, tokens: Array, position: Array) -> tuple[Array, Cache]:
    """The logits `[B, V]` that follow `tokens` `[B]`, which stand at `position`, and the cache with them in it."""
    x = params["embedding"][tokens]  # [B, E]
    layers, _, context, *_, d_head = cache["k"].shape
    rotation = rotary(position, d_head, x.dtype)  # 2 × [D]
    visible = jnp.arange(context) <= position  # [S]

    # The cache is carried, not scanned: each layer writes one token of it in place, and no copy of it is ever made.
    def layer_step(carry, scanned):
        x, cache_k, cache_v = carry
        index, layer = scanned
        normed = rms_norm(x, layer["scale"])  # [B, E]
        q, k, v = queries_keys_values(layer, normed, rotation, rotation)  # [B, H, D], 2 × [B, D] or [B, H, D]
        cache_k = write_token(cache_k, k, index, position)
        cache_v = write_token(cache_v, v, index, position)
        read_k, read_v = (read_layer(each, index).astype(q.dtype) for each in (cache_k, cache_v))
        attended = attend(q, read_k, read_v, visible)  # [B, H, D]
        return (block_output(layer, x, normed, attended), cache_k, cache_v), None

    carry = (x, cache["k"], cache["v"])
    (x, cache_k, cache_v), _ = lax.scan(layer_step, carry, (jnp.arange(layers), params["layers"]))
    return logits(params, x), {"k": cache_k, "v": cache_v}


def prefill_step(params: Params, tokens: Array, cache: str | None = None) -> tuple[Array, Cache]:
    """The logits `[B, V]` that follow the last of `tokens` `[B, T]`, and the cache of them all, in the activations' type
    unless `cache` names another."""
    x = params["embedding"][tokens]  # [B, T, E]
    positions = jnp.arange(tokens.shape[1])
    cos, sin = rotary(positions, d_head_of(params), x.dtype)  # [T, D]
    per_head = (cos[:, None, :], sin[:, None, :])  # [T, 1, D]
    visible = positions[:, None, None] >= positions  # [T, 1, S]: causal
    multihead, kept = jax.tree.leaves(params["layers"]["wk"])[0].ndim > 3, cache_dtype(cache) if cache else x.dtype

    def layer_step(x, layer):
        normed = rms_norm(x, layer["scale"])  # [B, T, E]
        k_rotation = per_head if multihead else (cos, sin)
        q, k, v = queries_keys_values(
            layer, normed, per_head, k_rotation
        )  # [B, T, H, D], 2 × [B, T, D] or [B, T, H, D]
        attended = attend(q, k, v, visible)  # [B, T, H, D]
        return block_output(layer, x, normed, attended), (k.astype(kept), v.astype(kept))

    x, (cache_k, cache_v) = lax.scan(layer_step, x, params["layers"])
    return logits(params, x[:, -1]), {"k": cache_k, "v": cache_v}


def write_token(cache: Array, new: Array, layer: Array, position: Array) -> Array:
    """`cache` `[L, B, S, ...]` with `new` `[B, ...]` at one layer and position."""
    at = (layer, 0, position, *[0] * (new.ndim - 1))
    return lax.dynamic_update_slice(cache, new[None, :, None].astype(cache.dtype), at, allow_negative_indices=False)


def read_layer(cache: Array, layer: Array) -> Array:
    return lax.dynamic_index_in_dim(cache, layer, keepdims=False, allow_negative_indices=False)  # [B, S, ...]


def queries_keys_values(
    layer: Params, x: Array, q_rotation: Rotation, k_rotation: Rotation
) -> tuple[Array, Array, Array]:
    """Queries `[..., H, D]`, scaled by $1/\\sqrt D$, and keys and values, one head `[..., D]` or as many."""
    q = rotate(project("...e,ehd->...hd", x, layer["wq"]), *q_rotation)
    one = "...e,ed->...d" if jax.tree.leaves(layer["wk"])[0].ndim == 2 else "...e,ehd->...hd"
    k = rotate(project(one, x, layer["wk"]), *k_rotation)
    v = project(one, x, layer["wv"])
    return q * q.shape[-1] ** -0.5, k, v


def attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Every head of `q` `[B, ..., H, D]` over the same `k` and `v` `[B, S, D]` (multiquery) or its own `[B, S, H, D]`."""
    kv = "bsd" if k.ndim == 3 else "bshd"
    scores = jnp.einsum(f"b...hd,{kv}->b...hs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, -jnp.inf)  # [B, ..., H, S]
    return jnp.einsum(f"b...hs,{kv}->b...hd", jax.nn.softmax(scores).astype(v.dtype), v)


def block_output(layer: Params, x: Array, normed: Array, attended: Array) -> Array:
    """The residual stream after a block, which adds attention's output and the feed-forward network's, of the same norm
    (parallel) or of one after attention (serial: there is a scale for it)."""
    attention = project("...hd,hde->...e", attended, layer["wo"])
    if "scale_ffn" not in layer:
        return x + (attention + feed_forward(layer, normed))
    x = x + attention
    return x + feed_forward(layer, rms_norm(x, layer["scale_ffn"]))


def feed_forward(layer: Params, normed: Array) -> Array:
    gate = project("...e,ef->...f", normed, layer["wi_gate"])
    up = project("...e,ef->...f", normed, layer["wi_up"])
    return project("...f,fe->...e", jax.nn.silu(gate) * up, layer["wo_ffn"])


def project(spec: str, x: Array, matrix: Array | dict[str, Array]) -> Array:
    """The einsum of `x` with a matrix, which may be int8 with a scale per output channel."""
    if not isinstance(matrix, dict):
        return jnp.einsum(spec, x, matrix)
    return jnp.einsum(spec, x, matrix["q"].astype(x.dtype)) * matrix["scale"]


def rms_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + 1e-6)).astype(x.dtype) * scale


def rotary(positions: Array, d_head: int, dtype: jnp.dtype) -> Rotation:
    """Cosine and sine `[..., D]` of the angles that rotary positions turn by (Su et al. 2021, arXiv 2104.09864)."""
    # Angles in float32: bf16 has 8 bits and would make position 257 the same as 256.
    frequencies = 10_000.0 ** (-jnp.arange(0, d_head, 2).astype(jnp.float32) / d_head)  # [D / 2]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)  # [..., D]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs `(x[i], x[i + D / 2])` by the angles of `cos` and `sin`."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def logits(params: Params, x: Array) -> Array:
    """float32 logits `[B, V]` by the tied embedding; it is N(0, 1), hence the scale $1/\\sqrt E$ (PaLM §5)."""
    normed = rms_norm(x, params["scale"])
    unscaled = jnp.einsum("be,ve->bv", normed, params["embedding"], preferred_element_type=jnp.float32)
    return unscaled * x.shape[-1] ** -0.5


def d_head_of(params: Params) -> int:
    return jax.tree.leaves(params["layers"]["wk"])[0].shape[-1]  # bf16 [L, E, D], or int8 with its scale [L, D]


# --- Workloads


def letters(weights: str, inputs: dict[str, str]) -> dict[str, str]:
    """The letters of this file by argument, for formulas (`autoshard explain --symbolic`)."""
    matrix = ".q" if weights == "int8" else ""
    layers = {"wi_gate": "L E F", "wq": "L E H D", "wk": "L E D", "wv": "L E D"}
    return {"embedding": "V E", **{f"layers.{name}{matrix}": word for name, word in layers.items()}, **inputs}


def decode(
    size: str = "540b",
    batch: int = 64,
    context: int = 2048,
    weights: str = "bf16",
    cache: str = "bf16",
    layers: int | None = None,
) -> Workload:
    """One decode step: a token for each of `batch` sequences against a cache of `context` tokens, which is donated."""
    config = config_of(size, layers)
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    args = (abstract_params(config, weights), abstract_cache(config, batch, context, cache), tokens, position)
    dims = letters(weights, {"cache.*": "L B S D"})
    return Workload(decode_step, args, donate_argnums=(1,), name=f"palm-{size}-decode", dims=dims)


def prefill(
    size: str = "540b",
    batch: int = 1,
    length: int = 2048,
    weights: str = "bf16",
    cache: str = "bf16",
    layers: int | None = None,
) -> Workload:
    """Prefill: `batch` prompts of `length` tokens into a fresh cache."""
    config = config_of(size, layers)
    args = (abstract_params(config, weights), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    dims = letters(weights, {"tokens": "B T"})
    step = prefill_step if cache == "bf16" else partial(prefill_step, cache=cache)
    return Workload(step, args, name=f"palm-{size}-prefill", dims=dims)
