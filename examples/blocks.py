"""Blocks of transformers at published widths, each a program of its own: for programs that a partitioner shards by specs.

Letters in shapes: B batch, T tokens, E `d_model`, F `d_ff`, H heads, D `d_head`, L layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoshard import Workload

Params = dict[str, Array]


def mlp_step(x: Array, params: Params) -> Array:
    """`x` `[B, E]` through two products."""
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def gated_step(x: Array, params: Params) -> Array:
    """`x` `[B, E]` through the gated products of Llama."""
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def scanned_step(x: Array, params: Params) -> Array:
    """`x` `[B, E]` through L residual layers of two products, in a `scan`."""
    return lax.scan(lambda x, layer: (x + mlp_step(x, layer), None), x, params)[0]


def attention_step(x: Array, params: Params) -> Array:
    """`x` `[B, T, E]` with causal attention of its own keys and values."""
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, params[name]) for name in ("wq", "wk", "wv"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(x.dtype)
    return x + jnp.einsum("bhts,bshd,hde->bte", weights, v, params["wo"])


def training_step(params: Params, x: Array, y: Array) -> Params:
    """The parameters of an MLP after a step of gradient descent on `x` and `y` `[B, E]`."""

    def loss(params: Params) -> Array:
        return jnp.mean(jnp.square((mlp_step(x, params) - y).astype(jnp.float32)))

    return jax.tree.map(lambda weight, grad: weight - 0.01 * grad, params, jax.grad(loss)(params))


# --- Workloads


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def weights(d_model: int, d_ff: int, *layers: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {"up": array(*layers, d_model, d_ff), "down": array(*layers, d_ff, d_model)}


def mlp(batch: int = 4096, d_model: int = 4096, d_ff: int = 16_384) -> Workload:
    """An MLP of `batch` tokens."""
    return Workload(mlp_step, (array(batch, d_model), weights(d_model, d_ff)), name="mlp")


def gated(batch: int = 64, d_model: int = 8192, d_ff: int = 28_672) -> Workload:
    """Llama 70B's gated MLP, of few tokens as in a decode step."""
    params = {**weights(d_model, d_ff), "gate": array(d_model, d_ff)}
    return Workload(gated_step, (array(batch, d_model), params), name="gated-mlp")


def scanned(batch: int = 512, layers: int = 8, d_model: int = 4096, d_ff: int = 16_384) -> Workload:
    """A stack of residual MLPs."""
    return Workload(scanned_step, (array(batch, d_model), weights(d_model, d_ff, layers)), name="scanned-mlp")


def attention(batch: int = 8, length: int = 1024, d_model: int = 4096, heads: int = 32) -> Workload:
    """A block of causal attention over `batch` prompts."""
    projection = array(d_model, heads, d_model // heads)
    params = {"wq": projection, "wk": projection, "wv": projection, "wo": array(heads, d_model // heads, d_model)}
    return Workload(attention_step, (array(batch, length, d_model), params), name="attention")


def training(batch: int = 8192, d_model: int = 4096, d_ff: int = 16_384) -> Workload:
    """A step of gradient descent of an MLP, whose parameters are donated."""
    x = array(batch, d_model)
    return Workload(training_step, (weights(d_model, d_ff), x, x), donate_argnums=(0,), name="mlp-training")
