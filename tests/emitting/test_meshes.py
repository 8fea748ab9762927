"""Plans on meshes as users make them: Explicit and Auto axes, other names, other orders, `jax.set_mesh`."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.errors import TopologyError
from autoshard.planning.carriage import Carriage, Carry, Constraint
from tests.support.effort import mostly_long
from tests.support.plans import assert_close, well_linked

KINDS = (AxisType.Auto, AxisType.Explicit)
AXES = {"x": "data", "y": "model"}


def step(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = autoshard.pin(jnp.tanh(x @ params["up"]), P("x", "y"))
    result = hidden @ params["down"]
    return result, result.max(axis=0)


def arguments() -> tuple[dict[str, jax.Array], jax.Array]:
    params = {"up": jnp.linspace(-1.0, 1.0, 512).reshape(16, 32), "down": jnp.linspace(1.0, 0.0, 512).reshape(32, 16)}
    return params, jnp.linspace(0.0, 1.0, 128).reshape(8, 16)


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    return autoshard.search(step, *arguments(), topology=well_linked("cpu:2x4"))


def mesh_of(kind: AxisType, **axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def renamed(spec: P, names: dict[str, str]) -> P:
    def image(entry: Any) -> Any:
        return tuple(names[a] for a in entry) if isinstance(entry, tuple) else names.get(entry)

    return P(*map(image, spec))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_first_mesh_of_jax_s_own_tutorial_is_taken(kind: AxisType) -> None:
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))
    plan = autoshard.search(jnp.matmul, x, w, topology="cpu:8")
    assert_close(plan.jit(jnp.matmul, jax.make_mesh((8,), ("x",), axis_types=(kind,)))(x, w), x @ w)


@pytest.mark.parametrize("inside", (False, True), ids=("passed", "set_mesh"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "axes",
    mostly_long(
        ({"x": 2, "y": 4}, {"data": 2, "model": 4}, {"model": 4, "data": 2}, {"data": 2, "one": 1, "model": 4}),
        {"x": 2, "y": 4},
        {"model": 4, "data": 2},
    ),
    ids=lambda axes: ",".join(axes),
)
def test_a_plan_runs_on_every_mesh_of_its_sizes(plan, kind: AxisType, axes: dict[str, int], inside: bool) -> None:
    args, wanted = arguments(), step(*arguments())
    mesh = mesh_of(kind, **axes)
    names = {"x": "x", "y": "y"} if "x" in axes else AXES
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        given = () if inside else (mesh,)
        runs = [plan.jit(step, *given)] + ([plan.apply(step), jax.jit(plan.apply(step))] if inside else [])
        for run in runs:
            got = run(*args)
            assert_close(got, wanted)
            shown = [NamedSharding(mesh, renamed(spec, names)) for spec in plan.out_specs]
            assert all(a.sharding.is_equivalent_to(b, a.ndim) for a, b in zip(got, shown, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_arrays_elsewhere_are_moved_with_one_warning(plan, kind: AxisType) -> None:
    wanted, mesh = step(*arguments()), mesh_of(kind, data=2, model=4)
    with jax.set_mesh(mesh):
        args = arguments()  # on the mesh, and replicated
        run = plan.jit(step)
        with pytest.warns(UserWarning, match=r"^params\['\w+'\] .*another sharding than the plan.*plan.place"):
            assert_close(run(*args), wanted)
        assert_close(run(*args), wanted)
        assert_close(run(*plan.place(args)), wanted)


def test_axes_choose_where_sizes_do_not() -> None:
    args = arguments()
    plan = autoshard.search(step, *args, topology=well_linked("cpu:2x2"))
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("data", "model"))
    for names in permutations(("data", "model")):
        axes: dict[str, str] = dict(zip(("x", "y"), names, strict=True))
        got = plan.jit(step, mesh, axes=axes)(*args)
        assert_close(got, step(*args))
        assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, renamed(plan.out_specs[0], axes)), 2)
        ins, _ = plan.shardings(mesh, axes)
        assert ins[0]["up"].spec == renamed(plan.in_specs[0]["up"], axes)
        placed = plan.place(args, mesh=mesh, axes=axes)
        assert placed[0]["up"].sharding == ins[0]["up"]
        assert plan.abstract_args(mesh, axes=axes)[0]["up"].sharding == ins[0]["up"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_transformations_and_lowering_on_the_user_s_mesh(plan, kind: AxisType) -> None:
    args, mesh = arguments(), mesh_of(kind, data=2, model=4)

    def loss(fn: Any) -> Any:
        return lambda params, x: jnp.sum(fn(params, x)[0] ** 2)

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss(plan.apply(step))))(*args)
    assert_close(got, jax.grad(loss(step))(*args))
    compiled = plan.jit(step, mesh).lower(*args).compile()
    assert_close(compiled(*plan.place(args, mesh=mesh)), step(*args))


MISFITS = [
    (
        {"data": 8},
        None,
        "The mesh has the axes data=8; the plan for cpu:2x4 needs x=2, y=4. Use plan.make_mesh(), plan for a topology of the"
        ' mesh\'s shape, or name the axes: axes={"x": "data"}.',
    ),
    ({"data": 2, "model": 4}, {"z": "data"}, "axes must name axes of the plan (x, y), got z."),
    (
        {"data": 2, "model": 4},
        {"x": "data", "y": "data"},
        "axes must give each axis of the plan a mesh axis of its own",
    ),
    ({"data": 2, "model": 4}, {"x": "model", "y": "data"}, "needs x=2, y=4, by the names {'x': 'model', 'y': 'data'}."),
    ({"data": 2, "model": 4}, {"x": "data"}, "needs x=2, y=4, by the names {'x': 'data'}."),
]


@pytest.mark.parametrize(("shape", "axes", "message"), MISFITS)
def test_what_does_not_fit_is_one_sentence(plan, shape: dict[str, int], axes: Any, message: str) -> None:
    mesh = mesh_of(AxisType.Auto, **shape)
    for use in (lambda: plan.jit(step, mesh, axes=axes), lambda: plan.shardings(mesh, axes)):
        with pytest.raises(TopologyError) as error:
            use()
        assert message in str(error.value)


def test_inside_a_shard_map_it_says_so(plan) -> None:
    mesh = mesh_of(AxisType.Auto, x=2, y=4)
    inside = jax.shard_map(lambda a: plan.apply(step)(arguments()[0], a)[0], mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(TopologyError, match="must be Auto or Explicit, got the mesh of a shard_map"):
        inside(arguments()[1])


@pytest.mark.parametrize("way", ("specs", "constraints"))
def test_a_carried_plan_runs_on_a_mesh_of_other_names(plan, way: Carry) -> None:
    args = arguments()
    of_input = Constraint((0,), (plan.arguments[0].layout,), "model.py:1")
    carried = replace(plan, carriage=Carriage("host", "", (), (of_input,)))
    mesh = mesh_of(AxisType.Auto, data=2, model=4)
    assert_close(carried.jit(step, mesh, carry=way, axes=AXES)(*args), step(*args))
    assert any(plan.arguments[0].layout.dims)
