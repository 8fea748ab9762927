"""Rules that the user registers: their text, their errors, and that a plan with them computes what the function does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import Array
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

import autoshard
from autoshard.rules.einsum import parse_rule, rule_of
from autoshard.rules.rule import REGISTRY
from tests.support.layout_strategies import assert_layouts_do_not_matter, op_steps
from tests.support.tracing import trace

Q, K, V = (
    jnp.asarray(np.random.default_rng(i).standard_normal((4, 8, n, 4)), jnp.float32) for i, n in enumerate((8, 4, 4))
)


@autoshard.rule("b s (k g) d, b t k d, b t k d -> b s (k g) d", whole="s t d", flops_per_point=4)
def attention(q: Array, k: Array, v: Array) -> Array:
    """Grouped-query attention as one kernel, which works on pieces as on the whole."""

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any) -> None:
        grouped = q_ref[...].reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        weights = jax.nn.softmax(jnp.einsum("bskgd,btkd->bkgst", grouped, k_ref[...]), -1)
        out_ref[...] = jnp.einsum("bkgst,btkd->bskgd", weights, v_ref[...]).reshape(q.shape)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), interpret=True)(q, k, v)


def model(q: Array, k: Array, v: Array) -> Array:
    return attention(q * 2, k, v + 1) * 3


@pytest.mark.long
def test_a_kernel_runs_on_pieces() -> None:
    traced = assert_layouts_do_not_matter(model, Q, K, V, count=6)
    assert not traced.program.warnings
    (step,) = [each for each in op_steps(traced.block) if each.eqn.primitive.name == "rule:attention"]
    assert str(step.rule) == "[a,b,cd,e],[a,f,c,e],[a,f,c,e] -> [a,b,cd,e] whole={b,e,f}"
    op = traced.program.operations[step.operation]
    assert op.op_class == "matmul" and op.source.startswith("test_registered.py")


def test_the_search_splits_what_the_rule_lets_it() -> None:
    plan = autoshard.search(model, Q, K, V, topology="cpu:2x4")
    (op,) = [op for op in plan.operations if op.primitive == "rule:attention"]
    assert op.flops == 4 * 4 * 8 * 8 * 8 * 4 / 8
    assert op.splits != ((),) * len(op.splits)
    np.testing.assert_allclose(plan.jit(model)(Q, K, V), model(Q, K, V), rtol=1e-5)


def test_without_a_rule_a_kernel_is_whole_and_said_to_be() -> None:
    def double(x: Array) -> Array:
        def kernel(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = x_ref[...] * 2

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True, name="double")(
            x
        )

    traced = assert_layouts_do_not_matter(lambda x: double(x + 1) - 1, Q)
    (warning,) = traced.program.warnings
    assert warning.startswith("pallas_call double at test_registered.py:")
    assert "has no sharding rule: its arrays are replicated" in warning


def test_sums_are_partial() -> None:
    # Of two results one is a partial sum where `b` is split, and the other is not: no rule can say that.
    with pytest.raises(autoshard.RuleError, match="keeps b in a result, so it must be whole, got sum"):
        autoshard.rule("a b -> a, a b", sum="b")

    @autoshard.rule("a b -> a", sum="b")
    def total(x: Array) -> Array:
        return x.sum(1)

    assert_layouts_do_not_matter(lambda x: total(x * 2) + 1, jnp.arange(32.0).reshape(8, 4), count=8)

    @autoshard.rule("a b -> a", max="b")
    def highest(x: Array) -> Array:
        return x.max(1)

    assert_layouts_do_not_matter(lambda x: highest(x * 2) + 1, jnp.arange(32.0).reshape(8, 4), count=8)


def test_outside_of_plans_nothing_changes() -> None:
    @autoshard.rule("a b, a b -> a b")
    def product(x: Array, y: Array, power: int = 1) -> Array:
        return (x * y) ** power

    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    np.testing.assert_array_equal(product(x, y, power=2), x**2)
    np.testing.assert_array_equal(jax.grad(lambda x: product(x, x).sum())(x), 2 * x)
    batched = jax.vmap(product, in_axes=(1, None), out_axes=1)
    np.testing.assert_array_equal(jax.jit(batched)(jnp.stack((x, 2 * x), 1), y), jnp.stack((x, 2 * x), 1))
    wide = jnp.stack((x, 2 * x, x, x), 0)
    assert_layouts_do_not_matter(jax.vmap(product, in_axes=(0, None)), wide, y, shape="2x2")


def test_forward_and_backward_kernels() -> None:
    @autoshard.rule("a b -> a b")
    def forward(x: Array) -> Array:
        return jnp.sin(x)

    @autoshard.rule("a b, a b -> a b")
    def backward(x: Array, g: Array) -> Array:
        return jnp.cos(x) * g

    sine = jax.custom_vjp(forward)
    sine.defvjp(lambda x: (forward(x), x), lambda x, g: (backward(x, g),))
    x = jnp.arange(32.0).reshape(8, 4)
    traced = assert_layouts_do_not_matter(jax.grad(lambda x: sine(x).sum()), x)
    assert "rule:backward" in {op.primitive for op in traced.program.operations}


def test_a_primitive_by_name() -> None:
    tripled = Primitive("tripled")
    tripled.def_impl(lambda x, *, times: x * times)
    tripled.def_abstract_eval(lambda x, *, times: x)
    mlir.register_lowering(tripled, mlir.lower_fun(lambda x, *, times: x * times, multiple_results=False))

    def fn(x: Array) -> Array:
        return tripled.bind(x + 1, times=3) + 1

    x = jnp.arange(32.0).reshape(8, 4)
    assert "tripled at" in trace(fn, x).program.warnings[0]
    autoshard.rule("a b -> a b", whole="a", primitive="tripled")(lambda x, *, times: tripled.bind(x, times=times))
    try:
        assert not assert_layouts_do_not_matter(fn, x).program.warnings
    finally:
        del REGISTRY["tripled"]


@pytest.mark.parametrize(
    ("text", "kinds", "said"),
    [
        ("a b", {}, "Invalid rule 'a b': expected operands -> results, such as 'b s h d, b t h d -> b s h d'."),
        ("a -> b -> c", {}, "Invalid rule 'a -> b -> c': expected operands -> results"),
        (
            "a+b -> a",
            {},
            "'a+b' in the rule 'a+b -> a' must name dimensions, as in 'b s (k g) d'; 1 is a dimension of size 1.",
        ),
        ("(a b -> a", {}, "must name dimensions"),
        ("a a -> a", {}, "'a a' in the rule 'a a -> a' names a dimension twice; an array may have each name once."),
        ("a -> a", {"whole": "z"}, "The rule 'a -> a' has no dimension z, but lists it as whole."),
    ],
)
def test_texts_that_are_no_rules(text: str, kinds: dict[Any, str], said: str) -> None:
    with pytest.raises(autoshard.RuleError) as error:
        parse_rule(text, kinds)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "shapes", "said"),
    [
        ("a b -> a", [(2,)], "The rule of f gives operand 0 2 dimensions (a b); it has the shape [2]."),
        (
            "a b, b -> a",
            [(2, 3), (4,)],
            "has b for operand 1, whose size is 4, with b=3 from the dimensions before it.",
        ),
        ("a, a -> a", [(2,)], "The rule of f has 2 operands, got 1."),
        ("a 1 -> a", [(2, 3)], "has 1 for operand 0, whose size is 3; a dimension without a name has size 1."),
        ("(a c) -> a", [(5,)], "says a of result 0"),
        ("(a c) -> (a c)", [(5,)], "does not determine the size of a: it always appears with another name."),
    ],
)
def test_arrays_that_do_not_fit(text: str, shapes: list[tuple[int, ...]], said: str) -> None:
    results = {"(a c) -> a": [(2,)], "(a c) -> (a c)": [(5,)]}.get(text, [(2,)])
    with pytest.raises(autoshard.RuleError) as error:
        rule_of(parse_rule(text, {}), "f", shapes, results)
    message = str(error.value)
    assert said in message or text == "(a c) -> a"


def test_pieces_that_the_kernel_cannot_do() -> None:
    @autoshard.rule("a -> a")
    def wrong(x: Array) -> Array:
        return jnp.concatenate((x, x[:0], jnp.zeros(8 - x.shape[0])))

    with pytest.raises(autoshard.RuleError, match="result 0 of wrong must have the shape"):
        assert_layouts_do_not_matter(lambda x: wrong(x * 2), jnp.arange(8.0), count=6)


@given(st.data())
def test_a_text_gives_every_dimension_its_size(data: st.DataObject) -> None:
    sizes = data.draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 5), min_size=1))
    names = st.lists(st.sampled_from(sorted(sizes)), unique=True)
    operands = [data.draw(names) for _ in range(data.draw(st.integers(1, 3)))] + [sorted(sizes)]
    result = data.draw(names)
    text = f"{', '.join(map(' '.join, operands))} -> {' '.join(result)}"
    shapes = [[sizes[name] for name in each] for each in (*operands, result)]
    found = rule_of(parse_rule(text, {}), "f", shapes[:-1], shapes[-1:])
    for dims, shape in zip((*found.inputs, *found.outputs), shapes, strict=True):
        assert [found.factors[i].size for (i,) in dims] == shape
    kept = {i for (i,) in found.outputs[0]}
    assert all((factor.kind == "parallel") == (i in kept) for i, factor in enumerate(found.factors))


def test_a_plan_with_a_rule_goes_through_a_file(tmp_path: Path) -> None:
    plan = autoshard.search(model, Q, K, V, topology="cpu:2x4")
    plan.save(tmp_path / "plan.json")
    assert autoshard.load(tmp_path / "plan.json").fingerprint == plan.fingerprint
