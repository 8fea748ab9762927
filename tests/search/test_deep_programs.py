"""Programs of any depth are searched: no analysis of a program recurses into it, or looks at a value once per path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard

DEPTH = 250
"""Operations in a chain."""
FRAMES = 220
"""Python frames that a search may use beyond those of the test: fewer than one for each operation of a chain."""


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def transposed(x: Any, times: int = DEPTH) -> Any:
    for _ in range(times):
        x = x.T
    return x


def views_before_a_matmul(x: Any, y: Any) -> Any:
    return transposed(x) @ y


def views_of_a_carry(c: Any, xs: Any) -> Any:
    return lax.scan(lambda c, x: (c + x @ transposed(c), None), c, xs)[0]


def views_of_a_slice(stack: Any, x: Any) -> Any:
    part = lax.dynamic_slice(stack, (3, 0, 0), (1, *stack.shape[1:]))[0]
    return x @ transposed(part), lax.dynamic_update_slice(stack, x[None], (3, 0, 0))


def softmax_behind_elementwise_work(x: Any, w: Any) -> Any:
    scores = jnp.einsum("bqd,bkd->bqk", x, w)
    for _ in range(DEPTH):
        scores = jnp.tanh(scores)
    return jax.nn.softmax(scores)


def softmax_behind_residual_sums(x: Any) -> Any:
    for _ in range(DEPTH // 5):  # two paths for each
        x = x + jnp.tanh(x)
    return jax.nn.softmax(x)


CASES = (
    (views_before_a_matmul, (array(64, 64), array(64, 32))),
    (views_of_a_carry, (array(32, 32), array(4, 32, 32))),
    (views_of_a_slice, (array(16, 32, 32), array(32, 32))),
    (softmax_behind_elementwise_work, (array(8, 16, 64), array(8, 32, 64))),
    (softmax_behind_residual_sums, (array(64, 128),)),
)


@pytest.fixture
def few_frames() -> Iterator[Callable[[], None]]:
    """A function that limits the recursion from its call to the end of the test."""
    before = sys.getrecursionlimit()

    def limit() -> None:
        depth, frame = 0, sys._getframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back
        sys.setrecursionlimit(depth + FRAMES)

    yield limit
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(("fn", "args"), CASES, ids=[fn.__name__ for fn, _ in CASES])
def test_a_deep_program_is_searched(
    fn: Callable[..., Any], args: tuple[Any, ...], few_frames: Callable[[], None]
) -> None:
    few_frames()
    plan = autoshard.search(fn, *args, topology="v5e:2x2", baselines=False)
    assert plan.proof.status == "OPTIMAL"
