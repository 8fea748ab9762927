"""DeepSeek-V2 in plain JAX: multi-head latent attention and many small experts, without sharding code.

The model is that of DeepSeek-AI 2024, "DeepSeek-V2" (arXiv 2405.04434), §2. Its Lite version does not compress queries; the
sizes "v3", those of "DeepSeek-V3" (arXiv 2412.19437), do. The routers of all are those of `mixtral.py`. One latent vector per
token gives the keys and values of all heads; the cache holds that vector and one rotated key for all heads. In decode the key
and value matrices are absorbed into the queries and the output (§2.1.2), so attention is over the latents themselves. Besides
the routed experts, those of `mixtral.py`, there are shared ones: here one wider feed-forward block.

Letters in shapes, beside those of `mixtral.py`: H heads, L the latent's size, D the size of a head, R of its rotated part, Q
the size of what queries are made of: of the compressed ones, or E.

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
from examples.mixtral import WAYS, dense_experts, dispatched_experts


@dataclass(frozen=True)
class Config:
    """The sizes of one DeepSeek-V2 or V3.

    `d_shared` is the width of its shared experts together, `d_query` that of compressed queries, 0 without compression.
    """

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
    d_query: int = 0


# DeepSeek-AI 2024, appendix B; its first layer, which has no experts, is left out. v3: config.json of deepseek-ai/DeepSeek-V3,
# without its first three layers, which have no experts, and in bf16.
SIZES = {
    "lite": Config(26, 2048, 16, 512, 128, 64, experts=64, chosen=6, d_expert=1408, d_shared=2816),
    "v3": Config(58, 7168, 128, 512, 128, 64, 256, 8, 2048, 2048, vocab=129_280, d_query=1536),
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
        "wq": ((c.d_query or E, H, D), (0,)),
        "wq_rotated": ((c.d_query or E, H, R), (0,)),
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
    if c.d_query:
        shapes["wq_latent"] = ((E, c.d_query), (0,))
    matrices = {
        name: random_matrix(jax.random.fold_in(key, i), shape, math.prod(shape[axis] for axis in summed))
        for i, (name, (shape, summed)) in enumerate(shapes.items())
    }
    norms = {"attention_norm": (E,), "ffn_norm": (E,), "latent_norm": (L,)}
    norms |= {"query_norm": (c.d_query,)} if c.d_query else {}
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


def query_inputs(layer: Params, x: Array) -> Array:
    """The operand `[..., Q]` of the query matrices: the compressed tokens if the layer compresses them, else the tokens."""
    if "wq_latent" not in layer:
        return x
    return rms_norm(jnp.einsum("...e,eq->...q", x, layer["wq_latent"]), layer["query_norm"])


def experts_half(layer: Params, x: Array, chosen: int, routed: Any) -> Array:
    """Shared and routed experts, added to `x`."""
    normed = rms_norm(x, layer["ffn_norm"])
    shared = {name: layer[f"shared_{name[2:]}"] for name in ("w_gate", "w_up", "w_down")}
    return x + feed_forward(shared, normed) + routed(layer, normed, chosen)


def attended(layer: Params, scores: Array, visible: Array) -> Array:
    """Attention weights of float32 scores, in bf16."""
    scale = (layer["wq"].shape[-1] + layer["wq_rotated"].shape[-1]) ** -0.5
    return jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf)).astype(jnp.bfloat16)


def decode_layer(
    layer: Params, x: Array, cache: Params, position: Array, chosen: int, routed: Any = dense_experts
) -> tuple[Array, Params]:
    """One layer on `x` `[B, E]` with its own cache of latents `[B, S, L]` and rotated keys `[B, S, R]`."""
    x, cache = cached_attention_half(layer, x, cache, position)
    return experts_half(layer, x, chosen, routed), cache


def cached_attention_half(layer: Params, x: Array, cache: Params, position: Array) -> tuple[Array, Params]:
    """The first half of `decode_layer`."""
    normed = rms_norm(x, layer["attention_norm"])
    new = latents(layer, normed, position)
    cache = {name: lax.dynamic_update_slice(cache[name], new[name][:, None], (0, position, 0)) for name in cache}
    inputs = query_inputs(layer, normed)
    absorbed = jnp.einsum("bhd,lhd->bhl", jnp.einsum("be,ehd->bhd", inputs, layer["wq"]), layer["wk"])
    rotated = rotate(jnp.einsum("be,ehr->bhr", inputs, layer["wq_rotated"]), position)
    f32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bhl,bsl->bhs", absorbed, cache["latent"], **f32)
    scores = scores + jnp.einsum("bhr,bsr->bhs", rotated, cache["rotated"], **f32)
    weights = attended(layer, scores, jnp.arange(scores.shape[-1]) <= position)
    values = jnp.einsum("bhl,lhd->bhd", jnp.einsum("bhs,bsl->bhl", weights, cache["latent"]), layer["wv"])
    return x + jnp.einsum("bhd,hde->be", values, layer["wo"]), cache


def prefill_layer(layer: Params, x: Array, chosen: int, routed: Any = dispatched_experts) -> tuple[Array, Params]:
    """One layer on `x` `[B, T, E]`, and the latents and rotated keys that it leaves in the cache."""
    positions = jnp.arange(x.shape[1])
    normed = rms_norm(x, layer["attention_norm"])
    entry = latents(layer, normed, positions)
    keys = jnp.einsum("bsl,lhd->bshd", entry["latent"], layer["wk"])
    inputs = query_inputs(layer, normed)
    queries = jnp.einsum("bte,ehd->bthd", inputs, layer["wq"])
    rotated = rotate(jnp.einsum("bte,ehr->bthr", inputs, layer["wq_rotated"]), positions[:, None])
    f32 = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys, **f32)
    scores = scores + jnp.einsum("bthr,bsr->bhts", rotated, entry["rotated"], **f32)
    weights = attended(layer, scores, positions[:, None] >= positions)
    values = jnp.einsum("bhts,bshd->bthd", weights, jnp.einsum("bsl,lhd->bshd", entry["latent"], layer["wv"]))
    x = x + jnp.einsum("bthd,hde->bte", values, layer["wo"])
    return experts_half(layer, x, chosen, routed), entry


def decode_step(
    params: Params, cache: Any, tokens: Array, position: Array, *, chosen: int, routed: Any = dense_experts
) -> tuple[Array, Any]:
    """The logits `[B, V]` that follow `tokens` `[B]`, which stand at `position`, and the cache with them in it."""
    x, new_cache = params["embedding"][tokens], []
    for layer, entry in zip(params["layers"], cache, strict=True):
        x, entry = decode_layer(layer, x, entry, position, chosen, routed)
        new_cache.append(entry)
    return logits(params, x), new_cache


def prefill_step(params: Params, tokens: Array, *, chosen: int, routed: Any = dispatched_experts) -> tuple[Array, Any]:
    """The logits `[B, V]` that follow the last of `tokens` `[B, T]`, and the cache of them all."""
    x, cache = params["embedding"][tokens], []
    for layer in params["layers"]:
        x, entry = prefill_layer(layer, x, chosen, routed)
        cache.append(entry)
    return logits(params, x[:, -1]), cache


# --- Workloads


def _name(size: str) -> str:
    return "deepseek-v3" if size == "v3" else f"deepseek-v2-{size}"


def decode(
    size: str = "lite", batch: int = 64, context: int = 2048, layers: int | None = None, experts: str = "dense"
) -> Workload:
    """One decode step: a token for each of `batch` sequences against a cache of `context` tokens, which is donated.

    `experts` is "dense" or "ragged".
    """
    c = config_of(size, layers)
    sizes = {"latent": c.latent, "rotated": c.d_rotated}
    cache = [
        {name: jax.ShapeDtypeStruct((batch, context, n), jnp.bfloat16) for name, n in sizes.items()}
        for _ in range(c.layers)
    ]
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    step = partial(decode_step, chosen=c.chosen, routed=WAYS[experts])
    return Workload(step, (abstract_params(c), cache, tokens, position), (1,), name=f"{_name(size)}-decode")


def prefill(
    size: str = "lite", batch: int = 16, length: int = 1024, layers: int | None = None, experts: str = "dispatch"
) -> Workload:
    """Prefill: `batch` prompts of `length` tokens into a fresh cache; `experts` is "dispatch", "dense" or "ragged"."""
    c = config_of(size, layers)
    args = (abstract_params(c), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    return Workload(partial(prefill_step, chosen=c.chosen, routed=WAYS[experts]), args, name=f"{_name(size)}-prefill")
