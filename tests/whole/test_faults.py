"""What goes wrong, and what the user reads then: one sentence that says what was got and what would fit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import autoshard
from costmodels.machine.chips import catalogue
from costmodels.machine.topology import parse_topology
from examples import palm
from tests.support.plans import assert_close, planned_block, well_linked
from tests.support.rules.unruled import unruled


def abstract(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def message(kind: type[Exception], call: Any, *args: Any, **keywords: Any) -> str:
    with pytest.raises(kind) as error:
        call(*args, **keywords)
    assert isinstance(error.value, autoshard.AutoshardError)
    return str(error.value)


# --- memory


def test_what_does_not_fit_says_how_much_is_missing_and_where_it_would_fit() -> None:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    args = abstract(2**20, 2**15), abstract(2**15, 2**15)  # 128 and 4 GiB, and a result of 128 GiB
    text = message(
        autoshard.InfeasibleError, autoshard.search, product, *args, topology="v4:2x2x1", reserve_bytes=2**30
    )
    pattern = re.compile(
        r"product does not fit on v4:2x2x1\. The smallest layout found needs (?P<held>[\d.]+) GiB per chip,"
        r" (?P<missing>[\d.]+) GiB more than the 29\.75 GiB available on a v4 \(30\.75 GiB usable, 1 GiB reserved\)\."
        r" The live arrays at the peak, in .*, are:\n"
        r"        32 GiB  x\n"
        r"        32 GiB  dot_general x · w \(test_faults\.py:\d+\)\n"
        r"(.*\n)*"
        r"It fits on v4:2x2x4, 16 chips\."
    )
    found = pattern.fullmatch(text)
    assert found, text
    assert float(found["held"]) >= 65  # a quarter each of 128 + 128 + 4 GiB
    assert float(found["missing"]) == pytest.approx(float(found["held"]) - 29.75, abs=0.01)
    # What is said to do does: neither half as many chips.
    assert autoshard.search(product, *args, topology="v4:2x2x4", reserve_bytes=2**30).proof.status == "OPTIMAL"
    message(autoshard.InfeasibleError, autoshard.search, product, *args, topology="v4:2x2x2", reserve_bytes=2**30)


@pytest.mark.long
def test_palm_540b_says_on_how_many_chips_it_would_fit() -> None:
    workload = palm.decode(batch=64)
    text = message(
        autoshard.InfeasibleError,
        autoshard.search,
        workload.fn,
        *workload.args,
        topology="v4:2x2x4",
        donate_argnums=workload.donate_argnums,
        name=workload.name,
    )
    assert text.startswith("palm-540b-decode does not fit on v4:2x2x4.")
    assert "\n     18.67 GiB  params['layers']['wi_gate']\n" in text  # 118 × 18,432 × 73,728 × 2 bytes on 16 chips
    assert text.endswith("It fits on v4:4x4x4, 64 chips.")


def test_what_no_topology_holds_is_said_to_be_so() -> None:
    text = message(
        autoshard.InfeasibleError,
        autoshard.search,
        lambda x: x * 2,
        abstract(10_000_001, 5003),
        topology="v5e:2x2",
        name="double",
    )
    assert text.startswith("double does not fit on v5e:2x2.")
    assert "\n     186.4 GiB  x\n" in text
    assert text.endswith(
        "No topology up to v5e:64x64, 4096 chips, was found on which it fits: some arrays cannot be split far enough."
    )


def test_gpus_are_added_within_the_node_first_and_then_by_nodes() -> None:
    big = abstract(2**20, 2**15)  # 128 GiB
    for given, wanted in (("h100:2", "h100:8, 8 chips"), ("a100:1x4", "a100:1x8, 8 chips")):
        assert message(autoshard.InfeasibleError, autoshard.search, lambda x: x * 2, big, topology=given).endswith(
            f"fits on {wanted}."
        )
    more = abstract(2**24, 2**15)  # 2 TiB
    text = message(autoshard.InfeasibleError, autoshard.search, lambda x: x * 2, more, topology="h100:8")
    assert re.search(r"It fits on h100:\d+x8, \d+ chips\.$", text)


# --- topologies and devices


@pytest.mark.parametrize(
    "topology, text",
    (
        (
            "v44:2x2",
            f"There is no chip 'v44' in the catalogue. Did you mean v4? It has {', '.join(catalogue())}.",
        ),
        (
            "v4-8",
            "Invalid topology 'v4-8': expected CHIP:AxBxC, such as v4:4x4x4 or h100:2x8 (nodes × GPUs), or the path of a .toml"
            " file.",
        ),
        (
            "v5e:2x2x2",
            "v5e:2x2x2 has 3 sizes, but the torus of v5e has 2 axes; write at most 2 sizes, such as v5e:4x4.",
        ),
        ("cpu:0x2", "The sizes of cpu:0x2 must be 1 or more, got 0."),
        (
            "missing.toml",
            "The topology file missing.toml cannot be read: [Errno 2] No such file or directory: 'missing.toml'.",
        ),
    ),
)
def test_a_malformed_topology_is_refused(topology: str, text: str) -> None:
    assert message(autoshard.TopologyError, autoshard.search, jnp.tanh, jnp.ones(8), topology=topology) == text


def test_a_topology_that_does_not_fit_the_devices_is_refused() -> None:
    host = autoshard.search(jnp.tanh, jnp.ones(16), topology="cpu:4x4")
    text = message(autoshard.TopologyError, host.make_mesh)
    assert text.startswith("The plan is for cpu:4x4, 16 chips. 16 host devices are needed and JAX has started with 8.")
    tpu = autoshard.search(jnp.tanh, jnp.ones(16), topology="v4:2x2x4")
    wanted = "The plan is for v4:2x2x4, 16 chips. A mesh of x=2 × y=2 × z=4 takes 16 devices, got 8."
    assert message(autoshard.TopologyError, tpu.make_mesh) == wanted
    assert message(autoshard.TopologyError, tpu.jit, jnp.tanh) == wanted
    assert message(autoshard.TopologyError, tpu.apply(jnp.tanh), jnp.ones(16)) == wanted


def test_a_mesh_without_the_axes_of_the_plan_is_refused() -> None:
    plan, fn, args = planned_block()
    wanted = (
        "The mesh has the axes x=8; the plan for cpu:2x4 needs x=2, y=4. Use plan.make_mesh(), plan for a topology of the"
        ' mesh\'s shape, or name the axes: axes={"x": "data"}.'
    )
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    assert message(autoshard.TopologyError, plan.jit, fn, mesh) == wanted
    with jax.set_mesh(mesh):
        assert message(autoshard.TopologyError, plan.apply(fn), *args) == wanted
        assert message(autoshard.TopologyError, plan.jit, fn) == wanted


# --- dimensions


def test_a_dimension_that_no_axis_divides_is_planned_around_and_said() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    x, w = jnp.linspace(0, 1, 17 * 6).reshape(17, 6), jnp.linspace(0, 1, 6 * 16).reshape(6, 16)
    plan = autoshard.search(fn, x, w, topology=well_linked("cpu:2x4"))
    said = [warning for warning in plan.warnings if "dimension" in warning]
    assert said == [
        "x has dimension 0 of 17, which no mesh axis divides: it stays whole.",
        "x has dimension 1 of 6, which y (4) cannot divide.",
        "w has dimension 0 of 6, which y (4) cannot divide.",
    ]
    assert plan.arguments[0].layout.dims[0] == ()
    assert_close(plan.jit(fn)(x, w), jax.jit(fn)(x, w))


@pytest.mark.long
def test_a_dimension_that_stays_whole_anyway_is_no_matter() -> None:
    """118 layers are scanned over: that no axis divides 118 is no loss."""
    workload = palm.decode(batch=64, layers=118)
    plan = autoshard.search(workload.fn, *workload.args, topology="v4:4x4x4", donate_argnums=workload.donate_argnums)
    assert [warning for warning in plan.warnings if "dimension" in warning] == []


def test_assumed_constants_and_primitives_without_a_rule_are_said() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return unruled(x)

    plan = autoshard.search(fn, jnp.ones((8, 8)), topology="v4:2x2x1")
    assert "Of the constants of v4, collective_overhead_seconds, wire_efficiency are assumed." in plan.warnings
    assert any(re.fullmatch(r".* has no sharding rule: its arrays are replicated", text) for text in plan.warnings)
    text = message(
        autoshard.UnsupportedPrimitiveError, autoshard.search, fn, jnp.ones((8, 8)), topology="v4:2x2x1", strict=True
    )
    assert "has no sharding rule" in text


def test_a_search_that_runs_out_of_time_says_what_is_left() -> None:
    plan, _, _ = planned_block()
    from autoshard.planning.records_of import proof_warnings

    class Stopped:
        proof = replace(plan.proof, status="FEASIBLE", objective_seconds=0.02, bound_seconds=0.019, gap=0.05)

    assert list(proof_warnings(Stopped())) == [  # pyright: ignore[reportArgumentType]
        "The search stopped before the plan was proven best: at most 5.00% of its 20 ms could be saved."
    ]


# --- functions and arguments


def test_a_function_that_does_not_trace_is_refused() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return x if x.sum() > 0 else -x

    text = message(autoshard.TraceError, autoshard.search, fn, jnp.ones(8), topology="cpu:8")
    assert text.startswith("fn could not be traced with these arguments: Attempted boolean conversion of traced array")


def test_an_argument_that_is_no_array_is_refused() -> None:
    text = message(
        autoshard.TraceError, autoshard.search, lambda x, mode: x, jnp.ones(8), {"mode": "fast"}, topology="cpu:8"
    )
    assert text == (
        "mode['mode'] must be an array, got 'fast' (str); declare it static (static_argnames='mode') in the decorator, bind it"
        " beforehand with functools.partial, or register its class as a pytree."
    )


def test_a_donated_position_that_is_none_is_refused() -> None:
    for given in (1, -2, (0, 3)):
        text = message(
            autoshard.AutoshardError, autoshard.search, jnp.tanh, jnp.ones(8), topology="cpu:8", donate_argnums=given
        )
        assert text == f"donate_argnums={given} is out of range for 1 arguments (expected 0 to 0)."
    assert autoshard.search(jnp.tanh, jnp.ones(8), topology="cpu:8", donate_argnums=-1).donate_argnums == (0,)


@pytest.mark.long
def test_a_plan_for_other_shapes_is_refused() -> None:
    plan, fn, (params, tokens) = planned_block()
    wanted = (
        "The plan 'run' is for other arguments; search again for these:\n  tokens is int32[8,8], planned int32[4,8]"
    )
    twice = jnp.concatenate([tokens, tokens])
    for run in (plan.apply(fn), jax.jit(plan.apply(fn)), plan.jit(fn), plan.jit(fn).lower):
        assert message(autoshard.PlanMismatchError, run, params, twice) == wanted
    applied = plan.apply(fn)
    applied(params, tokens)
    assert message(autoshard.PlanMismatchError, applied, params, twice) == wanted  # after it has been traced, too


def test_a_plan_for_other_types_or_nesting_is_refused_with_the_paths() -> None:
    plan, fn, (params, tokens) = planned_block()
    layers = dict(params["layers"])
    layers["bias"] = layers.pop("norm")
    layers["wq"] = layers["wq"].astype(jnp.bfloat16)
    assert message(autoshard.PlanMismatchError, plan.apply(fn), params | {"layers": layers}, tokens).splitlines() == [
        "The plan 'run' is for other arguments; search again for these:",
        "  params['layers']['norm'] is missing, planned float32[2,8]",
        "  params['layers']['wq'] is bfloat16[2,8,1,2,4], planned float32[2,8,1,2,4]",
        "  params['layers']['bias'] is float32[2,8], planned without it",
    ]
    many = {f"layer{i}": jnp.ones(i + 1) for i in range(12)}
    text = message(autoshard.PlanMismatchError, plan.apply(fn), many, tokens)
    assert len(text.splitlines()) == 1 + 8 + 1 and text.endswith(
        "  and 14 more".replace("14", str(len(plan.arguments) - 1 + 12 - 8))
    )


def test_a_plan_for_another_function_is_refused() -> None:
    plan = autoshard.search(lambda x: jnp.tanh(x) + 1, jnp.ones(8), topology="cpu:8", name="tanh")
    text = message(autoshard.PlanMismatchError, plan.apply(lambda x: jnp.sin(x) + 1), jnp.ones(8))
    pattern = (
        r"The plan 'tanh' is for another function, with the same arguments: where it has sin .*\(test_faults.py:\d+\), the"
        r" planned one had tanh .*\(test_faults.py:\d+\)\. Search again\."
    )
    assert re.fullmatch(pattern, text)
    older = replace(plan, jax_version="0.9.0")
    assert f"(planned with JAX 0.9.0, this is {jax.__version__})" in message(
        autoshard.PlanMismatchError, older.apply(lambda x: jnp.sin(x)), jnp.ones(8)
    )


@pytest.mark.long
def test_a_plan_runs_with_parameters_by_other_names() -> None:
    plan, fn, args = planned_block()
    assert_close(plan.apply(lambda *args: fn(*args))(*args), fn(*args))


def test_a_plan_for_a_topology_with_other_numbers_is_another_plan() -> None:
    fast = autoshard.search(jnp.dot, jnp.ones((8, 8)), jnp.ones((8, 8)), topology=parse_topology("cpu:8"))
    slow = autoshard.search(jnp.dot, jnp.ones((8, 8)), jnp.ones((8, 8)), topology=well_linked("cpu:8"))
    assert fast != slow and fast.fingerprint == slow.fingerprint
