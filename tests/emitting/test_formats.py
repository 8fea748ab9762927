"""Formats: arrays in any order of dimensions give the unsharded result, and the compiled program takes them as planned."""

from __future__ import annotations

import ast
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoshard
from autoshard import AutoshardError, ExportError, PlanMismatchError
from autoshard.emitting.formats import has_orders, with_orders, without_orders
from autoshard.emitting.targets import mesh_of, tpu_devices
from autoshard.plan import loads
from autoshard.planning.files.plan_file import dumps
from autoshard.planning.records import predecessors
from tests.support.effort import examples
from tests.support.plans import assert_close, well_linked

STEP = jnp.float32(0.25)


def fn(params: dict[str, Any], state: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A step that reads weights of two and three dimensions, and overwrites its state."""
    for layer in params["layers"]:
        x = jnp.tanh(jnp.einsum("be,ehd->bhd", x, layer["wide"]).reshape(x.shape[0], -1) @ layer["out"])
    return x, {"sum": state["sum"] * STEP + x, "pairs": state["pairs"] + jnp.einsum("be,bf->ef", x, x)}


def arguments() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32)

    layers = [{"wide": array(16, 8, 4), "out": array(32, 16)} for _ in range(2)]
    return {"layers": layers}, {"sum": array(8, 16), "pairs": array(16, 16)}, array(8, 16)


@functools.cache
def planned(donated: int | tuple[int, ...] = 1) -> autoshard.Plan:
    return autoshard.search(fn, *arguments(), topology=well_linked("cpu:2x4"), donate_argnums=donated, name="step")


def orders_of(plan: autoshard.Plan) -> st.SearchStrategy[autoshard.Plan]:
    """The plan with any orders; a donated argument and the result over it have one."""
    ins, outs = plan.arguments, plan.results
    drawn = st.tuples(*(st.permutations(range(len(each.shape))) for each in (*ins, *outs)))

    def put(orders: tuple[list[int], ...]) -> autoshard.Plan:
        arguments, results = list(orders[: len(ins)]), list(orders[len(ins) :])
        for result, at in predecessors(ins, outs, plan.require_program().donated).items():
            results[result] = arguments[at]
        return with_orders(plan, [tuple(o) for o in arguments], [tuple(o) for o in results])

    return drawn.map(put)


def turned(plan: autoshard.Plan | None = None) -> autoshard.Plan:
    """The plan with every array's dimensions in reverse."""
    plan = plan or planned()
    ins, outs = ([tuple(range(len(a.shape)))[::-1] for a in arrays] for arrays in (plan.arguments, plan.results))
    return with_orders(plan, ins, outs)


def order_of(array: jax.Array) -> tuple[int, ...]:
    return array.format.layout.major_to_minor  # pyright: ignore


# --- execution


@given(orders_of(planned()), st.data())
@examples(6)
def test_placed_and_unplaced_arguments_give_the_unsharded_result(plan: autoshard.Plan, data: st.DataObject) -> None:
    mesh, args = plan.make_mesh(), arguments()
    wanted = jax.jit(fn)(*args)
    shardings, _ = plan.shardings(mesh)
    placed = [plan.place(arg, argument=k, mesh=mesh) for k, arg in enumerate(args)]
    plain = jax.device_put(args, shardings)
    mixed = [placed[k] if data.draw(st.booleans(), f"place {k}") else plain[k] for k in range(len(args))]
    orders = jax.tree.map(order_of, mixed[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = plan.jit(fn, mesh)(*mixed)
    assert_close(got, wanted)
    assert jax.tree.map(order_of, got[1]) == orders, "the state comes out as it went in"
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(mixed[1])), "the state was donated"


def test_placed_arguments_are_taken_as_they_are() -> None:
    plan, args = turned(), arguments()
    mesh = plan.make_mesh()
    placed = plan.place(args, mesh=mesh)
    step = plan.jit(fn, mesh)
    ins, _ = plan.formats(mesh)
    compiled = step.lower(*args).compile()
    assert jax.tree.map(lambda f: f.layout.major_to_minor, compiled.input_formats[0]) == jax.tree.map(
        lambda f: f.layout.major_to_minor, ins
    )
    x = placed[2]
    _, state = step(*placed)  # no warning, which would be an error
    step(placed[0], state, x)  # the state came out as it went in


def test_arrays_in_another_order_are_taken_as_they_are_with_one_warning() -> None:
    plan, args = turned(), arguments()
    mesh = plan.make_mesh()
    shardings, _ = plan.shardings(mesh)
    step = plan.jit(fn, mesh)
    with pytest.warns(UserWarning, match=r"params\['layers'\]\[0\]\['out'\] and 6 more .* plan.place\(...\)") as said:
        got = step(*jax.device_put(args, shardings))
    assert len(said) == 1 and said[0].filename == __file__
    assert_close(got, jax.jit(fn)(*args))
    placed = plan.place(arguments()[0], argument="params", mesh=mesh)
    _, x = (jax.device_put(arg, where) for arg, where in zip(arguments()[1:], shardings[1:], strict=True))
    assert [order_of(leaf) for leaf in jax.tree.leaves(got[1])] == [(0, 1)] * 2
    _, state = step(placed, got[1], x)  # and no second warning
    assert [order_of(leaf) for leaf in jax.tree.leaves(state)] == [(0, 1)] * 2


def test_formats_can_be_left_to_the_device() -> None:
    plan, args = turned(), arguments()
    mesh = plan.make_mesh()
    got = plan.jit(fn, mesh, formats="default")(*jax.device_put(args, plan.shardings(mesh)[0]))
    assert [order_of(leaf) for leaf in jax.tree.leaves(got)] == [(0, 1)] * 3
    with pytest.raises(AutoshardError, match="formats must be 'plan' or 'default', got 'row-major'"):
        plan.jit(fn, mesh, formats="row-major")  # pyright: ignore


@pytest.mark.parametrize(
    "transformed",
    (
        lambda f: jax.grad(lambda x, *rest: jnp.sum(f(*rest, x)[0])),
        lambda f: (
            lambda x, *rest: jax.vmap(lambda x, *rest: f(*rest, x)[0], (0, None, None))(jnp.stack([x, -x]), *rest)
        ),
        lambda f: jax.jit(lambda x, *rest: f(*rest, x)),
    ),
    ids=("grad", "vmap", "jit"),
)
def test_transformed_it_runs_without_formats(transformed) -> None:
    plan = turned(planned(()))
    params, state, x = arguments()
    got = transformed(plan.jit(fn, plan.make_mesh()))(x, params, state)
    assert_close(got, transformed(fn)(x, params, state))


def test_errors_of_the_function_are_its_own() -> None:
    plan = turned()
    params, state, x = plan.place(arguments())
    with pytest.raises(PlanMismatchError, match="x is missing"):
        plan.jit(fn)(params, state, None)
    assert not x.is_deleted()


# --- placing


@pytest.mark.parametrize("argument", ("params/layers/1", "params['layers'][1]", 0, "params", None))
def test_a_tree_is_placed_by_name_path_or_position(argument: str | int | None) -> None:
    plan, args = turned(), arguments()
    mesh = plan.make_mesh()
    inner = argument in ("params/layers/1", "params['layers'][1]")
    tree = args if argument is None else args[0]["layers"][1] if inner else args[0]
    ins, _ = plan.formats(mesh)
    wanted = ins if argument is None else ins[0]["layers"][1] if inner else ins[0]
    found = plan.place(jax.tree.map(np.asarray, tree), argument=argument, mesh=mesh)
    assert_close(found, tree)
    for array, each in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert order_of(array) == each.layout.major_to_minor and array.sharding == each.sharding


def test_an_array_is_placed_by_its_path() -> None:
    plan = turned()
    placed = plan.place(np.ones((32, 16), np.float32), argument="params/layers/0/out")
    assert order_of(placed) == (1, 0)


def test_the_memory_of_arrays_can_be_given_up() -> None:
    plan = turned()
    x = jax.device_put(jnp.ones((8, 16)), plan.shardings(plan.make_mesh())[0][2])
    plan.place(x, argument="x", donate=True)
    assert x.is_deleted()
    plan.place(jax.device_put(jnp.ones((8, 16)), jax.devices()[0]), argument="x", donate=True)  # of other devices


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (
            {"out": np.ones((16, 32), np.float32)},
            "params['layers'][1]['out'] is float32[16,32], planned float32[32,16]",
        ),
        ({"out": np.ones((32, 16))}, "params['layers'][1]['out'] is float64[32,16], planned float32[32,16]"),
        ({"out": "x"}, "params['layers'][1]['out'] is 'x' (str), which is not an array, planned float32[32,16]"),
        ({"out": None}, "params['layers'][1]['out'] is missing, planned float32[32,16]"),
        ({"bias": np.ones(3)}, "bias is given, planned without it"),
    ),
)
def test_other_arrays_are_refused_by_path(change: dict[str, Any], said: str) -> None:
    plan = planned()
    with pytest.raises(PlanMismatchError) as error:
        plan.place(arguments()[0]["layers"][1] | change, argument="params/layers/1")
    assert said in str(error.value)


def test_arguments_that_are_not_there_are_named() -> None:
    for argument in ("weights", "params/tables", 3):
        with pytest.raises(ExportError, match=r"has no argument .*; it has params, state, x\."):
            planned().place({}, argument=argument)


def test_abstract_arguments_have_the_formats() -> None:
    plan = turned()
    mesh = plan.make_mesh()
    found = plan.abstract_args(mesh)
    assert jax.tree.map(lambda leaf: leaf.format, found) == plan.formats(mesh)[0]


# --- whose orders they are


def test_orders_hold_for_the_chips_that_they_are_chosen_for() -> None:
    plan = turned(autoshard.search(fn, *arguments(), topology="v5e:2x4", donate_argnums=1))
    mesh = plan.make_mesh(jax.devices()[:8])
    assert not has_orders(plan, mesh)
    assert all(each.layout is None for each in jax.tree.leaves(plan.formats(mesh)))
    args = jax.device_put(arguments(), plan.shardings(mesh)[0])
    assert_close(plan.jit(fn, mesh)(*args), jax.jit(fn)(*arguments()))


def test_host_devices_choose_row_major() -> None:
    plan = autoshard.choose_formats(planned(), fn, *arguments())
    assert [array.order for array in (*plan.arguments, *plan.results)] == [
        tuple(range(len(array.shape))) for array in (*plan.arguments, *plan.results)
    ]
    assert without_orders(plan) == planned()


# --- files


@given(orders_of(planned()))
@examples(6)
def test_orders_round_trip(plan: autoshard.Plan) -> None:
    assert loads(dumps(plan)) == plan


def test_files_without_orders_are_as_before() -> None:
    assert '"order"' not in dumps(planned())


@pytest.mark.parametrize("order", ("[0]", "[0, 0]", "[1, 2]", "[0, 1, 2]"))
def test_orders_that_are_none_are_refused(order: str) -> None:
    text = dumps(turned()).replace('"order": [1, 0]', f'"order": {order}', 1)
    with pytest.raises(PlanMismatchError, match="has 2 dimensions, but the order"):
        loads(text)


def test_explain_shows_orders_that_are_not_by_default() -> None:
    assert "Orders in memory" not in planned().explain()
    section = turned().explain().partition("Orders in memory, major to minor: as given")[2]
    (wide,) = (line for line in section.splitlines() if "'wide'" in line)
    assert wide.split()[:2] == ["params['layers'][*]['wide']", "×"] and "2,1,0" in wide and "0,1,2" in wide


def test_exports_say_the_orders() -> None:
    assert "Orders of dimensions" not in planned().export("specs")
    for format in ("specs", "rules"):
        said = ast.get_docstring(ast.parse(turned().export(format))) or ""
        assert "params['layers'][*]['wide'] × 2: 2,1,0" in said


# --- on TPUs


@pytest.mark.long
@pytest.mark.tpu
def test_the_compiled_program_takes_arguments_as_planned() -> None:
    def step(params: Any, cache: jax.Array, x: jax.Array, at: jax.Array) -> Any:
        keys = jnp.einsum("be,ekd->bkd", x, params["wk"])
        cache = jax.lax.dynamic_update_slice_in_dim(cache, keys[:, None], at, 1)
        scores = jnp.einsum("bkd,bskd->bks", keys, cache)
        return jnp.einsum("bks,bskd,kde->be", scores, cache, params["wo"]), cache

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {"wk": shape((1024, 8, 64)), "wo": shape((8, 64, 1024))}
    args = params, shape((32, 512, 8, 64)), shape((32, 1024)), jax.ShapeDtypeStruct((), jnp.int32)
    plan = autoshard.search(step, *args, topology="v5e:2x2", donate_argnums=1)
    chosen = autoshard.choose_formats(plan, step, *args)
    mesh = mesh_of(tpu_devices("v5e:2x2", (2, 2), "v5e"), plan.topology.axis_sizes)
    compiled = chosen.jit(step, mesh).lower(*args).compile()
    ins, outs = jax.tree.leaves(compiled.input_formats[0]), jax.tree.leaves(compiled.output_formats)
    for found, row in zip((*ins, *outs), (*chosen.arguments, *chosen.results), strict=True):
        assert not row.order or found.layout.major_to_minor == row.order, row.path
    assert any(row.order not in ((), tuple(range(len(row.shape)))) for row in chosen.arguments)
    cache = 1
    assert chosen.results[cache].order == next(row.order for row in chosen.arguments if row.donated)
    held = 32 * 512 * 8 * 64 * 2 / 4
    assert compiled.memory_analysis().alias_size_in_bytes == held
