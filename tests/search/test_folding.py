"""Layers that a Python loop unrolled are found again, whatever takes turns in them and whatever comes after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.program import Program
from search.formulation.colour_refinement import refine
from search.formulation.layer_folding import classes, folds
from tests.support.effort import examples
from tests.support.tracing import trace

WIDTH, LAYERS = 8, 12


def plain(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x + jax.nn.relu(x @ layer["up"]) @ layer["down"]


def gated(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x + (jax.nn.silu(x @ layer["up"]) * jnp.cos(x @ layer["up"])) @ layer["down"]


def normed(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = x - jnp.mean(x, axis=-1, keepdims=True)
    return x + jnp.tanh(y @ layer["up"]) @ layer["down"]


KINDS: tuple[Callable[..., jax.Array], ...] = (plain, gated, normed)


def parameters(layers: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    up, down = ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
    return [
        {"up": jax.ShapeDtypeStruct(up, jnp.float32), "down": jax.ShapeDtypeStruct(down, jnp.float32)}
        for _ in range(layers)
    ]


def stack(kinds: tuple[int, ...], layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for i, layer in enumerate(layers):
        x = KINDS[kinds[i % len(kinds)]](layer, x)
    return x


def class_sizes(program: Program) -> dict[str, int]:
    """Per argument and result how many share its class."""
    found = classes(program)
    count = Counter(found)
    return {op.name: count[found[i]] for i, op in enumerate(program.operations) if op.op_class in ("source", "sink")}


@examples(12)
@given(kinds=st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple))
def test_kinds_of_layers_that_take_turns_are_one_fold(kinds: tuple[int, ...]) -> None:
    """All layers are in one fold, whose period is that of the turns or a part of it."""
    layers = LAYERS // len(kinds) * len(kinds)
    x = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    program = trace(partial(stack, kinds), parameters(layers), x).program
    (fold,) = folds(program)
    assert len(kinds) % (layers / fold.copies) == 0
    body = [i for i, op in enumerate(program.operations) if op.op_class not in ("source", "sink")]
    assert list(fold.operations) == body


@pytest.mark.parametrize("remat", [False, True])
def test_a_training_step_folds_to_one_layer(remat: bool) -> None:
    """Forward and backward pass are a fold each; parameters, moments and updates of all layers are alike."""
    optax = pytest.importorskip("optax", reason="optax is not installed (pip install --group test)")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    layer = jax.checkpoint(gated) if remat else gated

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for each in params:
            x = layer(each, x)
        return jnp.mean(jnp.square(x))

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        grads, below = jax.grad(loss, argnums=(0, 1))(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, below

    params = parameters(LAYERS)
    state, x = jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # as Optax wants it
        program = trace(step, params, state, x, donate_argnums=(0, 1)).program
    assert [fold.copies for fold in folds(program)] == [LAYERS, LAYERS]
    sizes = class_sizes(program)
    shared = {name: size for name, size in sizes.items() if "up" in name or "down" in name}
    assert len(shared) == 12 * LAYERS and set(shared.values()) == {LAYERS}


def test_what_is_used_otherwise_is_not_alike() -> None:
    """Two arguments of one shape, one of which the layers use, the other only the head, stay apart."""

    def fn(layers: Any, head: Any, x: jax.Array) -> jax.Array:
        return plain(head, jnp.sin(stack((0,), layers, x)))

    x = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    program = trace(fn, parameters(LAYERS), parameters(1)[0], x).program
    sizes = class_sizes(program)
    assert {sizes["head['up']"], sizes["head['down']"]} == {1}
    assert sizes["layers[3]['up']"] == LAYERS


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """First colours of a few vertices, and per vertex which others it sees."""
    count = draw(st.integers(1, 12))
    vertices = st.integers(0, count - 1)
    colours = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return colours, draw(st.lists(st.lists(vertices, max_size=3), min_size=count, max_size=count))


@given(graph=graphs(), fixed=st.sets(st.integers(0, 11), max_size=3))
def test_refined_colours_are_those_of_whole_rounds(graph: tuple[list[int], list[list[int]]], fixed: set[int]) -> None:
    """Looking again only at who sees a new colour parts the vertices as looking at all of them in every round does."""
    colours, seen = graph
    members = [i for i in range(len(colours)) if i not in fixed]
    slow = [(colour, i in fixed) for i, colour in enumerate(colours)]
    for _ in colours:
        slow = [(each, () if i in fixed else tuple(slow[j] for j in seen[i])) for i, each in enumerate(slow)]
        names = {each: k for k, each in enumerate(dict.fromkeys(slow))}
        slow = [(names[each], i in fixed) for i, each in enumerate(slow)]
    fast = [2 * colour + (i in fixed) for i, colour in enumerate(colours)]
    seers = {i: {j for j in members if i in seen[j]} for i in range(len(colours))}
    refine(fast, members, lambda i: tuple(fast[j] for j in seen[i]), seers)
    for i in members:
        for j in members:
            assert (fast[i] == fast[j]) == (slow[i] == slow[j])


def test_a_matrix_and_its_transpose_are_no_two_layers() -> None:
    """`a @ (a.T @ x)` with a square matrix: where one product is split along its sum, the other is not."""
    matrix, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((64, 4), jnp.float32)

    def copies(fn: Callable[..., Any]) -> list[int]:
        return [fold.copies for fold in folds(trace(fn, matrix, x).program)]

    assert copies(lambda a, x: a @ (a.T @ x)) == []
    assert copies(lambda a, x: a @ (a @ x)) == [2]
    assert copies(lambda a, x: a @ (a.T @ (a @ (a.T @ x)))) == [2]
