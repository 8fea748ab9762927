"""Exports: what is read back from them lays every array out as the plan does, and compiles to the same program."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.errors import ExportError
from autoshard.export import FORMATS
from autoshard.export.arrays import Leaf
from autoshard.export.rules import rules_for, spec_at
from search.formulation.layouts import Layout
from tests.support.cli import refused, run
from tests.support.exported import NAMES, assert_same_program, by_rules, is_spec, loaded, placed, program
from tests.support.plans import assert_close, palm_decode, planned_block, well_linked


def joined(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their `/`-joined paths, as those who use rules make them."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


# --- specs


def test_specs_compile_to_the_planned_program(tmp_path) -> None:
    plan, fn, args = planned_block()
    path = tmp_path / "layouts.py"
    text = plan.export("specs", path)
    assert path.read_text() == text and max(map(len, text.splitlines())) <= 120
    found = loaded(text)
    assert found["IN_SPECS"] == plan.in_specs and found["OUT_SPECS"] == plan.out_specs
    assert found["MESH_SHAPE"] == {"x": 2, "y": 4}
    assert_same_program(plan, fn, args, found["IN_SPECS"], found["OUT_SPECS"])


@pytest.mark.long
def test_specs_of_another_program_compile_to_another() -> None:
    plan, fn, args = planned_block()
    params, tokens = plan.in_specs
    whole = jax.tree.map(lambda _: P(), params, is_leaf=is_spec)
    mesh = plan.make_mesh()
    exported = jax.jit(plan.apply(fn), in_shardings=placed(mesh, (whole, tokens)))
    assert program(exported, args) != program(plan.jit(fn, mesh), args)


def test_specs_of_one_argument_and_with_other_axes() -> None:
    plan, _, _ = planned_block()
    for argument in ("params", 0, -2):
        assert loaded(plan.export("specs", argument=argument))["SPECS"] == plan.in_specs[0]
    found = loaded(plan.export("specs", argument="tokens", axes={"x": "data"}))
    assert found["MESH_SHAPE"] == {"data": 2, "y": 4} and found["SPECS"] == P("y", "data")


Point = namedtuple("Point", "up down")


def test_specs_nest_as_the_arguments_do() -> None:
    x = jnp.ones((8, 8))
    tree = {"a": [x, None, (x,)], 7: Point(x, {"quo'te": x}), "o": OrderedDict(z=x, a=())}

    def fn(tree: Any, *others: jax.Array) -> Any:
        return jax.tree.map(jnp.tanh, tree), others

    tree = {"ints": {7: tree[7]}, "a": tree["a"], "o": tree["o"]}
    plan = autoshard.search(fn, tree, x, x, topology="cpu:2x4")
    found = loaded(plan.export("specs"))
    for ours, planned in ((found["IN_SPECS"], plan.in_specs), (found["OUT_SPECS"], plan.out_specs)):
        assert jax.tree.structure(ours, is_leaf=is_spec) == jax.tree.structure(planned, is_leaf=is_spec)
        assert jax.tree.leaves(ours, is_leaf=is_spec) == jax.tree.leaves(planned, is_leaf=is_spec)
    assert loaded(plan.export("specs", argument="others/1"))["SPECS"] == plan.in_specs[2]


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """A class that only itself knows how to make."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("inside"), self.inside)], None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Box:
        return cls(*children)


def test_classes_are_written_as_dicts_and_put_back_by_like() -> None:
    boxes = [Box(jnp.ones((8, 8))), {"more": Box((jnp.ones((8, 8)), {3: jnp.ones(8)}))}]
    plan = autoshard.search(
        lambda box, boxes, x: box.inside @ x + boxes[0].inside @ x + boxes[1]["more"].inside[0] @ x,
        Box(jnp.ones((8, 8))),
        boxes,
        jnp.ones((8, 8)),
        topology="cpu:8",
    )
    for at, tree in enumerate((Box(0), boxes)):
        found = loaded(plan.export("specs", argument=at))
        like, wanted = found["like"](tree, found["SPECS"]), plan.in_specs[at]
        assert jax.tree.structure(like) == jax.tree.structure(wanted) and jax.tree.leaves(like) == jax.tree.leaves(
            wanted
        )
    alone = loaded(plan.export("specs", argument="x"))
    assert alone["SPECS"] == plan.in_specs[2] and "like" not in alone
    whole = loaded(plan.export("specs"))
    assert whole["like"]((Box(0), boxes, 0), whole["IN_SPECS"])[0].inside == plan.in_specs[0].inside
    rules = loaded(plan.export("rules"))["PARTITION_RULES"]
    assert spec_at(rules, "box/inside") == plan.in_specs[0].inside


# --- rules


@pytest.mark.parametrize("unrolled", (False, True), ids=("stacked", "unrolled"))
def test_rules_compile_to_the_planned_program(unrolled: bool) -> None:
    plan, fn, args = deep() if unrolled else planned_block()
    rules = loaded(plan.export("rules"))["PARTITION_RULES"]
    params, *others = args
    named = {"params": params, **{array.path: other for array, other in zip(plan.arguments[-1:], others, strict=True)}}
    specs = by_rules(rules, named)
    assert_same_program(plan, fn, args, tuple(specs.values()))
    inside = loaded(plan.export("rules", argument="params"))["PARTITION_RULES"]
    assert by_rules(inside, params) == plan.in_specs[0]


def deep() -> tuple[autoshard.Plan, Callable[..., Any], tuple[Any, ...]]:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["up"]) @ layer["down"] + x
        return x

    layer = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}
    args = {"layers": [layer] * 12}, jnp.ones((8, 8))
    return autoshard.search(fn, *args, topology=well_linked("cpu:2x4")), fn, args


def test_layers_that_lie_alike_share_a_rule() -> None:
    plan, _, _ = deep()
    rules = loaded(plan.export("rules", argument="params"))["PARTITION_RULES"]
    assert [pattern for pattern, _ in rules] == [r"(^|/)layers/\d+/down$", r"(^|/)layers/\d+/up$", ".*"]
    other = replace(plan.arguments[2], layout=plan.arguments[1].layout)
    rows = (*plan.arguments[:2], other, *plan.arguments[3:])
    rules = loaded(replace(plan, arguments=rows).export("rules", argument="params"))["PARTITION_RULES"]
    assert [pattern for pattern, _ in rules] == [
        r"(^|/)layers/(?:0|10|11|2|3|4|5|6|7|8|9)/down$",
        r"(^|/)layers/1/down$",
        r"(^|/)layers/\d+/up$",
        ".*",
    ]


def test_rules_find_the_parameters_in_an_optimizers_state() -> None:
    plan, _, (params, _) = planned_block()
    rules = loaded(plan.export("rules"))["PARTITION_RULES"]
    state = ({"count": jnp.zeros(()), "mu": params, "nu": params}, None)
    found = by_rules(rules, {"opt_state": state})["opt_state"][0]
    assert found["mu"] == found["nu"] == plan.in_specs[0] and found["count"] == P()


def test_arguments_that_lie_differently_have_rules_of_their_own() -> None:
    plan = autoshard.search(
        lambda a, b: (a["w"] @ b["w"], a["w"].T), {"w": jnp.ones((8, 8))}, {"w": jnp.ones((8, 8))}, topology="cpu:8"
    )
    layouts = Layout((("x",), ())), Layout(((), ()))
    rows = tuple(replace(row, layout=layout) for row, layout in zip(plan.arguments, layouts, strict=True))
    plan = replace(plan, arguments=rows)
    rules = loaded(plan.export("rules"))["PARTITION_RULES"]
    assert rules == (("(^|/)a/w$", P("x")), (".*", P()))


def test_two_arrays_of_one_path_are_refused() -> None:
    arrays = [Leaf("params", keys, (8,), spec) for keys, spec in ((("a/b",), ("x",)), (("a", "b"), ()))]
    with pytest.raises(
        ExportError, match=r"Two arrays have the path params/a/b \(a key contains a /\) and different layouts"
    ):
        rules_for(arrays)


PARTS = st.sampled_from(("w", "b", "0", "1", "12", "layer_0", "layer_1", "a.b", "w1", "(", "layers"))
SPECS = st.sampled_from(((), ("x",), (None, "x"), (("x", "y"),), ("y", "x")))


@st.composite
def leaves(draw) -> list[Leaf]:
    """Arrays of some arguments, with paths that share parts and numbers."""
    paths = draw(st.lists(st.lists(PARTS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=12, unique=True))
    inner = [path for path in paths if not any(other[: len(path)] == path != other for other in paths)]
    heads = st.sampled_from(("params", "cache"))
    return [Leaf(draw(heads), path, (8, 8), draw(SPECS)) for path in inner]


@given(leaves(), st.booleans())
def test_every_array_gets_its_layout_and_no_rule_is_needless(arrays: list[Leaf], inside: bool) -> None:
    rules = rules_for(arrays, inside)
    paths = {("/".join(leaf.keys) if inside else leaf.path): leaf.spec for leaf in arrays}
    assert rules[-1] == (".*", ())
    assert {path: spec_at(rules, path) for path in paths} == paths
    embedded = {f"opt_state/0/mu/{path}": spec for path, spec in paths.items()}
    if not any(pattern.startswith("^") for pattern, _ in rules):
        assert {path: spec_at(rules, path) for path in embedded} == embedded
    everything = paths | embedded | {f"opt_state/0/mu/{'/'.join(leaf.keys)}": leaf.spec for leaf in arrays}
    for k in range(len(rules) - 1):
        fewer = (*rules[:k], *rules[k + 1 :])
        assert any(spec_at(fewer, path) != spec_at(rules, path) for path in everything)


# --- logical axes


def test_logical_axes_have_the_plans_mesh_axes() -> None:
    plan, _, _ = planned_block()
    found = loaded(plan.export("flax", argument="params", names=NAMES, axes={"x": "data"}))
    rules = dict(found["LOGICAL_AXIS_RULES"])
    norm = tuple({"x": "data"}.get(axis, axis) for axis in norm_axes(plan))
    assert rules["vocab"] == rules["mlp"] == "data" and rules["norm"] == norm and rules["embed"] is None
    assert found["LOGICAL_AXES"]["layers"]["down"] == P("layers", "mlp", "embed")
    assert len(rules) == len(found["LOGICAL_AXIS_RULES"])
    named = found["LOGICAL_AXES"]
    assert plan.export("flax", argument="params", names=named) == plan.export("flax", argument="params", names=NAMES)


def norm_axes(plan: autoshard.Plan) -> tuple[str, ...]:
    """The axes that split the scale of the norms; in which order is nothing to anybody."""
    return plan.in_specs[0]["layers"]["norm"][1]


def test_a_name_with_two_layouts_is_refused_with_the_arrays() -> None:
    plan, _, _ = planned_block()
    with pytest.raises(ExportError) as error:
        plan.export("flax", argument="params", names=NAMES | {"layers/norm": ("layers", "embed")})
    assert str(error.value) == (
        "Logical axes with these names cannot express the plan. Give these dimensions different names, or export rules or"
        " specs:\n"
        "  embed is whole in dimension 1 of params/embedding, and split over"
        f" {' '.join(norm_axes(plan))} in dimension 1 of params/layers/norm"
    )


@pytest.mark.parametrize(
    "names, said",
    (
        (NAMES | {"embedding": ("vocab",)}, "params/embedding has 2 dimensions, and the names ('vocab',)"),
        ({"wq": NAMES["layers/wq"]}, "params/embedding has 2 dimensions and no names"),
        (NAMES | {"layers/norm": (None, None)}, "dimension 1 of params/layers/norm has no name, and is split over "),
        (NAMES | {"(": ("a",)}, "Invalid regular expression '(' in names."),
        ({"embedding": P("vocab", None), "layers": {}}, "layers/down has no names"),
    ),
)
def test_names_that_do_not_fit_are_refused(names: Any, said: str) -> None:
    with pytest.raises(ExportError) as error:
        planned_block()[0].export("flax", argument="params", names=names)
    assert said in str(error.value)


def test_without_names_a_dimension_is_called_by_its_size() -> None:
    x = jnp.ones((8, 16))
    plan = autoshard.search(lambda x, y: x @ y, x, jnp.ones((16, 16)), topology="cpu:8")
    whole = tuple(replace(row, layout=Layout(((), ()))) for row in plan.arguments)
    found = loaded(replace(plan, arguments=whole).export("flax"))
    assert found["LOGICAL_AXES"] == (P("dim_8", "dim_16"), P("dim_16_0", "dim_16_1"))


# --- the tree to restore into


@pytest.mark.long
def test_abstract_arguments_know_where_they_lie() -> None:
    plan, fn, args = planned_block()
    mesh = plan.make_mesh()
    found = plan.abstract_args(mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == plan.shardings(mesh)[0]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda a: (a.shape, a.dtype), args
    )
    assert plan.abstract_args(argument="params") == found[0]
    assert program(jax.jit(plan.apply(fn), out_shardings=plan.shardings(mesh)[1]), found) == program(plan.jit(fn), args)


# --- refusals and the command


def test_what_is_asked_for_must_be_there() -> None:
    plan, _, _ = planned_block()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"format": "toml"}, f"The format must be one of {', '.join(FORMATS)}, got 'toml'."),
        ({"format": "rules", "argument": "state"}, "The plan 'run' has no argument 'state'; it has params, tokens."),
        ({"format": "rules", "argument": 2}, "The plan 'run' has no argument 2; it has params, tokens."),
        ({"format": "rules", "axes": {"z": "data"}}, "The plan has no mesh axis z; it has x, y."),
        ({"format": "rules", "axes": {"x": "y"}}, "The names of the mesh axes x, y must be unique, got y."),
        ({"format": "specs", "names": NAMES}, "names apply to the formats flax and maxtext only, got format specs."),
        ({"format": "maxtext"}, "MaxText's models have their own names of dimensions"),
    )
    for options, said in cases:
        with pytest.raises(ExportError) as error:
            plan.export(**options)
        assert str(error.value).startswith(said)


def test_the_command_writes_what_the_method_does(tmp_path) -> None:
    plan, _, _ = planned_block()
    path, names, out = tmp_path / "plan.json", tmp_path / "names.json", tmp_path / "rules.py"
    plan.save(path)
    names.write_text(json.dumps(NAMES))
    found = run("export", path, "--format", "rules", "--argument", "params", "--axis", "x=data", "-o", out)
    assert (
        found.exit_code == 0
        and found.stdout == ""
        and out.read_text() == plan.export("rules", argument="params", axes={"x": "data"})
    )
    found = run("export", path, "--format", "maxtext", "--argument", "params", "--names", names)
    assert found.stdout == plan.export("maxtext", argument="params", names=NAMES)
    assert refused("export", path, "-f", "rules", "-o", out) == f"{out} exists; --force overwrites it."
    assert refused("export", path, "-f", "rules", "--axis", "x") == "--axis must be AXIS=NAME, such as x=data, got x."
    assert "no argument 'cache'" in refused("export", path, "-f", "rules", "--argument", "cache")
    names.write_text("[]")
    assert refused("export", path, "-f", "flax", "--names", names).startswith(f"{names} must map regular expressions")


@pytest.mark.long
def test_a_plan_from_a_file_exports_the_same(tmp_path) -> None:
    workload, args = palm_decode()
    plan = autoshard.search(workload.fn, *workload.args, topology="cpu:2x4", donate_argnums=workload.donate_argnums)
    plan.save(tmp_path / "plan.json")
    again = autoshard.load(tmp_path / "plan.json")
    for format in ("specs", "rules"):
        assert again.export(format) == plan.export(format)
    ins = loaded(again.export("specs"))["IN_SPECS"]
    mesh = plan.make_mesh()
    run_ = jax.jit(again.apply(workload.fn), in_shardings=placed(mesh, ins))
    assert_close(run_(*args), jax.jit(workload.fn)(*args), rtol=0.02)
