"""Mixtures of experts: experts split over chips where it pays, with the all-to-alls that it takes, and the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import autoshard
from tests.support.effort import mostly_long
from tests.support.layout_strategies import assert_equal, assert_layouts_do_not_matter


def dispatched(x: Array, router: Array, up: Array, down: Array) -> Array:
    """Tokens go to one expert each, up to a capacity (Lepikhin et al. 2020, GShard). G groups, S tokens, E experts."""
    experts, capacity = router.shape[1], 2 * x.shape[1] // router.shape[1]
    gates = jax.nn.softmax((x @ router).astype(jnp.float32), -1)
    mask = jax.nn.one_hot(jnp.argmax(gates, -1), experts, dtype=jnp.int32)
    place = jnp.cumsum(mask, 1) * mask - 1
    dispatch = jax.nn.one_hot(place, capacity, dtype=x.dtype)
    combine = dispatch * gates[..., None].astype(x.dtype)
    rows = jnp.einsum("gsec,gsd->egcd", dispatch, x)
    hidden = jax.nn.relu(jnp.einsum("egcd,edf->egcf", rows, up))
    return jnp.einsum("gsec,egcd->gsd", combine, jnp.einsum("egcf,efd->egcd", hidden, down))


def ragged(x: Array, router: Array, up: Array, down: Array) -> Array:
    """Tokens sorted by expert, two experts per token, no capacity."""
    gates, chosen = lax.top_k(jax.nn.softmax(x @ router, -1), 2)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=router.shape[1]).astype(jnp.int32)
    rows = x[order // 2]
    made = lax.ragged_dot(jax.nn.silu(lax.ragged_dot(rows, up, sizes)), down, sizes)
    weighted = made * gates.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(x).at[order // 2].add(weighted)


def masked(x: Array, router: Array, up: Array, down: Array) -> Array:
    """Every expert computes every token; what was not chosen counts nothing."""
    gates = jax.nn.softmax(x @ router, -1)
    kept = jnp.where(gates >= lax.top_k(gates, 2)[0][:, -1:], gates, 0)
    hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, up))
    return jnp.einsum("te,etd->td", kept, jnp.einsum("etf,efd->etd", hidden, down))


def _random(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.long
@pytest.mark.parametrize("moe", [dispatched, ragged, masked])
def test_layouts_do_not_matter(moe: Any) -> None:
    x = (4, 8, 6) if moe is dispatched else (16, 6)
    assert_layouts_do_not_matter(moe, *_random(x, (6, 4), (4, 6, 8), (4, 8, 6)), count=3)


@pytest.mark.parametrize("moe", mostly_long([dispatched, ragged, masked], ragged))
def test_planned_and_differentiated(moe: Any) -> None:
    x = (4, 8, 6) if moe is dispatched else (16, 6)
    args = _random(x, (6, 4), (4, 6, 8), (4, 8, 6))

    def step(*args: Any) -> Any:
        return jax.value_and_grad(lambda up, down: jnp.square(moe(*args[:2], up, down)).sum(), (0, 1))(*args[2:])

    plan = autoshard.search(step, *args, topology="cpu:2x4")
    assert_equal(jax.tree.leaves(plan.jit(step)(*args)), jax.jit(step)(*args))


@pytest.mark.parametrize(("experts", "split"), [(64, True), (4, False)])
def test_many_experts_are_split_by_all_to_alls_and_few_are_not(experts: int, split: bool) -> None:
    shapes = ((64, 512, 2048), (2048, experts), (experts, 2048, 8192), (experts, 8192, 2048))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    plan = autoshard.search(dispatched, *args, topology="v5e:4x4")
    assert plan.proof.status == "OPTIMAL"
    kinds = [each.kind for each in plan.estimate.collectives]
    assert kinds == (["all-to-all"] * 2 if split else [])
    for spec in plan.in_specs[2:]:
        assert (tuple(spec) == (("x", "y"),)) is split


@pytest.mark.parametrize(
    ("experts", "width", "hidden", "kind"),
    [
        (64, 2048, 8192, "expert parallel over xy, 16 ways"),
        (4, 2048, 8192, "expert parallel over x, 4 ways; tensor parallel over y, 4 ways"),
        (3, 2048, 8192, "tensor parallel over xy, 16 ways"),
        (64, 2049, 1023, "expert parallel over xy, 16 ways"),
    ],
)
def test_ragged_products_split_experts_and_columns(experts: int, width: int, hidden: int, kind: str) -> None:
    shapes = ((128, width), (width, experts), (experts, width, hidden), (experts, hidden, width))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    plan = autoshard.search(ragged, *args, topology="v5e:4x4")
    assert plan.proof.status == "OPTIMAL"
    assert str(plan.parallelism()) == kind
