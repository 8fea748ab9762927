"""How many rounds a `while` is priced as: what its code says, by running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array, lax

from tests.support.layout_strategies import assert_layouts_do_not_matter
from tests.support.tracing import trace

X = jnp.arange(16.0).reshape(4, 4) / 16


def _priced(fn: Callable[..., Any], *args: Any) -> tuple[float, tuple[str, ...]]:
    program = trace(fn, *args).program
    (loop,) = [region for region in program.regions if region.kind == "loop"]
    return loop.count, program.warnings


CONTINUES = {
    "lt": lambda c, end: c < end,
    "le": lambda c, end: c <= end,
    "gt": lambda c, end: c > end,
    "ge": lambda c, end: c >= end,
    "ne": lambda c, end: c != end,
    "eq": lambda c, end: c == end,
    "not eq": lambda c, end: jnp.logical_not(c == end),
    "mirrored": lambda c, end: end > c,
}


@given(
    st.sampled_from(sorted(CONTINUES)),
    st.integers(-9, 9),
    st.integers(-3, 3).filter(bool),
    st.integers(-9, 9),
    st.booleans(),
)
def test_rounds_of_a_counter_are_those_it_runs(how: str, start: int, step: int, end: int, carried: bool) -> None:
    runs = 0
    while bool(CONTINUES[how](start + runs * step, end)) and runs < 50:
        runs += 1

    def fn(x: Array) -> Any:
        def test(state: Any) -> Any:
            return CONTINUES[how](state[0], state[2] if carried else end)

        return lax.while_loop(test, lambda s: (s[0] + step, s[1] * 2, s[2]), (start, x, end))

    count, warnings = _priced(fn, X)
    if runs == 50:  # it would never end, or after a turn round all integers
        assert any("trip count is unknown" in text for text in warnings) and count == 1
    else:
        assert count == max(1, runs) and not warnings


def test_a_generate_loop_is_priced_as_its_longest_run() -> None:
    def fn(p: Array, x: Array) -> Any:
        def test(state: Any) -> Any:
            return ~jnp.logical_or(state[0] == 20, jnp.all(state[2]))

        def body(state: Any) -> Any:
            x = jnp.tanh(state[1] @ p)
            return state[0] + 1, x, state[2] | (x.max(1) > 2)

        start = jnp.array(3) + 1
        return lax.while_loop(test, body, (start, x, jnp.zeros(4, bool)))

    count, warnings = _priced(fn, X, X)
    assert count == 16
    (text,) = warnings
    assert text.endswith("costed as 16 iterations, with a counter from 4 to 20 by 1; it may end earlier")
    assert_layouts_do_not_matter(fn, X, X)


def test_several_ends() -> None:
    def fn(x: Array) -> Any:
        return lax.while_loop(lambda s: (s[0] < 30) & (s[1] > -5), lambda s: (s[0] + 1, s[1] - 1, s[2] * 2), (0, 7, x))

    assert _priced(fn, X)[0] == 12


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, n: lax.fori_loop(0, n, lambda i, c: c * 2, x),
        lambda x, n: lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + n, s[1]), (0, x)),
        lambda x, n: lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] * 2, s[1]), (1, x)),
        lambda x, n: lax.while_loop(lambda s: s.sum() < 9, lambda s: s + 1, x),
        lambda x, n: lax.while_loop(lambda s: (s[0] < 9) | (s[1].sum() < 9), lambda s: (s[0] + 1, s[1] + 1), (0, x)),
    ],
)
def test_what_depends_on_arguments_is_said(fn: Callable[..., Any]) -> None:
    count, warnings = _priced(fn, X, jnp.int32(3))
    assert count == 1
    assert any("trip count is unknown, costed as 1" in text for text in warnings)


def test_a_batched_condition_is_said() -> None:
    fn = jax.vmap(lambda n: lax.while_loop(lambda s: s[0] < s[1], lambda s: (s[0] + 1, s[1]), (0, n)))
    assert any("trip count is unknown" in text for text in _priced(fn, jnp.arange(4))[1])
