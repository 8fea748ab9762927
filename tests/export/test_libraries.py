"""Exports, read by the libraries they are for: Flax Linen and NNX, Equinox, MaxText's YAML, Optax states, Orbax."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.emitting.formats import with_orders
from tests.support.exported import NAMES, assert_same_program, by_rules, loaded, placed
from tests.support.plans import assert_close, planned_block, well_linked

WHY = "{} is not installed (pip install --group test)"
EMBED, MLP, BATCH = 8, 32, 16


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=WHY.format(name.partition(".")[0]))


# --- Flax Linen


@functools.cache
def linen_model() -> tuple[autoshard.Plan, Callable[..., Any], tuple[Any, ...], Any]:
    """A Linen model whose parameters are annotated: its plan, function, arguments, and the annotations."""
    nn = library("flax.linen")
    meta = library("flax.core.meta")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def dense(features: int, *names: str) -> Any:
                init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
                return nn.Dense(features, use_bias=False, kernel_init=init)

            for _ in range(2):
                x = x + dense(EMBED, "mlp", "embed")(nn.gelu(dense(MLP, "embed", "mlp")(x)))
            return x

    model, x = Model(), jnp.linspace(-1, 1, BATCH * EMBED).reshape(BATCH, EMBED)
    boxed = model.init(jax.random.key(0), x)
    params = meta.unbox(boxed)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return model.apply(params, x)  # pyright: ignore[reportReturnType]

    plan = autoshard.search(apply, params, x, topology=well_linked("cpu:2x4"))
    return plan, apply, (params, x), nn.get_partition_spec(boxed)


def test_linen_lays_parameters_out_by_the_exported_rules() -> None:
    nn = library("flax.linen")
    plan, fn, args, logical = linen_model()
    assert any(spec != P() for spec in jax.tree.leaves(plan.in_specs, is_leaf=lambda leaf: isinstance(leaf, P)))
    found = loaded(plan.export("flax", argument="params", names=logical))
    assert found["LOGICAL_AXES"] == logical
    mesh = plan.make_mesh()
    shardings = nn.logical_to_mesh_sharding(logical, mesh, found["LOGICAL_AXIS_RULES"])
    wanted, _ = plan.shardings(mesh)
    same = jax.tree.map(lambda a, b, array: a.is_equivalent_to(b, array.ndim), shardings, wanted[0], args[0])
    assert all(jax.tree.leaves(same))
    with nn.logical_axis_rules(found["LOGICAL_AXIS_RULES"]):
        specs = nn.logical_to_mesh(logical)
    trimmed = jax.tree.map(_trimmed, specs, is_leaf=lambda leaf: isinstance(leaf, P))
    assert_same_program(plan, fn, args, (trimmed, plan.in_specs[1]))


def _trimmed(spec: P) -> P:
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def test_regex_rules_lay_out_linens_parameters() -> None:
    plan, fn, args, _ = linen_model()
    rules = loaded(plan.export("rules", argument="params"))["PARTITION_RULES"]
    assert_same_program(plan, fn, args, (by_rules(rules, args[0]), plan.in_specs[1]))


def test_regex_rules_find_parameters_in_an_optax_state() -> None:
    optax = library("optax")
    plan, _, (params, _), _ = linen_model()
    rules = loaded(plan.export("rules", argument="params"))["PARTITION_RULES"]
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params)
    found = by_rules(rules, {"params": params, "opt_state": state})
    moments = [each for each in jax.tree.leaves(found["opt_state"], is_leaf=_has_moments) if _has_moments(each)]
    assert found["params"] == plan.in_specs[0] and len(moments) == 1
    assert moments[0].mu == moments[0].nu == plan.in_specs[0] and moments[0].count == P()


def _has_moments(node: Any) -> bool:
    return hasattr(node, "mu")


# --- Flax NNX


def test_nnx_lays_parameters_out_by_the_exported_rules() -> None:
    nnx = library("flax.nnx")

    def weights(rngs: Any, rows: str, columns: str, *shape: int) -> Any:
        init = nnx.initializers.lecun_normal()
        return nnx.Param(init(rngs.params(), shape), out_sharding=(rows, columns), eager_sharding=False)

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.up = weights(rngs, "embed", "mlp", EMBED, MLP)
            self.down = weights(rngs, "mlp", "embed", MLP, EMBED)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.nn.gelu(x @ self.up[...]) @ self.down[...]

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    x = jnp.linspace(-1, 1, BATCH * EMBED).reshape(BATCH, EMBED)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        nnx.replace_by_pure_dict(whole := jax.tree.map(lambda leaf: leaf, state), params)
        return nnx.merge(graph, whole)(x)

    plan = autoshard.search(fn, params, x, topology=well_linked("cpu:2x4"))
    names = nnx.to_pure_dict(nnx.get_partition_spec(state))
    found = loaded(plan.export("flax", argument="params", names=names))
    with nnx.logical_axis_rules(found["LOGICAL_AXIS_RULES"]):
        shardings = nnx.get_named_sharding(state, plan.make_mesh())
    specs = jax.tree.map(lambda sharding: _trimmed(sharding.spec), nnx.to_pure_dict(shardings), is_leaf=_is_sharding)
    assert specs == plan.in_specs[0] and P() not in jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    assert_same_program(plan, fn, (params, x), (specs, plan.in_specs[1]))


@pytest.mark.long
def test_an_nnx_state_has_specs_and_logical_axes() -> None:
    """The state as it is, without a detour through plain dicts."""
    nnx = library("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([nnx.Linear(EMBED, MLP, rngs=rngs), nnx.Linear(MLP, EMBED, rngs=rngs)])

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layers[1](jax.nn.gelu(self.layers[0](x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    x = jnp.linspace(-1, 1, BATCH * EMBED).reshape(BATCH, EMBED)

    def fn(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)

    plan = autoshard.search(fn, state, x, topology=well_linked("cpu:2x4"))
    found = loaded(plan.export("specs", argument="state"))
    specs = found["like"](state, found["SPECS"])
    assert jax.tree.structure(specs) == jax.tree.structure(plan.in_specs[0])
    assert jax.tree.leaves(specs) == jax.tree.leaves(plan.in_specs[0])
    assert_same_program(plan, fn, (state, x), (specs, plan.in_specs[1]))
    names = {"kernel/value$": ["rows", "columns"], "bias/value$": ["bias"]}
    flax = {
        pattern: [f"{name}_{layer}" for name in value] for layer in (0, 1) for pattern, value in _of_layer(names, layer)
    }
    logical = loaded(plan.export("flax", argument="state", names=flax))
    rules = dict(logical["LOGICAL_AXIS_RULES"])
    axes = logical["like"](state, logical["LOGICAL_AXES"])
    got = [_trimmed(P(*(rules.get(name) for name in spec))) for spec in jax.tree.leaves(axes)]
    assert got == jax.tree.leaves(plan.in_specs[0])


def _of_layer(names: dict[str, list[str]], layer: int) -> Any:
    return [(f"layers/{layer}/{pattern}", value) for pattern, value in names.items()]


def _is_sharding(leaf: Any) -> bool:
    return isinstance(leaf, NamedSharding)


# --- Equinox


@pytest.mark.long
def test_equinox_shards_a_module_by_the_exported_specs() -> None:
    eqx = library("equinox")
    model = eqx.nn.MLP(EMBED, EMBED, MLP, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    x = jnp.linspace(-1, 1, BATCH * EMBED).reshape(BATCH, EMBED)

    def fn(arrays: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(arrays, static))(x)

    plan = autoshard.search(fn, arrays, x, topology=well_linked("cpu:2x4"))
    found = loaded(plan.export("specs", argument="arrays"))
    specs, mesh = found["like"](arrays, found["SPECS"]), plan.make_mesh()
    assert any(spec != P() for spec in jax.tree.leaves(specs))
    sharded = eqx.filter_shard(model, placed(mesh, specs))
    wanted, _ = plan.shardings(mesh)
    placement = [array.sharding for array in jax.tree.leaves(eqx.filter(sharded, eqx.is_array))]
    assert placement == jax.tree.leaves(wanted[0])
    assert_close(eqx.filter_jit(lambda model, x: jax.vmap(model)(x))(sharded, x), fn(arrays, x))
    assert_same_program(plan, fn, (arrays, x), (specs, plan.in_specs[1]))


# --- MaxText


def test_maxtext_reads_its_mesh_and_rules() -> None:
    """As MaxText does: the YAML's lists, through Flax Linen's logical axes."""
    yaml, nn = library("yaml"), library("flax.linen")
    plan, fn, args = planned_block()
    names = NAMES | {"tokens": ("activation_batch", "activation_length")}
    named = {pattern if pattern == "tokens" else f"params/{pattern}": value for pattern, value in names.items()}
    found = yaml.safe_load(plan.export("maxtext", names=named, axes={"x": "fsdp", "y": "tensor"}))
    assert found["mesh_axes"] == ["fsdp", "tensor"] and found["data_sharding"] == [["tensor"]]
    rules = [(name, axes if isinstance(axes, str) else tuple(axes)) for name, axes in found["logical_axis_rules"]]
    assert len(dict(rules)) == len(rules)
    back = {"fsdp": "x", "tensor": "y"}

    def spec(path: Any, _: Any) -> P:
        joined = jax.tree_util.keystr(path, simple=True, separator="/")
        logical = next(value for pattern, value in named.items() if re.search(pattern, joined))
        entries = [axes if isinstance(axes, tuple) else (axes,) for axes in nn.logical_to_mesh_axes(logical, rules)]
        renamed = [tuple(back[axis] for axis in axes if axis) for axes in entries]
        return _trimmed(P(*(axes[0] if len(axes) == 1 else axes or None for axes in renamed)))

    specs = jax.tree_util.tree_map_with_path(spec, {"params": args[0], "tokens": args[1]})
    assert_same_program(plan, fn, args, (specs["params"], specs["tokens"]))


# --- Orbax


@pytest.mark.long
def test_orbax_restores_an_unsharded_checkpoint_into_the_planned_layout(tmp_path: Path) -> None:
    orbax = library("orbax.checkpoint")
    plan, fn, (params, tokens) = planned_block()
    plan.save(tmp_path / "plan.json")
    plan = autoshard.load(tmp_path / "plan.json")
    mesh = plan.make_mesh()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", jax.device_put(params, jax.devices()[0]))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", plan.abstract_args(mesh, argument="params"))
    ins, outs = plan.shardings(mesh)
    assert jax.tree.map(lambda array: array.sharding, restored) == ins[0]
    compiled = plan.jit(fn, mesh).lower(restored, tokens).compile()
    assert compiled.input_shardings[0][0] == ins[0]  # nothing is moved before the step
    result = compiled(restored, jax.device_put(tokens, ins[1]))
    assert result.sharding == outs
    assert_close(result, jax.jit(fn)(params, tokens))


@pytest.mark.long
def test_orbax_restores_an_unpadded_checkpoint_into_the_padded_layout_and_saves_it_unpadded(tmp_path: Path) -> None:
    orbax = library("orbax.checkpoint")

    def fn(params, x):
        return jnp.exp(x @ params["up"]) @ params["down"]

    rng = np.random.default_rng(0)
    params = {"up": rng.standard_normal((510, 1021)) / 50, "down": rng.standard_normal((1021, 510))}
    params, x = jax.tree.map(jnp.float32, params), jnp.ones((1, 510))
    plan = autoshard.search(fn, params, x, topology="cpu:4")
    assert [(each.size, each.padded) for each in plan.padding] == [(1021, 1024)]
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "given", params)
        checkpointer.wait_until_finished()
        wanted = plan.abstract_args(plan.make_mesh(), argument="params")
        restored = checkpointer.restore(tmp_path / "given", wanted, strict=False)
        assert restored["up"].shape == (510, 1024)
        assert jax.tree.map(lambda array: array.sharding, restored) == jax.tree.map(lambda each: each.sharding, wanted)
        assert_close(plan.jit(fn)(restored, x), fn(params, x))
        checkpointer.save(tmp_path / "saved", plan.unpad(restored, argument="params"))
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.long
def test_orbax_restores_into_the_planned_order_of_dimensions(tmp_path: Path) -> None:
    orbax = library("orbax.checkpoint")
    plan, fn, (params, tokens) = planned_block()
    ins, outs = ([tuple(range(len(a.shape)))[::-1] for a in arrays] for arrays in (plan.arguments, plan.results))
    plan = with_orders(plan, ins, outs)
    mesh = plan.make_mesh()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", jax.device_put(params, jax.devices()[0]))
        checkpointer.wait_until_finished()
    with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as checkpointer:
        wanted = orbax.args.StandardRestore(plan.abstract_args(mesh, argument="params"), support_layout=True)
        restored = checkpointer.restore(tmp_path / "checkpoint", args=wanted)
    wanted, _ = plan.formats(mesh)
    for array, each in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted[0]), strict=True):
        assert array.format.layout.major_to_minor == each.layout.major_to_minor
        assert array.sharding == each.sharding
    result = plan.jit(fn, mesh)(restored, plan.place(tokens, argument="tokens", mesh=mesh))  # nothing is relaid
    assert_close(result, jax.jit(fn)(params, tokens))
