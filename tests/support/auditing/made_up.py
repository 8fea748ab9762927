"""Audits of made-up programs: planned and compiled collectives side by side."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp

import autoshard
from autoshard import Audit, Plan
from autoshard.auditing import hlo_collectives
from autoshard.auditing.audit import compare
from autoshard.auditing.findings import CompileTarget
from autoshard.auditing.hlo_collectives import CompiledCollective
from autoshard.planning.records import PlannedCollective
from costmodels.machine import parse_topology
from costmodels.machine.collectives import seconds

V4 = parse_topology("v4:4x4x4")
KIB = 1024


@cache
def plan_of_nothing() -> Plan:
    return autoshard.search(lambda x: x, jax.ShapeDtypeStruct((64, 64), jnp.float32), topology=V4)


MILLISECOND = """\
HloModule jit_f, is_scheduled=true

%turned (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  ROOT %t = f32[64,64]{1,0} transpose(%x), dimensions={1,0}
}

ENTRY %main (x.1: f32[64,64]) -> f32[64,64] {
  %x.1 = f32[64,64]{1,0} parameter(0)
  ROOT %copy_fusion = f32[64,64]{1,0} fusion(%x.1), kind=kLoop, calls=%turned, \
metadata={op_name="jit(f)/layer/transpose" source_file="/home/user/model.py" source_line=7}, \
backend_config={"estimated_cycles":"1050000"}
}
"""


def timed(planned_seconds: float, target: CompileTarget = "tpu") -> Audit:
    """A program of one instruction that takes a millisecond, beside a plan of so many seconds."""
    nothing = plan_of_nothing()
    return compare(replace(nothing, estimate=replace(nothing.estimate, seconds=planned_seconds)), MILLISECOND, target)


def p(kind: str, axes: str, bytes: float, count: int = 1) -> PlannedCollective:
    each = float(seconds(kind, [V4.axis(axis) for axis in axes], bytes))
    return PlannedCollective(kind, tuple(axes), bytes, count, count * each, "w for dot_general")


def c(kind: str, axes: str | None, bytes: int, count: int = 1, spelling: str = "", **more) -> CompiledCollective:
    on = None if axes is None else tuple(axes)
    return CompiledCollective(kind, on, bytes, count, "", "palm.py:1", False, spelling or kind, **more)


def compared(
    monkeypatch, planned, compiled, target: CompileTarget = "tpu", arrays=(), peak: float | None = None
) -> Audit:
    monkeypatch.setattr(hlo_collectives, "collectives", lambda text, axes: tuple(compiled))
    nothing = plan_of_nothing()
    estimate = replace(nothing.estimate, collectives=tuple(planned), peak_bytes=100.0)
    return compare(replace(nothing, estimate=estimate), "", target, peak, arrays)


AG, RS, AR, A2A, CP = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
