"""Points of a sweep: slices of chips, phases, keys and lower bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import autoshard
from autoshard.sweep.job import JobError
from autoshard.sweep.lower_bounds import lower_bound, reason_to_prune
from autoshard.sweep.points import Point, Unmade, key, points, topologies, trace_run
from autoshard.sweep.results import Result
from autoshard.sweep.slice_shapes import shapes
from autoshard.sweep.worker import solve, unpack
from costmodels.machine import chip, parse_topology
from tests.support.effort import examples
from tests.support.layout_strategies import blocks
from tests.support.models import Block, arguments, function
from tests.support.scripts.jobs import JOB, job
from tests.support.scripts.sweep_target import network
from tests.support.tracing import trace

# --- Shapes and points


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("v4", 1, ((1,),)),
        ("v4", 8, ((2, 4), (2, 2, 2))),
        ("v4", 16, ((4, 4), (2, 2, 4))),
        ("v4", 64, ((4, 4, 4),)),
        ("v4", 128, ((4, 4, 8),)),
        ("v4", 256, ((4, 4, 16), (4, 8, 8))),
        ("v4", 3, ()),
        ("v5e", 16, ((16,), (2, 8), (4, 4))),
        ("v5e", 256, ((16, 16),)),
        ("h100", 4, ((4,),)),
        ("h100", 32, ((4, 8),)),
        ("h100", 12, ()),
        ("cpu", 8, ((8,), (2, 4))),
    ],
)
def test_the_shapes_of_a_count_of_chips(name: str, count: int, expected: tuple):
    assert set(shapes(chip(name), count)) == set(expected)


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("v4", 16, ((2, 2, 4),)),
        ("v4", 8, ((2, 2, 2),)),
        ("v4", 128, ((4, 4, 8),)),
        ("v5p", 4, ((2, 2),)),
        ("v5e", 1, ((1,),)),
        ("v5e", 16, ((4, 4),)),
        ("v6e", 32, ((4, 8),)),
        ("v6e", 2, ()),
        ("h100", 32, ((4, 8),)),
        ("cpu", 8, ((8,), (2, 4))),
    ],
)
def test_the_slices_that_vendors_list(name: str, count: int, expected: tuple):
    assert set(shapes(chip(name), count, any_shape=False)) == set(expected)


def test_a_slice_that_no_vendor_lists_is_said() -> None:
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    notes = {
        name: [text for text in autoshard.search(jnp.tanh, x, topology=name).warnings if "No vendor lists" in text]
        for name in ("v5e:1x8", "v5e:2x4")
    }
    assert len(notes["v5e:1x8"]) == 1 and "a slice of 1x8 v5e chips" in notes["v5e:1x8"][0] and not notes["v5e:2x4"]


@given(st.sampled_from(["v4", "v5e", "v5p", "v6e", "h100", "cpu"]), st.integers(1, 512))
def test_every_shape_is_a_topology_of_so_many_chips(name: str, count: int):
    for sides in shapes(chip(name), count):
        assert parse_topology(f"{name}:{'x'.join(map(str, sides))}").size == count


def test_a_count_that_comes_in_no_slice_is_refused(tmp_path: Path):
    with pytest.raises(JobError, match="there is no slice of 3 v5e chips"):
        topologies(replace(job(tmp_path), counts=(3,)))


def test_a_phase_has_a_point_for_each_combination_of_what_it_reads(tmp_path: Path):
    every = list(points(job(tmp_path)))
    assert len(every) == len(set(map(str, every))) == 2 * 8  # v5e:4 and v5e:2x2
    asked = job(tmp_path)
    (phase,) = asked.phases
    fewer = replace(phase, arguments={**phase.arguments, "dtype": "float32"})
    assert len(list(points(replace(asked, phases=(fewer,))))) == 2 * 4


def test_an_expression_that_is_no_whole_number_somewhere_spoils_that_point_only(tmp_path: Path):
    every = list(points(job(tmp_path, JOB.replace('{ of = "width" }', '{ of = "width / 512" }'))))
    spoilt = [point for point in every if isinstance(point, Unmade)]
    assert len(spoilt) == 8
    assert spoilt[0].why == "width / 512 must be a whole number, got 0.5"


def test_equal_points_have_one_key_and_others_another(tmp_path: Path):
    every = [point for point in points(job(tmp_path)) if isinstance(point, Point)]
    keys = [key(point) for point in every]
    assert len(set(keys)) == len(keys)
    again = replace(every[0], knobs=(), runs=(replace(every[0].runs[0], phase="other", tokens=1.0),))
    assert key(again) == keys[0]
    assert key(replace(every[0], memory_bytes=2**30)) != keys[0]


# --- Bounds


@pytest.mark.long
@examples(8)
@given(blocks(), st.sampled_from(["cpu:2", "v5e:2", "v4:2", "h100:2"]), st.sampled_from([0.0, 128.0]))
def test_no_plan_is_below_the_lower_bound(block: Block, name: str, keeps: float):
    from search import Limits, NoPlan, search

    topology, program = parse_topology(name), trace(function(block), *arguments(block)).program
    if keeps:  # small arrays stay on the chip, the smaller for being split
        topology = replace(topology, chip=replace(topology.chip, on_chip_bytes=keeps))
    found = lower_bound(program, topology)
    try:
        solution = search(program, topology, Limits(rounds=5, wall_seconds=5.0))
    except NoPlan:
        reject()
    assert found.seconds <= solution.check.seconds * (1 + 1e-9)
    assert found.bytes <= solution.check.peak_bytes * (1 + 1e-9)


def test_the_bound_of_a_matmul_that_splits_evenly_is_its_price(tmp_path: Path):
    """2·m·k·n FLOPs at C, or its bytes at W, over n chips; no layout needs a collective where all is batch."""
    (point, *_) = points(job(tmp_path))
    assert isinstance(point, Point)
    program, topology = trace_run(point.runs[0]).traced.program, point.topology
    local = lower_bound(program, topology).seconds
    alone = lower_bound(program, parse_topology("v5e:1")).seconds
    assert alone / topology.size <= local <= alone


def test_arrays_that_may_stay_on_the_chip_are_no_part_of_the_bound():
    """A hidden array of 4 MiB stays there only in pieces; the bound must not count it, whole as it sees it."""
    work = network(2048, 256)
    program = trace(work.fn, *work.args).program
    plain = parse_topology("cpu:8")

    def bound(keeps: float) -> float:
        return lower_bound(program, replace(plain, chip=replace(plain.chip, on_chip_bytes=keeps))).seconds

    assert bound(2**20) == bound(2**30) < bound(0.0)


def test_points_are_ruled_out_by_memory_and_by_latency(tmp_path: Path):
    (point, *_) = points(job(tmp_path))
    assert isinstance(point, Point)
    assert reason_to_prune(point, None, None) == ""
    assert "a step takes at least" in reason_to_prune(point, 1e-9, None)
    assert "its arrays take at least" in reason_to_prune(replace(point, memory_bytes=1024.0), None, None)


def test_a_job_pads_unless_it_says_otherwise(tmp_path: Path):
    odd = JOB.replace("[4]", "[3]").replace("[256, 1024]", "1024").replace("[8, 64]", "64").replace("v5e", "cpu")

    def solved(text: str) -> Result:
        point, *_ = points(job(tmp_path, text))
        assert isinstance(point, Point)
        return solve(point)

    padded, plain = solved(odd), solved(odd + "[search]\npadding = false\n")
    assert [bool(unpack(each.plans["decode"]).padding) for each in (padded, plain)] == [True, False]
    assert padded.phases["decode"].useful_flops == plain.phases["decode"].useful_flops
