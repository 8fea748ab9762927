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
