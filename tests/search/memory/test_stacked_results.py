"""The stacked results of a loop are in the plan's memory from its first round on, as the TPU compiler allocates them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard
from tests.support.cases import Case
from tests.support.effort import mostly_long

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


def gradients(x: Any, w: Any) -> Any:
    """Residuals `[N, B, E]` that one loop makes are read by the next, which makes gradients `[N, E, E]`."""
    x, residuals = lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, w)
    return lax.scan(lambda d, z: (d @ z[0].T, z[1].T @ d), x, (w, residuals), reverse=True)[1]


def prefill(x: Any, w: Any) -> Any:
    """Each round makes a piece of the cache, and needs much for itself."""

    def body(x: Any, w: Any) -> Any:
        k = x @ w
        s = jnp.einsum("bqe,bke->bqk", k, k)
        return x + jnp.einsum("bqk,bke->bqe", jax.nn.softmax(s @ s, -1), x), k

    return lax.scan(body, x, w)[1]


def halves(x: Any) -> Any:
    """Rounds that make as much as they take, and hold more meanwhile."""
    return lax.scan(lambda _, x: (0, jnp.tanh(x @ (x.T @ x))), 0, x)[1]


def replaced(x: Any, w: Any) -> Any:
    """An argument that is to be overwritten is read until the last round."""
    return lax.scan(lambda _, x: (0, w @ x), 0, x)[1]


PILED = {  # of more than stays in a chip's own memory, 128 MiB
    "gradients": Case(gradients, (S((1024, 2048), bf16), S((32, 2048, 2048), bf16))),
    "prefill": Case(prefill, (S((8, 4096, 1024), bf16), S((32, 1024, 1024), bf16))),
    "halves": Case(halves, (S((64, 2048, 2048), bf16),)),
    "replaced": Case(replaced, (S((64, 2048, 2048), bf16), S((2048, 2048), bf16)), (0,)),
}


@pytest.mark.tpu
@pytest.mark.parametrize("name", mostly_long(PILED, "replaced"))
def test_what_a_loop_piles_up_is_there_before_its_first_round(name: str) -> None:
    case = PILED[name]
    plan = autoshard.search(case.fn, *case.args, topology="v5e:1x1", donate_argnums=case.donated)
    found = autoshard.audit(plan, case.fn, *case.args, target="tpu")
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)
