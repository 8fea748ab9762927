"""What a trace shares, warns of and names: paths, donations and fingerprints; the constructs are in test_constructs.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import autoshard
from autoshard import TraceError
from autoshard.annotating.fingerprint import fingerprint
from autoshard.rules.rule import REGISTRY
from autoshard.tracing import trace as tracing
from tests.support.tracing import trace

X = jnp.arange(32.0).reshape(8, 4) / 32
W = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)), jnp.float32)


def test_a_search_and_the_first_call_share_a_trace(monkeypatch: pytest.MonkeyPatch):
    """One walk for the same names and donations; a rule that is registered later is seen."""

    def step(x: Array, w: Array) -> Array:
        return jnp.tanh(x @ w)

    plan = autoshard.search(step, X, W, topology="cpu:2", donate_argnums=0)
    first = tracing.trace(step, X, W, donate_argnums=(0,))
    monkeypatch.setattr(tracing, "Tracer", None)  # no further walk is possible
    assert tracing.trace(step, X, W, donate_argnums=(0,)) is first
    np.testing.assert_allclose(plan.jit(step)(jnp.array(X), W), step(X, W), rtol=1e-5)
    monkeypatch.undo()
    assert tracing.trace(step, X, W) is not first
    monkeypatch.setitem(REGISTRY, "tanh", functools.partial(REGISTRY["tanh"]))
    assert tracing.trace(step, X, W, donate_argnums=(0,)) is not first


def line_of(fn: Callable[..., Any], below: int) -> str:
    """`file:line` of a line of a function, counted from its `def`."""
    return f"test_trace.py:{fn.__code__.co_firstlineno + below}"


def test_what_was_guessed_is_said() -> None:
    def hostile(x):
        jax.debug.print("{}", x)
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x))

    warnings = trace(hostile, X).program.warnings
    assert f"while at {line_of(hostile, 2)}: its trip count is unknown, costed as 1" in warnings
    assert f"cond at {line_of(hostile, 2)}: all branches are costed" in warnings
    assert any(line_of(hostile, 1) in text and "has side effects, which run once per chip" in text for text in warnings)


def test_a_function_that_does_not_trace() -> None:
    with pytest.raises(TraceError, match="branching could not be traced with these arguments"):
        trace(branching, X)


def branching(x: Array) -> Array:
    return x if x.sum() > 0 else -x


def test_paths_are_in_the_users_words() -> None:
    def model(params, *rest):
        return {"logits": params["layers"][0]["wq"] + rest[0], "cache": rest[1:]}

    traced = trace(model, {"layers": [{"wq": X}]}, X, (X, X))
    assert traced.paths == ("params['layers'][0]['wq']", "rest[0]", "rest[1][0]", "rest[1][1]")
    assert traced.result_paths == ("result['cache'][0][0]", "result['cache'][0][1]", "result['logits']")
    assert [traced.program.values[value].name for value in traced.argument_values] == list(traced.paths)


def test_a_fingerprint_is_of_what_is_computed() -> None:
    def renamed(u, v):
        return jax.jit(lambda u: jnp.sin(u @ v))(u)

    same = fingerprint(trace(lambda x, w: jnp.sin(x @ w), X, W).program)
    assert fingerprint(trace(renamed, X, W).program) == same
    assert fingerprint(trace(renamed, X[:4], W).program) != same
    assert fingerprint(trace(lambda x, w: jnp.cos(x @ w), X, W).program) != same


def test_a_donated_argument_is_paired_with_the_first_result_like_it() -> None:
    def step(cache, x):
        return x, {"k": cache["v"], "v": cache["k"] + x}, X

    assert trace(step, {"k": X, "v": X}, X, donate_argnums=(0,)).program.donated == ((0, 0), (1, 1))


def test_a_fingerprint_does_not_know_where_a_loop_stands():
    """Or a comment above the model would make every plan one of another function."""
    text = "def looped(x):\n    return jax.lax.scan(lambda carry, _: (carry * 2, None), x, length=3)[0]\n"
    found = []
    for above in ("", "# A comment.\n" * 7):
        names: dict[str, Any] = {"jax": jax}
        exec(compile(above + text, "looped.py", "exec"), names)
        found.append(trace(names["looped"], jax.ShapeDtypeStruct((8,), "float32")).program)
    lines = [{region.name for region in program.regions} for program in found]
    assert lines[0] != lines[1], "the names tell nothing of the lines"
    assert fingerprint(found[0]) == fingerprint(found[1])
