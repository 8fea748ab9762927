"""Faults planted in programs that were planned: each is named by the audit, on every target, and the audit fails by it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import autoshard
from autoshard import Audit, Plan, audit
from autoshard.auditing.audit import compare
from autoshard.auditing.findings import CompileTarget
from autoshard.emitting import targets
from costmodels.machine import Topology, parse_topology

TOPOLOGIES: dict[CompileTarget, str] = {"host": "cpu:2x2", "tpu": "v5e:2x2", "gpu": "h100:4"}
SIZES: dict[CompileTarget, tuple[int, int, int]] = {
    "host": (1024, 1024, 4096),
    "tpu": (16384, 4096, 16384),  # more than its on-chip memory holds
    "gpu": (4096, 4096, 8192),
}
"""Rows, width and inner width."""
TARGETS = (
    "host",
    pytest.param("tpu", marks=[pytest.mark.tpu, pytest.mark.long]),
    pytest.param("gpu", marks=pytest.mark.skipif(not targets.has_cuda(), reason="the GPU compiler is not installed")),
)


def step(cache: jax.Array, x: jax.Array, up: jax.Array, down: jax.Array, proj: jax.Array) -> tuple[Any, ...]:
    """A reduce-scatter, an all-gather, a slice that costs nothing, and a donated argument."""
    axes = tuple(axis.name for axis in topology_of(step.target).axes)
    hidden = autoshard.pin(x @ up, PartitionSpec(None, axes))
    out = autoshard.pin(hidden @ down, PartitionSpec(axes))
    return cache + autoshard.pin(x @ proj, PartitionSpec(axes)), autoshard.pin(jnp.tanh(out), PartitionSpec())


step.target = "host"


@cache
def topology_of(target: CompileTarget) -> Topology:
    return parse_topology(TOPOLOGIES[target])


def specs(target: CompileTarget) -> dict[str, PartitionSpec]:
    axes = tuple(axis.name for axis in topology_of(target).axes)
    kept = {"cache": PartitionSpec(axes), "up": PartitionSpec(None, axes), "down": PartitionSpec(axes)}
    return {"cache": kept["cache"], "x": PartitionSpec(), **kept, "proj": PartitionSpec()}


def arguments(target: CompileTarget) -> list[jax.ShapeDtypeStruct]:
    rows, width, inner = SIZES[target]
    shapes = ((rows, inner), (rows, width), (width, inner), (inner, width), (width, inner))
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@cache
def planned(target: CompileTarget) -> Plan:
    step.target = target
    return autoshard.search(
        step, *arguments(target), topology=topology_of(target), donate_argnums=0, pins=specs(target)
    )


# --- the same program by hand, where a fault can be put in


def scatter_rows(piece: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """As the emitted program does it: the TPU compiler pads and realigns rows that are scattered in place."""
    rows, columns = piece.shape
    chips = lax.axis_size(axes)
    view = piece.reshape(chips, rows // chips, columns)
    return lax.psum_scatter(view, axes, scatter_dimension=0, tiled=False)


def local(fault: str, axes: tuple[str, ...], scattered: list[tuple[str, ...]], chips: int) -> Callable[..., Any]:
    """The step on one chip's pieces; `scattered` are the axes of the planned reduce-scatters, in order."""

    def own(array: jax.Array, dim: int = 0) -> jax.Array:
        size = array.shape[dim] // chips
        return lax.dynamic_slice_in_dim(array, lax.axis_index(axes) * size, size, dim)

    def run(cache, x, up, down, proj):
        up = own(lax.optimization_barrier(up), 1) if fault == "a replicated argument" else up
        hidden = x @ up
        if fault == "a replicated operand":
            whole = lax.all_gather(hidden, axes, axis=1, tiled=True)
            out = own(whole @ lax.all_gather(down, axes, axis=0, tiled=True))
        elif fault == "all-reduce and slice":
            out = own(lax.optimization_barrier(lax.psum(hidden @ down, axes)))
        else:
            out = hidden @ down
            for group in scattered:
                out = scatter_rows(out, group)
        act = jnp.tanh(out)
        if fault == "a gather by all-reduce":
            zeros, at = jnp.zeros((out.shape[0] * chips, out.shape[1])), lax.axis_index(axes) * out.shape[0]
            act = lax.psum(lax.dynamic_update_slice_in_dim(zeros, act, at, 0), axes)
        else:
            act = lax.all_gather(act, axes, axis=0, tiled=True)
        rows = own(x @ proj) if fault == "a dropped slice" else own(x) @ proj
        if fault == "an extra gather":
            rows = own(lax.optimization_barrier(lax.all_gather(rows, axes, axis=0, tiled=True)))
        return cache + rows, act

    return run


@cache
def audited(target: CompileTarget, fault: str) -> Audit:
    plan, topology = planned(target), topology_of(target)
    axes = tuple(axis.name for axis in topology.axes)
    placed = specs(target)
    if fault == "a replicated argument":
        placed["up"] = PartitionSpec()
    results = (PartitionSpec(axes), PartitionSpec())
    found: dict[str, Callable[[], Any]] = {
        "host": lambda: targets.host_devices(topology.size),
        "tpu": lambda: targets.tpu_devices(topology.name, topology.shape, topology.chip.name),
        "gpu": lambda: targets.gpu_devices(topology),
    }
    mesh = targets.mesh_of(found[target](), topology.axis_sizes)
    scattered = [each.axes for each in plan.estimate.collectives if each.kind == "reduce-scatter"]
    run = jax.shard_map(
        local(fault, axes, scattered, topology.size),
        mesh=mesh,
        in_specs=tuple(placed.values()),
        out_specs=results,
        check_vma=False,
    )
    shardings = [tuple(NamedSharding(mesh, spec) for spec in side) for side in (placed.values(), results)]
    donated = () if fault == "a dropped donation" else (0,)
    jitted = jax.jit(run, in_shardings=shardings[0], out_shardings=shardings[1], donate_argnums=donated)
    compiled = jitted.lower(*arguments(target)).compile()
    memory = compiled.memory_analysis()
    return compare(plan, compiled.as_text() or "", target, getattr(memory, "peak_memory_in_bytes", None) or None)


FAULTS = {
    "all-reduce and slice": {"bytes on the wire"},
    "a gather by all-reduce": {"same plan at higher cost", "bytes on the wire"},
    "an extra gather": {"unplanned", "bytes on the wire"},
    "a replicated operand": {"missing", "unplanned", "bytes on the wire", "replicated", "FLOPs"},
    "a replicated argument": {"argument"},
    "a dropped donation": {"donation"},
    "a dropped slice": {"replicated", "FLOPs"},
}
"""Each fault with the kinds of findings that have to name it, all of which count."""


@pytest.mark.parametrize("target", TARGETS)
def test_the_planned_program_is_as_planned(target: CompileTarget) -> None:
    plan = planned(target)
    assert {each.kind for each in plan.estimate.collectives} == {"reduce-scatter", "all-gather"}
    for found in (audit(plan, step, *arguments(target), target=target), audited(target, "")):
        assert found.ok, str(found)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_fault_is_named(target: CompileTarget, fault: str) -> None:
    found = audited(target, fault)
    assert not found.ok, str(found)
    named = {each.kind for each in found.differences if each.counts}
    assert FAULTS[fault] <= named, str(found)
    if fault == "all-reduce and slice":  # of one planned reduce-scatter, or of one for each axis
        assert "same plan at higher cost" in named or {"missing", "unplanned"} <= named, str(found)
