"""JAX's own Pallas kernels: their rules, and that shards compute what the whole kernel does, in interpret mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from autoshard.tracing.blocks import Traced
from tests.support.layout_strategies import assert_layouts_do_not_matter, mesh_shapes, op_steps
from tests.support.tracing import trace

WIDTH = 128
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of JAX, in its kernels
unshrunk = (Phase.explicit, Phase.generate)  # smaller examples are not faster


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Runs kernels in interpret mode, those too whose functions have no option for it."""
    compiled = pl.pallas_call
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", lambda *args, **options: compiled(*args, **{**options, "interpret": True}))
        with jax.numpy_dtype_promotion("standard"):
            yield
    jax.clear_caches()


def array(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rules(traced: Traced) -> list[str]:
    """The rules of the kernels, without the letters of dimensions that stay whole."""
    steps = [each for each in op_steps(traced.block) if each.eqn.primitive.name.startswith(("pallas_call", "kernel:"))]
    return [str(step.rule).split(" whole=")[0] for step in steps]


def all_exact(traced: Traced) -> bool:
    return all(step.rule.exact for step in op_steps(traced.block))


# --- flash and splash attention


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Sequences, heads of keys, query heads of each, and blocks of 128 positions."""
    batch, heads, group = (draw(st.sampled_from(each)) for each in ((1, 2, 4), (1, 2, 4), (1, 2)))
    return batch, heads, group, draw(st.sampled_from((1, 2)))


def flash(batch: int, heads: int, length: int, causal: bool) -> Callable[..., Array]:
    blocks = BlockSizes.get_default(batch, heads, length, length, WIDTH)
    return lambda q, k, v: flash_attention(q * 2, k, v, causal=causal, sm_scale=0.1, block_sizes=blocks) + 1


@pytest.mark.long
@settings(max_examples=3, phases=unshrunk)
@given(sizes(), mesh_shapes(), st.booleans())
def test_flash_attention(at: tuple[int, int, int, int], shape: str, causal: bool) -> None:
    batch, heads, _, blocks = at
    q, k, v = (array(i, batch, heads, 128 * blocks, WIDTH) for i in range(3))
    assert_layouts_do_not_matter(flash(batch, heads, 128 * blocks, causal), q, k, v, shape=shape, count=2)


@pytest.mark.long
def test_batch_heads_and_queries_of_flash_attention_are_split() -> None:
    spec = jax.ShapeDtypeStruct((2, 4, 256, WIDTH), jnp.float32)
    assert rules(trace(flash(2, 4, 256, True), spec, spec, spec)) == ["[a,b,c,d],[a,b,e,f],[a,b,g,h] -> [a,b,i,j]"]
    assert rules(trace(flash(2, 4, 256, False), spec, spec, spec)) == ["[a,b,cd,e],[a,b,f,g],[a,b,h,i] -> [a,b,cj,k]"]
    gradient = jax.grad(lambda *qkv: flash(2, 4, 256, True)(*qkv).sum(), (0, 1, 2))
    traced = trace(gradient, spec, spec, spec)
    assert all_exact(traced) and len(rules(traced)) == 3


def splash_layers(heads: int, length: int, windows: bool) -> Callable[..., Any]:
    """Batched splash attention; causal for all heads alike, or with windows of different lengths."""
    local = [masks.LocalMask((length, length), (64 + i, 0), 0) for i in range(heads)]
    mask = masks.MultiHeadMask(local if windows else [masks.CausalMask((length, length))] * heads)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": 128 for name in names}
    blocks = splash.BlockSizes(**sizes)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)

    def run(q: Array, k: Array, v: Array) -> Any:
        found: Any = jax.vmap(kernel)(q * 2, k, v)
        return found + 1

    return run


@pytest.mark.long
@settings(max_examples=3, phases=unshrunk)
@given(sizes(), mesh_shapes(), st.booleans())
def test_splash_attention(at: tuple[int, int, int, int], shape: str, windows: bool) -> None:
    batch, heads, group, blocks = at
    q = array(0, batch, heads * group, 128 * blocks, WIDTH)
    k, v = (array(i, batch, heads, 128 * blocks, WIDTH) for i in (1, 2))
    fn = splash_layers(heads * group, 128 * blocks, windows)
    assert_layouts_do_not_matter(fn, q, k, v, shape=shape, count=2)


@pytest.mark.long
def test_gradients_of_splash_attention() -> None:
    q, k, v = array(0, 2, 4, 256, WIDTH), array(1, 2, 2, 256, WIDTH), array(2, 2, 2, 256, WIDTH)
    gradient = jax.grad(lambda *qkv: jnp.square(splash_layers(4, 256, True)(*qkv)).sum(), (0, 1, 2))
    assert all_exact(assert_layouts_do_not_matter(gradient, q, k, v, count=3))


def test_heads_groups_and_queries_of_splash_attention_are_split() -> None:
    q, kv = (jax.ShapeDtypeStruct((2, heads, 256, WIDTH), jnp.float32) for heads in (4, 2))
    (rule,) = rules(trace(splash_layers(4, 256, True), q, kv, kv))
    operands, results = rule.split(" -> ")
    assert operands == "[ab,c,d],[ab,c,e],[ab,c,f],[g,ab,ch,i],[g,a,j,k],[g,a,l,m],[n,o,p]"
    assert results.split("],[")[-1].strip("[").startswith("g,ab,c")  # JAX 0.10 has results that are scratch memory


# --- paged attention


def paged(sequences: int, heads: int, group: int, **static: Any) -> tuple[Callable[..., Array], tuple[Array, ...]]:
    q, k, v = (
        array(0, sequences, heads * group, WIDTH),
        array(1, heads, 4 * sequences, 16, WIDTH),
        array(2, heads, 4 * sequences, 16, WIDTH),
    )
    random = np.random.default_rng(0)
    lengths = jnp.asarray(random.integers(1, 65, sequences), jnp.int32)
    indices = jnp.asarray(random.permutation(4 * sequences).reshape(sequences, 4), jnp.int32)
    fn = functools.partial(paged_attention, pages_per_compute_block=2, **static)
    return lambda q, *rest: fn(q * 2, *rest) + 1, (q, k, v, lengths, indices)


@pytest.mark.long
@settings(max_examples=2, phases=unshrunk)
@given(sizes(), mesh_shapes(), st.booleans())
def test_paged_attention(at: tuple[int, int, int, int], shape: str, inline: bool) -> None:
    sequences, heads, group, _ = at
    fn, arguments = paged(sequences, heads, 4 * group, inline_seq_dim=inline)
    assert_layouts_do_not_matter(fn, *arguments, shape=shape, count=2)


def test_sequences_heads_and_groups_of_paged_attention_are_split() -> None:
    fn, arguments = paged(2, 2, 8)
    assert rules(trace(fn, *arguments)) == ["[a,bc,d],[b,e,f,d],[b,e,f,d],[a],[a,g] -> [a,bc,d]"]


@pytest.mark.long
def test_pages_of_int8_and_pages_for_two_cores() -> None:
    fn, arguments = paged(2, 2, 8)
    quantised = [quantization_utils.quantize_to_int8(each) for each in arguments[1:3]]
    assert rules(trace(fn, arguments[0], *quantised, *arguments[3:])) == [
        "[a,bc,d],[b,e,f,d],[b,e,f,1],[b,e,f,d],[b,e,f,1],[a],[a,g] -> [a,bc,d]"
    ]
    cores, arguments = paged(2, 2, 8, megacore_mode="kv_head")
    (step,) = [s for s in op_steps(trace(cores, *arguments).block) if s.eqn.primitive.name == "kernel:paged_attention"]
    assert str(step.rule) == "[a,bc,d],[b,e,f,d],[b,e,f,d],[a],[a,g] -> [a,bc,d] whole={b,d,e,f,g}"


def test_a_call_that_is_not_recognised_is_replicated_and_said() -> None:
    fn, arguments = paged(2, 2, 8, attn_logits_soft_cap=30.0)
    (warning,) = trace(fn, *arguments).program.warnings
    assert "its arrays are replicated; every chip computes all of it" in warning

    @jax.jit
    def gmm(x: Array, y: Array, z: Array) -> Array:  # a user's function of the name
        def copy(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = x_ref[...]

        return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x) * y * z

    (warning,) = trace(gmm, *[array(i, 8) for i in range(3)]).program.warnings
    assert "because its grid has one step" in warning


def ragged(q: Array, pages: Array, *tables: Array) -> Array:
    return ragged_paged_attention(
        q * 2, pages, *tables, num_kv_pages_per_block=2, num_queries_per_block=8, sm_scale=0.3
    )


RAGGED = (
    array(0, 16, 8, WIDTH),
    array(1, 16, 16, 8, WIDTH),
    jnp.asarray([5, 20, 9, 12], jnp.int32),
    jnp.asarray(np.random.default_rng(0).permutation(16).reshape(4, 4), jnp.int32),
    jnp.asarray([0, 3, 9, 12, 16], jnp.int32),
    jnp.asarray([4], jnp.int32),
)


@pytest.mark.slow
def test_ragged_paged_attention() -> None:
    literals = pytest.importorskip("jax._src.literals")
    with pytest.MonkeyPatch.context() as patch:  # JAX 0.10.2's interpreter fails on literal indices without it
        patch.setattr(literals.TypedInt, "shape", (), raising=False)
        assert_layouts_do_not_matter(ragged, *RAGGED, count=2, shape="2x2")


@pytest.mark.long
def test_heads_of_ragged_paged_attention_are_split() -> None:
    assert rules(trace(ragged, *RAGGED)) == ["[a,bc,d],[e,f,bg,d],[h],[i,j],[k],[l] -> [a,bc,d]"]


# --- grouped matmuls


def grouped(lhs: Array, rhs: Array, counts: Array) -> Array:
    return gmm(lhs * 2, rhs, counts, preferred_element_type=jnp.float32, tiling=(32, 32, 32)) + 1


@pytest.mark.long
@settings(max_examples=3, phases=unshrunk)
@given(st.sampled_from((32, 64)), st.sampled_from((32, 64)), st.sampled_from((1, 2, 4)), mesh_shapes(), st.data())
def test_grouped_matmuls(depth: int, columns: int, groups: int, shape: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, 64), min_size=groups - 1, max_size=groups - 1)))
    counts = jnp.asarray(np.diff([0, *cuts, 64]), jnp.int32)
    traced = assert_layouts_do_not_matter(
        grouped, array(0, 64, depth), array(1, groups, depth, columns), counts, shape=shape, count=3
    )
    assert not traced.program.warnings


def test_columns_depth_and_groups_of_grouped_matmuls_are_split() -> None:
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (4, 64, 128))]
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert rules(trace(grouped, *specs, counts)) == ["[a,b],[c,b,d],[e] -> [a,d] sum={b,c}"]
    gradient = jax.grad(lambda *args: grouped(*args).sum(), (0, 1))
    of_rows, of_matrices = rules(trace(gradient, *specs, counts))
    assert of_rows == "[a,b],[c,d,b],[e] -> [a,d] sum={b,c}"
    assert of_matrices == "[],[a],[b],[c],[d],[e,f],[g,hi] -> [j,k,hl]"
