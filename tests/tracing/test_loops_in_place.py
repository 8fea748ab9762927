"""Loops in place compute what they were written to, carry what they update, and cost the same however a cache is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax
from jax.extend import core as jex
from jax.sharding import PartitionSpec

import autoshard
from autoshard.tracing.jaxprs import scan_counts
from autoshard.tracing.loops.in_place import carry_in_place
from examples import llama
from tests.support.effort import examples, mostly_long
from tests.support.layout_strategies import quick
from tests.support.loops import COLUMNS, NUMBERS, WRITES, forgetting, loops, mixed, nested, part, replacing
from tests.support.plans import well_linked

S = jax.ShapeDtypeStruct


# --- loops in place: the rewritten jaxpr computes what the original does


def evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What a jaxpr computes, loops by what the tracer reads of them."""
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _equation(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _inside(closed: Any) -> Callable[..., list[Any]]:
    return lambda *args: evaluated(closed.jaxpr, closed.consts, args)


def _equation(eqn: Any, operands: list[Any]) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        constants, carries = scan_counts(params)
        held, init, xs = (
            operands[:constants],
            operands[constants : constants + carries],
            operands[constants + carries :],
        )

        def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            found = _inside(params["jaxpr"])(*held, *carry, *slices)
            return found[:carries], found[carries:]

        carry, piled = lax.scan(
            body, list(map(jnp.asarray, init)), xs, length=params["length"], reverse=params["reverse"]
        )
        return [*carry, *piled]
    if name == "while":
        tested, constants = params["cond_nconsts"], params["body_nconsts"]
        first, second, carry = operands[:tested], operands[tested : tested + constants], operands[tested + constants :]
        return lax.while_loop(
            lambda carry: _inside(params["cond_jaxpr"])(*first, *carry)[0],
            lambda carry: _inside(params["body_jaxpr"])(*second, *carry),
            list(map(jnp.asarray, carry)),
        )
    if name == "cond":
        return lax.switch(operands[0], [_inside(each) for each in params["branches"]], *operands[1:])
    if name in ("jit", "pjit"):
        return _inside(params["jaxpr"])(*operands)
    found = eqn.primitive.bind(*operands, **params)
    return found if eqn.primitive.multiple_results else [found]


def rewritten(fn: Callable[..., Any], *args: Any, donated: Sequence[int] = ()) -> Any:
    """The flat jaxpr of a function with its loops in place."""
    return carry_in_place(jax.make_jaxpr(fn)(*args), donated)


def same_results(fn: Callable[..., Any], *args: Any, donated: Sequence[int] = ()) -> Any:
    closed = rewritten(fn, *args, donated=donated)
    options = quick()
    run = jax.jit(lambda *flat: evaluated(closed.jaxpr, closed.consts, flat), compiler_options=options)
    found = run(*jax.tree_util.tree_leaves(args))
    right = jax.tree_util.tree_leaves(jax.jit(fn, compiler_options=options)(*args))
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one, other)
    return closed


@given(loops())
@examples(40)
def test_loops_in_place_compute_what_they_are_written_to(case: tuple[Callable[..., Any], int, list[int]]) -> None:
    fn, stacks, donated = case
    same_results(fn, jnp.int32(5), *map(jnp.asarray, NUMBERS[:stacks]), donated=donated)


def scans(closed: Any) -> list[Any]:
    return [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan"]


def carried_and_piled(eqn: Any) -> tuple[int, int]:
    """How many arrays a scan carries, and how many it piles up."""
    _, carries = scan_counts(eqn.params)
    return carries, len(eqn.outvars) - carries


def updating(how: Callable[..., Any]) -> Callable[..., Any]:
    def step(total: Any, old: Any) -> Any:
        new = how(old, total, total % 4)
        return mixed(total, new), new

    return lambda total, stack: lax.scan(step, total, stack)


STACK = jnp.asarray(NUMBERS[0])


@pytest.mark.parametrize("how", WRITES, ids=lambda how: how.__name__)
def test_what_is_updated_goes_round(how: Callable[..., Any]) -> None:
    whole = how in (replacing, forgetting)
    (scan,) = scans(same_results(updating(how), jnp.int32(3), STACK))
    assert carried_and_piled(scan) == ((1, 1) if whole else (2, 0))
    (scan,) = scans(same_results(updating(how), jnp.int32(3), STACK, donated=[1]))
    assert carried_and_piled(scan) == ((1, 1) if how is forgetting else (2, 0))


def test_a_whole_slice_takes_the_place_of_what_nobody_needs() -> None:
    new = lambda stack: lax.scan(lambda c, x: (c, x * 2), None, stack)[1]  # noqa: E731
    assert carried_and_piled(scans(same_results(lambda stack: new(stack + 1), STACK))[0]) == (1, 0)
    assert carried_and_piled(scans(same_results(lambda stack: new((stack + 1).T).T, STACK.T))[0]) == (1, 0)
    assert carried_and_piled(scans(same_results(lambda stack: new(stack.T).T, STACK.T))[0]) == (0, 1)
    assert carried_and_piled(scans(same_results(lambda stack: new(stack.T).T, STACK.T, donated=[0]))[0]) == (1, 0)
    again = lambda stack: (lambda twice: (new(twice), twice))(stack + 1)  # noqa: E731
    assert carried_and_piled(scans(same_results(again, STACK))[0]) == (0, 1)


def test_stacks_of_stacks_go_round_whole() -> None:
    """A loop in a loop writes into the one array of both."""

    def inner(total: Any, old: Any) -> Any:
        return lax.scan(lambda c, row: (c + row[0, 0], part(row, c, c % 4)), total, old)

    def outer(total: Any, stack: Any) -> Any:
        return lax.scan(inner, total, stack)

    closed = same_results(outer, jnp.int32(2), jnp.asarray(NUMBERS))
    (scan,) = scans(closed)
    (within,) = scans(scan.params["jaxpr"])
    assert carried_and_piled(scan) == carried_and_piled(within) == (2, 0)
    assert {v.aval.shape for v in within.outvars} == {(), NUMBERS.shape}
    assert not any(v.aval.shape == NUMBERS.shape[1:] for eqn in scan.params["jaxpr"].jaxpr.eqns for v in eqn.outvars)


def test_programs_without_updates_stay_as_they_are() -> None:
    def fn(x: Any, stack: Any) -> Any:
        x, piled = lax.scan(lambda x, w: (x + w.sum(), (w * x, w)), x, stack)
        return x, piled, lax.fori_loop(0, 3, lambda _, c: c * 2, stack)

    closed = jax.make_jaxpr(fn)(jnp.int32(1), STACK)
    assert carry_in_place(closed) is closed


# --- planned and run


@pytest.mark.parametrize("how", WRITES, ids=lambda how: how.__name__)
@pytest.mark.parametrize("donated", mostly_long([(), (1,)], (1,)), ids=["kept", "donated"])
def test_planned_loops_in_place_compute_what_they_are_written_to(
    how: Callable[..., Any], donated: tuple[int, ...]
) -> None:
    args = (jnp.int32(3), jnp.asarray(np.random.default_rng(1).integers(-9, 9, (4, 8, COLUMNS)).astype(np.int32)))
    fn = updating(how)
    plan = autoshard.search(
        fn, *args, topology=well_linked("cpu:2x4"), donate_argnums=donated, pins={"stack": pins(how)}
    )
    for found, right in zip(plan.apply(fn)(*args), fn(*args), strict=True):
        np.testing.assert_array_equal(found, right)


def pins(how: Callable[..., Any]) -> PartitionSpec:
    """What splits the stack: its rounds where it goes round, else its rows."""
    return PartitionSpec(None, "y") if how in (replacing, forgetting, nested) else PartitionSpec("x", "y")


# --- one model, its caches as slices and piles of a scan, and carried


MODEL = llama.Config(layers=8, d_model=1024, d_ff=2048, heads=32, kv_heads=8, vocab=2048)


def sliced(params: Any, cache: Any, tokens: Any, position: Any) -> Any:
    """A decode step as most people write it."""
    step = lambda x, layer: llama.decode_layer(layer[0], x, layer[1], position)  # noqa: E731
    x, cache = lax.scan(step, params["embedding"][tokens], (params["layers"], cache))
    return llama.logits(params, x), cache


def carried(params: Any, cache: Any, tokens: Any, position: Any) -> Any:
    """A decode step that writes its token into the stack and reads its layer from it."""

    def step(carry: Any, layer: Any) -> Any:
        x, cache = carry
        layer, index = layer
        q, k, v = llama.queries_keys_values(layer, llama.rms_norm(x, layer["attention_norm"]), position)
        at = (index, 0, position, 0, 0)
        new = {"k": k, "v": v}
        cache = {name: lax.dynamic_update_slice(cache[name], new[name][None, :, None], at) for name in cache}
        k, v = (lax.dynamic_index_in_dim(cache[name], index, keepdims=False) for name in ("k", "v"))
        visible = jnp.arange(k.shape[1]) <= position
        x += jnp.einsum("bhd,hde->be", llama.attend(q, k, v, visible), layer["wo"])
        return (x + llama.feed_forward(layer, llama.rms_norm(x, layer["ffn_norm"])), cache), None

    layers = jnp.arange(cache["k"].shape[0])
    (x, cache), _ = lax.scan(step, (params["embedding"][tokens], cache), (params["layers"], layers))
    return llama.logits(params, x), cache


@pytest.mark.long
@pytest.mark.tpu
def test_caches_that_are_sliced_and_piled_up_cost_what_carried_ones_do() -> None:
    args = (
        llama.abstract_params(MODEL),
        llama.abstract_cache(MODEL, batch=8, context=4096),
        S((8,), jnp.int32),
        S((), jnp.int32),
    )
    found = {}
    for fn in (sliced, carried):
        plan = autoshard.search(fn, *args, topology="v5e:1x1", donate_argnums=1)
        found[fn] = autoshard.audit(plan, fn, *args, target="tpu")
        assert found[fn].peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)
    assert found[sliced].peak_bytes == pytest.approx(found[carried].peak_bytes, rel=0.05)
    assert found[sliced].compute_seconds == pytest.approx(found[carried].compute_seconds, rel=0.1)
    assert found[sliced].planned_seconds == pytest.approx(found[carried].planned_seconds, rel=0.1)
