"""Workarounds for the TPU compiler are still needed: each construct, compiled with and without its rewrite.

A test that fails here says that the compiler has learned what the rewrite does; the rewrite can then go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard.auditing.audit import Audit
from autoshard.emitting import program
from examples import llama

S = jax.ShapeDtypeStruct
bf16 = jnp.bfloat16

pytestmark = [pytest.mark.tpu, pytest.mark.long]


def audit(plan: autoshard.Plan, fn: Callable[..., Any], *args: Any) -> Audit:
    return autoshard.audit(plan, fn, *args, target="tpu")


def test_vectors_need_a_row_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query: Any, keys: Any, values: Any) -> Any:
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, keys)
        return jnp.einsum("bhqk,bkhd->bqhd", scores, values)

    args = S((64, 1, 2, 128), bf16), S((64, 2048, 2, 128), bf16), S((64, 2048, 2, 128), bf16)
    plan = autoshard.search(attend, *args, topology="v5e:1x1")
    rewritten = audit(plan, attend, *args).compute_seconds
    monkeypatch.setattr(program, "product", lambda eqn, left, right: eqn.primitive.bind(left, right, **eqn.params))
    plain = audit(plan, attend, *args).compute_seconds
    assert rewritten is not None and plain is not None and plain > 2 * rewritten


def test_long_sums_need_barriers() -> None:
    sizes = llama.Config(layers=12, d_model=4096, d_ff=1024, heads=4, kv_heads=1, vocab=2048)
    args = llama.abstract_params(sizes, unrolled=True), S((1, 1024), jnp.int32)
    plan = autoshard.search(llama.prefill_step, *args, topology="v5e:1x1")
    without = replace(plan, emission=replace(plan.emission, residual_barriers=False))
    peaks = [audit(each, llama.prefill_step, *args).peak_bytes or 0.0 for each in (plan, without)]
    assert peaks[1] > 1.05 * peaks[0]
