"""Tiny models that several tests share.

A `Block` is a transformer of a few sizes and switches in plain JAX. Letters in shapes: B batch, S context, L layers,
E `d_model`, F `d_ff`, G key and value heads, Q queries per key and value head, D `d_head`, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Params = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """The sizes of a small transformer and how it is put together."""

    batch: int = 4
    context: int = 8
    layers: int = 2
    d_model: int = 8
    d_ff: int = 16
    kv_heads: int = 1
    queries_per_kv: int = 2
    d_head: int = 4
    vocab: int = 12
    gated: bool = True
    parallel: bool = True
    scanned: bool = True
    decode: bool = True


def arguments(block: Block, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of `function(block)`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, block.vocab, (block.batch,) if block.decode else (block.batch, block.context))
    params = init(block, rng)
    if not block.decode:
        return params, jnp.asarray(tokens, jnp.int32)
    shape = (block.layers, block.batch, block.context, block.kv_heads, block.d_head)
    cache = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in ("k", "v")}
    return params, cache, jnp.asarray(tokens, jnp.int32), jnp.int32(block.context // 2)


def init(block: Block, rng: np.random.Generator) -> Params:
    """Random parameters; the layers' are stacked along a leading dimension."""
    E, F, G, Q, D = block.d_model, block.d_ff, block.kv_heads, block.queries_per_kv, block.d_head
    shapes = {
        "norm": (E,),
        "wq": (E, G, Q, D),
        "wk": (E, G, D),
        "wv": (E, G, D),
        "wo": (G, Q, D, E),
        "up": (E, F),
        "down": (F, E),
    }
    shapes |= {"gate": (E, F)} if block.gated else {}
    shapes |= {} if block.parallel else {"norm2": (E,)}

    def draw(shape: tuple[int, ...]) -> Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    layers = {name: draw((block.layers, *shape)) for name, shape in shapes.items()}
    return {"embedding": draw((block.vocab, E)), "layers": layers}


def function(block: Block) -> Callable[..., Any]:
    """The model: one decode step with its cache, or a whole forward pass."""
    return decode(block) if block.decode else forward(block)


def forward(block: Block) -> Callable[..., Any]:
    """`(params, tokens [B, S]) -> logits [B, S, V]`, causal."""

    def run(params: Params, tokens: Array) -> Array:
        x = params["embedding"][tokens]  # [B, S, E]
        positions = jnp.arange(tokens.shape[1])
        visible = positions[:, None] >= positions  # [S, S]

        def layer_step(x: Array, layer: Params) -> tuple[Array, None]:
            def attention(normed: Array) -> Array:
                q = jnp.einsum("bte,egqd->btgqd", normed, layer["wq"])
                k, v = (jnp.einsum("bse,egd->bsgd", normed, layer[name]) for name in ("wk", "wv"))
                scores = jnp.where(visible, jnp.einsum("btgqd,bsgd->bgqts", q, k), -jnp.inf)
                mixed = jnp.einsum("bgqts,bsgd->btgqd", jax.nn.softmax(scores), v)
                return jnp.einsum("btgqd,gqde->bte", mixed, layer["wo"])

            return residual(block, layer, x, attention), None

        x, _ = over_layers(block, layer_step, x, params["layers"])
        return jnp.einsum("bte,ve->btv", x, params["embedding"])

    return run


def decode(block: Block) -> Callable[..., Any]:
    """`(params, cache, tokens [B], position) -> logits [B, V], cache`."""

    def run(params: Params, cache: Params, tokens: Array, position: Array) -> tuple[Array, Params]:
        x = params["embedding"][tokens]  # [B, E]
        visible = jnp.arange(block.context) <= position  # [S]

        def layer_step(x: Array, scanned: tuple[Params, Params]) -> tuple[Array, Params]:
            layer, old = scanned
            new: Params = {}

            def attention(normed: Array) -> Array:
                q = jnp.einsum("be,egqd->bgqd", normed, layer["wq"])
                for name, weight in (("k", "wk"), ("v", "wv")):
                    token = jnp.einsum("be,egd->bgd", normed, layer[weight])
                    new[name] = lax.dynamic_update_index_in_dim(old[name], token, position, 1)  # [B, S, G, D]
                scores = jnp.where(visible, jnp.einsum("bgqd,bsgd->bgqs", q, new["k"]), -jnp.inf)
                mixed = jnp.einsum("bgqs,bsgd->bgqd", jax.nn.softmax(scores), new["v"])
                return jnp.einsum("bgqd,gqde->be", mixed, layer["wo"])

            return residual(block, layer, x, attention), new

        x, cache = over_layers(block, layer_step, x, (params["layers"], cache))
        return jnp.einsum("be,ve->bv", x, params["embedding"]), cache

    return run


def residual(block: Block, layer: Params, x: Array, attention: Callable[[Array], Array]) -> Array:
    """The residual stream after one layer: attention and feed-forward network side by side, or one after the other."""
    normed = rms_norm(x, layer["norm"])
    if block.parallel:
        return x + attention(normed) + feed_forward(layer, normed)
    x = x + attention(normed)
    return x + feed_forward(layer, rms_norm(x, layer["norm2"]))


def feed_forward(layer: Params, x: Array) -> Array:
    """SwiGLU where the layer has a gate, GELU otherwise."""
    up = x @ layer["up"]
    hidden = jax.nn.silu(x @ layer["gate"]) * up if "gate" in layer else jax.nn.gelu(up)
    return hidden @ layer["down"]


def rms_norm(x: Array, scale: Array) -> Array:
    """`x` over its root mean square, times `1 + scale`."""
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * (1 + scale)


def over_layers(block: Block, step: Callable[..., Any], x: Array, stacked: Any) -> tuple[Array, Any]:
    """`lax.scan` over layers, or the same unrolled."""
    if block.scanned:
        return lax.scan(step, x, stacked)
    found = []
    for i in range(block.layers):
        x, made = step(x, jax.tree.map(lambda a: a[i], stacked))  # noqa: B023
        found.append(made)
    return x, jax.tree.map(lambda *layers: jnp.stack(layers), *found)
