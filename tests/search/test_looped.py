"""Looped collective einsums as a value of `overlap`: the search against brute force and the checker, and what may be hidden."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

import autoshard
from costmodels.machine.conventions import Pricing
from costmodels.machine.topology import Topology, parse_topology
from search.answer.assignment import Choice, choice_of, collectives, loop_best
from search.answer.check import check
from search.formulation.all_pairs import FORBIDDEN
from search.formulation.axis_renaming import rename, renamings
from search.formulation.problem import build
from search.formulation.reshard import reshard_table
from search.formulation.strategies import LoopedSide
from search.solve import search
from tests.support.effort import examples
from tests.support.enumeration import assert_search_equals_enumeration
from tests.support.layout_strategies import random_states
from tests.support.programs import MESHES, TOPOLOGIES, programs, small_programs


def pieces_first(text: str | Topology, faster: float = 1.0, **pricing) -> Topology:
    """A topology whose collectives take no time but on the wire, so that something of tiny arrays can be hidden.

    Operations have no start-up time, so that the pieces of tiny products cost little more than the products.
    """
    plain = parse_topology(text) if isinstance(text, str) else text
    axes = tuple(
        replace(axis, bytes_per_second=axis.bytes_per_second * faster, hop_seconds=0.0, launch_seconds=0.0)
        for axis in plain.axes
    )
    chip = replace(
        plain.chip, op_overhead_seconds=0.0, stream_overhead_seconds=0.0, piece_loss=0.1, summed_piece_loss=0.2
    )
    return replace(plain, chip=chip, axes=axes, pricing=Pricing(**{"overlap": "looped", **pricing}))


def topologies(of=TOPOLOGIES) -> st.SearchStrategy[Topology]:
    return st.builds(pieces_first, st.sampled_from(of), st.sampled_from((1.0, 30.0, 1000.0)))


def exposed(topology: Topology, overlap: float = 0.0) -> Topology:
    return replace(topology, pricing=replace(topology.pricing, overlap=overlap))


@examples(20)
@given(small_programs(), topologies(MESHES), st.floats(0.3, 1.2))
def test_the_search_equals_enumeration(program, topology, part):
    assert_search_equals_enumeration(program, topology, part)


@examples(25)
@given(programs(), topologies())
def test_looping_lies_between_hiding_nothing_and_hiding_all(program, topology):
    found = search(program, topology)
    assert found.check.faults == () and found.proof.gap == 0.0
    assert found.check.seconds == pytest.approx(found.proof.objective_seconds, rel=1e-9)
    nothing, everything = (search(program, exposed(topology, part)).check.seconds for part in (0.0, 1 - 1e-9))
    assert everything * (1 - 1e-6) <= found.check.seconds <= nothing * (1 + 1e-9)


@examples(60)
@given(programs(), topologies(), st.integers(0, 2**31))
def test_the_checker_prices_any_choice_as_the_search_does(program, topology, seed):
    problem = build(program, topology, np.inf)
    states = random_states(problem, np.random.default_rng(seed))
    assume(states is not None)
    assert states is not None
    choice = choice_of(problem, states)
    found, plain = check(program, topology, choice), check(program, exposed(topology), choice)
    assert found.seconds == pytest.approx(problem.objective(states), rel=1e-9)
    sent = collectives(program, topology, choice)
    assert found.collective_seconds <= plain.collective_seconds * (1 + 1e-9)
    hidden = sum(each.hidden_seconds for each in sent)
    event(f"something is hidden: {hidden > 0}")
    assert hidden == pytest.approx(plain.seconds - found.seconds, rel=1e-6, abs=1e-12 * plain.seconds)
    assert (found.compute_seconds, found.memory_seconds) == (plain.compute_seconds, plain.memory_seconds)


@examples(40)
@given(programs(), topologies(), st.integers(0, 2**31))
def test_a_given_layout_loops_what_hides_the_most(program, topology, seed):
    """No other word on which collective a product loops makes the same layouts faster."""
    problem = build(program, topology, np.inf)
    rng = np.random.default_rng(seed)
    states = random_states(problem, rng)
    assume(states is not None)
    assert states is not None
    best = loop_best(program, topology, choice_of(problem, states))
    sides: tuple[LoopedSide, ...] = ("result", 0, 1)
    other = tuple(s._replace(looped=sides[rng.integers(3)]) for s in best.strategies)
    least = check(program, topology, best).seconds
    assert least <= check(program, topology, Choice(other, best.hubs)).seconds * (1 + 1e-9)


@examples(15)
@given(programs())
def test_renaming_interchangeable_axes_changes_no_cost(program):
    topology = pieces_first("cpu:2x2")
    best = search(program, topology)
    for names in renamings(topology.symmetries()):
        strategies = tuple(rename(s, names) for s in best.choice.strategies)
        hubs = {value: rename(layout, names) for value, layout in best.choice.hubs.items()}
        cost = check(program, topology, Choice(strategies, hubs)).seconds
        assert cost == pytest.approx(best.check.seconds, rel=1e-9)


@pytest.mark.parametrize("text", ["cpu:2x2", "v4:2x2x2", "2xv5e:2x2"])
@pytest.mark.parametrize("shape", [(64, 2048), (8, 64, 1024)])
def test_paths_with_ends_are_the_cheapest(text: str, shape: tuple[int, ...]):
    """Which of several cheapest paths is taken changes no cost; it begins and ends with what is said to be looped."""
    plain = parse_topology(text)
    topology = replace(plain, pricing=Pricing(overlap="looped"))
    table, usual = (reshard_table(shape, 2.0, where, True) for where in (topology, plain))
    price = dict(zip(table.graph.steps, table.step_seconds.tolist(), strict=True))
    assert np.array_equal(table.seconds, usual.seconds)
    rng, reachable = np.random.default_rng(0), np.argwhere(table.seconds < FORBIDDEN)
    for i, j in reachable[rng.permutation(len(reachable))[:300]]:
        path = table.path(table.layouts[i], table.layouts[j])
        assert sum(price[step] for step in path) == pytest.approx(table.seconds[i, j], rel=1e-8)
        ends = [table.graph.steps[int(k)] if k >= 0 else None for k in (table.ends.first[i, j], table.ends.last[i, j])]
        assert [step in (None, path[at]) if path else step is None for at, step in zip((0, -1), ends, strict=True)]
        if path and path[-1].kind == "all-gather":
            assert ends[1] == path[-1]
        if path and path[0].kind == "reduce-scatter":
            assert ends[0] == path[0]


def _one_product(a, b):
    return autoshard.pin(
        autoshard.pin(a, jax.sharding.PartitionSpec(None, "x")) @ autoshard.pin(b, jax.sharding.PartitionSpec("x")),
        jax.sharding.PartitionSpec(None, "x"),
    )


@pytest.mark.parametrize("inner", [4096, 65_536])
def test_under_total_bandwidth_the_pair_takes_the_longer_of_both_but_for_one_piece(inner: int):
    """Both operands are split along what is contracted: partial sums, each chip's piece sent as it is made."""
    args = (jax.ShapeDtypeStruct((512, inner), jnp.bfloat16), jax.ShapeDtypeStruct((inner, 8192), jnp.bfloat16))
    topology = pieces_first("v4:4x1x1", 1 / 3, bandwidth="total")
    plan = autoshard.search(_one_product, *args, topology=topology)
    (scatter,), (product,) = plan.estimate.collectives, [op for op in plan.operations if op.matmul]
    assert scatter.kind == "reduce-scatter"
    (alone,) = autoshard.search(_one_product, *args, topology=exposed(topology)).estimate.collectives
    overhead = topology.chip.op_overhead_seconds
    work = product.seconds - overhead
    assert (work * 3 / 4 > alone.seconds) == (inner == 65_536)
    assert plan.estimate.seconds == pytest.approx(work / 4 + max(work * 3 / 4, alone.seconds) + overhead, rel=1e-9)
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)


@pytest.mark.parametrize("inner", [4096, 65_536])
def test_a_scattered_product_takes_its_pieces_or_the_hops_and_the_last_sum(inner: int):
    """The wire decides with few columns of the operands, the pieces of the product with many."""
    args = (jax.ShapeDtypeStruct((512, inner), jnp.bfloat16), jax.ShapeDtypeStruct((inner, 8192), jnp.bfloat16))
    topology = pieces_first("v4:4x1x1")
    plan = autoshard.search(_one_product, *args, topology=topology)
    product = next(op for op in plan.operations if op.matmul)
    piece_of = autoshard.search(jnp.matmul, *_piece(inner), topology=pieces_first("v4:1x1x1"))
    piece = next(op for op in piece_of.operations if op.matmul).seconds
    axis, sent = topology.axis("x"), 2 * 512 * 8192
    hop, last = sent / 4 / axis.bytes_per_second, 2 * sent / 8 / topology.chip.vector_elements_per_second
    assert (4 * piece > 3 * hop + piece) == (inner == 65_536)
    taken = max(4 * piece, 3 * hop + piece) + last
    assert plan.estimate.seconds == pytest.approx(taken, rel=1e-9) and taken > product.seconds
    (scatter,) = plan.estimate.collectives
    assert scatter.kind == "reduce-scatter" and scatter.hidden_seconds > 0
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)


@pytest.mark.parametrize(("spec", "loss"), [(("x",), 0.1), ((None, "x"), 0.2)])
def test_a_gathered_product_takes_its_pieces_with_their_loss(spec: tuple[str | None, ...], loss: float):
    """Rows are written to their places; what is summed over is added up. The work decides in both."""
    given, columns = jax.sharding.PartitionSpec(*spec), jax.sharding.PartitionSpec(None, "x")

    def product(a, b):
        return autoshard.pin(autoshard.pin(a, given) @ autoshard.pin(b, columns), columns)

    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8192, 8192), (8192, 65_536))]
    topology = pieces_first("v4:4x1x1")
    plan = autoshard.search(product, *args, topology=topology)
    (gather,) = plan.estimate.collectives
    assert gather.kind == "all-gather" and gather.hidden_seconds > 0
    product_seconds = next(op for op in plan.operations if op.matmul).seconds
    assert plan.estimate.seconds == pytest.approx((1 + loss) * product_seconds, rel=1e-2)
    assert plan.formulas().at(plan.formulas().total.seconds) == pytest.approx(plan.estimate.seconds, rel=1e-9)


def _piece(inner: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A chip's piece of the product: a quarter of what is contracted, and of the columns."""
    shapes = ((512, inner // 4), (inner // 4, 8192 // 4))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)  # pyright: ignore


def test_a_looped_plan_is_kept_in_its_file_and_runs(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (jnp.array(rng.standard_normal(shape), jnp.float32) for shape in ((16, 64), (64, 32)))
    plan = autoshard.search(_one_product, a, b, topology=pieces_first("cpu:2x2"))
    assert [s.looped for s in plan.choice.strategies if s.looped is not None]
    plan.save(tmp_path / "plan.json")
    again = autoshard.load(tmp_path / "plan.json")
    assert again.choice == plan.choice and again.topology.pricing.looped
    np.testing.assert_allclose(again.jit(_one_product)(a, b), a @ b, rtol=1e-4, atol=1e-4)
