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
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard import Audit
from autoshard.auditing.hlo_collectives import estimated_cycles
from autoshard.emitting import local_operation, program, targets
from autoshard.emitting.collectives.reshard_steps import run_step
from examples import llama
from search.formulation.collective_steps import CollectiveStep
from search.formulation.layouts import Layout

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
    monkeypatch.setattr(
        local_operation, "product", lambda eqn, left, right: eqn.primitive.bind(left, right, **eqn.params)
    )
    plain = audit(plan, attend, *args).compute_seconds
    assert rewritten is not None and plain is not None and plain > 2 * rewritten


@pytest.mark.slow
def test_long_sums_need_barriers() -> None:
    sizes = llama.Config(layers=12, d_model=4096, d_ff=1024, heads=4, kv_heads=1, vocab=2048)
    args = llama.abstract_params(sizes, unrolled=True), S((1, 1024), jnp.int32)
    plan = autoshard.search(llama.prefill_step, *args, topology="v5e:1x1")
    without = replace(plan, emission=replace(plan.emission, residual_barriers=False))
    peaks = [audit(each, llama.prefill_step, *args).peak_bytes or 0.0 for each in (plan, without)]
    assert peaks[1] > 1.05 * peaks[0]


def test_projections_stay_apart_from_long_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(x: Any, wq: Any, wk: Any, wv: Any, wo: Any) -> Any:
        q, k, v = (jnp.einsum("bte,ehd->bthd", x, w) for w in (wq, wk, wv))
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        causal = jnp.arange(2048)[:, None] >= jnp.arange(2048)
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)).astype(bf16)
        return x + jnp.einsum("bthd,hde->bte", jnp.einsum("bhts,bshd->bthd", weights, v), wo)

    args = S((1, 2048, 256), bf16), *[S((256, 12, 128), bf16)] * 3, S((12, 128, 256), bf16)
    plan = autoshard.search(attend, *args, topology="v5e:1x1")
    apart = audit(plan, attend, *args)
    monkeypatch.setattr(program, "score_barriers", lambda *_: frozenset())
    fused = audit(plan, attend, *args)
    assert (fused.compute_seconds or 0) > 1.5 * (apart.compute_seconds or 0) > 0
    assert (fused.peak_bytes or 0) > 1.5 * (apart.peak_bytes or 0) > 0


@pytest.mark.parametrize("shape", [(1, 200), (64,)])
def test_vectors_of_no_whole_tiles_are_gathered_as_matrices(shape: tuple[int, ...]) -> None:
    mesh = targets.mesh_of(targets.tpu_devices("v5e:2x2", (2, 2), "v5e"), {"x": 2, "y": 2})
    split, whole = (Layout((*[()] * (len(shape) - 1), axes)) for axes in (("x", "y"), ()))
    step = CollectiveStep("all-gather", ("x", "y"), split, whole, source_dim=len(shape) - 1)

    def compiled(gather: Callable[[Any], Any]) -> str:
        mapped = jax.shard_map(
            lambda x: jnp.tanh(gather(jnp.tanh(x))), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
        return jax.jit(mapped).lower(S(shape, bf16)).compile().as_text() or ""

    ours = compiled(lambda x: run_step(step, x, {"x": 2, "y": 2}))
    tiled = compiled(lambda x: lax.all_gather(x, ("x", "y"), axis=len(shape) - 1, tiled=True))
    assert "all-reduce" in tiled and "all-reduce" not in ours and "all-gather" in ours
    assert 0 < (estimated_cycles(ours) or 0) < (estimated_cycles(tiled) or 0)


@pytest.mark.tpu
@pytest.mark.parametrize(("split", "joined", "shape"), [(2, 1, (1, 32, 16384)), (1, 2, (1, 128, 4096))])
def test_an_all_to_all_of_an_array_with_a_dimension_of_one_element(split: int, joined: int, shape: tuple[int, ...]):
    """Over a leading dimension it costs a tenth of the cycles of a tiled all-to-all (libtpu 0.0.42)."""
    mesh = targets.mesh_of(targets.tpu_devices("v5p:2x2x1", (2, 2, 1), "v5p"), {"x": 4})
    source, target = (Layout(tuple(("x",) if i == at else () for i in range(3))) for at in (joined, split))
    step = CollectiveStep("all-to-all", ("x",), source, target, joined, split)

    def cycles(exchange) -> int:
        mapped = jax.shard_map(
            lambda x: jnp.tanh(exchange(jnp.tanh(x))), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
        compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).compile()
        return estimated_cycles(compiled.as_text() or "") or 0

    ours = cycles(lambda x: run_step(step, x, {"x": 4}))
    tiled = cycles(lambda x: lax.all_to_all(x, "x", split, joined, tiled=True))
    assert 0 < 3 * ours < tiled


def test_slabs_behind_several_dimensions_need_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(cache: Any, parents: Any) -> Any:
        return jnp.take_along_axis(cache, parents[None, :, :, None, None, None], axis=2, mode="clip")

    args = S((4, 8, 4, 2, 512, 128), bf16), S((8, 4), jnp.int32)
    plan = autoshard.search(chosen, *args, topology="v5e:1x1")
    rewritten = audit(plan, chosen, *args).compute_seconds
    monkeypatch.setattr(local_operation, "look_up", lambda primitive, *args: primitive.bind(*args[:2], **args[2]))
    plain = audit(plan, chosen, *args).compute_seconds
    assert rewritten is not None and plain is not None and plain > 2 * rewritten
