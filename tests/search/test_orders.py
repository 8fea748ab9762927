"""The orders of arguments by what reads them: their laws, and libtpu's own choice beside them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

import autoshard
from autoshard.emitting.formats import without_orders
from benchmarks import uneven
from search.answer.orders import Order, orders
from search.formulation.layouts import local_shape
from search.formulation.tpu_tiles import default_order

SIZES = st.sampled_from((1, 3, 8, 64, 96, 128, 200, 512))
SHAPE = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)


def plan_of(fn: Any, *args: Any, topology: str = "v5e:1x1", donated: tuple[int, ...] = ()) -> autoshard.Plan:
    return autoshard.search(fn, *args, topology=topology, donate_argnums=donated)


def order_of(fn: Any, *args: Any, argument: int = 0) -> Order:
    return plan_of(fn, *args).arguments[argument].order


# --- laws


@given(SIZES, SIZES, SIZES)
def test_a_plain_matrix_lies_as_the_device_has_it(rows: int, inner: int, columns: int) -> None:
    assert order_of(lambda w, x: x @ w, SHAPE((inner, columns)), SHAPE((rows, inner))) == ()


@given(st.permutations("ehd"), SIZES, SIZES, SIZES)
def test_an_order_names_each_dimension_once_and_ends_with_the_matrix(dims: list[str], e: int, h: int, d: int) -> None:
    sizes = {"e": e, "h": h, "d": d}
    shape = tuple(sizes[name] for name in dims)
    found = order_of(lambda w, x: jnp.einsum(f"be,{''.join(dims)}->bhd", x, w), SHAPE(shape), SHAPE((8, e)))
    if found:
        assert sorted(found) == [0, 1, 2]
        assert "e" in {dims[at] for at in found[-2:]}, "the summed dimension is one of the matrix's"
        assert max(h, d) in {shape[at] for at in found[-2:]}, "and the longest of the kept ones the other"


def test_a_stack_that_a_loop_slices_lies_slice_by_slice() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        return lax.scan(lambda x, w: (jnp.einsum("be,ehd->bhd", x, w).reshape(x.shape), None), x, w)[0]

    single = order_of(lambda w, x: jnp.einsum("be,ehd->bhd", x, w), SHAPE((1024, 8, 128)), SHAPE((8, 1024)))
    assert single == (1, 0, 2)
    assert order_of(step, SHAPE((4, 1024, 8, 128)), SHAPE((8, 1024))) == (0, *(at + 1 for at in single))


def test_a_stack_whose_layers_pad_less_than_its_rows_lies_slice_by_slice() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        return lax.scan(lambda x, w: (x + x[:, :284] @ w, None), x, w)[0]

    assert default_order((32, 284, 512), 2) == (1, 0, 2)
    assert order_of(step, SHAPE((32, 284, 512)), SHAPE((8, 512))) == (0, 1, 2)


def test_what_elementwise_operations_read_too_keeps_its_order() -> None:
    def step(w: jax.Array, x: jax.Array) -> Any:
        return jnp.einsum("be,ehd->bhd", x, w), w * jnp.bfloat16(0.5)

    assert order_of(step, SHAPE((1024, 8, 128)), SHAPE((8, 1024))) == ()


def test_a_look_up_of_slabs_takes_them_in_the_order_of_other_readers() -> None:
    """A beam search takes the caches `[S, H, D]` of the chosen beams, and rows of a table as they lie."""

    def step(cache: jax.Array, x: jax.Array, parents: jax.Array) -> Any:
        chosen = jnp.take_along_axis(cache, parents[:, :, None, None, None], axis=1)
        return jnp.einsum("bkhd,bkshd->bkhs", x, cache), chosen

    parents = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    assert order_of(step, SHAPE((8, 4, 1024, 2, 128)), SHAPE((8, 4, 2, 128)), parents) == (0, 1, 3, 2, 4)


def attend(x: jax.Array, wq: jax.Array, wo: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Many heads share keys and values `[S, D]`."""
    scores = jnp.einsum("thd,sd->hts", jnp.einsum("te,ehd->thd", x, wq), keys, preferred_element_type=jnp.float32)
    heads = jnp.einsum("hts,sd->thd", jax.nn.softmax(scores).astype(x.dtype), values)
    return jnp.einsum("thd,hde->te", heads, wo)


MANY_HEADS = SHAPE((128, 1024)), SHAPE((1024, 71, 64)), SHAPE((71, 64, 1024)), SHAPE((512, 64)), SHAPE((512, 64))


def test_projections_have_the_dimension_of_attention_s_matmuls_in_their_matrix() -> None:
    plan = plan_of(attend, *MANY_HEADS)
    found = [row.order or default_order(row.shape, 2) for row in plan.arguments[1:3]]
    assert found == [(1, 2, 0), (0, 1, 2)]  # the head dimension beside the width, though there are more heads
    alone = order_of(lambda w, x: jnp.einsum("te,ehd->thd", x, w), MANY_HEADS[1], MANY_HEADS[0])
    assert alone == (2, 1, 0)


def test_other_chips_have_no_orders() -> None:
    fn = functools.partial(jnp.einsum, "ehd,be->bhd")
    args = SHAPE((1024, 8, 128)), SHAPE((8, 1024))
    assert plan_of(fn, *args).emission.formats == "rule"
    for topology in ("cpu:1", "h100:1x1"):
        plan = plan_of(fn, *args, topology=topology)
        assert orders(plan.require_program(), plan.choice, plan.topology) == ((), ())
        assert plan.emission.formats == "default"


def test_a_donated_argument_and_its_successor_lie_alike() -> None:
    def step(cache: jax.Array, x: jax.Array, at: jax.Array) -> Any:
        cache = lax.dynamic_update_slice_in_dim(cache, x[:, None], at, 1)
        return jnp.einsum("bkd,bskd->bks", x, cache), cache

    args = SHAPE((8, 512, 8, 128)), SHAPE((8, 8, 128)), jax.ShapeDtypeStruct((), jnp.int32)
    plan = plan_of(step, *args, donated=(0,))
    assert plan.arguments[0].order == (0, 2, 1, 3) == plan.results[1].order


# --- beside the compiler's


def moe(params: dict[str, jax.Array], tokens: jax.Array, sizes: jax.Array) -> jax.Array:
    """A look-up, a projection to heads of 64 and a grouped product, of the shapes that lie badly by default."""
    x = params["embedding"][tokens]
    heads = jnp.einsum("be,ehd->bhd", x, params["query"])
    rows = lax.ragged_dot(x, params["experts"], sizes)
    return rows + jnp.einsum("bhd,hde->be", heads, params["out"])


MOE = (
    {
        "embedding": SHAPE((20_000, 2880)),
        "query": SHAPE((2880, 16, 64)),
        "experts": SHAPE((8, 2880, 360)),
        "out": SHAPE((16, 64, 360)),
    },
    jax.ShapeDtypeStruct((32,), jnp.int32),
    jax.ShapeDtypeStruct((8,), jnp.int32),
)


def test_a_chain_of_grouped_products_reads_its_matrices_by_group() -> None:
    """Hidden columns of 720 would lie along the rows by default, as 2880 pad less."""

    def fn(x: Any, order: Any, sizes: Any, up: Any, bias: Any, down: Any) -> Any:
        hidden = jnp.tanh(lax.ragged_dot(x[order], up, sizes) + bias[order])
        return jnp.zeros_like(x).at[order].add(lax.ragged_dot(hidden, down, sizes))

    numbers = (jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32))
    args = (SHAPE((64, 2880)), *numbers, SHAPE((8, 2880, 720)), SHAPE((8, 720)), SHAPE((8, 720, 2880)))
    pins = [None] * 3 + [PartitionSpec("x"), None, PartitionSpec("x")]
    plan = autoshard.search(fn, *args, topology="v5e:2x1", pins=pins, padding=False)
    assert [op.primitive for op in plan.operations].count("ragged_chain") == 1
    assert default_order((4, 2880, 720), 2) == (0, 2, 1)
    assert {row.path: row.order for row in plan.arguments if row.order} == {"up": (0, 1, 2)}


@pytest.mark.long
@pytest.mark.tpu
def test_the_orders_are_those_that_the_compiler_chooses() -> None:
    plan = plan_of(moe, *MOE)
    chosen = autoshard.choose_formats(without_orders(plan), moe, *MOE)
    for ours, its in zip(plan.arguments, chosen.arguments, strict=True):
        sizes = local_shape(ours.shape, ours.layout, plan.topology.axis_sizes)
        assert len(sizes) < 2 or (ours.order or default_order(sizes, 2)) == its.order, ours.path
    assert {row.path: row.order for row in plan.arguments if row.order} == {
        "params['embedding']": (0, 1),
        "params['experts']": (0, 1, 2),
    }


@pytest.mark.long
@pytest.mark.tpu
def test_no_projection_of_many_heads_is_laid_out_anew() -> None:
    work = uneven.workload_of(replace(uneven.MODELS["falcon-7b"], layers=1), "prefill", 1)
    plan = plan_of(work.fn, *work.args, topology="v5e:2x4")
    found = autoshard.audit(plan, work.fn, *work.args, target="tpu")
    assert found.ok and found.step_seconds is not None and found.step_seconds < 1.1 * plan.estimate.seconds


@pytest.mark.long
@pytest.mark.tpu
def test_the_compiler_chooses_orders_of_padded_arguments() -> None:
    args = SHAPE((64, 1001)), SHAPE((1001, 4096))
    plan = autoshard.search(jnp.matmul, *args, topology="v5e:2x2", pins={"b": PartitionSpec("x", None)})
    assert plan.padding
    assert sorted(autoshard.choose_formats(plan, jnp.matmul, *args).arguments[1].order) == [0, 1]


@pytest.mark.long
@pytest.mark.tpu
def test_the_orders_save_relayouts() -> None:
    plan = plan_of(moe, *MOE)
    ours, plain = (
        autoshard.audit(each, moe, *MOE, target="tpu").compute_seconds for each in (plan, without_orders(plan))
    )
    assert ours is not None and plain is not None and ours < plain / 3
