"""Peak memory of small programs is what the TPU compiler says it is: one program per rule of the memory model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard
from examples import llama
from search.formulation.tpu_tiles import argument_tile
from search.memory.views import views
from tests.support.cases import Case
from tests.support.effort import mostly_long
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


def tied(table: Any, tokens: Any) -> Any:
    """The words' vectors, and their products with a vector: seen from the other side, the table is no second array."""
    return jnp.tanh(table[tokens]) @ table.T


def in_heads(weights: Any, x: Any) -> Any:
    """Weights that are given for all heads, and used for each."""
    return jnp.einsum("bd,dhe->bhe", x, weights.reshape(2048, 16, 128))


def converted_in_a_loop(up: Any, down: Any, x: Any) -> Any:
    """XLA converts both once, before the loop, in which all forms are held."""

    def step(state: Any) -> Any:
        i, x = state
        return i + 1, jnp.tanh(x @ up.astype(bf16)) @ down.astype(bf16)

    return lax.while_loop(lambda state: state[0] < 9, step, (0, x))[1]


def cache_in_a_loop(prompt: Any, x: Any) -> Any:
    """25 heads of 64 lie in tiles of 8 × 128 with 2.56 times their bytes, unless the positions lie along the lanes."""

    def attend(state: Any) -> Any:
        i, x, cache = state
        cache = lax.dynamic_update_slice(cache, x[:, None], (0, i, 0, 0))
        scores = jax.nn.softmax(jnp.einsum("bhd,bshd->bhs", x, cache))
        return i + 1, jnp.einsum("bhs,bshd->bhd", scores, cache), cache

    cache = jnp.zeros((64, 2048, 25, 64), bf16).at[:, :64].set(prompt)
    return lax.while_loop(lambda state: state[0] < 500, attend, (64, x, cache))[1]


def unrolled(stacks: Any, x: Any) -> Any:
    """Rounds one after the other would each have their slices, and many be cut out ahead."""

    def layer(x: Any, weights: Any) -> tuple[Any, None]:
        up, down = weights
        heads = jnp.tanh(jnp.einsum("bd,dhe->bhe", x, up))
        return x + jnp.einsum("bhe,hed->bd", heads, down), None

    return lax.scan(layer, x, stacks, unroll=len(stacks[0]))[0]


def logits(x: Any, weights: Any) -> Any:
    """An argument of [4, 1024, 50257] has the 4 and the 1024 in its tiles: so the product is copied for the result."""
    return x @ weights


def right_words(x: Any, weights: Any, words: Any) -> Any:
    """The gradient of one logit in each row is a comparison in the kernel that adds it to the others' gradients."""

    def loss(weights: Any) -> Any:
        logits = jnp.einsum("bte,ev->btv", x, weights, preferred_element_type=f32)
        return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, words[..., None], -1)[..., 0]).mean()

    return jax.grad(loss)(weights)


def next_words(x: Any, weights: Any, words: Any) -> Any:
    """The gradient of all words' logits but the last one's: it is padded, so it is an array beside the others' gradients."""

    def loss(weights: Any, x: Any) -> Any:
        logits = jnp.einsum("bte,ev->btv", x, weights, preferred_element_type=f32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1)[:, :-1], words[:, 1:, None], -1).mean()

    return jax.grad(loss, (0, 1))(weights, x)


RESIDUAL = llama.Config(layers=12, d_model=4096, d_ff=1024, heads=4, kv_heads=1, vocab=2048)
"""An unrolled model whose layers add to one sum: what it ends with is not to be a sum of its own of all that they added."""

CASES = {
    "residual": Case(llama.prefill_step, (llama.abstract_params(RESIDUAL, unrolled=True), S((1, 1024), jnp.int32))),
    "right words": Case(right_words, (S((4, 1024, 128), bf16), S((128, 32000), bf16), S((4, 1024), jnp.int32))),
    "next words": Case(next_words, (S((4, 1024, 1024), bf16), S((1024, 32000), bf16), S((4, 1024), jnp.int32))),
    "unrolled": Case(unrolled, ((S((8, 2048, 16, 128), bf16), S((8, 16, 128, 2048), bf16)), S((256, 2048), bf16))),
    "odd vocabulary": Case(logits, (S((4, 1024, 512), f32), S((512, 50257), f32))),
    "even vocabulary": Case(logits, (S((4, 1024, 512), f32), S((512, 50304), f32))),
    "converted in a loop": Case(converted_in_a_loop, (*[S((8192, 8192), f32)] * 2, S((16, 8192), bf16))),
    "cache in a loop": Case(cache_in_a_loop, (S((64, 64, 25, 64), bf16), S((64, 25, 64), bf16))),
    "transposed": Case(tied, (S((32000, 1024), bf16), S((64,), jnp.int32))),
    "in heads": Case(in_heads, (S((2048, 2048), bf16), S((64, 2048), bf16))),
}


@pytest.mark.tpu
@pytest.mark.parametrize(
    "name",
    [
        *mostly_long((name for name in CASES if name != "residual"), "converted in a loop", "in heads", "transposed"),
        pytest.param("residual", marks=pytest.mark.slow),
    ],
)
def test_the_planned_peak_is_the_compiled_one(name: str) -> None:
    case = CASES[name]
    plan = autoshard.search(case.fn, *case.args, topology="v5e:1x1", donate_argnums=case.donated)
    found = autoshard.audit(plan, case.fn, *case.args, target="tpu")
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)


TILES = {
    ((4, 512, 10001), 4): {0, 1},
    ((3, 512, 10001), 4): {1, 2},
    ((16, 128, 10001), 4): {0, 1},
    ((1, 4, 512, 10001), 4): {1, 2},
    ((32, 284, 4544), 2): {0, 2},
    ((4, 512, 10001), 2): {0, 1},
    ((3, 512, 10001), 2): {1, 2},
    ((16, 1024, 3210), 2): {0, 1},
    ((8, 128, 32000), 4): {1, 2},
    ((64, 1, 32000), 4): {1, 2},
    ((64, 1, 32000), 2): {0, 2},
    ((1, 1024, 50257), 2): {1, 2},
    ((1, 1024, 50257), 4): {0, 1},
    ((2, 100, 32000), 4): {0, 2},
    ((1024, 50257), 4): {0, 1},
    ((7,), 4): {0},
    ((), 4): set(),
}


@pytest.mark.parametrize(("shape", "itemsize"), TILES)
def test_the_tiles_of_an_argument_are_those_of_libtpu(shape: tuple[int, ...], itemsize: int) -> None:
    """What libtpu 0.0.42 prints for results of these shapes."""
    assert set(argument_tile(shape, itemsize)) == TILES[shape, itemsize]


# --- views


def shown(fn: Callable[..., Any], *args: Any) -> list[str]:
    program = trace(fn, *args).program
    return [program.operations[i].primitive for i in sorted(views(program))]


def test_what_is_only_read_is_a_view() -> None:
    x, w = S((8, 16), f32), S((16, 8), f32)
    assert shown(lambda x, w: x.T.reshape(8, 16) @ w, x, w) == ["transpose", "reshape"]
    assert shown(lambda x, w: x.T, x, w) == []  # leaves the program
    assert shown(lambda x, w: x.T.astype(bf16) @ x.astype(bf16), x, w) == ["transpose"]
    assert shown(lambda x, w: jnp.broadcast_to(x[:, None], (8, 2, 16)) @ w, x, w) == ["broadcast_in_dim"]
    assert shown(lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: c @ (x @ w), x.reshape(16, 8)), x, w) == []
    assert shown(lambda x, w: x.T.at[0].set(1.0) @ x, x, w) == []  # is written into


def test_a_loop_without_its_unrolling_says_so() -> None:
    stacks, x = (S((4, 8, 2, 4), bf16), S((4, 2, 4, 8), bf16)), S((8, 8), bf16)
    plan = autoshard.search(unrolled, stacks, x, topology="cpu:8")
    (warning,) = (each for each in plan.warnings if "unroll" in each)
    assert "planned and run without its unroll=4" in warning
