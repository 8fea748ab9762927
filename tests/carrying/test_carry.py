"""Plans carried by `jax.jit` with specs, with constraints and by hand: laws on host devices, and the choice of constraints."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoshard
from autoshard.auditing.findings import Finding
from autoshard.auditing.planned_times import AuditedCost
from autoshard.carrying import written
from autoshard.carrying.candidates import Place, between, places
from autoshard.carrying.carry import cause_of
from autoshard.carrying.choose import Trial, choose
from autoshard.emitting import bind
from autoshard.planning.carriage import WAYS, Carriage, CarriedProgram, Constraint
from examples import palm
from search.formulation.layouts import Layout
from search.formulation.reshard import reshard_table
from tests.support.effort import examples
from tests.support.emitting import carried
from tests.support.emitting.carried import assert_carried
from tests.support.emitting.einsum_graphs import MESH_SHAPES, Graph, arguments_of, graphs
from tests.support.emitting.sixteen_devices import check_on_sixteen_devices
from tests.support.layout_strategies import blocks, mesh_shapes
from tests.support.models import Block, arguments, function
from tests.support.plans import assert_close, drawn, well_linked
from tests.support.tracing import trace

# --- laws


@given(graph=graphs(), mesh_shape=st.sampled_from(MESH_SHAPES), seed=st.integers(0, 2**16))
@examples(10)
def test_graphs_are_carried_in_each_way(graph: Graph, mesh_shape: str, seed: int) -> None:
    assert_carried(graph, arguments_of(graph), mesh_shape, seed)


@pytest.mark.long
@given(graph=graphs(), mesh_shape=st.sampled_from(MESH_SHAPES), seed=st.integers(0, 2**16))
@examples(4, least=2)
def test_gradients_of_graphs_are_carried_in_each_way(graph: Graph, mesh_shape: str, seed: int) -> None:
    args = [array.astype(jnp.float32) / 2 for array in arguments_of(graph)]
    assert_carried(graph, args, mesh_shape, seed, gradients=True)


@pytest.mark.long
@given(block=blocks(), mesh_shape=mesh_shapes(), seed=st.integers(0, 2**16))
@examples(2, least=1)
def test_blocks_and_their_gradients_are_carried_in_each_way(block: Block, mesh_shape: str, seed: int) -> None:
    assert_carried(function(block), arguments(block), mesh_shape, seed, gradients=not block.decode)


@pytest.mark.slow
@given(block=blocks(), mesh_shape=mesh_shapes(), seed=st.integers(0, 2**16))
@settings(max_examples=200)
def test_blocks_are_always_carried(block: Block, mesh_shape: str, seed: int) -> None:
    assert_carried(function(block), arguments(block), mesh_shape, seed, gradients=not block.decode)


@pytest.mark.long
def test_also_on_sixteen_devices() -> None:
    check_on_sixteen_devices(carried.__name__, 2)


# --- the choice of constraints


def two_products(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ up)
    return hidden @ down


SHAPES = ((64, 256), (256, 512), (512, 256))


def planned() -> tuple[autoshard.Plan, tuple[Any, ...]]:
    args = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES)
    return autoshard.search(two_products, *args, topology=well_linked("cpu:2x4")), args


def place(k: int) -> Place:
    return Place(Constraint((k,), (Layout(()),), f"m.py:{k}"), (), ())


@given(st.sets(st.integers(0, 11)), st.data())
def test_the_chosen_constraints_are_enough_and_needed(needed: set[int], data: st.DataObject) -> None:
    """A compiler that takes a second more for each missing constraint, at some line, gets just those that it needs."""
    at = {k: data.draw(st.sampled_from((k, 11 - k))) for k in needed}
    compiled = []

    def compile(chosen: Sequence[Place]) -> Trial:
        missing = needed - {each.constraint.values[0] for each in chosen}
        compiled.append(chosen)
        return Trial(
            tuple(chosen), program("constraints", 10.0 + len(missing)), {f"m.py:{at[k]}": 1.0 for k in missing}
        )

    found = choose(compile, [place(k) for k in range(12)], program("manual", 10.0), 100)
    assert {each.constraint.values[0] for each in found.chosen} == needed
    assert len(compiled) <= 6 + 4 * max(1, len(needed)) + 8
    assert len({frozenset(each.constraint.values[0] for each in chosen) for chosen in compiled}) == len(compiled)


def test_layouts_that_are_not_needed_are_left_out() -> None:
    """Of three layouts of a place, a compiler that needs the last two gets these, in their order."""
    layouts = tuple(Layout((axes,)) for axes in ((), ("x",), ("y",)))
    resharded = replace(place(0), constraint=replace(place(0).constraint, layouts=layouts))

    def compile(chosen: Sequence[Place]) -> Trial:
        found = {layout for each in chosen for layout in each.constraint.layouts}
        missing = len({*layouts[1:]} - found)
        return Trial(tuple(chosen), program("constraints", 10.0 + missing), {"m.py:0": 1.0})

    found = choose(compile, [resharded], program("manual", 10.0))
    assert [each.constraint.layouts for each in found.chosen] == [layouts[1:]]


@given(st.data())
@examples(30)
def test_between_two_constraints_there_is_one_collective(data: st.DataObject) -> None:
    """A reshard of several collectives has a constraint between each two of them, which moves nothing by itself."""
    topology, program = well_linked("cpu:2x4"), trace(jnp.tanh, jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)).program
    table = reshard_table((16, 16, 16), 4, topology, partial=False)
    source, target = (data.draw(st.sampled_from(sorted(table.index, key=str))) for _ in range(2))
    chain = [source, *between(program, topology, 0, source, target), target]
    steps = [step for one, other in pairwise(chain) if one != other for step in table.path(one, other)]
    assert steps == list(table.path(source, target))
    for one, other in pairwise(chain):
        kinds = [step.kind for step in table.path(one, other)] if one != other else []
        assert len(kinds) <= 1 or "slice" in kinds


def test_the_cause_is_the_costliest_difference() -> None:
    plan, _ = planned()
    wire, small = Finding("unplanned", "gathers", 8.0, 1.0, True), Finding("unplanned", "a scalar", 4.0, 0.0)

    def cause(differences: Sequence[Finding], on_core: float, on_wire: float, slower: float | None) -> str:
        collectives = plan.estimate.collective_seconds + on_wire
        copy: Any = SimpleNamespace(scope="a/copy", opcode="copy", source="m.py:3", name="copy.1", runs=4)
        costs = (AuditedCost(copy, on_core), AuditedCost(copy, -1.0))
        step = None if slower is None else slower * plan.estimate.seconds
        audit: Any = SimpleNamespace(
            differences=differences, costs=costs, collective_seconds=collectives, step_seconds=step
        )
        return cause_of(plan, audit)

    named = "the most that is not planned: 2.00 s of copy at m.py:3"
    assert named in (text := cause((small, wire), 2.0, 1.0, 1.2)) and text.startswith(
        "slower than planned: a step takes "
    )
    assert cause((small, wire), 1.0, 2.0, 1.2) == "unplanned: gathers"
    assert cause((small,), 1.0, 2.0, 1.2).startswith("slower than planned: ")
    assert cause((small, wire), 2.0, 1.0, 1.05) == "unplanned: gathers"
    assert cause((small,), 2.0, 1.0, 1.05) == cause((small,), 2.0, 1.0, None) == ""


def test_no_more_programs_are_compiled_than_asked_for() -> None:
    compiled = []

    def compile(chosen: Sequence[Place]) -> Trial:
        compiled.append(chosen)
        return Trial(tuple(chosen), program("constraints", 20.0 - len(chosen)), {})

    for most in (1, 2, 5):
        compiled.clear()
        choose(compile, [place(k) for k in range(12)], program("manual", 10.0), most)
        assert len(compiled) <= most


@pytest.mark.long
def test_a_decode_step_gets_its_reshards_by_constraints() -> None:
    """Specs alone send tens of times the planned bytes: the partitioner gathers weights where the plan moves activations."""
    work = palm.decode(size="8b", batch=64, layers=1, context=256)
    plan = autoshard.search(work.fn, *work.args, topology="v5e:2x4", donate_argnums=work.donate_argnums)
    carriage = autoshard.carry(plan, work.fn, *work.args, target="host", most=6).carriage
    assert carriage is not None
    manual, constrained, specs = (carriage.program(way) for way in ("manual", "constraints", "specs"))
    assert manual and constrained and specs
    assert specs.wire_bytes > 5 * manual.wire_bytes
    assert constrained.wire_bytes < 2.5 * manual.wire_bytes  # host devices sum twice what is planned once


@pytest.mark.tpu
@pytest.mark.long
def test_constrained_loops_update_caches_where_they_lie() -> None:
    """Left to itself, the TPU compiler (libtpu 0.0.42) re-tiles the keys before the loop and after it."""
    work = palm.decode(size="8b", batch=64, layers=2)
    plan = autoshard.search(work.fn, *work.args, topology="v4:2x2x2", donate_argnums=work.donate_argnums)
    every = places(bind.trace_as_planned(plan, work.fn, work.args), plan.choice, plan.topology)
    carried = replace(plan, carriage=Carriage("tpu", "", (), tuple(each.constraint for each in every)))
    found, manual = (autoshard.audit(carried, work.fn, *work.args, target="tpu", carry=way) for way in WAYS[1::-1])
    assert found.step_seconds and manual.step_seconds and found.step_seconds < 1.03 * manual.step_seconds
    assert found.peak_bytes and manual.peak_bytes and found.peak_bytes < 1.05 * manual.peak_bytes


def test_a_carried_plan_is_saved_run_and_described(tmp_path: Path) -> None:
    plan, shapes = planned()
    fn, args = two_products, drawn(shapes)
    found = autoshard.carry(plan, fn, *args, target="host", most=2)
    found.save(tmp_path / "plan.json")
    loaded = autoshard.load(tmp_path / "plan.json")
    assert loaded.carriage == found.carriage and loaded.carriage is not None
    for way in ("manual", "constraints", "specs"):
        assert_close(loaded.jit(fn, carry=way)(*args), fn(*args))
    text = autoshard.carriage_text(loaded)
    assert all(way in text for way in ("manual", "constraints", "specs", "planned"))
    assert f"The fastest way: {loaded.carriage.fastest}" in text


def test_placement_markers_of_the_user_are_left_to_the_plan() -> None:
    def fn(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        marked = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P("x"))
        return autoshard.pin(two_products(marked(x), up, down), jax.P("x"))

    args = drawn(planned()[1])
    plan = autoshard.search(fn, *args, topology="cpu:2x4")
    carried = replace(plan, carriage=Carriage("host", "", ()))
    assert_close(carried.jit(fn, carry="constraints")(*args), two_products(jnp.tanh(args[0]), *args[1:]))


def program(way: str, seconds: float) -> CarriedProgram:
    return CarriedProgram(way, seconds, 0.0, 0.0, 0.0)


def test_the_fastest_way_is_the_default_and_manual_wins_ties() -> None:
    programs = (program("manual", 1.0), program("constraints", 0.995), program("specs", 2.0))
    assert Carriage("host", "", programs).fastest == "manual"
    assert Carriage("host", "", (*programs[:1], program("constraints", 0.9), program("specs", 0.8))).fastest == "specs"


def test_unknown_ways_and_missing_constraints_are_refused() -> None:
    plan, _ = planned()
    with pytest.raises(autoshard.AutoshardError, match="carry must be 'manual', 'constraints' or 'specs', got 'pmap'"):
        plan.jit(two_products, carry="pmap")  # pyright: ignore[reportArgumentType]
    with pytest.raises(autoshard.AutoshardError, match=r"call plan = autoshard\.carry\(plan, fn, \*args\)"):
        plan.jit(two_products, carry="constraints")


# --- exports


def test_exports_say_what_their_specs_carry() -> None:
    plan, _ = planned()
    assert "is not measured: `autoshard carry plan.json FILE.py:NAME` compiles it." in one_line(plan.export("specs"))
    programs = (program("manual", 0.001), program("constraints", 0.001), program("specs", 0.002))
    constraint = Constraint(
        (3,), (Layout((("x",), ("y",))),), "m.py:3", path="m.py", line=3, variable="h", shape=(4, 4)
    )
    known = replace(plan, carriage=Carriage("host", "jax 0", programs, (constraint,), True))
    text = one_line(known.export("rules"))
    assert "these specs alone take 2.00 ms a step where the planned program takes 1.00 ms" in text
    assert "h: [4,4]: jax.lax.with_sharding_constraint(h, P('x', 'y'))" in text


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- source


MODULE = '''"""A model."""

from __future__ import annotations

import jax.numpy as jnp


def model(x, up, down):
    hidden = jnp.tanh(
        x @ up  # over several lines
    )
    return hidden @ down
'''


def test_patches_apply_and_the_patched_source_constrains(tmp_path: Path) -> None:
    """`git apply` takes the patch; the patched function has the constraints when it is traced."""
    (tmp_path / "model.py").write_text(MODULE, "utf-8")
    layout = Layout((("x",), ("y",)))
    common = {"values": (0,), "layouts": (layout,), "source": "model.py:9", "path": str(tmp_path / "model.py")}
    constraints = (Constraint(**common, line=9, variable="hidden"), Constraint(**common, line=12, variable=""))
    (tmp_path / "a.patch").write_text(written.patch(constraints, tmp_path), "utf-8")
    subprocess.run(["git", "apply", "a.patch"], cwd=tmp_path, check=True)
    space: dict[str, Any] = {}
    exec((tmp_path / "model.py").read_text("utf-8"), space)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(space["model"])(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES))
    placed = [eqn.params["sharding"].spec for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]
    assert placed == [jax.P("x", "y"), jax.P("x", "y")]
