"""Dimensions by name: from the user's words to every factor of a program, and to other numbers."""

from __future__ import annotations

import unicodedata

import jax
import jax.numpy as jnp
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

import autoshard
from autoshard._util.paths import dotted
from autoshard.annotating.dimension_names import name_dimensions
from autoshard.errors import AutoshardError
from costmodels.machine.lazy_sympy import sympy
from costmodels.symbols import dimension, evaluate, largest_terms, parse_expression, specialize, text
from tests.support.tracing import trace


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def dims_of(fn, *args, dims=None):
    traced = trace(fn, *args)
    return traced.program, name_dimensions(traced.program, traced.argument_values, traced.paths, dims)


def factors_of(fn, *args, dims=None) -> dict[str, tuple[str, ...]]:
    """The last operation of each primitive by its factors' names."""
    program, dimensions = dims_of(fn, *args, dims=dims)
    return {op.primitive: names for op, names in zip(program.operations, dimensions.factors, strict=True)}


# --- names through operations


def test_a_factor_has_the_name_of_every_dimension_it_is() -> None:
    found = factors_of(lambda x, w: x @ w, shape(4, 8), shape(8, 16), dims={"x": "B E", "w": "_ F"})
    assert found["dot_general"] == ("B", "F", "E")


@pytest.mark.parametrize(
    ("fn", "args", "dims", "primitive", "names"),
    [
        (lambda x: x.reshape(4, 30), [(4, 5, 6)], {"x": "B H D"}, "reshape", ("B", "H", "D")),
        (lambda x: x.reshape(4, 5, 6), [(4, 30)], {"x": "B E"}, "reshape", ("B", "5", "E/5")),
        (
            lambda x, w: x.reshape(4, 5, 6) * w,
            [(4, 30), (5, 6)],
            {"x": "B H*D", "w": "H D"},
            "reshape",
            ("B", "H", "D"),
        ),
        (
            lambda x, y: jnp.concatenate([x, y], 1),
            [(4, 5), (4, 6)],
            {"x": "B S", "y": "_ T"},
            "concatenate",
            ("B", "S + T", "S", "T"),
        ),
        (
            lambda x: jnp.split(x, 2, 1)[0] + jnp.split(x, 2, 1)[1],
            [(4, 8)],
            {"x": "B F"},
            "split",
            ("B", "F/2", "2"),
        ),
        (lambda x: jnp.pad(x, ((0, 0), (1, 2))), [(4, 8)], {"x": "B S"}, "pad", ("B", "S", "S + 3")),
        (lambda x: x + jnp.arange(x.shape[1], dtype=x.dtype), [(4, 8)], {"x": "B S"}, "iota", ("S",)),
        (lambda x: jnp.ones((7, 8)) @ x, [(8, 4)], {"x": "E F"}, "dot_general", ("7", "F", "E")),
    ],
)
def test_names_follow_shapes(fn, args, dims, primitive, names) -> None:
    assert factors_of(fn, *(shape(*each) for each in args), dims=dims)[primitive] == names


def test_a_loop_runs_as_often_as_its_slices_are_many() -> None:
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    _, found = dims_of(layers, shape(4, 8), shape(3, 8, 8), dims={"w": "L E _"})
    assert found.counts == ("1", "L")


def test_dimensions_without_a_name_are_called_after_their_argument() -> None:
    _, found = dims_of(lambda p, x: x @ p["w"] @ p["v"], {"w": shape(8, 16), "v": shape(16, 2)}, shape(4, 8))
    assert found.sizes == {"v_0": 16, "v_1": 2, "w_0": 8, "x_0": 4}


def test_two_names_of_one_dimension_are_a_relation() -> None:
    _, found = dims_of(lambda x, y: x + y, shape(4), shape(4), dims={"x": "A", "y": "B"})
    assert found.relations == (("A", "B"),)


def test_shapes_at_the_numbers_are_the_programs_own() -> None:
    def attend(q, k):
        return jax.nn.softmax(jnp.einsum("bhd,bsd->bhs", q.reshape(4, 2, 3), k))

    program, found = dims_of(attend, shape(4, 6), shape(4, 5, 3))
    for value, names in zip(program.values, found.shapes, strict=True):
        assert tuple(evaluate(parse_expression(n), found.sizes) for n in names) == value.shape


# --- the user's words


def test_paths_are_matched_by_their_ends() -> None:
    p = {"layers": [{"w": shape(8, 8)}, {"w": shape(8, 8)}]}

    def fn(p, x):
        return x @ p["layers"][0]["w"] @ p["layers"][1]["w"]

    assert dotted("p['layers'][1]['w']") == "p.layers.1.w"
    for key in ("p['layers'][1]['w']", "p.layers.1.w", "layers.1.w", "1.w"):
        assert dims_of(fn, p, shape(4, 8), dims={key: "_ OUT"})[1].sizes["OUT"] == 8
    assert list(dims_of(fn, p, shape(4, 8), dims={"layers.*.w": "E E", "x": "B _"})[1].sizes) == ["E", "B"]


def test_a_size_names_every_dimension_that_has_it() -> None:
    _, found = dims_of(lambda x, w: x @ w, shape(4, 8), shape(8, 16), dims={"B": 4, "E": 8, "F": 16})
    assert found.sizes == {"B": 4, "E": 8, "F": 16}


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"x": "B"}, "x has shape [4,8], but 'B' names 1 dimensions; give one word each, _ for no name."),
        ({"weight": "B E"}, "No argument has the path 'weight'. The paths are x, w."),
        ({"xs": "B E"}, "No argument has the path 'xs'. Did you mean x? The paths are x, w."),
        ({"B": 5}, "No argument has a dimension of size 5, given for the name 'B'."),
        ({"B": 4, "A": 4}, "Two names have the same size; name those dimensions by their arguments' paths."),
        ({"x": "B B"}, "dimension 1 of x is 8, but B is 4 (B = 4); one name stands for one number"),
        ({"x": "X E"}, "X, Y, Z, W are reserved for the sizes of mesh axes; rename X"),
        ({"x": "B A*C"}, "dimension 1 of x is 8, but A·C has several unknown names"),
        ({"x": "B __import__('os')"}, "Invalid size"),
    ],
)
def test_names_that_do_not_fit_are_said(dims, message) -> None:
    with pytest.raises(AutoshardError) as error:
        dims_of(lambda x, w: x @ w, shape(4, 8), shape(8, 16), dims=dims)
    assert message in str(error.value)


# --- formulas as text


_NAMES = st.sampled_from(["B", "E", "F", "H"])
_SIZES = st.recursive(
    _NAMES.map(dimension) | st.integers(1, 9).map(sympy.Integer),
    lambda inner: st.builds(lambda a, b, op: op(a, b), inner, inner, st.sampled_from([sympy.Mul, sympy.Add])),
    max_leaves=5,
)


@given(size=_SIZES)
def test_a_size_survives_being_written(size) -> None:
    assert parse_expression(str(size)) == size
    assert parse_expression(text(size).replace("·", "*")) == size


@pytest.mark.long
@given(written=st.text(max_size=30))
@example(written="__import__('os').getcwd()")
@example(written="B.__class__")
@example(written="(lambda: 3)()")
@example(written="print(B)")
@example(written="ﬀ")
def test_no_text_is_run(written) -> None:
    """What is read has no calls: sums, products, powers and the like of numbers and of names that stand in the text.

    Python spells ligatures and the like out: of "ﬀ" it makes the name "ff".
    """
    try:
        size = parse_expression(written)
    except ValueError:
        event("refused")
        return
    event("read")
    assert all(symbol.name in unicodedata.normalize("NFKC", written) for symbol in size.free_symbols)
    assert not size.atoms(sympy.core.function.AppliedUndef)


@given(size=_SIZES, numbers=st.fixed_dictionaries({name: st.integers(2, 9) for name in "BEFH"}))
def test_terms_make_up_their_sum(size, numbers) -> None:
    shown, rest = largest_terms(size * size, numbers, 0.1)
    total = evaluate(size * size, numbers)
    assert sum(evaluate(term, numbers) for term in (*shown, *rest)) == pytest.approx(total)
    assert sum(evaluate(term, numbers) for term in rest) <= 0.1 * total * (1 + 1e-9)


def test_a_maximum_is_its_larger_side_here() -> None:
    b, e = dimension("B"), dimension("E")
    assert specialize(sympy.Max(2 * b, e, evaluate=False) + sympy.floor(b / 2), {"B": 4, "E": 3}) == 2 * b + b / 2
    assert specialize(sympy.Max(2 * b, e, evaluate=False) + sympy.floor(b / 2), {"B": 5, "E": 30}) == e + sympy.floor(
        b / 2
    )


def test_a_plan_needs_numbers() -> None:
    (b,) = jax.export.symbolic_shape("b")
    with pytest.raises(AutoshardError, match=r"must not have symbolic dimensions, got b: .*bind\(b=...\)"):
        autoshard.search(lambda x: x * 2, jax.ShapeDtypeStruct((b, 4), jnp.float32), topology="cpu:2")
