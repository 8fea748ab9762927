"""Padded dimensions: results equal those of the unpadded program, for each primitive, for models and for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.annotating.padding import Occurrences, Padding, dimensions_of
from autoshard.tracing.traced_function import trace_function
from tests.rules.test_rules import EXAMPLES, Example, draw
from tests.support.effort import examples
from tests.support.emitting.einsum_graphs import PRIMES, Graph, arguments_of, graphs
from tests.support.emitting.padding import assert_padding_does_not_matter, draw_paddings, paddable
from tests.support.models import Block, arguments, function
from tests.support.rules.decompositions import DEFINED

CHIPS = st.sampled_from(("2", "3", "5", "6", "7", "8", "2x2", "3x2", "2x4"))
"""Meshes of two to eight chips, most of which divide no prime size."""
TRIED = frozenset(
    "dot_general reduce_sum reduce_max argmax cumsum gather scatter-add sort tanh select_n pad split".split()
)
"""Primitives that `make test` tries: one of each kind."""
PADDED = [example for example in EXAMPLES if example.fn is not None]
"""All primitives: those that accept no padding of a dimension may have others whole, which are cut."""
FIRST = {example.primitive: example for example in reversed(PADDED)}
OF_EINSUM = {example.text(): example for example in reversed(PADDED)}


def _marks(example: Example) -> list[pytest.MarkDecorator]:
    """Some primitives are tried in `make test`, an example of each einsum in `make test-all`."""
    if example.primitive in TRIED and FIRST[example.primitive] is example:
        return []
    return [pytest.mark.long if OF_EINSUM[example.text()] is example else pytest.mark.slow]


@pytest.mark.parametrize("example", [pytest.param(each, marks=_marks(each), id=each.primitive) for each in PADDED])
def test_no_padding_changes_what_a_primitive_computes(example: Example) -> None:
    rng = np.random.default_rng(0)
    args = [draw(spec, rng) for spec in example.args]
    assert example.fn is not None

    def paddings(traced):
        return draw_paddings(paddable(traced, range(len(traced.program.operations))), rng)

    assert_padding_does_not_matter(
        example.fn, *args, paddings=paddings, count=3, defined=DEFINED.get(example.primitive)
    )


def test_a_dimension_that_occurs_twice_is_masked_where_it_is_broadcast() -> None:
    """All sums of pairs, summed: the padding of one dimension holds copies of what lies along the other."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 6), (6,))]

    def summed(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        return (y[:, None] + y[None, :]).sum(1)

    chosen = assert_padding_does_not_matter(
        summed, *args, paddings=lambda traced: [each.padding(8) for each in paddable(traced) if each.size == 5]
    )
    assert chosen


@st.composite
def odd_blocks(draw: st.DrawFn) -> Block:
    """Small transformer blocks of prime sizes."""
    return Block(
        batch=draw(st.sampled_from((1, 3, 5))),
        context=draw(st.sampled_from((3, 5, 7))),
        layers=draw(st.integers(1, 2)),
        d_model=draw(st.sampled_from((6, 7, 10))),
        d_ff=draw(st.sampled_from((5, 11, 14))),
        kv_heads=draw(st.sampled_from((1, 3, 5))),
        queries_per_kv=draw(st.sampled_from((1, 3))),
        d_head=draw(st.sampled_from((3, 4))),
        gated=draw(st.booleans()),
        parallel=draw(st.booleans()),
        scanned=draw(st.booleans()),
        decode=draw(st.booleans()),
        vocab=draw(st.sampled_from((7, 11, 13))),
    )


@examples(12, 2)
@given(graph=graphs(), seed=st.integers(0, 2**31), shape=CHIPS)
def test_no_padding_changes_what_a_graph_of_einsums_computes(graph: Graph, seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    assert_padding_does_not_matter(
        graph,
        *arguments_of(graph, PRIMES),
        paddings=lambda traced: draw_paddings(paddable(traced), rng),
        shape=shape,
        count=1,
        seed=seed,
    )


@pytest.mark.long
@examples(3, 2)
@given(block=odd_blocks(), seed=st.integers(0, 2**31), shape=CHIPS)
def test_no_padding_changes_what_a_model_computes(block: Block, seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    assert_padding_does_not_matter(
        function(block),
        *arguments(block),
        paddings=lambda traced: draw_paddings(paddable(traced), rng),
        shape=shape,
        seed=seed,
    )


@pytest.mark.long
@examples(2, 2)
@given(block=odd_blocks(), seed=st.integers(0, 2**31), shape=CHIPS)
def test_no_padding_changes_a_gradient(block: Block, seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    params, *rest = arguments(block)

    def gradients(params, *rest):
        def loss(params):
            found = jax.tree.leaves(function(block)(params, *rest))
            return sum(jnp.square(leaf).mean() for leaf in found)

        return jax.grad(loss)(params)

    assert_padding_does_not_matter(
        gradients,
        params,
        *rest,
        paddings=lambda traced: draw_paddings(paddable(traced), rng),
        shape=shape,
        seed=seed,
    )


def test_a_donated_array_whose_padding_does_not_stay_zero_is_masked() -> None:
    """The exponential of zero is one: from the second step on the padding of the cache is not zero."""

    def step(cache: jax.Array, w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cache.sum(0), jnp.exp(0.1 * cache + x @ w)

    assert _after_two_steps(step) == 1  # the sum is masked


def test_a_donated_array_whose_padding_stays_zero_needs_no_mask() -> None:
    def step(cache: jax.Array, w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cache.sum(0), jax.lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c) + x @ w, cache)

    assert _after_two_steps(step) == 0


def _after_two_steps(step: Any) -> int:
    """Runs two steps with a placed, donated cache, compares with the function, and returns the number of masks."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32) for shape in ((21,), (8, 21), (8,))]
    plan = autoshard.search(step, *args, topology="cpu:4", donate_argnums=0, pins={"cache": P("x")})
    cache, *rest = plan.place(tuple(args))
    run = plan.jit(step, plan.make_mesh())
    _, cache = run(cache, *rest)
    assert cache.shape == (24,)
    found, _ = run(cache, *rest)
    np.testing.assert_allclose(found, step(step(*args)[1], *args[1:])[0], rtol=1e-4)
    return sum(len(op.masked) for op in plan.require_program().operations)


@pytest.mark.long
def test_a_fused_projection_of_unequal_parts_is_padded() -> None:
    """Four query heads, one key head and one value head in one matmul; the split is at unequal positions."""

    def attend(x: jax.Array, w: jax.Array, wo: jax.Array) -> jax.Array:
        q, k, v = jnp.split(x @ w, [20, 25], -1)
        q = q.reshape(q.shape[0], 4, 5)
        weights = jax.nn.softmax(jnp.einsum("thd,sd->hts", q, k))
        return jnp.einsum("hts,sd,hde->te", weights, v, wo)

    assert {30, 4} <= {each.size for each in _assert_each_can_be_padded(attend, (7, 6), (6, 30), (4, 5, 6))}


def test_a_fused_projection_of_equal_parts_is_padded() -> None:
    def gated(x: jax.Array, w: jax.Array, down: jax.Array) -> jax.Array:
        gate, up = jnp.split(x @ w, 2, -1)
        return (jax.nn.sigmoid(gate) * up) @ down

    assert 13 in {each.size for each in _assert_each_can_be_padded(gated, (4, 8), (8, 26), (13, 8))}


def test_a_padded_and_sliced_sequence_is_padded() -> None:
    def shifted(x: jax.Array, w: jax.Array) -> jax.Array:
        y = x @ w
        return jnp.pad(y, ((1, 0), (0, 3)))[:-1, :13] + y[:, ::-1]

    assert {7, 13} <= {each.size for each in _assert_each_can_be_padded(shifted, (7, 6), (6, 13))}


def test_a_dimension_whose_positions_are_counted_across_others_is_refused() -> None:
    """With padding inside, the positions 0 to 25 would not be those of two rows of 13."""

    def counted(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w + jnp.arange(26.0).reshape(2, 13)

    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8), (8, 13))]
    found = dimensions_of(trace_function(counted, args).traced.program)
    assert ["counts positions" in each.refusal for each in found if each.size == 13] == [True]


def _assert_each_can_be_padded(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> list[Padding]:
    """Pads the dimensions of the matmuls that can be padded, as many as do not overlap."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    return assert_padding_does_not_matter(fn, *args, paddings=lambda traced: _together(paddable(traced)))


def _together(dimensions: list[Occurrences]) -> list[Padding]:
    chosen: list[Occurrences] = []
    for each in dimensions:
        if not any(each.overlaps(other) for other in chosen):
            chosen.append(each)
    return [each.padding(each.size + 3) for each in chosen]
