"""Programs of public bug reports and requests, rebuilt in a few lines each; `benchmarks/reports.py` measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

BF16, F32 = jnp.bfloat16, jnp.float32
BATCH = ("x", "y")


def spec(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def key_spec() -> Any:
    """An abstract PRNG key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def filled(leaf: Any) -> Any:
    """Numbers for an abstract array: small integers, a key, or floats."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    rng = np.random.default_rng(sum(leaf.shape))
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 8, leaf.shape), leaf.dtype)
    return jnp.asarray(np.abs(rng.normal(size=leaf.shape)), leaf.dtype)


def is_close(a: np.ndarray, b: np.ndarray, dtype: Any) -> bool:
    """Whether two results are equal up to the rounding of their type."""
    if jnp.issubdtype(dtype, jnp.integer):
        return bool((a == b).all())
    error = 1e-4 if jnp.dtype(dtype).itemsize >= 4 else 4 * float(jnp.finfo(dtype).eps)
    return bool(np.allclose(a, b, rtol=error, atol=error * np.abs(b).max(initial=1e-30)))


@dataclass(frozen=True)
class Case:
    """A function with abstract arguments, and the options of its search."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


# --- The faults that were reported first


def drop(key: Any, x: jax.Array, rate: float) -> jax.Array:
    """Dropout, as `flax.linen.Dropout` computes it."""
    if rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def dropout_training(rate: float, layers: int = 12, batch: int = 64, width: int = 2048) -> Case:
    """A training step with dropout after both matmuls of an MLP, scanned and rematerialised."""

    def loss(params: Any, x: jax.Array, key: Any) -> jax.Array:
        @jax.checkpoint
        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
            w, k = scanned
            first, second = jax.random.split(k)
            hidden = drop(first, jax.nn.gelu(x @ w["up"]), rate)
            return x + drop(second, hidden @ w["down"], rate), None

        x, _ = lax.scan(body, x, (params, jax.random.split(key, layers)))
        return jnp.mean(jnp.square(x.astype(F32)))

    def step(params: Any, x: jax.Array, key: Any) -> Any:
        gradients = jax.grad(loss)(params, x, key)
        return jax.tree.map(lambda p, g: (p - 1e-3 * g).astype(p.dtype), params, gradients)

    params = {"up": spec(layers, width, 4 * width), "down": spec(layers, 4 * width, width)}
    return Case(step, (params, spec(batch, width // 2, width), key_spec()), {"donate_argnums": 0})


def scaled_weights(width: int = 4096, batch: int = 64) -> Case:
    """An MLP whose int8 weights are multiplied by a scale per column before each matmul."""

    def mlp(params: Any, x: jax.Array) -> jax.Array:
        w = {name: q.astype(BF16) * scale for name, (q, scale) in params.items()}
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"]

    shapes = {"up": (width, 4 * width), "down": (4 * width, width)}
    params = {name: (spec(*shape, dtype=jnp.int8), spec(shape[1])) for name, shape in shapes.items()}
    return Case(mlp, (params, spec(batch, width)))


def accumulation(form: str, rounds: int = 8, batch: int = 65536, width: int = 4096) -> Case:
    """A sum of outer products over microbatches, by `scan` from zeros or by Python's `sum`."""
    dot = partial(jnp.einsum, "be,bf->ef", preferred_element_type=F32)

    def scanned(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.scan(lambda c, z: (c + dot(*z), None), jnp.zeros((width, width)), (x, y))[0]

    def summed(x: jax.Array, y: jax.Array) -> Any:
        return sum(dot(x[i], y[i]) for i in range(rounds))

    x = spec(rounds, batch, width)
    split = P(None, BATCH)
    return Case({"scan": scanned, "sum": summed}[form], (x, x), {"pins": {"x": split, "y": split}})


def scanned_cache(layers: int = 8) -> Case:
    """A donated KV cache that a scan over layers takes slice by slice and returns."""

    def fn(cache: jax.Array, new: jax.Array, pos: jax.Array) -> jax.Array:
        write = lambda c, n: lax.dynamic_update_slice(c, n[:, None], (0, pos, 0, 0))  # noqa: E731
        return lax.scan(lambda _, z: (0, write(*z)), 0, (cache, new))[1]

    args = (spec(layers, 64, 8192, 8, 128), spec(layers, 64, 8, 128), spec(dtype=jnp.int32))
    return Case(fn, args, {"donate_argnums": 0, "pins": {"cache": P(None, "y")}})


def stacked_results() -> Case:
    """A forward scan that makes residuals, and a backward scan that reads them and makes gradients."""

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        x, residuals = lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, w)
        return lax.scan(lambda d, z: (d @ z[0].T, z[1].T @ d), x, (w, residuals), reverse=True)[1]

    return Case(fn, (spec(8192, 4096), spec(8, 4096, 4096)))


# --- Further reports


def random_weights(small: bool = False) -> Case:
    """A `Dense` of 32768 by 262144, initialised inside `jit`."""
    shape = (64, 128) if small else (32768, 262144)
    fn = lambda key: jax.nn.initializers.lecun_normal()(key, shape, F32)  # noqa: E731
    return Case(fn, (key_spec(),))


def random_layers(small: bool = False) -> Case:
    """Weights of 32 layers initialised by `vmap` over keys, as Levanter does."""
    layers, shape = (4, (16, 8)) if small else (32, (14336, 4096))

    def fn(key: Any) -> jax.Array:
        return jax.vmap(lambda k: jax.random.normal(k, shape))(jax.random.split(key, layers))

    return Case(fn, (key_spec(),))


def optimizer_state(small: bool = False) -> Case:
    """Adam on replicated parameters, with optimizer state that is pinned to be split."""
    width, batch = (16, 32) if small else (4096, 8192)
    optimizer = optax.adam(1e-3)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"] - y))

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = {"up": spec(width, width, dtype=F32), "down": spec(width, width, dtype=F32)}
    state = jax.eval_shape(optimizer.init, params)
    x = spec(batch, width, dtype=F32)
    pins = {"params.*": P(), "state.*.mu.*": P("x", "y"), "state.*.nu.*": P("x", "y"), "x": P(BATCH), "y": P(BATCH)}
    return Case(step, (params, state, x, x), {"donate_argnums": (0, 1), "pins": pins})


def exchanged_layout(small: bool = False) -> Case:
    """A sum that moves from `P("y", None, "x")` to `P(None, ("x", "y"))`."""
    n = 16 if small else 1024
    x = spec(n, n, n, dtype=F32)
    pins = {"a": P("y", None, "x"), "b": P("y", None, "x"), "c": P(None, BATCH)}
    return Case(lambda a, b, c: c + (a + b), (x, x, x), {"pins": pins})


def sampling(small: bool = False) -> Case:
    """Top-k sampling from logits that are split along the vocabulary."""
    batch, vocabulary = (4, 64) if small else (64, 152_064)

    def fn(logits: jax.Array, words: jax.Array) -> jax.Array:
        best, index = lax.top_k(logits, 8)
        chosen = jax.random.categorical(jax.random.wrap_key_data(words), best)
        return jnp.take_along_axis(index, chosen[:, None], axis=1)[:, 0]

    args = (spec(batch, vocabulary, dtype=F32), spec(2, dtype=jnp.uint32))
    return Case(fn, args, {"pins": {"logits": P(None, BATCH)}})


def log_probabilities(small: bool = False) -> Case:
    """Log-probabilities of given tokens with their ranks and the best few, from logits split along the vocabulary."""
    batch, vocabulary = (4, 64) if small else (32, 131_072)

    def fn(logits: jax.Array, tokens: jax.Array) -> Any:
        scores = jax.nn.log_softmax(logits)
        mine = jnp.take_along_axis(scores, tokens[:, None], axis=1)
        return lax.top_k(scores, 4), mine, jnp.sum(scores >= mine, axis=1)

    args = (spec(batch, vocabulary, dtype=F32), spec(batch, dtype=jnp.int32))
    return Case(fn, args, {"pins": {"logits": P(None, BATCH)}})


def gathered_weights(small: bool = False) -> Case:
    """Fully sharded weights in a rematerialised scan: the backward pass must gather each layer's weight again."""
    layers, width, batch = (3, 16, 32) if small else (16, 4096, 32_768)

    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(lax.scan(body, x, params)[0].astype(F32))

    pins = {"params": P(None, BATCH), "x": P(BATCH)}
    return Case(jax.grad(loss), (spec(layers, width, width), spec(batch, width)), {"pins": pins})


def attention(small: bool = False, length: int = 98_304) -> Case:
    """Attention over a long sequence, whose number of chips is not a power of two."""
    batch, length, heads, size = (1, 48, 8, 8) if small else (1, length // 8, 32, 64)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("bte,ehd->bhtd", x, params[name]) for name in ("q", "k", "v"))
        scores = jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", q, k))
        out = jnp.einsum("bhts,bhsd->bthd", scores, v)
        return out.reshape(*out.shape[:2], -1) @ params["o"]

    width = heads * size
    params = {name: spec(width, heads, size) for name in ("q", "k", "v")} | {"o": spec(width, width)}
    return Case(fn, (params, spec(batch, length, width)))


def tiled_vocabulary(small: bool = False) -> Case:
    """A loss over tiles of the tokens, added up in a scan from zero, with the gradient of the output embedding."""
    tiles, rows, width, vocabulary = (4, 8, 16, 64) if small else (8, 16_384, 4096, 32_768)

    def loss(head: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        @jax.checkpoint
        def body(total: jax.Array, tile: Any) -> tuple[jax.Array, None]:
            x, y = tile
            logits = (x @ head).astype(F32)
            picked = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
            return total + jnp.sum(jax.nn.logsumexp(logits, axis=1) - picked), None

        return lax.scan(body, jnp.float32(0), (hidden, labels))[0] / (tiles * rows)

    args = (spec(width, vocabulary), spec(tiles, rows, width), spec(tiles, rows, dtype=jnp.int32))
    batch = P(None, BATCH)
    return Case(jax.value_and_grad(loss), args, {"pins": {"hidden": batch, "labels": batch, "head": P()}})


def orthogonalised(small: bool = False) -> Case:
    """Muon: Newton-Schulz iterations on the momentum of a stack of layers, which are independent of each other."""
    layers, width = (8, 8) if small else (16, 4096)

    def one(g: jax.Array) -> jax.Array:
        x = g / (jnp.linalg.norm(g) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * (a @ a)) @ x
        return x

    def step(params: jax.Array, momentum: jax.Array, gradient: jax.Array) -> Any:
        momentum = 0.95 * momentum + gradient
        return params - 0.02 * jax.vmap(one)(momentum), momentum

    args = (spec(layers, width, width, dtype=F32),) * 3
    return Case(step, args, {"donate_argnums": (0, 1), "pins": {"gradient": P(None, "x", "y")}})


def batch_norm(small: bool = False) -> Case:
    """Batch normalisation of a split batch, with running statistics."""
    batch, space, channels = (16, 4, 8) if small else (1024, 56 * 56, 64)

    def fn(x: jax.Array, mean: jax.Array, square: jax.Array) -> Any:
        now, second = jnp.mean(x, axis=(0, 1)), jnp.mean(jnp.square(x), axis=(0, 1))
        y = (x - now) * lax.rsqrt(second - jnp.square(now) + 1e-5)
        return y, 0.9 * mean + 0.1 * now, 0.9 * square + 0.1 * second

    args = (spec(batch, space, channels, dtype=F32), spec(channels, dtype=F32), spec(channels, dtype=F32))
    return Case(fn, args, {"pins": {"x": P(BATCH)}})


def adapted(small: bool = False) -> Case:
    """LoRA: an MLP whose weights are `W + s A B`, added up before each matmul."""
    width, rank, batch = (16, 4, 8) if small else (4096, 16, 64)

    def mlp(params: Any, x: jax.Array) -> jax.Array:
        up, down = (p["w"] + 2.0 * (p["a"] @ p["b"]) for p in (params["up"], params["down"]))
        return x + jax.nn.gelu(x @ up) @ down

    def layer(rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"w": spec(rows, columns), "a": spec(rows, rank), "b": spec(rank, columns)}

    return Case(mlp, ({"up": layer(width, 4 * width), "down": layer(4 * width, width)}, spec(batch, width)))
