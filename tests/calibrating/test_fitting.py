"""Fitting constants to timings: what the model made is found again, exactly without noise and closely with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.fitting import (
    COLLECTIVES,
    Timing,
    fit_topology,
    predict,
    relative_least_squares,
    residuals,
)
from costmodels.machine.topology import Topology, parse_topology
from tests.support.effort import examples

TOPOLOGIES = ("cpu:8", "cpu:2x4", "v5e:4x4", "v4:4x4x4", "h100:8", "h100:2x8")
POSITIVE = st.floats(0.5, 2.0)


def work(topology: Topology) -> list[Timing]:
    """Pieces of work of every kind, each in its own regime on every chip of the catalogue; no seconds yet."""
    sides = (4096, 5120, 6144, 8192, 12288, 16384, 24576)
    matmuls = [Timing("matmul", (n, n, n), 1.0, dtype) for dtype in ("bfloat16", "float32") for n in sides]
    rows = [Timing("one row", (1, n, n), 1.0, "bfloat16") for n in (4096, 8192)]
    vector = [Timing("vector", (n,), 1.0, flops_per_element=1e5) for n in (2**10, 2**16)]
    memory = [Timing("memory", (n,), 1.0, flops_per_element=1e-3) for n in (2**20, 2**24)]
    names = [(axis.name,) for axis in topology.axes]
    names += [tuple(axis.name for axis in topology.axes)] if len(names) > 1 else []
    wires = [
        Timing(kind, (n,), 1.0, axes=a) for kind in COLLECTIVES for a in names for n in (2**10, 2**16, 2**24, 2**28)
    ]
    return [*matmuls, *rows, *vector, *memory, *wires]


def changed(topology: Topology, by: list[float]) -> Topology:
    """The topology with every constant that timings tell multiplied, and no overhead left at 0."""
    names = [name for name in topology.chip.constants if name.endswith("_seconds") or "per_second" in name]
    others = (
        "vector_elements",
        "vector_overhead",
        "stream_",
        "converted_",
        "flops_per_second.int8",
        "flops_per_second.float8",
    )
    told = [name for name in names if not name.startswith(others)]
    values = {
        name: (topology.chip.constants[name].value or 1e-6) * by[i % len(by)] for i, name in enumerate(sorted(told))
    }
    chip = topology.chip.override(values, "true")
    return replace(topology, chip=chip, axes=_axes(topology, chip))


def _axes(topology: Topology, chip):
    from costmodels.machine.topology import complete_axes

    return complete_axes(replace(topology, chip=chip)).axes


def timed(topology: Topology, true: Topology, noise=lambda: 1.0) -> list[Timing]:
    return [
        replace(each, seconds=predict(each, true) * noise(), fitted=i % 3 != 1) for i, each in enumerate(work(topology))
    ]


@examples(8)
@given(st.sampled_from(TOPOLOGIES), st.lists(POSITIVE, min_size=7, max_size=7))
def test_what_the_model_made_is_predicted_exactly(name: str, by: list[float]):
    topology = _without_vector_loops(parse_topology(name))
    true = changed(topology, by)
    timings = [each for each in timed(topology, true) if _pure(each, true)]
    found = fit_topology(timings, topology, "here")
    for each in timings:
        assert predict(each, found) == pytest.approx(each.seconds, rel=1e-6), each


def _without_vector_loops(topology: Topology) -> Topology:
    """The topology without the loops of the vector unit, whose constants no timing tells."""
    names = ("vector_elements_per_second", "vector_overhead_seconds", "stream_overhead_seconds")
    return replace(topology, chip=replace(topology.chip, **dict.fromkeys(names, 0.0)))


def _pure(timing: Timing, true: Topology) -> bool:
    """Whether a timing is of the regime that its kind stands for: a matmul computes, one row waits for memory."""
    from costmodels.fitting import model_seconds

    compute, memory, _ = model_seconds(timing, true.chip) if timing.kind not in COLLECTIVES else (1.0, 0.0, 1.0)
    return (compute >= memory) == (timing.kind not in ("one row", "memory"))


def test_constants_are_found_closely_in_noise():
    topology = parse_topology("h100:8")
    true = changed(topology, [0.5, 0.7, 1.3, 2.0, 0.9, 1.1, 1.7])
    random = np.random.default_rng(0)
    found = fit_topology(
        [each for each in timed(topology, true, lambda: random.normal(1.0, 0.03)) if _pure(each, true)],
        topology,
        "here",
    )
    for each in (
        Timing("memory", (2**28,), 1.0, flops_per_element=1e-3),
        Timing("matmul", (2**14, 2**14, 2**14), 1.0, "bfloat16"),
        Timing("all-gather", (2**30,), 1.0, axes=("x",)),
        Timing("all-to-all", (2**10,), 1.0, axes=("x",)),
    ):
        assert predict(each, found) == pytest.approx(predict(each, true), rel=0.1), each


def test_what_was_fitted_is_measured_and_all_else_as_it_was():
    topology = parse_topology("cpu:8")
    found = fit_topology(timed(topology, changed(topology, [2.0])), topology, "this machine")
    was, now = topology.chip.constants, found.chip.constants
    measured = {name for name, constant in now.items() if constant.status == "measured"}
    assert "hbm_bytes_per_second" in measured and "bus.egress_bytes_per_second" in measured
    assert all(now[name].source == "this machine" for name in measured)
    assert all(now[name] == was[name] for name in set(was) - measured)
    assert found.axis("x").bytes_per_second == now["bus.egress_bytes_per_second"].value


def test_held_out_timings_take_no_part():
    topology = parse_topology("cpu:8")
    timings = timed(topology, topology)
    wild = [each if each.fitted else replace(each, seconds=each.seconds * 100) for each in timings]
    assert fit_topology(wild, topology, "here").chip == fit_topology(timings, topology, "here").chip
    everything = residuals(wild, fit_topology(wild, topology, "here"))[-1]
    assert everything.series == "all" and everything.held_out_median == pytest.approx(0.99, rel=1e-3)
    assert everything.fitted_median == pytest.approx(0.0, abs=0.3)


@given(st.lists(st.floats(0.01, 10), min_size=6, max_size=6), st.lists(st.floats(0.0, 5), min_size=2, max_size=2))
def test_nothing_is_fitted_below_zero_and_nothing_nearby_is_better(target: list[float], trial: list[float]):
    columns = [np.ones(6), np.arange(1.0, 7.0)]
    found = relative_least_squares(columns, target)

    def error(x):
        return sum(((x[0] + x[1] * a) / t - 1) ** 2 for a, t in zip(columns[1], target, strict=True))

    assert min(found) >= 0
    assert error(found) <= error(trial) + 1e-9
