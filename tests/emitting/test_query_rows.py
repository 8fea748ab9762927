"""Attention with few queries per head of keys: rows of zeros change no number, and make it faster on TPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard
from autoshard.emitting import program
from autoshard.emitting.tpu_workarounds import query_rows
from autoshard.emitting.tpu_workarounds.query_rows import ROWS, find_few_rows
from tests.support.layout_strategies import assert_equal, run_planned
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


def grouped(q: Any, k: Any, v: Any, position: Any) -> Any:
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=f32)
    visible = jnp.arange(k.shape[1]) <= position
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("bkgs,bskd->bkgd", weights, v)


def with_a_bias(q: Any, k: Any, v: Any, bias: Any) -> Any:
    """The bias has the rows of the queries, and comes from outside."""
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=f32) + bias
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores).astype(v.dtype), v)


def normed_over_rows(q: Any, k: Any, v: Any) -> Any:
    """The rows meet before the product with the values."""
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=f32)
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores, axis=2).astype(v.dtype), v)


def also_returned(q: Any, k: Any, v: Any) -> Any:
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=f32)
    return jnp.einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores).astype(v.dtype), v), scores


def shapes(batch: int, heads: int, rows: int, columns: int, dtype: Any = bf16) -> list[Any]:
    return [S((batch, heads, rows, 128), dtype), *[S((batch, columns, heads, 128), dtype)] * 2]


def found_in(fn: Any, *args: Any, topology: str = "v5e:1x1") -> dict[int, query_rows.Grown]:
    plan = autoshard.search(fn, *args, topology=topology)
    return find_few_rows(trace(fn, *args), plan.choice, plan.topology)


POSITION = S((), jnp.int32)


@pytest.mark.parametrize(
    ("fn", "args", "products"),
    [
        (grouped, [*shapes(512, 1, 4, 2048), POSITION], 2),
        (grouped, [*shapes(64, 8, 2, 2048), POSITION], 2),
        (grouped, [*shapes(512, 1, 1, 2048), POSITION], 0),
        (grouped, [*shapes(512, 1, 8, 2048), POSITION], 0),
        (grouped, [*shapes(1, 1, 4, 2048), POSITION], 0),
        (grouped, [*shapes(4096, 1, 4, 2048), POSITION], 0),
        (with_a_bias, [*shapes(512, 1, 4, 2048), S((4, 2048), f32)], 0),
        (normed_over_rows, shapes(512, 1, 4, 2048), 0),
        (also_returned, shapes(512, 1, 4, 2048), 0),
    ],
)
def test_few_rows_get_rows_of_zeros(fn: Any, args: list[Any], products: int) -> None:
    found = found_in(fn, *args)
    assert sum(each.begins or each.ends for each in found.values()) == products
    assert all(each.rows < ROWS and each.chips == 1 for each in found.values())


@pytest.mark.parametrize("topology", ["h100:1", "v6e:1x1"])
def test_rows_of_other_chips_have_none(topology: str) -> None:
    args = [*shapes(512, 1, 4, 2048), POSITION]
    assert not found_in(grouped, *args, topology=topology)


@pytest.mark.parametrize("rows", [2, 4])
def test_rows_of_zeros_change_no_number(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_rows, "LEAST_BYTES", 0)
    random = np.random.default_rng(rows)
    q, k, v = (jnp.asarray(random.normal(size=each.shape), f32) for each in shapes(8, 2, rows, 256, f32))
    args = q, k, v, jnp.int32(100)
    plan = autoshard.search(grouped, *args, topology="v5e:2x2")
    traced = trace(grouped, *args)
    assert find_few_rows(traced, plan.choice, plan.topology)
    (planned,) = run_planned(traced, plan.topology, [plan.choice], *args)
    assert_equal(planned, grouped(*args))


@pytest.mark.tpu
def test_rows_of_zeros_make_attention_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*shapes(512, 1, 4, 2048), POSITION]
    plan = autoshard.search(grouped, *args, topology="v5e:1x1")
    found = autoshard.audit(plan, grouped, *args, target="tpu")
    assert found.ok and found.flops == found.planned_flops, str(found)
    monkeypatch.setattr(program, "find_few_rows", lambda *_: {})
    plain = autoshard.audit(plan, grouped, *args, target="tpu")
    assert found.compute_seconds is not None and plain.compute_seconds is not None
    assert found.compute_seconds < 0.9 * plain.compute_seconds
