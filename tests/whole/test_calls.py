"""The decorator as users call functions: keywords, defaults, static arguments, methods, modules, errors, progress."""

from __future__ import annotations

import dataclasses
import functools
import io
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard
from autoshard._util import elapsed as elapsed_module
from autoshard._util.elapsed import elapsed
from autoshard.tracing.calls import Calls
from tests.support.plans import assert_close

X, W = jnp.linspace(0.0, 1.0, 128).reshape(8, 16), jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)


@pytest.fixture
def planned(tmp_path) -> Callable[..., Any]:
    """The decorator on two host devices, with a cache of its own."""
    return functools.partial(autoshard.autoshard, topology="cpu:2", cache_dir=tmp_path)


def layer(
    x: jax.Array, w: jax.Array, act: str = "relu", *rest: jax.Array, scale: Any = 1.0, flip: bool = False, **more: Any
):
    assert isinstance(act, str) and isinstance(flip, bool)
    y = getattr(jax.nn, act)(x @ w) * scale
    for each in (*rest, *more.values()):
        y = y + each
    return -y if flip else y


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "positional": ((X, W), {}),
    "keywords": ((), {"w": W, "x": X}),
    "a string": ((X, W, "gelu"), {}),
    "keyword-only": ((X, W), {"scale": jnp.float32(3.0)}),
    "static": ((X, W), {"flip": True}),
    "rest and more": ((X, W, "tanh", X, 2 * X), {"b": X, "a": 3 * X, "flip": True, "scale": 2.0}),
}


@pytest.mark.parametrize(("args", "keywords"), CALLS.values(), ids=CALLS)
def test_every_form_of_a_call(planned, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    sharded = planned(layer, static_argnames="flip")
    assert_close(sharded(*args, **keywords), layer(*args, **keywords))
    assert_close(
        sharded.lower(*args, **keywords).compile()(*arrays_of(sharded, args, keywords)), layer(*args, **keywords)
    )


def arrays_of(sharded: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return sharded.plan.place(sharded._planner.calls.of(args, keywords).args)


def test_each_static_value_has_its_own_plan(planned) -> None:
    sharded = planned(layer, static_argnums=2, static_argnames=("flip",))
    with pytest.raises(autoshard.AutoshardError, match="layer has no plan before its first call"):
        _ = sharded.plan
    for act, flip in (("relu", False), ("relu", True), ("tanh", True), ("relu", True)):
        assert_close(sharded(X, W, act, flip=flip), layer(X, W, act, flip=flip))
    assert len(sharded._planner.known) == 3
    assert [array.path for array in sharded.plan.arguments] == ["x", "w"]
    assert sharded.plan == sharded.plan_for(X, W, "relu", flip=True)


def test_true_and_one_are_different_static_values(planned) -> None:
    sharded = planned(lambda x, k: x * (2 if k is True else 3), static_argnums=1)
    assert_close((sharded(X, True), sharded(X, 1)), (2 * X, 3 * X))


def test_clear_cache_forgets_plans_and_their_files(planned, tmp_path) -> None:
    sharded = planned(layer)
    sharded(X, W)
    sharded.clear_cache()
    assert not sharded._planner.known and len(list(tmp_path.iterdir())) == 1
    sharded(X, W)
    sharded.clear_cache(disk=True)
    assert not list(tmp_path.iterdir())
    assert_close(sharded(X, W), layer(X, W))


def test_donations_by_name_and_by_position_are_one(planned) -> None:
    def step(x, *, state, flag="a"):
        return state + x

    by_name = planned(step, donate_argnames="state").plan_for(X, state=X)
    assert [array.donated for array in by_name.arguments] == [False, True]
    by_number = planned(lambda flag, x, state: state + x, donate_argnums=-1).plan_for("a", X, X)
    assert [array.donated for array in by_number.arguments] == [False, True]


def test_partial_functions_and_bound_methods(planned) -> None:
    assert_close(planned(functools.partial(layer, act="tanh"))(X, W), layer(X, W, "tanh"))
    assert_close(planned(functools.partial(layer, act="tanh"))(X, W, scale=2.0), layer(X, W, "tanh", scale=2.0))

    class Model:
        def __init__(self, w: jax.Array) -> None:
            self.w = w

        def forward(self, x: jax.Array) -> jax.Array:
            return x @ self.w

    assert_close(planned(Model(W).forward)(X), X @ W)


def test_methods_of_pytrees_and_of_static_objects(planned) -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Tree:
        w: jax.Array
        act: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True}, default=jax.nn.relu)

        @planned
        def forward(self, x: jax.Array) -> jax.Array:
            return self.act(x @ self.w)

    class Plain:
        @functools.partial(planned, static_argnames="self")
        def forward(self, x: jax.Array) -> jax.Array:
            return 2 * x

        @planned
        def refused(self, x: jax.Array) -> jax.Array:
            return x

    for w in (W, 2 * W):
        assert_close(Tree(w).forward(X), jax.nn.relu(X @ w))
    plan = Tree(W).forward.plan_for(X)  # pyright: ignore[reportAttributeAccessIssue]
    assert [array.path for array in plan.arguments] == ["self.w", "x"]
    assert_close(Plain().forward(X), 2 * X)
    with pytest.raises(
        autoshard.TraceError, match=r"^self must be an array, got .*; declare it static \(static_argnames='self'\)"
    ):
        Plain().refused(X)


def test_functions_inside_a_pytree_are_constants(planned) -> None:
    sharded = planned(lambda layers, x: functools.reduce(lambda x, layer: layer["act"](x @ layer["w"]), layers, x))
    layers = [{"w": W, "act": jax.nn.relu}, {"w": W, "act": jnp.tanh, "name": "last"}]
    assert_close(sharded(layers, X), jnp.tanh(jax.nn.relu(X @ W) @ W))
    assert_close(sharded([layers[0], layers[0]], X), jax.nn.relu(jax.nn.relu(X @ W) @ W))
    assert [array.path for array in sharded.plan.arguments] == ["layers[0]['w']", "layers[1]['w']", "x"]


# --- Flax NNX


def _nnx() -> Any:
    return pytest.importorskip("flax.nnx")


def modules(dropout: bool = True) -> tuple[Any, Any]:
    nnx, optax = _nnx(), pytest.importorskip("optax")

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first, self.norm = nnx.Linear(16, 32, use_bias=False, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)
            self.dropout = nnx.Dropout(0.5 if dropout else 0.0, rngs=rngs)
            self.tied = self.first  # a shared variable
            self.last = nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(self.dropout(self.norm(self.tied(x))))

    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)


def train(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    loss, grads = _nnx().value_and_grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.long
@pytest.mark.parametrize("donate", ((), (0, 1)), ids=("kept", "donated"))
def test_a_mutating_nnx_step_trains_as_nnx_jit_does(planned, donate: tuple[int, ...]) -> None:
    nnx = _nnx()
    wanted, got = modules(), modules()
    reference, sharded = nnx.jit(train), planned(train, donate_argnums=donate)
    losses = [(reference(*wanted, X), sharded(*got, X)) for _ in range(3)]
    for a, b in losses:
        assert_close(a, b)
    assert jnp.abs(got[0].last.kernel[...] - modules()[0].last.kernel[...]).max() > 1e-4  # it has learned something
    assert len(sharded._planner.known) == 1
    for a, b in zip(jax.tree.leaves(nnx.state(wanted)), jax.tree.leaves(nnx.state(got)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6)
            assert len(b.sharding.device_set) == 2  # where the next step needs it


def test_a_forward_pass_of_a_module_returns_no_weights(planned) -> None:
    model, _ = modules(dropout=False)
    model.eval()
    sharded = planned(lambda model, x: model(x))
    assert_close(sharded(model, X), model(X))
    assert [array.path for array in sharded.plan.results] == ["result[0]"]


def test_a_step_that_grows_its_module_is_refused(planned) -> None:
    nnx = _nnx()

    def grow(model: Any, x: jax.Array) -> jax.Array:
        model.seen = nnx.Variable(x)
        return x

    with pytest.raises(autoshard.AutoshardError, match=r"grow changes the structure of its NNX modules \(adds .*seen"):
        planned(grow)(modules()[0], X)


# --- errors


class Own(Exception):
    pass


def test_exceptions_of_the_function_pass_through_unchanged(planned) -> None:
    error = Own("mine")

    def bad(x: jax.Array) -> jax.Array:
        raise error

    def wrong(x: jax.Array) -> jax.Array:
        return x @ jnp.ones(3)

    with pytest.raises(Own) as raised:
        planned(bad)(X)
    assert raised.value is error and raised.value.__cause__ is None
    assert "bad" in [frame.name for frame in raised.traceback]
    with pytest.raises(TypeError, match="dot_general"):
        planned(wrong)(X)
    with pytest.raises(TypeError, match="missing a required argument: 'w'"):
        planned(layer)(X)


def test_options_and_names_that_do_not_exist(planned) -> None:
    with pytest.raises(TypeError, match=r"^autoshard has no option 'static_argname'. Options"):
        planned(layer, static_argname="flip")
    with pytest.raises(TypeError, match=r"no option 'baseline'. Did you mean baselines\?"):
        planned(baseline=True)
    with pytest.raises(autoshard.AutoshardError, match="donate_argnames: layer has no parameter y; it has x, w, act"):
        Calls(lambda_free(layer), donate_argnames="y")
    with pytest.raises(autoshard.AutoshardError, match=r"static_argnums=5 is out of range .* \(expected 0 to 0\)"):
        Calls(lambda x: x, static_argnums=5)
    with pytest.raises(TypeError, match="static argument k must be hashable, got list"):
        planned(lambda x, k: x, static_argnames="k")(X, k=[1])


def lambda_free(fn: Any) -> Any:
    """`layer` without `**more`, which takes every name."""

    def layer(x, w, act="relu"):
        return fn(x, w, act)

    return layer


# --- meshes


def test_it_runs_on_the_mesh_of_set_mesh_and_on_a_given_one(planned, tmp_path) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    sharded = autoshard.autoshard(layer, cache_dir=tmp_path)
    with jax.set_mesh(mesh):
        got = sharded(X, W)
    assert_close(got, layer(X, W))
    assert sharded.plan.topology.name == "cpu:2x4" and got.sharding.mesh == mesh
    given = autoshard.autoshard(layer, cache_dir=tmp_path, mesh=mesh, axes={"x": "data", "y": "model"})
    assert given(X, W).sharding.mesh == mesh
    assert_close(jax.jit(given)(X, W), layer(X, W))


# --- progress


def test_nothing_under_a_second_is_shown_and_everything_over_it_is(monkeypatch) -> None:
    quick, slow = io.StringIO(), io.StringIO()
    with elapsed("planning f", quick):
        pass
    assert quick.getvalue() == ""
    monkeypatch.setattr(elapsed_module, "SILENT_SECONDS", 0.02)
    with elapsed("planning f", slow, "planned") as say:
        say("searching")
        time.sleep(0.2)
    first, *_, last = slow.getvalue().splitlines()
    assert first == "planning f: searching (0 s)" and last.startswith("planning f: planned in 0.2 s")


@pytest.mark.parametrize("quiet", (False, True))
def test_a_slow_first_call_says_what_it_does(planned, monkeypatch, capsys, quiet: bool) -> None:
    monkeypatch.setattr(elapsed_module, "SILENT_SECONDS", 0.001)
    planned(layer, quiet=quiet)(X, W)
    said = capsys.readouterr().err
    assert ("autoshard: planning layer: " in said, "autoshard: compiling layer for cpu:2: compiled in " in said) == (
        not quiet,
        not quiet,
    )
