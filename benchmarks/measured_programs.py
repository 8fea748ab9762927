"""Decoder-only transformers as the published measurements run them: decode, prefill and training, in abstract shapes.

Attention is a kernel, as in all measured programs: one operation that reads queries, keys and values and writes its result
(`autoshard.rule`). Causal attention computes half of the scores. Weights may be int8 or float8, and so may the cache.

Letters in shapes: B batch, T tokens, S cached tokens, E model, F feed-forward network, K key and value heads, G query heads
of each, D size of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

import autoshard
from autoshard import Workload

BF16, FP32 = jnp.bfloat16, jnp.float32


@dataclass(frozen=True)
class Model:
    """The sizes of one model. Its feed-forward network has three matrices, or two if it is not `gated`."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    head: int = 128
    gated: bool = True


LLAMA_2_7B = Model(32, 4096, 11_008, 32, 32, 32_000)
LLAMA_2_70B = Model(80, 8192, 28_672, 64, 8, 32_000)
LLAMA_3_8B = Model(32, 4096, 14_336, 32, 8, 128_256)
LLAMA_3_70B = Model(80, 8192, 28_672, 64, 8, 128_256)
GPT_3_175B = Model(96, 12_288, 49_152, 96, 96, 50_304, gated=False)
QWEN_3_8B = Model(36, 4096, 12_288, 32, 8, 151_936)
QWEN_3_32B = Model(64, 5120, 25_600, 64, 8, 151_936)
MAXTEXT_16B = Model(32, 4096, 28_672, 64, 64, 32_000)
MAXTEXT_32B = Model(32, 8192, 28_672, 64, 64, 32_000)
MAXTEXT_128B = Model(64, 8192, 57_344, 128, 128, 32_000)
MAXTEXT_256B = Model(64, 16_384, 57_344, 128, 128, 32_000)


@dataclass(frozen=True)
class Types:
    """Element types of the layers' matrices, of the operands of their products, and of the cache."""

    weights: Any = BF16
    operands: Any = BF16
    cache: Any = BF16


# --- Kernels


@autoshard.rule("b k g d, b s k d, b s k d -> b k g d", whole="s d", flops_per_point=4)
def cached_attention(q: Array, k: Array, v: Array) -> Array:
    """One query per sequence over its cache."""
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k.astype(q.dtype))
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores), v.astype(q.dtype))


def _attention(q: Array, k: Array, v: Array) -> Array:
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
    return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)


forward_kernel = autoshard.rule("b t k g d, b s k d, b s k d -> b t k g d", whole="t s d", flops_per_point=2)(
    _attention
)


@autoshard.rule(
    "b t k g d, b s k d, b s k d, b t k g d -> b t k g d, b s k d, b s k d", whole="t s d", flops_per_point=5
)
def backward_kernel(q: Array, k: Array, v: Array, gradient: Array) -> tuple[Array, Array, Array]:
    """The gradients of causal attention: five products where the forward kernel has two."""
    return jax.vjp(_attention, q, k, v)[1](gradient)


@jax.custom_vjp
def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention of a sequence to itself."""
    return forward_kernel(q, k, v)


attention.defvjp(lambda *operands: (forward_kernel(*operands), operands), lambda kept, g: backward_kernel(*kept, g))


# --- Layers


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    E, F, K, D = model.width, model.ffn, model.kv_heads, model.head
    G = model.heads // K
    found = {"wq": (E, K, G, D), "wk": (E, K, D), "wv": (E, K, D), "wo": (K, G, D, E), "up": (E, F), "down": (F, E)}
    return {**found, "gate": (E, F)} if model.gated else found


def abstract_params(model: Model, weights: Any = BF16, others: Any = BF16) -> dict[str, Any]:
    """Stacked layers, and embedding, norm and head."""
    layers = {name: jax.ShapeDtypeStruct((model.layers, *shape), weights) for name, shape in _shapes(model).items()} | {
        name: jax.ShapeDtypeStruct((model.layers, model.width), others) for name in ("norm_1", "norm_2")
    }
    table = jax.ShapeDtypeStruct((model.vocab, model.width), others)
    head = jax.ShapeDtypeStruct((model.width, model.vocab), others)
    return {"layers": layers, "embedding": table, "norm": jax.ShapeDtypeStruct((model.width,), others), "head": head}


def dense(equation: str, x: Array, weight: Array, types: Types) -> Array:
    """The product of activations and a weight in the operands' type, with a bfloat16 result."""
    return jnp.einsum(equation, x.astype(types.operands), weight.astype(types.operands), preferred_element_type=BF16)


def norm(x: Array, scale: Array) -> Array:
    wide = x.astype(FP32)
    return (wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)).astype(BF16) * scale


def queries_keys_values(layer: dict[str, Array], x: Array, types: Types) -> tuple[Array, Array, Array]:
    normed = norm(x, layer["norm_1"])
    q = dense("...e,ekgd->...kgd", normed, layer["wq"], types)
    k, v = (dense("...e,ekd->...kd", normed, layer[name], types) for name in ("wk", "wv"))
    return tuple(checkpoint_name(each, "kept") for each in (q, k, v))


def feed_forward(layer: dict[str, Array], x: Array, types: Types) -> Array:
    normed = norm(x, layer["norm_2"])
    up = dense("...e,ef->...f", normed, layer["up"], types)
    hidden = jax.nn.gelu(up)
    if "gate" in layer:
        hidden = jax.nn.silu(dense("...e,ef->...f", normed, layer["gate"], types)) * up
    return dense("...f,fe->...e", hidden, layer["down"], types)


def block(layer: dict[str, Array], x: Array, types: Types) -> tuple[Array, dict[str, Array]]:
    """One layer on `x` `[B, T, E]`, and its keys and values."""
    q, k, v = queries_keys_values(layer, x, types)
    mixed = checkpoint_name(attention(q, k, v), "kept")
    x = x + dense("btkgd,kgde->bte", mixed, layer["wo"], types)
    return x + feed_forward(layer, x, types), {"k": k, "v": v}


def logits(params: dict[str, Any], x: Array) -> Array:
    return jnp.einsum("...e,ev->...v", norm(x, params["norm"]), params["head"], preferred_element_type=FP32)


# --- Workloads


def decode(model: Model, batch: int, context: int, types: Types = Types()) -> Workload:
    """One decode step that reads `context` tokens of a donated cache."""

    def step(params: dict[str, Any], cache: dict[str, Array], tokens: Array, position: Array):
        def layer_step(x: Array, scanned: Any):
            layer, entry = scanned
            q, k, v = queries_keys_values(layer, x, types)
            new = {"k": k, "v": v}
            at = (0, position, 0, 0)
            entry = {
                name: lax.dynamic_update_slice(entry[name], new[name][:, None].astype(types.cache), at)
                for name in entry
            }
            mixed = cached_attention(q, entry["k"], entry["v"])
            x = x + dense("bkgd,kgde->be", mixed, layer["wo"], types)
            return x + feed_forward(layer, x, types), entry

        x, cache = lax.scan(layer_step, params["embedding"][tokens], (params["layers"], cache))
        return jnp.argmax(logits(params, x), axis=-1), cache

    shape = (model.layers, batch, context, model.kv_heads, model.head)
    cache = {name: jax.ShapeDtypeStruct(shape, types.cache) for name in ("k", "v")}
    tokens, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return Workload(step, (abstract_params(model, types.weights), cache, tokens, position), (1,), name="decode")


def prefill(model: Model, batch: int, length: int, types: Types = Types()) -> Workload:
    """The prefill of `batch` prompts, with the logits of the last token."""

    def step(params: dict[str, Any], tokens: Array):
        x = params["embedding"][tokens]
        x, cache = lax.scan(lambda x, layer: block(layer, x, types), x, params["layers"])
        return logits(params, x[:, -1]), jax.tree.map(lambda leaf: leaf.astype(types.cache), cache)

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return Workload(step, (abstract_params(model, types.weights), tokens), name="prefill")


RECOMPUTED = {
    "all": None,
    "feed-forward": jax.checkpoint_policies.save_only_these_names("kept"),
    "none": jax.checkpoint_policies.dots_saveable,
}
"""The operations that a backward pass computes again, as policies of `jax.checkpoint`."""


def train(model: Model, batch: int, length: int, recomputed: str, types: Types = Types()) -> Workload:
    """One step of AdamW on float32 weights, which are cast to bfloat16 for the model."""

    def loss(params: dict[str, Any], tokens: Array) -> Array:
        run = jax.checkpoint(
            lambda x, layer: (block(layer, x, types)[0], None), policy=RECOMPUTED[recomputed], prevent_cse=False
        )
        x, _ = lax.scan(run, params["embedding"][tokens[:, :-1]], params["layers"])
        found = logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()

    optimizer = optax.adamw(3e-4)

    def step(params: dict[str, Any], state: Any, tokens: Array):
        value, found = jax.value_and_grad(loss)(jax.tree.map(lambda leaf: leaf.astype(BF16), params), tokens)
        found = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), found, params)
        updates, state = optimizer.update(found, state, params)
        return optax.apply_updates(params, updates), state, value

    params = abstract_params(model, FP32, FP32)
    args = (params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((batch, length + 1), jnp.int32))
    return Workload(partial(step), args, (0, 1), name="train")
