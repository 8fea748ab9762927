"""The stacks of loops lie in tiles of two dimensions of their slices, which pads small slices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import autoshard
from costmodels.machine import parse_topology
from search.answer.assignment import choice_of
from search.answer.check_memory import alive_bytes
from search.formulation.problem import build
from search.formulation.tpu_tiles import least_ratio, stack_ratio
from search.memory.constraints import rows
from tests.support.cases import Case
from tests.support.effort import mostly_long
from tests.support.layout_strategies import random_states
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32

RATIOS = {
    ((4096, 32, 16, 64), 2): 2.0,
    ((512, 8, 16, 64, 64), 2): 2.0,
    ((16384, 200, 20), 2): 192 / 125,
    ((8192, 2, 3, 2560), 2): 1.0,
    ((131072, 4, 200), 4): 1.28,
    ((2048, 1, 200, 200), 4): 1.28,
    ((131072, 1000), 4): 1.024,
    ((8388608, 8), 4): 16.0,
    ((524288, 8, 32), 4): 4.0,
    ((32, 4, 1024, 64), 2): 1.0,
    ((12,), 4): 1.0,
}


@pytest.mark.parametrize(("shape", "itemsize"), RATIOS)
def test_stacks_are_padded_as_by_libtpu(shape: tuple[int, ...], itemsize: int) -> None:
    """What libtpu 0.0.50 holds for stacks of these shapes on v5e."""
    assert stack_ratio(shape, itemsize) == pytest.approx(RATIOS[shape, itemsize])
    assert least_ratio(shape, itemsize) <= stack_ratio(shape, itemsize)


def states(x: Any) -> Any:
    """Every state of a recurrence with small slices is a result; the argument is copied for the loop."""

    def step(state: Any, slice_: Any) -> tuple[Any, Any]:
        state = jnp.tanh(state * 0.9 + slice_)
        return state, state

    return lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[1]


def projected(x: Any, w: Any) -> Any:
    """The slices are made before the loop, in another order, and the states are read after it."""
    return jnp.einsum("tbhd,ehd->bte", states(jnp.einsum("bte,ehd->tbhd", x, w)), w)


def last(x: Any, w: Any) -> Any:
    """The loop makes nothing of its slices but a sum."""
    slices = jnp.einsum("bte,ehd->tbhd", x, w)
    return lax.scan(lambda c, z: (jnp.tanh(c * 0.9 + z), None), jnp.zeros(slices.shape[1:], bf16), slices)[0]


def recurrence(weights: Any, x: Any) -> Any:
    """The gradient of a linear attention, as of RWKV: the backward loop reads the states [batch, heads, 64, 64]."""

    def loss(weights: Any) -> Any:
        *projections, out = weights
        given = tuple(jnp.einsum("bte,ehd->tbhd", x, w) for w in projections)

        def step(state: Any, slices: Any) -> tuple[Any, Any]:
            r, k, v, w = slices
            outer = k[..., :, None] * v[..., None, :]
            return state * jax.nn.sigmoid(w)[..., None] + outer, jnp.einsum("bhk,bhkv->bhv", r, state + outer)

        read = lax.scan(step, jnp.zeros((*given[0].shape[1:], 64), bf16), given)[1]
        return jnp.square(jnp.einsum("tbhd,hde->bte", read, out).astype(f32)).mean()

    return jax.grad(loss)(weights)


STEPS = {
    "states": Case(states, (S((4096, 32, 16, 64), bf16),)),
    "projected": Case(projected, (S((32, 4096, 256), bf16), S((256, 16, 64), bf16))),
    "last": Case(last, (S((32, 4096, 256), bf16), S((256, 16, 64), bf16))),
    "recurrence": Case(
        recurrence, ((*[S((1024, 16, 64), bf16)] * 4, S((16, 64, 1024), bf16)), S((8, 512, 1024), bf16))
    ),
}


@pytest.mark.tpu
@pytest.mark.parametrize("name", mostly_long(STEPS, "states", "projected"))
def test_the_planned_peak_of_time_steps_is_the_compiled_one(name: str) -> None:
    case = STEPS[name]
    plan = autoshard.search(case.fn, *case.args, topology="v5e:1x1")
    found = autoshard.audit(plan, case.fn, *case.args, target="tpu")
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)


@pytest.mark.parametrize("name", ["states", "projected", "last", "recurrence"])
def test_rows_and_checker_pad_the_same(name: str) -> None:
    """Whatever the split of the slices' dimensions."""
    case, topology = STEPS[name], parse_topology("v5e:2x2")
    program = trace(case.fn, *case.args).program
    problem = build(program, topology, np.inf)
    for seed in range(6):
        drawn = random_states(problem, np.random.default_rng(seed))
        if drawn is not None:
            alive, held = alive_bytes(program, topology, choice_of(problem, drawn)), rows(problem).bytes(problem, drawn)
            assert max(held) == pytest.approx(max(alive), abs=1e-6)
