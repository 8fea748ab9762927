"""Plans: what they say, and that the function runs under them as it runs without."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.planning.runner_up import Alternatives
from costmodels.machine.topology import parse_topology
from search.answer.assignment import states_of
from search.collector import seldom_collected
from search.memory.constraints import rows
from search.solve import search as solve
from tests.support.effort import mostly_long
from tests.support.plans import (
    BLOCK,
    assert_close,
    assert_placed,
    palm_decode,
    palm_prefill,
    planned_block,
    well_linked,
)
from tests.support.tracing import trace

# --- planned execution = unsharded execution


@pytest.mark.parametrize("case", mostly_long((palm_decode, palm_prefill), palm_decode), ids=("decode", "prefill"))
@pytest.mark.parametrize(
    "topology",
    (
        pytest.param(parse_topology("cpu:2x4"), id="cpu:2x4"),
        pytest.param(well_linked("cpu:2x2x2"), id="well linked 2x2x2", marks=pytest.mark.slow),
    ),
)
def test_planned_palm_computes_what_the_plain_one_computes(case, topology) -> None:
    workload, args = case()
    plan = autoshard.search(
        workload.fn, *workload.args, topology=topology, donate_argnums=workload.donate_argnums, name=workload.name
    )
    assert (plan.name, plan.proof.status, plan.proof.gap) == (workload.name, "OPTIMAL", 0.0)
    wanted = jax.jit(workload.fn)(*args)
    mesh = plan.make_mesh()
    compiled = plan.jit(workload.fn, mesh).lower(*workload.args).compile()
    for got, spec in zip(
        jax.tree.leaves(compiled.input_shardings[0]), jax.tree.leaves(plan.in_specs, is_leaf=_is_spec), strict=True
    ):
        assert got.is_equivalent_to(NamedSharding(mesh, spec), 8)
    ins, _ = plan.shardings(mesh)
    got = compiled(*jax.device_put(jax.tree.map(jnp.copy, args), ins))
    assert_close(got, wanted, rtol=0.02)  # bfloat16
    assert_placed(got, plan.out_specs, mesh)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)


def test_a_donated_argument_is_donated() -> None:
    workload, args = palm_decode()
    plan = autoshard.search(workload.fn, *workload.args, topology="cpu:8", donate_argnums=workload.donate_argnums)
    ins, _ = plan.shardings(plan.make_mesh())
    placed = jax.device_put(jax.tree.map(jnp.copy, args), ins)
    plan.jit(workload.fn)(*placed)
    assert all(array.is_deleted() for array in jax.tree.leaves(placed[1]))
    assert [array.donated for array in plan.arguments if array.path.startswith("cache")] == [True, True]


def loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, tokens: jnp.sum(jnp.sin(fn(params, tokens)))


@pytest.mark.long
@pytest.mark.parametrize(
    "transformed",
    (
        lambda fn: fn,
        jax.jit,
        lambda fn: jax.grad(loss(fn)),
        lambda fn: jax.jit(jax.value_and_grad(loss(fn))),
        lambda fn: lambda params, tokens: jax.jvp(lambda params: fn(params, tokens), (params,), (params,)),
        lambda fn: lambda params, tokens: jax.vmap(fn, (None, 0))(params, jnp.stack([tokens, tokens[::-1]])),
        lambda fn: (
            lambda params, tokens: jax.lax.map(lambda tokens: fn(params, tokens), jnp.stack([tokens, tokens[::-1]]))
        ),
    ),
    ids=("itself", "jit", "grad", "jit value and grad", "jvp", "vmap", "map"),
)
def test_apply_composes_with_transformations(transformed) -> None:
    plan, fn, args = planned_block()
    assert len(plan.estimate.collectives) > 3
    assert_close(transformed(plan.apply(fn))(*args), transformed(fn)(*args))


@pytest.mark.long
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=("auto", "explicit"))
def test_apply_runs_on_the_mesh_in_context(kind: AxisType) -> None:
    plan, fn, args = planned_block()
    wanted = fn(*args)
    devices = np.array(jax.devices()[::-1]).reshape(1, 2, 4)
    mesh = jax.sharding.Mesh(devices, ("spare", "x", "y"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        for applied in (plan.apply(fn), jax.jit(plan.apply(fn)), plan.jit(fn)):
            got = applied(*args)
            assert_close(got, wanted)
            assert_placed(got, plan.out_specs, mesh)


def test_apply_calls_its_function_once_per_nesting_of_arguments() -> None:
    calls = []

    def fn(x: jax.Array) -> jax.Array:
        calls.append(1)
        return jnp.tanh(x)

    x = jnp.arange(8.0)
    plan = autoshard.search(fn, x, topology="cpu:8")
    applied = plan.apply(fn)
    applied(x)
    before = len(calls)
    assert_close(applied(x + 1), jnp.tanh(x + 1))
    assert len(calls) == before


def test_arguments_may_be_given_by_keyword_and_as_python_numbers() -> None:
    def fn(x: jax.Array, position: jax.Array, shift: float = 1.0) -> jax.Array:
        return x[position] + shift

    x = jnp.arange(8, dtype=jnp.bfloat16).reshape(8, 1) * jnp.ones((1, 8), jnp.bfloat16)
    plan = autoshard.search(fn, x, jax.ShapeDtypeStruct((), jnp.int32), 2.0, topology="cpu:8")
    assert [array.weak for array in plan.arguments] == [False, False, True]
    wanted = jnp.full(8, 7, jnp.bfloat16)
    assert_close(plan.apply(fn)(x, position=3, shift=4.0), wanted)
    assert_close(plan.jit(fn)(x, 3, 4.0), wanted)


def test_closed_over_arrays_are_planned_too() -> None:
    weights = jnp.arange(256.0).reshape(16, 16)

    def fn(x: jax.Array) -> jax.Array:
        return x @ weights

    plan = autoshard.search(fn, jnp.ones((1, 16)), topology=well_linked("cpu:2x4"))
    (constant,) = plan.constants
    assert (constant.shape, constant.dtype, constant.bytes_per_chip) == ((16, 16), "float32", 16 * 16 * 4 / 8)
    for run in (plan.apply(fn), plan.jit(fn)):
        assert_close(run(jnp.ones((1, 16))), weights.sum(0, keepdims=True))

    def through(weights: jax.Array) -> jax.Array:
        return plan.apply(lambda x: x @ weights)(jnp.ones((1, 16))).sum()

    assert_close(jax.grad(through)(weights), jnp.ones((16, 16)))
    assert_close(jax.grad(through)(2 * weights), jnp.ones((16, 16)))  # what was traced before holds no tracer


def test_closed_over_arrays_that_are_alike_are_one() -> None:
    """As for compilers; but what is one number throughout may yet become something else."""
    tables = [jnp.arange(256.0).reshape(16, 16) for _ in range(3)]
    tables[2] = tables[2].at[15, 15].set(-1.0)
    biases = [jnp.ones(16) for _ in range(2)]

    def fn(x: jax.Array) -> jax.Array:
        for table in (*tables, np.asarray(tables[0])):
            x = x @ table / 1e3
        return jax.jit(lambda x: x * jnp.asarray(tables[1]))(x) + biases[0] + biases[1]

    plan = autoshard.search(fn, jnp.ones((1, 16)), topology="cpu:8")
    assert [constant.shape for constant in plan.constants] == [(16, 16), (16, 16), (16,), (16,)]
    assert_close(plan.apply(fn)(jnp.ones((1, 16))), fn(jnp.ones((1, 16))))
    traced = jax.make_jaxpr(lambda x: plan.apply(fn)(x))(jnp.ones((1, 16)))
    assert len(traced.consts) == 4


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, gradient: (jnp.clip(gradient, -1.0, 1.0),))


def test_a_function_with_its_own_derivative_runs_and_refuses_to_be_differentiated() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sum(clipped(x) ** 2)

    x = jnp.arange(8.0)
    plan = autoshard.search(fn, x, topology="cpu:8")
    assert_close(plan.apply(fn)(x), fn(x))
    with pytest.raises(
        autoshard.AutoshardError, match=r"fn has a custom derivative \(custom_vjp at test_plan.py:\d+\)"
    ):
        jax.grad(plan.apply(fn))(x)
    planned = autoshard.search(jax.grad(fn), x, topology="cpu:8")
    assert_close(planned.apply(jax.grad(fn))(x), jax.grad(fn)(x))


# --- nesting


class State(NamedTuple):
    mean: Any
    steps: Any


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


def nested(state: State, layer: Layer, optional: Any, pair: list[Any]) -> dict[str, Any]:
    whole = pair[0] @ layer.kernel + layer.bias + state.mean
    return {"state": State(whole, None), "layer": Layer(whole * 2, 1.5), "steps": (state.steps + 1,)}


def nested_arguments() -> tuple[Any, ...]:
    layer = Layer(jnp.arange(64.0).reshape(8, 8), jnp.ones(8))
    return State(jnp.zeros(8), jnp.int32(1)), layer, None, [jnp.ones((8, 8))]


def test_specs_nest_as_arguments_and_results_do() -> None:
    args = nested_arguments()
    plan = autoshard.search(nested, *args, topology=well_linked("cpu:8"))
    assert jax.tree.structure(plan.in_specs) == jax.tree.structure(args)
    assert jax.tree.structure(plan.out_specs) == jax.tree.structure(nested(*args))
    paths = ["state.mean", "state.steps", "layer.kernel", "layer.bias", "pair[0]"]
    assert [array.path for array in plan.arguments] == paths
    assert_close(plan.jit(nested)(*args), jax.jit(nested)(*args))


def test_a_plan_from_a_file_runs_with_custom_nodes(tmp_path) -> None:
    args = nested_arguments()
    plan = autoshard.search(nested, *args, topology=well_linked("cpu:8"))
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.load(tmp_path / "plan.json")
    assert loaded == plan
    state, layer, optional, pair = loaded.in_specs
    assert isinstance(state, State) and optional is None and isinstance(pair, list)
    assert layer == {"kernel": plan.in_specs[1].kernel, "bias": plan.in_specs[1].bias}
    assert_close(loaded.jit(nested)(*args), jax.jit(nested)(*args))
    assert_close(loaded.apply(nested)(*args), jax.jit(nested)(*args))
    assert_placed(loaded.jit(nested)(*args), plan.out_specs, plan.make_mesh())


# --- the account


def test_rows_add_up_to_the_step() -> None:
    plan, _, _ = planned_block()
    estimate = plan.estimate
    parts = sum(row.seconds + row.collective_seconds for row in plan.operations)
    assert parts <= estimate.seconds * (1 + 1e-9)
    assert parts == pytest.approx(estimate.seconds, rel=0.05)  # the rest are local slices
    assert sum(row.compute_seconds for row in plan.operations) == pytest.approx(estimate.compute_seconds)
    assert sum(row.memory_seconds for row in plan.operations) == pytest.approx(estimate.memory_seconds)
    assert sum(each.seconds for each in estimate.collectives) == pytest.approx(
        sum(row.collective_seconds for row in plan.operations)
    )
    assert estimate.seconds == pytest.approx(plan.proof.objective_seconds)
    assert 0 < estimate.peak_bytes <= estimate.budget_bytes
    assert estimate.peak_where in [row.name for row in plan.operations]


def test_every_matmul_says_what_it_is() -> None:
    plan, _, _ = planned_block()
    rows = [row for row in plan.operations if row.matmul]
    assert len(rows) == 10 and len(plan.operations) == len(plan.choice.strategies)
    up = next(row for row in rows if "params['layers']['up']" in row.name)
    assert (up.einsum.count("->"), up.count, up.regime) == (1, BLOCK.layers, "HBM")
    assert sorted(up.sizes) == sorted((BLOCK.batch, BLOCK.context, BLOCK.d_model, BLOCK.d_ff))
    assert up.strategy and re.fullmatch(r".+: at most [\d.]+ .?s more", up.runner_up)
    assert up.source.startswith("models.py:")


def test_the_price_of_another_strategy_is_that_of_a_plan_and_no_bound_from_below() -> None:
    def fn(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.tanh(x @ up) @ down

    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (256, 512), (512, 256))]
    topology = parse_topology("cpu:2x2")
    program = trace(fn, *args).program
    solution = solve(program, topology)
    problem, states = solution.problem, states_of(solution.problem, solution.choice)
    alternatives = Alternatives(problem, rows(problem), states)
    assert problem.objective(states) == pytest.approx(solution.proof.objective_seconds)
    for operation, _ in program.matmuls():
        node = problem.of_operation[operation]
        for plan in alternatives.reoptimised_plans(operation):
            held = problem.nodes[node].states[plan[node]]
            best = solve(program, topology, allow=lambda at, other: at != operation or other == held)  # noqa: B023
            tolerance = 1e-9 * problem.objective(plan)
            assert problem.objective(plan) >= best.proof.objective_seconds - tolerance
            assert best.proof.objective_seconds >= solution.proof.objective_seconds - tolerance


@pytest.mark.parametrize("overhead, hbm, regime", ((0.0, 1e20, "compute"), (0.0, 1e3, "HBM"), (1.0, 1e20, "overhead")))
def test_the_regime_is_what_takes_longest(overhead: float, hbm: float, regime: str) -> None:
    topology = well_linked("cpu:8")
    chip = topology.chip.override({"op_overhead_seconds": overhead, "hbm_bytes_per_second": hbm}, "a test")
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    plan = autoshard.search(jnp.dot, x, x, topology=replace(topology, chip=chip))
    assert [row.regime for row in plan.operations if row.matmul] == [regime]


def test_communication_bounds_an_operation_whose_links_are_slow() -> None:
    topology = well_linked("cpu:8")
    chip = topology.chip.override({"hbm_bytes": 70e6, "usable_hbm_bytes": 70e6}, "a test")
    axes = tuple(replace(axis, bytes_per_second=1e6) for axis in topology.axes)
    weights = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.float32)  # 134 MB: to be kept in pieces

    def fn(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, layer: (x @ layer, None), x, weights)[0]

    slow = replace(topology, chip=chip, axes=axes)
    plan = autoshard.search(fn, jax.ShapeDtypeStruct((4, 2048), jnp.float32), weights, topology=slow)
    assert "communication" in [row.regime for row in plan.operations]


def test_progress_is_told() -> None:
    lines: list[str] = []
    autoshard.search(jnp.dot, jnp.ones((8, 8)), jnp.ones((8, 8)), topology="cpu:8", progress=lines.append)
    assert lines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_that_are_cast_for_a_product_are_read_as_they_are_stored(dtype: str) -> None:
    """However small: a cast makes nothing that could have stayed on the chip."""
    weight, x = jax.ShapeDtypeStruct((1600, 1600), dtype), jax.ShapeDtypeStruct((8, 1600), jnp.bfloat16)
    plan = autoshard.search(lambda w, x: x @ w.astype(x.dtype), weight, x, topology="v5e:1x1")
    chip = plan.topology.chip
    assert chip.on_chip_bytes > weight.size * 4
    assert plan.proof.objective_seconds >= weight.size * weight.dtype.itemsize / chip.hbm_bytes_per_second


def test_the_collector_of_garbage_is_as_before_after_planning() -> None:
    """Also when planning fails, and with another plan made inside."""
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError), seldom_collected():
        with seldom_collected():
            pass
        assert gc.get_threshold() != before
        raise ZeroDivisionError
    assert gc.get_threshold() == before
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    autoshard.search(lambda x: x @ x, x, topology="cpu:2")
    assert gc.get_threshold() == before
