"""Rings: products in pieces beside permutes, against the unsharded product; their bytes on the wire; what is shared."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import autoshard
from autoshard.auditing.hlo_collectives import collectives
from autoshard.auditing.matching import match_collectives
from autoshard.auditing.planned_times import distinct_rings, is_ring, ring_parts
from autoshard.candidates import Candidate, compile_variants
from autoshard.emitting.collectives.rings import gather_in_ring, multiply_pieces, scatter_in_ring
from autoshard.emitting.program import emit
from autoshard.planning.records import PlannedCollective
from costmodels.machine.conventions import Pricing
from costmodels.machine.topology import Topology, parse_topology
from search.answer.assignment import Choice, rings
from search.answer.assignment import collectives as planned_collectives
from search.formulation.collective_steps import CollectiveStep
from search.formulation.layouts import Layout
from tests.support.effort import examples
from tests.support.layout_strategies import cpu_topology, mesh_of, quick
from tests.support.tracing import trace

MESHES = ("2", "3", "4", "6", "8", "2x2", "2x4", "4x2", "2x2x2")
LEFT, RIGHT = "rs", "sc"
"""Rows, what is summed over, and columns."""
FORMS = (("all-gather", 0, "r"), ("all-gather", 0, "s"), ("all-gather", 1, "s"), ("all-gather", 1, "c"))
SCATTERS = (("reduce-scatter", "result", "r"), ("reduce-scatter", "result", "c"))


def run_form(
    form: tuple[str, Any, str], mesh_shape: str, sizes: dict[str, int], dtype: str, two_ways: bool
) -> tuple[Any, Any, Any]:
    """A product beside a ring over all axes of a mesh: its result, that of one device, and the compiled collectives."""
    kind, side, letter = form
    topology = cpu_topology(mesh_shape)
    axes, of = tuple(topology.axis_sizes), topology.axis_sizes
    rng = np.random.default_rng(0)
    left, right = (
        jnp.asarray(rng.integers(-3, 4, [sizes[each] for each in letters]), dtype) for letters in (LEFT, RIGHT)
    )
    traced = trace(jnp.matmul, left, right)
    op = next(op for op in traced.program.operations if op.op_class == "matmul")
    eqn = jax.make_jaxpr(jnp.matmul)(left, right).eqns[0]
    whole = Layout(((), ()))

    def multiply(a: Any, b: Any) -> Any:
        return jax.lax.dot_general(a, b, **{k: eqn.params[k] for k in ("dimension_numbers", "preferred_element_type")})

    def on_chip(a: Any, b: Any) -> Any:
        if kind == "all-gather":
            dim = (LEFT, RIGHT)[side].index(letter)
            step = CollectiveStep(kind, axes, whole, whole, source_dim=dim)
            found = gather_in_ring(step, (a, b)[side], of, two_ways)
            return multiply_pieces(op, side, found, (a, b)[1 - side], multiply)
        step = CollectiveStep(kind, axes, whole, whole, target_dim="rc".index(letter))
        return scatter_in_ring(op, step, (a, b), of, multiply)

    cut = letter if kind == "all-gather" else "s"
    specs = [
        PartitionSpec(*(axes if each == cut and (kind != "all-gather" or k == side) else None for each in letters))
        for k, letters in enumerate((LEFT, RIGHT))
    ]
    out = PartitionSpec(*(axes if kind == "reduce-scatter" and each == letter else None for each in "rc"))
    mesh = mesh_of(topology)
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip((left, right), specs, strict=True)]
    mapped = jax.shard_map(on_chip, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False)
    run = jax.jit(mapped, compiler_options=quick()).lower(*placed).compile()
    return np.asarray(run(*placed)), left, (right, collectives(run.as_text() or "", of))


@pytest.mark.parametrize("form", (*FORMS, *SCATTERS), ids=lambda form: "-".join(map(str, form)))
def test_every_form_both_ways_around(form):
    assert_form(form, "6", (1, 2, 1), "float32", True)


@pytest.mark.long
@given(
    form=st.sampled_from((*FORMS, *SCATTERS)),
    mesh_shape=st.sampled_from(MESHES),
    scale=st.tuples(*[st.integers(1, 3)] * 3),
    dtype=st.sampled_from(("float32", "bfloat16")),
    two_ways=st.booleans(),
)
@examples(30)
def test_every_form_equals_the_product_and_sends_what_the_collective_sends(form, mesh_shape, scale, dtype, two_ways):
    assert_form(form, mesh_shape, scale, dtype, two_ways)


def assert_form(
    form: tuple[str, Any, str], mesh_shape: str, scale: tuple[int, int, int], dtype: str, two_ways: bool
) -> None:
    """Rows, columns or what is summed over; one to three axes, one or both ways around."""
    chips = prod(cpu_topology(mesh_shape).axis_sizes.values())
    sizes = {letter: n * chips for letter, n in zip("rsc", scale, strict=True)}
    found, left, (right, sent) = run_form(form, mesh_shape, sizes, dtype, two_ways)
    expected = np.asarray(left, np.float32) @ np.asarray(right, np.float32)
    rounding = 0.0 if dtype == "float32" else 2**-8 * (chips + 1) * np.abs(expected).max()  # small integers are exact
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0.0, atol=rounding)
    topology = cpu_topology(mesh_shape)
    axes = tuple(axis for axis, n in topology.axis_sizes.items() if n > 1)
    letters = (LEFT, RIGHT)[form[1]] if form[0] == "all-gather" else "rc"
    payload = prod(sizes[each] for each in letters) * left.dtype.itemsize
    first = next(iter(topology.axis_sizes.values()))
    hops = [each for each in sent if each.kind == "collective-permute"]
    widened = {payload / first, payload * (4 / left.dtype.itemsize) / first}  # host devices widen 16-bit floats
    assert sum(each.count for each in hops) == first - 1
    assert {float(each.bytes) for each in hops} <= widened and {each.axes for each in hops} == {axes[:1]}
    rest = [each for each in sent if each.kind != "collective-permute"]
    assert [each.kind for each in rest] == ([form[0]] if len(axes) > 1 else [])


@pytest.mark.parametrize(("two_ways", "ahead"), [(True, (0, -1, 1, -2)), (False, (0, -1, -2, -3))])
@pytest.mark.parametrize(("letter", "sums"), [("r", 0), ("s", 3)])
def test_pieces_are_added_up_in_the_order_in_which_they_arrive(two_ways, ahead, letter, sums):
    """Each sum passes a barrier before the next product is added, so that no compiler takes another order."""
    left, right = jnp.zeros((8, 8)), jnp.zeros((8, 8))
    op = next(op for op in trace(jnp.matmul, left, right).program.operations if op.op_class == "matmul")
    dim, whole = LEFT.index(letter), Layout(((), ()))
    step = CollectiveStep("all-gather", ("x",), whole, whole, source_dim=dim)
    came = []

    def on_chip(a: Any, b: Any) -> Any:
        found = gather_in_ring(step, a, {"x": 4}, two_ways)
        came.append(found.ahead)
        return multiply_pieces(op, 0, found, b, jnp.matmul)

    cut = PartitionSpec(*("x" if each == letter else None for each in LEFT))
    mesh = mesh_of(cpu_topology("4"))
    mapped = jax.shard_map(on_chip, mesh=mesh, in_specs=(cut, PartitionSpec()), out_specs=cut, check_vma=False)
    text = str(jax.make_jaxpr(mapped)(left, right))
    assert came[0] == ahead and text.count("optimization_barrier") == sums


# --- in plans


def rings_only(text: str, slow: float = 1.0) -> Topology:
    """Host devices whose collectives take no time but on the wire, so that rings of tiny arrays save time."""
    plain = parse_topology(text)
    axes = tuple(
        replace(axis, bytes_per_second=axis.bytes_per_second * slow, hop_seconds=0.0, launch_seconds=0.0)
        for axis in plain.axes
    )
    return replace(plain, axes=axes, pricing=Pricing(overlap="looped"))


def block(x: Any, gate: Any, up: Any, down: Any) -> Any:
    """A gated feed-forward layer: one gathered array for two products, then a scattered result."""
    x = jnp.sin(x)
    return (jnp.cos(x @ gate) * (x @ up)) @ down


def planned_parts(program: Any, topology: Topology, choice: Choice) -> list[tuple[PlannedCollective, int]]:
    found = []
    for each in planned_collectives(program, topology, choice):
        row = PlannedCollective(
            each.kind, each.axes, each.bytes, each.count, each.seconds, "", float(each.hidden_seconds)
        )
        found += [(part, each.value) for part in ring_parts(row, topology)]
    return found


@given(mesh_shape=st.sampled_from(MESHES), seed=st.integers(0, 2**16))
@examples(5)
@pytest.mark.long
def test_a_random_plan_runs_its_rings_and_sends_what_is_planned(mesh_shape: str, seed: int):
    from tests.support.layout_strategies import problem_of, random_choices

    topology = rings_only(f"cpu:{mesh_shape}")
    rng = np.random.default_rng(seed)
    args = [jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for shape in ((48, 24), (24, 48), (24, 48), (48, 24))]
    traced = trace(block, *args)
    found = [c for c in random_choices(problem_of(traced, topology), rng, 12) if rings(traced.program, topology, c)]
    assume(found)
    run = jax.jit(emit(traced, found[0], topology, mesh_of(topology)), compiler_options=quick()).lower(*args).compile()
    np.testing.assert_allclose(np.asarray(run(*args)[0]), np.asarray(block(*args)), rtol=1e-4, atol=1e-3)
    rows = planned_parts(traced.program, topology, found[0])
    sent = [each for each in collectives(run.as_text() or "", topology.axis_sizes) if each.axes]
    pairs = match_collectives([part for part, _ in rows], [value for _, value in rows], sent, topology)
    assert [pair for pair in pairs if not pair.planned] == []


def columns(x: Any, gate: Any, up: Any) -> tuple[Any, Any]:
    x = jnp.sin(autoshard.pin(x, PartitionSpec(None, "x")))
    x = autoshard.pin(x, PartitionSpec(None, "x"))
    return tuple(autoshard.pin(x @ w, PartitionSpec(None, "x")) for w in (gate, up))  # pyright: ignore


def plan_of(topology: Topology) -> tuple[Any, list[jax.Array]]:
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((512, 512), (512, 1024), (512, 1024))]
    return autoshard.search(columns, *args, topology=topology), args


@pytest.mark.long
def test_two_products_share_one_ring():
    plan, args = plan_of(rings_only("cpu:4"))
    ringed = [each for each in plan.estimate.collectives if is_ring(each, plan.topology)]
    assert [(each.kind, each.hidden_seconds > 0) for each in ringed] == [("all-gather", True)] * 2
    run = plan.jit(columns)
    for found, expected in zip(run(*args), columns(*args), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    audit = autoshard.audit(plan, columns, *args)
    hops = [each for each in audit.collectives if each.kind == "collective-permute"]
    assert sum(each.count for each in hops) == 3 and {each.bytes for each in hops} == {512 * 128 * 4}
    assert audit.ok, str(audit)


@pytest.mark.parametrize(("closed", "ways"), [(True, 2), (False, 1)])
def test_pieces_travel_both_ways_only_where_the_ways_use_links_of_their_own(closed: bool, ways: int):
    """On a line each hop closes the ring the other way, so a second way around would wait for the first."""
    line = parse_topology("v5e:4x1")
    axes = (replace(line.axes[0], wraparound=closed), line.axes[1])
    topology = replace(line, axes=axes, pricing=Pricing(overlap="looped"))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 8192), (8192, 16384), (8192, 16384))]
    plan = autoshard.search(columns, *args, topology=topology)
    assert any(is_ring(each, topology) for each in plan.estimate.collectives)
    traced = trace(columns, *args)
    mesh = mesh_of(cpu_topology("4x1"))
    lowered = jax.jit(emit(traced, plan.choice, topology, mesh)).lower(*args).as_text()
    assert len(set(re.findall(r"source_target_pairs = dense<(\[\[.*?\]\])>", lowered))) == ways


def test_two_products_that_share_a_ring_send_it_once():
    row = PlannedCollective("all-gather", ("x",), 64.0, 1.0, 1.0, "", 2.0)
    whole = replace(row, hidden_seconds=0.0)
    topology = rings_only("cpu:4")
    pairs = [(row, (1, "bfloat16")), (row, (1, "bfloat16")), (row, (2, "bfloat16")), *[(whole, (1, "bfloat16"))] * 2]
    planned, arrays = zip(*pairs, strict=True)
    assert distinct_rings(planned, arrays, topology) == [pairs[0], *pairs[2:]]


def test_a_plan_may_be_emitted_without_its_rings():
    plan, args = plan_of(rings_only("cpu:4"))
    without = replace(plan, emission=replace(plan.emission, rings=False))
    audit = autoshard.audit(without, columns, *args)
    assert {each.kind for each in audit.collectives} == {"all-gather"} and audit.ok, str(audit)


def test_verify_compiles_a_plan_without_its_rings(monkeypatch: pytest.MonkeyPatch):
    """As a way to emit it, where the compiler reports cycles."""
    tried = []
    audit: Any = SimpleNamespace(compute_seconds=1.0, collective_seconds=0.0, step_seconds=1.0, ok=True, is_slow=False)

    def compiled(plan: Any, *_: Any) -> Candidate[Any]:
        tried.append(plan.emission.rings)
        return Candidate(0, plan, audit)

    monkeypatch.setattr("autoshard.candidates.compile_plan", compiled)
    monkeypatch.setattr("autoshard.candidates.choose_formats", lambda plan, *_: plan)
    for pricing, expected in ((Pricing(overlap="looped"), [False]), (Pricing(), [])):
        plan, args = plan_of(replace(rings_only("cpu:4"), pricing=pricing))
        list(compile_variants(Candidate(1, plan, audit), columns, args, "host", lambda _: None))
        assert [each for each in tried if each is not None] == expected
        tried.clear()


def test_a_plan_with_rings_is_saved_and_says_so(tmp_path):
    plan, _ = plan_of(rings_only("cpu:4"))
    plan.save(tmp_path / "plan.json")
    again = autoshard.load(tmp_path / "plan.json")
    assert again.estimate == plan.estimate
    assert sum("hidden by rings of permutes" in each for each in plan.warnings) == 1
    without, _ = plan_of(replace(rings_only("cpu:4"), pricing=Pricing()))
    assert plan.estimate.seconds < without.estimate.seconds


@pytest.mark.parametrize("batched", [False, True])
def test_batched_products_have_no_rings(batched: bool):
    """Attention's products stay whole, as compilers fuse them with the softmax."""
    spec, shape = ("bij,bjk->bik", (4, 256, 256)) if batched else ("ij,jk->ik", (256, 256))
    topology = rings_only("cpu:4")
    args = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    rows = PartitionSpec(*[None] * (len(shape) - 2), "x")

    def product(a: Any, b: Any) -> Any:
        a = autoshard.pin(a, rows)
        return autoshard.pin(jnp.einsum(spec, a, b), PartitionSpec())

    plan = autoshard.search(product, *args, topology=topology)
    assert not (batched and any(is_ring(each, topology) for each in plan.estimate.collectives))
