"""Unknown and hostile functions: a plan that computes what the function does, or an error in a sentence; never a crash."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.experimental import checkify, io_callback

import autoshard
from autoshard.errors import TraceError
from tests.support.layout_strategies import assert_equal

X = jnp.arange(32.0).reshape(8, 4) / 32
SHAPE = jax.ShapeDtypeStruct((8, 4), jnp.float32)
MASK = np.tril(np.ones((4096, 4096), np.float32))


def zero_sizes(a: Array, b: Array) -> Any:
    return a @ b, (b @ a).sum(), jnp.concatenate((a, a)), a.reshape(4, 0), jnp.ones(3)


def keys(new: Array, old: Array) -> Any:
    return jax.vmap(lambda k: jax.random.normal(k, (4,)))(new), jax.random.uniform(old, (8,)), new[::-1]


def callback_in_cond(x: Array) -> Array:
    def said(x: Array) -> Array:
        jax.debug.print("taken")
        return x

    return lax.cond(x.sum() > 0, said, lambda x: -x, x)


def reference(x: Array) -> Array:
    held = jax.new_ref(x)
    held[...] = held[...] * 2
    return held[...]


def checked(x: Array) -> Array:
    def fn(x: Array) -> Array:
        checkify.check(x.sum() > 0, "negative")
        return x * 2

    return checkify.checkify(fn)(x)[1]


def implicit(x: Array) -> Array:
    def tangent(g: Callable[[Array], Array], y: Array) -> Array:
        return y / g(jnp.ones_like(y))

    return lax.custom_root(lambda y: y * y - x - 1, x, lambda f, y: jnp.sqrt(x + 1), tangent)


PLANNED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "debug": (lambda x: (jax.debug.print("{}", x.sum()), x * 2)[1], (X,)),
    "io_callback": (lambda x: io_callback(lambda v: np.asarray(v) * 2, SHAPE, x) + 1, (X,)),
    "ordered io_callback": (lambda x: io_callback(lambda v: np.asarray(v) * 2, SHAPE, x, ordered=True) + 1, (X,)),
    "pure_callback": (lambda x: jax.pure_callback(lambda v: np.asarray(v) * 2, SHAPE, x) + 1, (X,)),
    "callback in cond": (callback_in_cond, (X,)),
    "reference": (reference, (X,)),
    "checked": (checked, (X,)),
    "implicit": (implicit, (X,)),
    "linear algebra": (lambda x: jnp.linalg.inv(x.T @ x + jnp.eye(4)), (X,)),
    "zero sizes": (zero_sizes, (jnp.zeros((0, 4)), jnp.zeros((4, 0)))),
    "scalars": (lambda a, b: (a * 2, b), (jnp.float32(2), 3)),
    "no arguments": (lambda: jnp.arange(8) * 2, ()),
    "no results": (lambda x: None, (X,)),
    "identity": (lambda x: x, (X,)),
    "repeated leaves": (lambda p: (p[0] + p[1], p[0], p[0]), ((X, X),)),
    "no leaf": (lambda p: p["a"] * 2, ({"a": X, "b": None},)),
    "numpy leaves": (lambda x, y: x * y.astype(jnp.float32), (np.ones((8, 4), np.float32), np.float32(3))),
    "literals": (lambda x: (3, 2.5, True, np.arange(4)), (X,)),
    "keys": (keys, (jax.random.split(jax.random.key(0), 8), jax.random.PRNGKey(1))),
    "int4": (lambda a, x: (a.astype(jnp.float32) @ x[:4], a), (jnp.arange(8).astype(jnp.int4).reshape(2, 4), X)),
    "fp8": (lambda a: (a.astype(jnp.float32) * 2, a), (X.astype(jnp.float8_e4m3fn),)),
    "complex": (lambda a: (a @ a.T, jnp.fft.fft(a)), (lax.complex(X, X),)),
    "booleans": (lambda x: (x > 0.5, ~(x > 0.3)), (X,)),
    "a large constant": (lambda x: x + jnp.asarray(MASK)[:8, :4], (X,)),
    "unsigned": (lambda x: jnp.zeros(8, jnp.uint32) + jnp.uint32(4294967295), (X,)),
}


@pytest.mark.parametrize("name", PLANNED)
def test_it_is_planned_and_computes_what_it_did(name: str) -> None:
    fn, args = PLANNED[name]
    plan = autoshard.search(fn, *args, topology="cpu:2x4")
    assert_equal(jax.tree.leaves(plan.jit(fn)(*args)), jax.jit(fn)(*args))


def test_in_double_precision() -> None:
    with jax.enable_x64():
        x = jnp.arange(32.0).reshape(8, 4)
        assert x.dtype == np.float64
        fn = lambda x, i: (x @ x.T, x[i], jnp.cumsum(x, 0), jnp.argmax(x, 1))  # noqa: E731
        i = jnp.arange(4)
        plan = autoshard.search(fn, x, i, topology="cpu:2x4")
        assert_equal(jax.tree.leaves(plan.jit(fn)(x, i)), jax.jit(fn)(x, i))


def test_side_effects_are_said() -> None:
    plan = autoshard.search(PLANNED["debug"][0], X, topology="cpu:2x4")
    assert any("debug_print at test_hostile.py" in text and "once per chip" in text for text in plan.warnings)


def _ordered(x: Array) -> Array:
    def step(carry: Array, _: None) -> tuple[Array, None]:
        jax.debug.print("{}", carry.sum(), ordered=True)
        return carry * 2, None

    return lax.scan(step, x, None, length=2)[0]


def _failing(x: Array) -> Array:
    raise ValueError("my own words")


REFUSED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "nonzero": (jnp.nonzero, (X,), "nonzero could not be traced .* size argument"),
    "masked": (lambda x: x[x > 0.5], (X,), "could not be traced .* boolean indices must be concrete"),
    "branching": (lambda x: x if x.sum() > 0 else -x, (X,), "could not be traced .* boolean conversion"),
    "text": (lambda x, kind: x, (X, "relu"), "kind must be an array, got 'relu' .str."),
    "function": (lambda x, f: f(x), (X, partial(jnp.sin)), "must be an array, got .*bind it beforehand"),
    "ordered": (_ordered, (X,), "debug_print at test_hostile.py:.* must have ordered=False, got ordered=True"),
    "workload": (autoshard.Workload(jnp.sin, (X,)), (), "must be callable, got Workload: pass its `fn` and"),
    "array": (X, (), "must be callable, got ArrayImpl"),
    "failing": (_failing, (X,), "could not be traced with these arguments: my own words"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_sentence(name: str) -> None:
    fn, args, said = REFUSED[name]
    with pytest.raises(TraceError, match=f"(?s){said}"):
        autoshard.search(fn, *args, topology="cpu:2x4")
