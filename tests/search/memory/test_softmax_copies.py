"""Scores of attention that a TPU holds twice: when they are counted, and the compiler's peaks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import autoshard

EMBED, HEAD = 256, 128


def attention(x, wq, wk, wv, wo, dtype=jnp.float32):
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, w) for w in (wq, wk, wv))
    if q.shape[2] == k.shape[2]:
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=dtype)
        weights = jax.nn.softmax(causal(scores, scores.ndim - 2)).astype(v.dtype)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
    else:
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        scores = jnp.einsum("btkgd,bskd->btkgs", grouped, k, preferred_element_type=dtype)
        weights = jax.nn.softmax(causal(scores, 1)).astype(v.dtype)
        mixed = jnp.einsum("btkgs,bskd->btkgd", weights, v).reshape(q.shape)
    return x + jnp.einsum("bthd,hde->bte", mixed, wo)


def causal(scores, rows: int):
    at = jnp.arange(scores.shape[rows]).reshape(-1, *[1] * (scores.ndim - rows - 1))
    return jnp.where(at >= jnp.arange(scores.shape[-1]), scores, -jnp.inf)


def arguments(length: int, heads: int, kv_heads: int, batch: int = 1):
    shapes = [(batch, length, EMBED), *((EMBED, n, HEAD) for n in (heads, kv_heads, kv_heads)), (heads, HEAD, EMBED)]
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "batch", "dtype", "arrays"),
    (
        (2048, 2, 2, 1, jnp.float32, 1),
        (2056, 2, 2, 1, jnp.float32, 2),
        (4096, 2, 2, 1, jnp.float32, 2),
        (4096, 2, 2, 1, jnp.bfloat16, 1),
        (4096, 4, 2, 1, jnp.float32, 1),
        (4096, 4, 2, 2, jnp.float32, 2),
        (4096, 2, 1, 2, jnp.float32, 1),
        (2048, 4, 2, 2, jnp.float32, 1),
    ),
)
def test_long_float32_scores_count_twice(length, heads, kv_heads, batch, dtype, arrays: int):
    def step(*args):
        return attention(*args, dtype=dtype)

    found = autoshard.search(step, *arguments(length, heads, kv_heads, batch), topology="v5e:1x1")
    scores = batch * heads * length**2 * jnp.dtype(dtype).itemsize
    rest = sum(array.bytes_per_chip for array in found.arguments) + 4 * batch * length * heads * HEAD * 2
    assert arrays * scores < found.estimate.peak_bytes < arrays * scores + rest
    assert not any("memory" in warning for warning in found.warnings)  # the checker agrees


def test_columns_count_on_one_chip():
    """Split over two chips, 4,096 columns are 2,048 on each; the same plan on one chip holds them twice."""
    whole = autoshard.search(attention, *arguments(4096, 1, 1), topology="v5e:1x1").estimate.peak_bytes
    split = autoshard.search(attention, *arguments(4096, 1, 1), topology="v5e:1x2").estimate.peak_bytes
    assert split < 0.6 * whole


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "batch"),
    (
        pytest.param(
            2048, 8, 8, 1, marks=pytest.mark.long
        ),  # twice if the compiler fuses a projection with the product
        pytest.param(2048, 12, 12, 1, marks=pytest.mark.long),
        pytest.param(4096, 2, 2, 1, marks=pytest.mark.long),
        pytest.param(4096, 4, 2, 1, marks=pytest.mark.long),
        pytest.param(4096, 4, 2, 2, marks=pytest.mark.long),
    ),
)
def test_the_compiler_holds_scores_as_planned(length: int, heads: int, kv_heads: int, batch: int):
    args = arguments(length, heads, kv_heads, batch)
    found = autoshard.search(attention, *args, topology="v5e:1x1")
    audit = autoshard.audit(found, attention, *args, target="tpu")
    assert audit.peak_bytes is not None
    assert 0.9 < audit.peak_bytes / found.estimate.peak_bytes < 1.05
