"""Known answers: which kind of parallelism is best at both ends of a sweep, by its name in the literature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import autoshard
from benchmarks.parallelism import SWEEPS, planned
from examples import llama

_MARKS = {"memory": pytest.mark.slow, "node": pytest.mark.long, "prefill": pytest.mark.long}
"""A chip's memory that is nearly full takes long to prove."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=_MARKS.get(name, [])) for name in SWEEPS])
def test_both_ends_of_a_sweep_are_as_textbooks_say(name: str) -> None:
    sweep = SWEEPS[name]
    with jax.numpy_dtype_promotion("standard"):  # Optax's step counter meets floats
        first, last = (str(planned(sweep, point).parallelism()) for point in (sweep.points[0], sweep.points[-1]))
    assert sweep.ends[0] in first and sweep.ends[1] in last and first != last


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def two_products(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return jnp.einsum("btf,fe->bte", jnp.einsum("bte,ef->btf", x, up), down)


@pytest.mark.parametrize(
    ("tokens", "up", "down", "name"),
    [
        (P("x"), P(), P(), "data parallel over x, 8 ways"),
        (P(None, "x"), P(), P(), "sequence parallel over x, 8 ways"),
        (P(), P(None, "x"), P("x"), "tensor parallel over x, 8 ways"),
        (P(None, "x"), P(None, "x"), P("x"), "tensor parallel with sharded activations over x, 8 ways"),
        (P("x"), P("x"), P("x"), "fully sharded data parallel: weights gathered over x, 8 ways"),
    ],
)
def test_pinned_layouts_have_the_names_that_they_are_known_by(tokens: P, up: P, down: P, name: str) -> None:
    small = name.startswith(("data", "sequence", "fully"))
    args = (
        (shape(64, 64, 512), shape(512, 1024), shape(1024, 512))
        if small
        else (
            shape(8, 8, 8192),
            shape(8192, 32_768),
            shape(32_768, 8192),
        )
    )
    pinned = {"x": tokens, "up": up, "down": down}
    plan = autoshard.search(two_products, *args, topology="v5e:8x1", pins=pinned)
    assert str(plan.parallelism()) == name


@pytest.mark.parametrize(("size", "name"), [((), "repeated"), ((1024, 4096), "split")], ids=["scalar", "matrix"])
def test_a_program_without_products_is_split_or_repeated(size: tuple[int, ...], name: str) -> None:
    plan = autoshard.search(lambda x: x + 1, shape(*size), topology="v5e:8x1")
    assert plan.parallelism().names == (name,)


def test_attention_without_weights_is_named_by_what_it_splits() -> None:
    def scores(q, k):
        return jnp.einsum("bhtk,bhsk->bhts", q, k)

    plan = autoshard.search(scores, shape(8, 8, 256, 64), shape(8, 8, 256, 64), topology="v5e:8x1")
    assert plan.parallelism().names == ("data parallel",)


def test_an_explained_plan_names_its_parallelism() -> None:
    plan = autoshard.search(two_products, shape(64, 64, 512), shape(512, 1024), shape(1024, 512), topology="v5e:8x1")
    assert f"  parallelism  {plan.parallelism()}\n" in plan.explain()


@pytest.mark.parametrize(
    ("kv_heads", "attention"), [(4, "batch-sharded over x, head-sharded over y"), (32, "head-sharded over xy")]
)
def test_attention_is_data_parallel_where_kv_heads_are_fewer_than_chips(kv_heads: int, attention: str) -> None:
    config = llama.Config(layers=1, d_model=2048, d_ff=6144, heads=32, kv_heads=kv_heads, vocab=1024)
    cache = llama.abstract_cache(config, 64, 4096)
    rest = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    args = (llama.abstract_params(config), cache, *rest)
    plan = autoshard.search(llama.decode_step, *args, topology="v5e:4x4", donate_argnums=1)
    assert plan.proof.status == "OPTIMAL"
    assert [row.strategy for row in plan.operations if row.strategy == attention] == [attention] * 2


@pytest.mark.parametrize(
    ("batch", "context", "names"),
    [(64, 2048, ("batch-sharded over xy",)), (1, 32768, ("sequence-sharded over x", "sequence-sharded over y"))],
)
def test_fewer_heads_of_keys_than_chips(batch: int, context: int, names: tuple[str, ...]) -> None:
    """Eight heads on 16 chips: data-parallel attention for many sequences, a split cache and a combined softmax for one."""
    cache = shape(batch, context, 8, 128)

    def step(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return llama.attend(q, k, v, jnp.ones(context, bool))

    plan = autoshard.search(step, shape(batch, 64, 128), cache, cache, topology="v5e:4x4", padding=False)
    values = [row.strategy for row in plan.operations if row.matmul][-1]
    assert any(name in values for name in names)
    assert {each.kind for each in plan.estimate.collectives} == (set() if batch > 1 else {"all-reduce"})
