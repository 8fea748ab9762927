"""More programs of other people (`expert_programs.py`): stacks in loops, fused projections, windows, a training step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.expert_programs import (
    LLAMA2_7B,
    LLAMA_1B,
    LLAMA_8B,
    MASKED,
    MISTRAL_7B,
    QWEN3_8B,
    Program,
    Sizes,
    attention,
    embedded,
    feed_forward,
    gated,
    grouped,
    model,
    projected,
    projected_back,
    read_out,
    repeated,
    rms,
    token,
)
from benchmarks.logical_axes import TRAINING, Named, constrain


def stacked(layer: dict[str, Named], layers: int, axis: int) -> dict[str, Named]:
    """The arrays of a layer, stacked along a dimension."""

    def stack(leaf: Named) -> Named:
        shape, names = list(leaf.shape), leaf.names.split()
        shape.insert(axis, layers)
        names.insert(axis, "-")
        return Named(tuple(shape), " ".join(names), leaf.dtype)

    return {name: stack(leaf) for name, leaf in layer.items()}


# --- decode: weights stacked along their second dimension, a cache of the prompt and one of new tokens (as in MaxText)


def _part(q: Any, k: Any, v: Any, visible: Any) -> tuple[Any, Any, Any]:
    """Attention over one cache `[S, K, B, D]`: weighted values, maxima and sums of exponentials."""
    k, v = (jnp.transpose(each, (2, 0, 1, 3)) for each in (k, v))  # [B, S, K, D]
    b, t, h, d = q.shape
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(b, t, k.shape[2], -1, d), k)
    scores = jnp.where(visible[:, None, None, None], scores.astype(jnp.float32), MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - highest)
    sums = jnp.moveaxis(jnp.sum(exponentials, axis=-1, keepdims=True), -2, 1).reshape(b, t, h, 1)
    values = jnp.einsum("bkgts,bskd->btkgd", exponentials.astype(v.dtype), v).reshape(b, t, h, d)
    return values, jnp.moveaxis(highest, -2, 1).reshape(b, t, h, 1), sums


def two_caches_step(params: Any, cache: Any, tokens: Any, positions: Any, lengths: Any) -> Any:
    """The prompt's cache is only read; new tokens stand in a short one; their softmaxes are joined."""
    x, index = embedded(params, tokens), cache["index"]

    def body(x: Any, scanned: Any) -> Any:
        layer, entry = scanned
        q, k, v = projected(layer, rms(x, layer["norm1"]), positions)
        q = q * q.shape[-1] ** -0.5
        new = dict(entry)
        for name, each in (("k_new", k), ("v_new", v)):
            update = jnp.transpose(each, (1, 2, 0, 3))  # [T, K, B, D]
            new[name] = lax.dynamic_update_index_in_dim(entry[name], update[0], index, 0)
        seen = jnp.arange(entry["k"].shape[0]) < lengths[:, None]
        fresh = jnp.broadcast_to(jnp.arange(entry["k_new"].shape[0]) <= index, (x.shape[0], entry["k_new"].shape[0]))
        parts = [_part(q, new["k"], new["v"], seen), _part(q, new["k_new"], new["v_new"], fresh)]
        highest = jnp.maximum(parts[0][1], parts[1][1])
        scales = [jnp.exp(part[1] - highest) for part in parts]
        total = sum(scale * part[2] for scale, part in zip(scales, parts, strict=True))
        attended: Any = sum(part[0] * scale / total for scale, part in zip(scales, parts, strict=True))
        x = x + projected_back(layer, constrain(attended.astype(x.dtype), "batch length act_heads -"))
        return x + gated(rms(x, layer["norm2"]), layer), new

    layers = jax.tree_util.tree_map(lambda w: jnp.moveaxis(w, 1, 0), params["layers"])
    entries = {name: held for name, held in cache.items() if name != "index"}
    x, entries = lax.scan(body, x, (layers, entries))
    return read_out(params, x), {**entries, "index": index + 1}


def two_caches(n: Sizes = LLAMA_8B, batch: int = 32, prompt: int = 1024, new: int = 1024) -> Program:
    """A decode step of MaxText's form."""

    def held(length: int) -> Named:
        return Named((n.layers, length, n.K, batch, n.D), "- - cache_heads cache_batch -")

    cache = {
        "k": held(prompt),
        "v": held(prompt),
        "k_new": held(new),
        "v_new": held(new),
        "index": Named((), "", jnp.int32),
    }
    params = model(n, stacked(attention(n) | feed_forward(n), n.layers, 1))
    return Program(two_caches_step, (params, cache, *token(batch), Named((batch,), "batch", jnp.int32)), (1,))


# --- prefill of the same model


def packed_prompt(params: Any, tokens: Any, segments: Any) -> Any:
    """Prompts packed by segment: the last logits, and caches `[L, S, K, B, D]`."""
    places = jnp.arange(tokens.shape[1])
    mask = (segments[:, :, None] == segments[:, None]) & (places[:, None] >= places)  # [B, T, S]
    positions = jnp.broadcast_to(places, tokens.shape)

    def body(x: Any, layer: Any) -> Any:
        q, k, v = projected(layer, rms(x, layer["norm1"]), positions)
        x = x + projected_back(layer, grouped(q, k, v, mask[:, None]))
        return x + gated(rms(x, layer["norm2"]), layer), tuple(jnp.transpose(each, (1, 2, 0, 3)) for each in (k, v))

    layers = jax.tree_util.tree_map(lambda w: jnp.moveaxis(w, 1, 0), params["layers"])
    x, cache = lax.scan(body, embedded(params, tokens), layers)
    return read_out(params, x[:, -1:]), cache


def packed(n: Sizes = LLAMA_8B, batch: int = 4, length: int = 2048) -> Program:
    """Prefill of MaxText's form."""
    params = model(n, stacked(attention(n) | feed_forward(n), n.layers, 1))
    ids = Named((batch, length), "batch -", jnp.int32)
    return Program(packed_prompt, (params, ids, ids), ())


# --- decode: the stacked cache in the carry, normed queries and keys (as in Qwen 3)


def carried_step(params: Any, cache: Any, tokens: Any, position: Any) -> Any:
    """Caches `[L, B, S, K, D]`, updated and read by the number of the layer."""
    positions = jnp.broadcast_to(position, tokens.shape)
    visible = jnp.arange(cache["k"].shape[2]) <= position

    def body(i: Any, carried: Any) -> Any:
        x, keys, values = carried
        layer = jax.tree_util.tree_map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), params["layers"])
        q, k, v = projected(layer, rms(x, layer["norm1"]), positions)
        q, k = rms(q, layer["q_norm"]), rms(k, layer["k_norm"])
        keys = lax.dynamic_update_slice(keys, k[None], (i, 0, position, 0, 0))
        values = lax.dynamic_update_slice(values, v[None], (i, 0, position, 0, 0))
        k, v = (lax.dynamic_index_in_dim(each, i, keepdims=False) for each in (keys, values))
        x = x + projected_back(layer, grouped(q, k, v, visible))
        return x + gated(rms(x, layer["norm2"]), layer), keys, values

    layers = params["layers"]["norm1"].shape[0]
    x, keys, values = lax.fori_loop(0, layers, body, (embedded(params, tokens), cache["k"], cache["v"]))
    return read_out(params, x), {"k": keys, "v": values}


def carried(n: Sizes = QWEN3_8B, batch: int = 64, context: int = 2048) -> Program:
    """A decode step whose loop carries the cache."""
    held = Named((n.layers, batch, context, n.K, n.D), "- cache_batch - cache_heads -")
    norms = {"q_norm": Named((n.D,), "-"), "k_norm": Named((n.D,), "-")}
    params = model(n, stacked(attention(n) | norms | feed_forward(n), n.layers, 0))
    return Program(carried_step, (params, {"k": held, "v": held}, token(batch)[0], Named((), "", jnp.int32)), (1,))


# --- decode: one flat projection for queries, keys and values, no groups (as in GPT-2's ports)


def _rotated(x: Any, table: Any) -> Any:
    """`[B, N, D]` turned by pairs, from a table `[D / 2, 2]` of cosines and sines."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[:, 0], table[:, 1]
    turned = [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin]
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


def flat_step(params: Any, cache: Any, tokens: Any, position: Any) -> Any:
    """Caches `[B, H, S, D]`, keys and values in one array per layer."""
    x, new = constrain(params["table"][tokens], "batch act_embed"), []
    table = lax.dynamic_index_in_dim(params["angles"], position, keepdims=False)
    for layer, held in zip(params["layers"], cache, strict=True):
        _, b, h, s, d = held.shape
        q, k, v = jnp.einsum("be,ecf->cbf", rms(x, layer["norm1"]), layer["qkv"]).reshape(3, b, h, d)
        q, k = _rotated(q, table), _rotated(k, table)
        held = lax.dynamic_update_slice(held, jnp.stack([k, v])[:, :, :, None], (0, 0, 0, position, 0))
        scores = jnp.einsum("bhd,bhsd->bhs", q, held[0]).astype(jnp.float32) / d**0.5
        scores = jnp.where(jnp.arange(s) <= position, scores, MASKED)
        attended = jnp.einsum("bhs,bhsd->bhd", jax.nn.softmax(scores).astype(x.dtype), held[1])
        x = x + constrain(constrain(attended, "batch act_heads -").reshape(b, h * d) @ layer["o"], "batch act_embed")
        gate, up = jnp.einsum("be,ecf->cbf", rms(x, layer["norm2"]), layer["gate_up"])
        x = x + constrain(constrain(jax.nn.silu(gate) * up, "batch act_mlp") @ layer["down"], "batch act_embed")
        new.append(held)
    return constrain(rms(x, params["norm"]) @ params["head"], "batch act_vocab"), new


def flat(n: Sizes = LLAMA2_7B, batch: int = 16, context: int = 4096) -> Program:
    """A decode step with flat matrices."""
    layer = {
        "qkv": Named((n.E, 3, n.H * n.D), "embed - q_heads"),
        "o": Named((n.H * n.D, n.E), "q_heads embed"),
        "gate_up": Named((n.E, 2, n.F), "embed - mlp"),
        "down": Named((n.F, n.E), "mlp embed"),
        "norm1": Named((n.E,), "norm"),
        "norm2": Named((n.E,), "norm"),
    }
    params = {
        **model(n, [dict(layer) for _ in range(n.layers)]),
        "angles": Named((context, n.D // 2, 2), "- - -", jnp.float32),
    }
    cache = [Named((2, batch, n.H, context, n.D), "- cache_batch cache_heads - -")] * n.layers
    return Program(flat_step, (params, cache, Named((batch,), "batch", jnp.int32), Named((), "", jnp.int32)), (1,))


# --- decode: a rolling window, repeated heads (as in Flax ports of Mistral)


def rolling_step(params: Any, cache: Any, tokens: Any, positions: Any) -> Any:
    """Caches `[B, K, W, D]` that new tokens overwrite in turn, as `xs` and `ys` of a scan."""
    width = cache[0].shape[3]
    place = positions[0, 0] % width
    visible = (jnp.arange(width) <= positions[0, 0])[None, None, None]

    def body(x: Any, scanned: Any) -> Any:
        layer, (keys, values) = scanned
        q, k, v = (jnp.swapaxes(each, 1, 2) for each in projected(layer, rms(x, layer["norm1"]), positions))
        keys = lax.dynamic_update_slice(keys, k, (0, 0, place, 0))
        values = lax.dynamic_update_slice(values, v, (0, 0, place, 0))
        x = x + projected_back(layer, jnp.swapaxes(repeated(q, keys, values, visible), 1, 2))
        return x + gated(rms(x, layer["norm2"]), layer), (keys, values)

    x, cache = lax.scan(body, embedded(params, tokens), (params["layers"], cache))
    return read_out(params, x), cache


def rolling(n: Sizes = MISTRAL_7B, batch: int = 32, window: int = 4096) -> Program:
    """A decode step over a rolling window."""
    held = Named((n.layers, batch, n.K, window, n.D), "- cache_batch cache_heads - -")
    params = model(n, stacked(attention(n) | feed_forward(n), n.layers, 0))
    return Program(rolling_step, (params, (held, held), *token(batch)), (1,))


# --- one training step: a rematerialized scan, cross entropy, Adam


def training_step(state: Any, tokens: Any, targets: Any) -> Any:
    """The loss, and the state after one step of Adam."""
    places = jnp.arange(tokens.shape[1])
    mask, positions = places[:, None] >= places, jnp.broadcast_to(places, tokens.shape)

    def body(x: Any, layer: Any) -> Any:
        q, k, v = projected(layer, rms(x, layer["norm1"]), positions)
        x = x + projected_back(layer, grouped(q, k, v, mask))
        return constrain(x + gated(rms(x, layer["norm2"]), layer), "batch length act_embed"), None

    def loss(params: Any) -> Any:
        x, _ = lax.scan(jax.checkpoint(body), embedded(params, tokens), params["layers"])
        log_likelihood = jax.nn.log_softmax(read_out(params, x).astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(log_likelihood, targets[..., None], axis=-1))

    value, gradient = jax.value_and_grad(loss)(state["params"])
    first = jax.tree_util.tree_map(lambda m, g: 0.9 * m + 0.1 * g, state["first"], gradient)
    second = jax.tree_util.tree_map(
        lambda m, g: 0.95 * m + 0.05 * jnp.square(g.astype(jnp.float32)), state["second"], gradient
    )
    moved = jax.tree_util.tree_map(
        lambda w, m, s: (w - 3e-4 * m / (jnp.sqrt(s) + 1e-8)).astype(w.dtype), state["params"], first, second
    )
    return value, {"params": moved, "first": first, "second": second}


def training(n: Sizes = LLAMA_1B, batch: int = 32, length: int = 1024) -> Program:
    """A training step of tunix's and MaxText's form."""
    params = model(n, stacked(attention(n) | feed_forward(n), n.layers, 0))
    moment = jax.tree_util.tree_map(lambda leaf: Named(leaf.shape, leaf.names, jnp.float32), params)
    ids = Named((batch, length), "batch -", jnp.int32)
    return Program(training_step, ({"params": params, "first": moment, "second": moment}, ids, ids), (0,), TRAINING)
