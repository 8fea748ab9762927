"""Peak memory of small programs is what the TPU compiler says it is: one program per rule of the memory model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import autoshard
from autoshard.emitting import targets
from autoshard.emitting.program import emitted
from autoshard.emitting.tpu_workarounds import conversion_barriers
from autoshard.emitting.tpu_workarounds.conversion_barriers import waits
from autoshard.emitting.tpu_workarounds.residual_barriers import resting
from autoshard.tracing.blocks import BarrierStep
from autoshard.tracing.loops.invariants import split
from examples import llama
from search.formulation.tpu_tiles import argument_tile
from search.memory.views import views
from tests.support.plans import well_linked
from tests.support.tracing import trace

S = jax.ShapeDtypeStruct
bf16, f32 = jnp.bfloat16, jnp.float32


class Case(NamedTuple):
    """A function with its arguments, and those that are donated."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()


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


RESIDUAL = llama.Config(layers=12, d_model=4096, d_ff=1024, heads=4, kv_heads=1, vocab=2048)
"""An unrolled model whose layers add to one sum: what it ends with is not to be a sum of its own of all that they added."""

CASES = {
    "residual": Case(llama.prefill_step, (llama.abstract_params(RESIDUAL, unrolled=True), S((1, 1024), jnp.int32))),
    "right words": Case(right_words, (S((4, 1024, 128), bf16), S((128, 32000), bf16), S((4, 1024), jnp.int32))),
    "unrolled": Case(unrolled, ((S((8, 2048, 16, 128), bf16), S((8, 16, 128, 2048), bf16)), S((256, 2048), bf16))),
    "odd vocabulary": Case(logits, (S((4, 1024, 512), f32), S((512, 50257), f32))),
    "even vocabulary": Case(logits, (S((4, 1024, 512), f32), S((512, 50304), f32))),
    "converted in a loop": Case(converted_in_a_loop, (*[S((8192, 8192), f32)] * 2, S((16, 8192), bf16))),
    "cache in a loop": Case(cache_in_a_loop, (S((64, 64, 25, 64), bf16), S((64, 25, 64), bf16))),
    "transposed": Case(tied, (S((32000, 1024), bf16), S((64,), jnp.int32))),
    "in heads": Case(in_heads, (S((2048, 2048), bf16), S((64, 2048), bf16))),
}


@pytest.mark.tpu
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n == "residual")) for n in CASES])
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


def emitted_barriers(plan: autoshard.Plan, fn: Callable[..., Any], *args: Any) -> int:
    """How many barriers the planned program of a function has."""
    sizes = plan.topology.axis_sizes
    automatic = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic)
    run = emitted(trace(fn, *args), plan.choice, plan.topology, mesh)
    return str(jax.make_jaxpr(run)(*jax.tree_util.tree_leaves(args))).count("optimization_barrier")


# --- what waits


def layers(params: Any, x: Any) -> Any:
    for up, down in params:
        x = jnp.tanh(x @ up.astype(bf16)) @ down.astype(bf16)
    return x


WEIGHTS = [(S((2048, 8192), f32), S((8192, 2048), f32))] * 2
X = S((8, 2048), bf16)


def test_conversions_wait_for_what_they_are_multiplied_with() -> None:
    program = trace(layers, WEIGHTS, X).program
    found = waits(program)
    products = [op for _, op in program.matmuls()][1:]  # the first is ready when its weight is
    assert [program.operations[i].primitive for i in found] == ["convert_element_type"] * len(products)
    for product, (first, awaited) in zip(products, sorted(found.items()), strict=True):
        assert program.operations[first].outputs[0].value == product.inputs[1].value
        assert awaited == product.inputs[0].value


def test_what_cannot_wait_does_not() -> None:
    def all_at_first(weight: Any, x: Any) -> Any:
        converted = weight.astype(bf16)
        return jnp.tanh(x) @ converted

    assert waits(trace(all_at_first, S((8, 8), f32), S((8, 8), bf16)).program) == {}
    assert waits(trace(lambda w, v: w.astype(bf16) @ v.astype(bf16), *[S((8, 8), f32)] * 2).program) == {}


def test_conversions_wait_only_where_something_is_sent() -> None:
    for topology, count in (("v5e:2x2", 3), ("v5e:1x1", 0)):
        plan = autoshard.search(layers, WEIGHTS, X, topology=topology)
        assert bool(plan.estimate.collectives) == bool(count)
        assert emitted_barriers(plan, layers, WEIGHTS, X) == count


def test_what_waits_is_computed_and_differentiated_as_written() -> None:
    random = np.random.default_rng(0)
    weights = [(random.normal(size=(16, 64)) / 4, random.normal(size=(64, 16)) / 8) for _ in range(2)]
    weights = jax.tree_util.tree_map(lambda a: jnp.asarray(a, f32), weights)
    x = jnp.asarray(random.normal(size=(8, 16)), bf16)
    plan = autoshard.search(layers, weights, x, topology=well_linked("cpu:2x4"))
    assert plan.estimate.collectives
    for fn in (layers, jax.grad(lambda weights, x: layers(weights, x).sum().astype(f32))):
        planned = (
            plan.apply(layers) if fn is layers else jax.grad(lambda w, x: plan.apply(layers)(w, x).sum().astype(f32))
        )
        found, right = (jax.tree_util.tree_leaves(each(weights, x)) for each in (planned, fn))
        for one, other in zip(found, right, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0.1, atol=0.1)


# --- where long sums rest


def summed(terms: Any, x: Any) -> Any:
    for term in terms:
        x = (x + term).reshape(2, 8) if x.ndim == 1 else (x.reshape(16) - term)
    return x


def rests(fn: Callable[..., Any], *args: Any) -> list[int]:
    """At which of its additions a function's sum rests, the first being 1."""
    program = trace(fn, *args).program
    added = [op.outputs[0].value for op in program.operations if op.primitive in ("add", "sub", "add_any")]
    return [k for k, value in enumerate(added, 1) if value in resting(program)]


def test_long_sums_of_short_numbers_rest() -> None:
    assert rests(summed, [S((16,), bf16)] * 26, S((16,), bf16)) == [8, 16, 24]
    assert rests(summed, [S((16,), jnp.float16)] * 9, S((16,), jnp.float16)) == [8]
    assert rests(summed, [S((16,), bf16)] * 7, S((16,), bf16)) == []
    for wide in (f32, jnp.int16):
        assert rests(summed, [S((16,), wide)] * 26, S((16,), wide)) == []


def test_sums_that_something_parts_do_not_add_up() -> None:
    def parted(terms: Any, x: Any) -> Any:
        for term in terms:
            x = jnp.tanh(x + term)
        return x

    def looped(terms: Any, x: Any) -> Any:
        return lax.scan(lambda x, term: (x + term, None), x, terms)[0]

    assert rests(parted, [S((16,), bf16)] * 26, S((16,), bf16)) == []
    assert rests(looped, S((26, 16), bf16), S((16,), bf16)) == []


def test_sums_rest_in_programs_for_tpus() -> None:
    args = ([S((16,), bf16)] * 17, S((16,), bf16))
    for topology, count in (("v5e:2x2", 2), ("cpu:2x2", 0)):
        plan = autoshard.search(summed, *args, topology=topology)
        assert emitted_barriers(plan, summed, *args) == count


# --- what is computed again, and what is overwritten


def computed_again(weights: Any, x: Any) -> Any:
    """What a `jax.checkpoint` computes on the way back is not what was computed before: that is not kept."""

    @jax.checkpoint
    def block(x: Any, up: Any) -> Any:
        return x + jnp.tanh(x @ up) @ up.T

    def loss(weights: Any) -> Any:
        y = x
        for up in weights:
            y = block(y, up)
        return jnp.sum(y.astype(f32) ** 2)

    return jax.grad(loss)(weights)


def gathered_results(weights: Any, moments: Any, x: Any) -> Any:
    """New weights, gathered from the chips that keep their moments: the old ones are overwritten, not copied."""
    for weight in weights:
        x = x + jnp.tanh(x @ weight)
    scale = jnp.mean(x.astype(f32))
    return [(w.astype(f32) - scale * m).astype(bf16) for w, m in zip(weights, moments, strict=True)], moments


@pytest.mark.tpu
def test_what_is_to_be_computed_again_is() -> None:
    args = ([S((512, 512), bf16)] * 4, S((1024, 512), bf16))
    plan = autoshard.search(computed_again, *args, topology="v5e:1x1")
    found = autoshard.audit(plan, computed_again, *args, target="tpu")
    assert found.flops == pytest.approx(found.planned_flops)


def barriers(fn: Callable[..., Any], *args: Any) -> list[int]:
    """Of how many values the barriers of a function are, loops included."""
    return [len(step.values) for step in steps_of(trace(fn, *args).block) if isinstance(step, BarrierStep)]


def steps_of(block: Any) -> Iterator[Any]:
    for step in block.steps:
        yield step
        yield from steps_of(step.body) if hasattr(step, "body") else ()


def test_only_what_was_read_before_is_kept_apart() -> None:
    x, w = S((8, 8), f32), S((8, 8), f32)

    def block(x: Any, w: Any) -> Any:
        return jnp.tanh(jnp.sin(x) @ w)

    def scanned(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, w: (jax.checkpoint(block)(x, w), None), x, jnp.stack([w, w]))[0].sum()

    again = jax.value_and_grad(lambda x, w: jax.checkpoint(block)(x, w).sum(), argnums=(0, 1))
    assert barriers(again, x, w) == [3]  # with the result's gradient
    assert barriers(jax.grad(lambda x, w: jax.checkpoint(block)(x, w).sum()), x, w) == []  # the result is not needed
    assert barriers(lambda x, w: jax.checkpoint(block)(x, w), x, w) == []  # nothing is computed again
    shared = jax.value_and_grad(lambda x, w: jax.checkpoint(block, prevent_cse=False)(x, w).sum())
    assert barriers(shared, x, w) == []
    assert barriers(jax.value_and_grad(scanned), x, w) == []  # of a round, nothing was made before
    assert barriers(lambda x, w: lax.optimization_barrier((x, w))[0] @ w, x, w) == [2]


def test_what_is_kept_apart_is_computed_as_written() -> None:
    random = np.random.default_rng(2)
    weights = [jnp.asarray(random.normal(size=(16, 16)) / 4, f32) for _ in range(3)]
    x = jnp.asarray(random.normal(size=(32, 16)), f32)
    plan = autoshard.search(computed_again, weights, x, topology=well_linked("cpu:2x4"))
    for found, right in zip(plan.apply(computed_again)(weights, x), computed_again(weights, x), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.tpu
def test_what_gathered_results_overwrite_is_not_copied() -> None:
    args = ([S((2048, 2048), bf16)] * 4, [S((2048, 2048), f32)] * 4, S((4096, 2048), bf16))
    pins = {"weights.*": PartitionSpec(), "moments.*": PartitionSpec(("x", "y"))}
    plan = autoshard.search(gathered_results, *args, topology="v5e:2x2", donate_argnums=(0, 1), pins=pins)
    assert [each.bytes for each in plan.estimate.collectives if each.kind == "all-gather"] == [2048 * 2048 * 2] * 4
    where = plan.topology
    mesh = targets.mesh_of(targets.tpu_devices(where.name, where.shape, where.chip.name), where.axis_sizes)
    text = plan.jit(gathered_results, mesh=mesh).lower(*args).compile().as_text()
    assert not re.search(r" = bf16\[2048,2048\]\S* copy\(", text)


# --- what stays the same in every round of a loop


def moved(step: Callable[..., Any], fixed: int, *args: Any) -> list[str]:
    body = jax.make_jaxpr(step)(*args).jaxpr
    return [eqn.primitive.name for eqn in split(body, body.invars[:fixed]).before]


def test_what_does_not_grow_is_made_before_the_loop() -> None:
    w, v, x = S((8, 8), f32), S((8,), f32), S((8, 8), bf16)
    assert moved(lambda w, x: x @ w.astype(bf16), 1, w, x) == ["convert_element_type"]
    assert moved(lambda w, x: x @ w.T.astype(bf16), 1, w, x) == ["transpose", "convert_element_type"]
    assert moved(lambda w, x: x @ w.T, 1, w, w) == []  # only shows it
    assert moved(lambda x, w: w @ x.astype(f32), 1, x, w) == []  # takes more memory than it saves
    assert moved(lambda v, x: x + jnp.exp(v[:, None] * v[None, :]), 1, v, w) == []
    assert moved(lambda v, x: x * jnp.sum(v), 1, v, w) == []  # one number
    assert moved(lambda w, x: x + jax.jit(jnp.sin)(w) @ w, 1, w, w) == ["jit", "dot_general"]
    assert moved(lambda w, x: x + w, 1, w, w) == []


def test_loops_compute_what_they_are_written_to() -> None:
    def fn(w: Any, b: Any, x: Any) -> Any:
        def body(c: Any, row: Any) -> Any:
            c = jnp.tanh(c @ jnp.exp(w) + b.T.astype(bf16).astype(f32) + row)
            return c, c.sum() + jnp.sum(b * 2.0)

        c, sums = lax.scan(body, x, x)
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ jnp.sin(w).T), (0, c))[1], sums

    random = np.random.default_rng(1)
    args = [jnp.asarray(random.normal(size=(8, 8)) / 8, f32) for _ in range(3)]
    plan = autoshard.search(fn, *args, topology=well_linked("cpu:2x4"))
    for found, right in zip(plan.apply(fn)(*args), fn(*args), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-2, atol=1e-2)
    once = [op for op in plan.operations if op.primitive in ("exp", "sin")]
    assert len(once) == 2 and all(op.count == 1 for op in once)


def test_a_loop_without_its_unrolling_says_so() -> None:
    stacks, x = (S((4, 8, 2, 4), bf16), S((4, 2, 4, 8), bf16)), S((8, 8), bf16)
    plan = autoshard.search(unrolled, stacks, x, topology="cpu:8")
    (warning,) = (each for each in plan.warnings if "unroll" in each)
    assert "planned and run without its unroll=4" in warning


def test_what_makes_a_weight_is_looked_at_once_however_often_it_is_used() -> None:
    def product(weight, x):
        for _ in range(12):
            weight = 2 * weight + 3 * weight
        return jnp.tanh(x @ x) @ weight

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    program = trace(product, square, square).program
    (_, last) = (op for _, op in program.matmuls())
    given = {use.value for op in program.operations if op.op_class == "source" for use in op.outputs}
    assert len(list(conversion_barriers._firsts(program, last.inputs[1].value, given))) == 2
