"""Compiled programs are what was planned, on host devices and by the TPU compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import autoshard
from autoshard import Plan, Workload, audit
from autoshard.auditing.audit import AuditError, compare
from costmodels.machine import Topology, parse_topology
from examples import palm


@cache
def slow_host() -> Topology:
    """Eight host devices whose memory is slow beside their links: weights are worth splitting, at any size."""
    topology = parse_topology("cpu:2x2x2")
    chip = topology.chip.override({"hbm_bytes_per_second": 1e7}, "slow, so that tiny weights are split")
    return replace(topology, chip=chip, axes=tuple(replace(axis, launch_seconds=0.0) for axis in topology.axes))


def tiny(phase: str) -> Workload:
    if phase == "decode":
        return palm.decode(size="tiny", batch=8, context=16)
    return palm.prefill(size="tiny", batch=2, length=16)


@cache
def planned(phase: str) -> Plan:
    work = tiny(phase)
    return autoshard.search(
        work.fn, *work.args, topology=slow_host(), donate_argnums=work.donate_argnums, name=work.name
    )


@pytest.mark.long
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_host_devices_run_what_was_planned(phase: str) -> None:
    work = tiny(phase)
    found = audit(planned(phase), work.fn, *work.args)
    assert found.ok, str(found)
    assert {"all-gather", "reduce-scatter", "all-to-all"} <= {each.kind for each in found.collectives}
    assert all(pair.planned and pair.compiled for pair in found.pairs)
    assert found.peak_bytes and found.compute_seconds is None


def test_another_program_is_not_the_plan() -> None:
    work = tiny("prefill")
    text = planned("prefill").jit(work.fn).lower(*work.args).compile().as_text()
    found = compare(planned("decode"), text)
    assert not found.ok and {"missing", "unplanned"} <= {difference.kind for difference in found.differences}


def test_an_audit_as_json() -> None:
    work = tiny("decode")
    data = json.loads(json.dumps(audit(planned("decode"), work.fn, *work.args).to_dict()))
    assert data["ok"] is True and data["plan"] == "palm-tiny-decode" and data["topology"] == "cpu:2x2x2"
    assert {row["kind"] for row in data["planned"]} == {row["kind"] for row in data["compiled"]}
    assert sum(row["planned"] for row in data["wire_bytes"]) > 0


def test_targets_that_cannot_be_had() -> None:
    work = tiny("decode")
    with pytest.raises(
        autoshard.AutoshardError, match="the chip must be one of a100, h100, h200, b200 for the GPU compiler"
    ):
        audit(planned("decode"), work.fn, *work.args, target="gpu")
    with pytest.raises(
        autoshard.AutoshardError, match="the chip must be one of v4, v5p, v5e, v6e for the TPU compiler"
    ):
        audit(planned("decode"), work.fn, *work.args, target="tpu")
    with pytest.raises(autoshard.PlanMismatchError):
        audit(planned("decode"), tiny("prefill").fn, *tiny("prefill").args)


@pytest.mark.long
@pytest.mark.tpu
def test_palm_540b_decode_is_what_the_tpu_compiler_makes_of_it() -> None:
    work = palm.decode()
    plan = autoshard.search(
        work.fn, *work.args, topology=parse_topology("v4:4x4x4"), donate_argnums=work.donate_argnums, name=work.name
    )
    found = audit(plan, work.fn, *work.args, target="tpu")
    assert found.ok, str(found)
    assert found.peak_bytes == pytest.approx(plan.estimate.peak_bytes, rel=0.05)
    for planned_bytes, compiled_bytes in found.wire_bytes().values():
        assert compiled_bytes == pytest.approx(planned_bytes, rel=0.01)
    assert found.compute_seconds and found.replay is not None and found.step_seconds is not None
    assert found.replay.floor_seconds < found.replay.core_seconds < found.step_seconds
    assert found.replay.exposed_seconds == pytest.approx(found.collective_seconds, rel=0.01), "decode hides nothing"
    assert all(each.instruction.source.startswith("palm.py:") for each in found.costs[:10])


@pytest.mark.long
@pytest.mark.tpu
def test_arguments_that_are_gathered_behind_matmuls_are_not_copied_ahead_of_all() -> None:
    """Six layers of weights: copies of their pieces would take a tenth of the peak."""
    layers, width, inner = 6, 8192, 28672

    def stack(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
        for up, down in zip(ups, downs, strict=True):
            hidden = autoshard.pin(x @ up, PartitionSpec("y", "x"))
            x = autoshard.pin(hidden @ down, PartitionSpec("y", "x"))
        return x

    def weights(*shape: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * layers

    args = (jax.ShapeDtypeStruct((16384, width), jnp.bfloat16), weights(width, inner), weights(inner, width))
    pins = {"ups.*": PartitionSpec(None, "x"), "downs.*": PartitionSpec(("x", "y"))}
    plan = autoshard.search(stack, *args, topology="v5e:4x4", pins=pins)
    assert {("all-gather", ("y",))} <= {(each.kind, each.axes) for each in plan.estimate.collectives}
    found = audit(plan, stack, *args, target="tpu")
    assert found.ok, str(found)
    hidden = [each for each in found.collectives if "async" in each.spelling]
    assert len(hidden) >= layers - 2, "the compiler still gathers them while matmuls run"


@pytest.mark.long
@pytest.mark.tpu
def test_what_fits_is_not_computed_again() -> None:
    """The compiler counts the result of 512 MiB all the time, and would gather twice to make room for it."""
    rows = 8192

    def fn(table: jax.Array, x: jax.Array, up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathered = autoshard.pin(jnp.tanh(x), PartitionSpec())
        mixed = gathered * autoshard.pin(jnp.tanh(gathered @ up) @ down, PartitionSpec())
        few = mixed[:, :8] + table[0, :8]
        return few, jnp.broadcast_to(few[:, :1], (rows, 4 * rows))

    shapes = ((904_000, rows), (rows, rows), (rows, 2 * rows), (2 * rows, rows))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    pins = {"x": PartitionSpec(("x", "y")), **dict.fromkeys(("table", "up", "down"), PartitionSpec())}
    plan = autoshard.search(fn, *args, topology="v5e:2x2", pins=pins)
    found = audit(plan, fn, *args, target="tpu")
    assert found.ok, str(found)
    assert found.unplanned_bytes() == 0


@pytest.mark.tpu
def test_a_program_that_does_not_fit_is_refused_by_the_compiler() -> None:
    topology = parse_topology("v5e:2x2")
    roomy = replace(topology, chip=topology.chip.override({"usable_hbm_bytes": 1e15}, "a wish"))
    plan = autoshard.search(lambda x: x + 1, jax.ShapeDtypeStruct((2**20, 2**15), jnp.float32), topology=roomy)
    with pytest.raises(
        AuditError, match=r"The tpu compiler refused <lambda> for v5e:2x2\. It says: .*RESOURCE_EXHAUSTED"
    ):
        audit(plan, lambda x: x + 1, jax.ShapeDtypeStruct((2**20, 2**15), jnp.float32), target="tpu")
