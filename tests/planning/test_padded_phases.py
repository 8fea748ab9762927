"""Padding of phases that share weights and hand over a cache: one padded layout in all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import autoshard
from autoshard.plan import loads
from autoshard.planning.files.plan_file import dumps
from autoshard.planning.records import ArrayPlan

pytestmark = pytest.mark.long
WIDTH, HEADS, HEAD, PROMPT, CONTEXT = 512, 31, 17, 24, 64


def _heads(params: Any, x: Array) -> tuple[Array, Array, Array]:
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, params[name]) for name in ("wq", "wk", "wv"))
    return q, k, v


def _attend(params: Any, q: Array, k: Array, v: Array, visible: Array) -> Array:
    scores = jnp.where(visible, jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
    return jnp.einsum("bhts,bshd,hde->bte", jax.nn.softmax(scores), v, params["wo"])


def prefill(params: Any, x: Array) -> tuple[Array, Any]:
    q, k, v = _heads(params, x)
    return _attend(params, q, k, v, jnp.tril(jnp.ones((PROMPT, PROMPT), bool)))[:, -1], {"k": k, "v": v}


def decode(params: Any, cache: Any, x: Array, position: Array) -> tuple[Array, Any]:
    q, k, v = _heads(params, x[:, None])
    k = lax.dynamic_update_slice_in_dim(cache["k"], k, position, 1)
    v = lax.dynamic_update_slice_in_dim(cache["v"], v, position, 1)
    return _attend(params, q, k, v, jnp.arange(CONTEXT) <= position)[:, 0], {"k": k, "v": v}


def _workloads(tail: Any = None) -> dict[str, autoshard.Workload]:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {name: array(WIDTH, HEADS, HEAD) for name in ("wq", "wk", "wv")} | {"wo": array(HEADS, HEAD, WIDTH)}
    entry = array(1, CONTEXT, HEADS, HEAD)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        "prefill": autoshard.Workload(tail or prefill, (params, array(1, PROMPT, WIDTH))),
        "decode": autoshard.Workload(
            decode, (params, {"k": entry, "v": entry}, array(1, WIDTH), position), donate_argnums=(1,)
        ),
    }


def _search(tail: Any = None, **options: Any) -> autoshard.PhasePlans:
    return autoshard.search_phases(
        _workloads(tail), shared="params", topology="cpu:4", weights={"decode": 16}, **options
    )


@pytest.fixture(scope="module")
def plans() -> autoshard.PhasePlans:
    return _search()


def _padded(arrays: tuple[ArrayPlan, ...], paths: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return [
        (a.path[len(head) :], *((p.dim, p.size, p.padded) for p in a.padding))
        for head in paths
        for a in arrays
        if a.path.startswith(head)
    ]


def test_shared_weights_and_the_cache_have_one_padding(plans: autoshard.PhasePlans) -> None:
    first, then = plans["prefill"], plans["decode"]
    weights = _padded(first.arguments, ("params",))
    assert weights == _padded(then.arguments, ("params",))
    assert all(sizes[1:] == (HEADS, 32) for _, *dims in weights for sizes in dims)
    assert _padded(first.results, ("result[1]",)) == _padded(then.arguments, ("cache",)) != []
    assert first.handed_results == (1, 2)
    assert "keep their padding: prefill.result[1]['k'], prefill.result[1]['v']" in plans.explain()
    assert plans.proof.objective_seconds < _search(padding=False).proof.objective_seconds
    assert any("the best weighted sum without padding is" in each for each in then.warnings)


def test_the_handed_over_cache_keeps_its_padding_and_the_results_are_right(plans: autoshard.PhasePlans) -> None:
    rng = np.random.default_rng(0)
    first, then = (loads(dumps(plans[name])) for name in ("prefill", "decode"))
    params, prompt = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.1, jnp.float32), _workloads()["prefill"].args
    )
    placed = first.place(params, argument="params")
    last, cache = first.jit(prefill, first.make_mesh())(placed, prompt)
    assert cache["k"].shape == (1, PROMPT, 32, HEAD)
    longer = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, CONTEXT - PROMPT), (0, 0), (0, 0))), cache)
    at = jnp.int32(PROMPT)
    got, after = then.jit(decode, then.make_mesh())(placed, then.place(longer, argument="cache"), prompt[:, 0], at)
    assert after["k"].shape == (1, CONTEXT, 32, HEAD)
    want, given = prefill(params, prompt)
    whole = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, CONTEXT - PROMPT), (0, 0), (0, 0))), given)
    np.testing.assert_allclose(last, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got, decode(params, whole, prompt[:, 0], at)[0], rtol=1e-3, atol=1e-3)


def test_a_result_whose_padding_is_not_zero_is_cut() -> None:
    def exponential(params: Any, x: Array) -> tuple[Array, Any]:
        last, cache = prefill(params, x)
        return last, jax.tree.map(jnp.exp, cache)

    plans = _search(exponential)
    assert any(each.padding for each in plans["prefill"].results)
    assert plans["prefill"].handed_results == ()


def test_a_dimension_that_one_phase_cannot_pad_is_padded_in_none() -> None:
    def counting(params: Any, x: Array) -> tuple[Array, Any]:
        last, cache = prefill(params, x)
        counted = jnp.arange(float(cache["k"].size)).reshape(cache["k"].shape)
        return last + (cache["k"] + counted).sum(), cache

    plans = _search(counting)
    assert not any(each.size == HEADS for plan in plans.values() for each in plan.padding)
    assert any(f"its dimension of {HEADS} cannot be padded, because" in each for each in plans["decode"].warnings)
