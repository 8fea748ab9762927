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
from jax import lax

import autoshard
from autoshard.auditing.audit import Audit
from autoshard.emitting import program
from examples import llama

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32

pytestmark = pytest.mark.tpu


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


def test_conversions_need_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(weights: Any, x: Any) -> Any:
        for up, down in weights:
            x = jnp.tanh(x @ up.astype(bf16)) @ down.astype(bf16)
        return x

    args = [(S((2048, 8192), f32), S((8192, 2048), f32))] * 8, S((8, 2048), bf16)
    plan = autoshard.search(layers, *args, topology="v5e:2x2")
    rewritten = audit(plan, layers, *args).peak_bytes
    monkeypatch.setattr(program, "waits", lambda program: {})
    plain = audit(plan, layers, *args).peak_bytes
    assert rewritten is not None and plain is not None and plain > 1.05 * rewritten


def test_carried_arrays_need_the_layout_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(prompt: Any, x: Any) -> Any:
        def attend(state: Any) -> Any:
            i, x, cache = state
            cache = lax.dynamic_update_slice(cache, x[:, None], (0, i, 0, 0))
            scores = jax.nn.softmax(jnp.einsum("bhd,bshd->bhs", x, cache))
            return i + 1, jnp.einsum("bhs,bshd->bhd", scores, cache), cache

        cache = jnp.zeros((64, 2048, 25, 64), bf16).at[:, :64].set(prompt)
        return lax.while_loop(lambda state: state[0] < 500, attend, (64, x, cache))[1]

    args = S((64, 64, 25, 64), bf16), S((64, 25, 64), bf16)
    plan = autoshard.search(generate, *args, topology="v5e:1x1")
    rewritten = audit(plan, generate, *args).peak_bytes
    monkeypatch.setattr(program, "as_an_argument", lambda piece: piece)
    plain = audit(plan, generate, *args).peak_bytes
    assert rewritten is not None and plain is not None and plain > 1.2 * rewritten
