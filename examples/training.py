"""A training step of Llama 3: loss, gradients, AdamW, with rematerialized layers and accumulated gradients.

There is no sharding code. The search decides whether the step is data parallel, fully sharded (ZeRO), tensor or sequence
parallel, or a mixture, for the optimizer state as for everything else.

    autoshard search examples/training.py:train --topology v5p:2x2x4 --set size=8b --set batch=64
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from autoshard import Workload
from examples.llama import Params, abstract_params, config_of, prefill_layer, rms_norm

State = Any  # Optax's: a nested tuple of counters and trees shaped like the parameters


def loss(params: Params, tokens: Array, remat: bool = True) -> Array:
    """The mean cross entropy of `tokens` `[B, T + 1]`, each token but the first as the one that follows those before."""

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        return prefill_layer(layer, x)[0], None

    run = jax.checkpoint(block) if remat else block
    x = params["embedding"][tokens[:, :-1]]  # [B, T, E]
    if isinstance(params["layers"], list):
        for layer in params["layers"]:
            x, _ = run(x, layer)
    else:
        x, _ = lax.scan(run, x, params["layers"])
    normed = rms_norm(x, params["norm"])
    logits = jnp.einsum("bte,ev->btv", normed, params["head"], preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def gradients(params: Params, tokens: Array, parts: int, remat: bool) -> tuple[Array, Params]:
    """Loss and float32 gradients of a batch, summed up over `parts` of it that follow one another."""
    value_and_grad = jax.value_and_grad(partial(loss, remat=remat))
    if parts == 1:
        return value_and_grad(params, tokens)

    def one(total: Any, part: Array) -> tuple[Any, None]:
        found = value_and_grad(params, part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found), None

    zeros = (jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params))
    total, _ = lax.scan(one, zeros, tokens.reshape(parts, -1, tokens.shape[1]))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def adamw() -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with float32 moments, and gradients clipped to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b2=0.95, weight_decay=0.1))


def train_step(
    params: Params, state: State, tokens: Array, *, accumulate: int = 1, remat: bool = True
) -> tuple[Params, State, Array]:
    """Parameters and optimizer state after one step on `tokens` `[B, T + 1]`, and the loss before it.

    `params` are float32 and are cast to bf16 for the model, as in mixed precision (Micikevicius et al. 2017, arXiv 1710.03740).
    """
    value, found = gradients(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), tokens, accumulate, remat)
    found = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), found, params)
    updates, state = adamw().update(found, state, params)
    return optax.apply_updates(params, updates), state, value  # pyright: ignore[reportReturnType]


def train(
    size: str = "8b",
    batch: int = 64,
    length: int = 1024,
    unrolled: bool = False,
    layers: int | None = None,
    accumulate: int = 1,
    remat: bool = True,
) -> Workload:
    """One training step on `batch` sequences of `length` tokens; parameters and optimizer state are donated."""
    config = config_of(size, layers)
    shapes = abstract_params(config, unrolled)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)
    args = (params, jax.eval_shape(adamw().init, params), jax.ShapeDtypeStruct((batch, length + 1), jnp.int32))
    step = partial(train_step, accumulate=accumulate, remat=remat)
    return Workload(step, args, donate_argnums=(0, 1), name=f"llama-3-{size}-train")
