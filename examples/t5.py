"""T5 v1.1 in plain JAX: an encoder-decoder with relative positions, without sharding code.

The model is that of Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv 1910.10683), §2.1, in version 1.1: gated GELU, no dropout, embedding and head apart. Attention scores are not scaled, and
get a bias by the distance of the two tokens, one table per stack for all its layers.

Letters in shapes: B batch, S tokens in, T tokens out, E `d_model`, F `d_ff`, H heads, D `d_head`, N buckets of distances.

    autoshard search examples/t5.py:forward --topology v5e:4x4 --set batch=16
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from autoshard import Workload
from examples.llama import Params, random_matrix, rms_norm

BUCKETS, FAR = 32, 128
"""Buckets of distances, and the distance from which on all share one (Raffel et al. 2019, §2.1)."""


@dataclass(frozen=True)
class Config:
    """The sizes of one T5; `layers` in the encoder and as many in the decoder."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    d_head: int = 64
    vocab: int = 32_128


# config.json of google/t5-v1_1-xl and -xxl.
SIZES = {
    "xl": Config(layers=24, d_model=2048, d_ff=5120, heads=32),
    "xxl": Config(layers=24, d_model=4096, d_ff=10_240, heads=64),
    "tiny": Config(layers=2, d_model=64, d_ff=128, heads=8, d_head=16, vocab=128),
}


def config_of(size: str, layers: int | None = None) -> Config:
    """The published sizes of a T5 v1.1, cut to its first `layers` layers if that is given."""
    if size not in SIZES:
        raise ValueError(f"The size must be one of {', '.join(SIZES)}, got {size!r}.")
    return SIZES[size] if layers is None else replace(SIZES[size], layers=layers)


def init_layer(config: Config, key: Array, crossed: bool) -> Params:
    """One layer's random parameters; a decoder's has attention to the encoder, too."""
    E, F, H, D = config.d_model, config.d_ff, config.heads, config.d_head
    shapes = {"w_gate": (E, F), "w_up": (E, F), "w_down": (F, E)}
    for kind in ("self", "cross") if crossed else ("self",):
        shapes |= {f"{kind}_{name}": (E, H, D) for name in ("q", "k", "v")} | {f"{kind}_o": (H, D, E)}
    fan_in = {name: H * D if name.endswith("_o") else shape[0] for name, shape in shapes.items()}
    keys = jax.random.split(key, len(shapes))
    matrices = {name: random_matrix(k, shapes[name], fan_in[name]) for k, name in zip(keys, shapes, strict=True)}
    norms = {f"{name}_norm": jnp.ones((E,), jnp.bfloat16) for name in ("self", "cross", "ffn")}
    return {**matrices, **norms}


def init_params(config: Config, key: Array) -> Params:
    """Random parameters; the layers as lists."""
    keys = iter(jax.random.split(key, 2 * config.layers + 4))

    def stack(crossed: bool) -> Params:
        layers = [init_layer(config, next(keys), crossed) for _ in range(config.layers)]
        bias = random_matrix(next(keys), (BUCKETS, config.heads), 1)
        return {"layers": layers, "bias": bias, "norm": jnp.ones((config.d_model,), jnp.bfloat16)}

    return {
        "encoder": stack(False),
        "decoder": stack(True),
        "embedding": random_matrix(next(keys), (config.vocab, config.d_model), 1),
        "head": random_matrix(next(keys), (config.d_model, config.vocab), config.d_model),
    }


# --- The model


def buckets(distances: Array, both_ways: bool) -> Array:
    """The bucket of each distance (key's place less query's): small ones apart, larger ones by their logarithm."""
    count = BUCKETS // 2 if both_ways else BUCKETS
    offset = jnp.where(distances > 0, count, 0) if both_ways else 0
    away = jnp.abs(distances) if both_ways else jnp.maximum(-distances, 0)
    near = count // 2
    log = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / near) / math.log(FAR / near)
    far = jnp.minimum(near + (log * (count - near)).astype(jnp.int32), count - 1)
    return offset + jnp.where(away < near, away, far)


def bias(table: Array, length: int, both_ways: bool) -> Array:
    """The bias of scores `[H, T, S]` between `length` tokens; unless `both_ways`, tokens do not see later ones."""
    places = jnp.arange(length)
    distances = places - places[:, None]
    found = jnp.moveaxis(table[buckets(distances, both_ways)], -1, 0).astype(jnp.float32)
    return found if both_ways else jnp.where(distances <= 0, found, -jnp.inf)


def attention(layer: Params, kind: str, x: Array, source: Array, added: Array | None) -> Array:
    """Attention of `x` `[B, T, E]` to `source` `[B, S, E]`."""
    q = jnp.einsum("bte,ehd->bthd", x, layer[f"{kind}_q"])
    k = jnp.einsum("bse,ehd->bshd", source, layer[f"{kind}_k"])
    v = jnp.einsum("bse,ehd->bshd", source, layer[f"{kind}_v"])
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores if added is None else scores + added).astype(x.dtype)
    return jnp.einsum("bthd,hde->bte", jnp.einsum("bhts,bshd->bthd", weights, v), layer[f"{kind}_o"])


def gated(layer: Params, x: Array) -> Array:
    gate = jax.nn.gelu(jnp.einsum("bte,ef->btf", x, layer["w_gate"]))
    return jnp.einsum("btf,fe->bte", gate * jnp.einsum("bte,ef->btf", x, layer["w_up"]), layer["w_down"])


def encode(params: Params, x: Array) -> Array:
    """The encoder on embedded tokens `[B, S, E]`."""
    added = bias(params["bias"], x.shape[1], both_ways=True)
    for layer in params["layers"]:
        normed = rms_norm(x, layer["self_norm"])
        x = x + attention(layer, "self", normed, normed, added)
        x = x + gated(layer, rms_norm(x, layer["ffn_norm"]))
    return rms_norm(x, params["norm"])


def decode(params: Params, x: Array, source: Array) -> Array:
    """The decoder on embedded tokens `[B, T, E]` and the encoder's result `[B, S, E]`."""
    added = bias(params["bias"], x.shape[1], both_ways=False)
    for layer in params["layers"]:
        normed = rms_norm(x, layer["self_norm"])
        x = x + attention(layer, "self", normed, normed, added)
        x = x + attention(layer, "cross", rms_norm(x, layer["cross_norm"]), source, None)
        x = x + gated(layer, rms_norm(x, layer["ffn_norm"]))
    return rms_norm(x, params["norm"])


def logits(params: Params, given: Array, wanted: Array) -> Array:
    """float32 logits `[B, T, V]` of the tokens after each of `wanted` `[B, T]`, for `given` `[B, S]`."""
    source = encode(params["encoder"], params["embedding"][given])
    x = decode(params["decoder"], params["embedding"][wanted], source)
    return jnp.einsum("bte,ev->btv", x, params["head"], preferred_element_type=jnp.float32)


# --- Workloads


def forward(size: str = "xxl", batch: int = 16, length: int = 512, layers: int | None = None) -> Workload:
    """Encoder and decoder on `batch` pairs of `length` tokens in and as many out."""
    config = config_of(size, layers)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return Workload(logits, (params, ids, ids), name=f"t5-{size}-forward")
