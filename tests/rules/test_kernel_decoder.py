"""A decoder of JAX's own kernels, planned whole: under exact rules, equal to unsharded, and compiled as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import autoshard
from autoshard.workload import Workload
from examples.kernels import Sizes, decode, prefill

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, in its kernels
SMALL = Sizes(E=64, H=4, K=2, D=128, F=128, V=64, layers=2, dtype=jnp.float32)


@pytest.fixture(autouse=True)
def promoting() -> Iterator[None]:
    """Promotes types as JAX does by default: its kernels need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs kernels in interpret mode."""
    compiled = pl.pallas_call
    jax.clear_caches()
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **options: compiled(*args, **{**options, "interpret": True}))
    yield
    jax.clear_caches()


@pytest.mark.parametrize("made", [prefill, decode])
def test_all_of_it_has_exact_rules(made: Callable[[], Workload]) -> None:
    workload = made()
    census = autoshard.census(workload.fn, *workload.args)
    assert census.exact["seconds"] == 1.0
    names = {row.primitive for row in census.rows}
    assert names & {"pallas_call", "kernel:paged_attention"}


def arguments(workload: Workload) -> list[Any]:
    """Random arguments; integers are tokens, lengths and pages, below 16."""
    random = np.random.default_rng(0)

    def fill(spec: Any) -> jax.Array:
        if spec.dtype == jnp.int32:
            return jnp.asarray(random.integers(0, 16, spec.shape), jnp.int32)
        return jnp.asarray(random.standard_normal(spec.shape) * 0.2, spec.dtype)

    return jax.tree.map(fill, list(workload.args))


@pytest.mark.long
@pytest.mark.parametrize(
    "workload", [prefill(4, 256, 128, SMALL), decode(4, 16, 8, 4, 2, SMALL)], ids=["prefill", "decode"]
)
def test_a_plan_computes_what_the_function_does(workload: Workload, interpreted: None) -> None:
    given = arguments(workload)
    plan = autoshard.search(workload.fn, *given, topology="cpu:2x4")
    kernels = [op for op in plan.operations if op.primitive in ("pallas_call", "kernel:paged_attention")]
    assert kernels and all(any(op.splits) for op in kernels)
    for got, want in zip(
        jax.tree.leaves(plan.jit(workload.fn)(*given)), jax.tree.leaves(workload.fn(*given)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.tpu
@pytest.mark.parametrize(
    "made", [pytest.param(prefill, marks=pytest.mark.slow), pytest.param(decode, marks=pytest.mark.long)]
)
def test_the_tpu_compiler_compiles_what_is_planned(made: Callable[[], Workload]) -> None:
    workload = made()
    plan = autoshard.search(workload.fn, *workload.args, topology="v5e:4x4", donate_argnums=workload.donate_argnums)
    assert autoshard.audit(plan, workload.fn, *workload.args, target="tpu").ok
