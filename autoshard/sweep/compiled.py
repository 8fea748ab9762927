"""Compiled steps of a sweep's frontier: its plans are compiled ahead of time, and the times are kept in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from autoshard._util.tables import time
from autoshard.auditing.audit import audit
from autoshard.emitting.targets import Target
from autoshard.errors import AutoshardError
from autoshard.sweep.analysis.frontier import frontier
from autoshard.sweep.analysis.rows import Row, SweepResult
from autoshard.sweep.points import Point, Run, workload_of
from autoshard.sweep.runner import Done
from autoshard.sweep.store import Store
from autoshard.sweep.worker import unpack


def compile_frontier(
    sweep: SweepResult, done: Iterable[Done], store: Store, target: Target, say: Callable[[str], None]
) -> SweepResult:
    """The sweep with the compiled step times of its frontier's points.

    A plan is compiled once for each target; later runs find its time in the store. A plan that the compiler refuses, or whose
    target reports no times, stays without one, with a line of text.
    """
    points = {each.key: each.point for each in done if isinstance(each.point, Point)}
    best = {row.key for phase in sweep.phases for part in sweep.parts(phase) for row in frontier(part.rows)}
    rows = []
    for row in sweep.rows:
        known = row.key in best and row.key in points
        rows.append(replace(row, compiled_seconds=_steps(row, points[row.key], store, target, say)) if known else row)
    return replace(sweep, rows=tuple(rows))


def _steps(row: Row, point: Point, store: Store, target: Target, say: Callable[[str], None]) -> dict[str, float]:
    """The compiled step of each phase of a point, as far as known."""
    found = {}
    for run in point.runs:
        seconds = store.compiled(row.key, run.phase, target)
        if seconds is None:
            say(f"compiling {run.phase} on {row.name} for {target}")
            seconds = _compile(row, run, store, target, say)
        if seconds:
            found[run.phase] = seconds
    return found


def _compile(row: Row, run: Run, store: Store, target: Target, say: Callable[[str], None]) -> float:
    """The compiled step of one plan, in seconds; 0 if there is none."""
    data = store.plan(row.key, run.phase)
    if data is None:
        return 0.0
    plan, work = unpack(data), workload_of(run)
    try:
        seconds = audit(plan, work.fn, *work.args, target=target).step_seconds
    except AutoshardError as error:
        say(f"{run.phase} on {row.name} was not compiled: {error}")
        return 0.0
    if seconds is None:
        say(f"{run.phase} on {row.name}: the compiler for {target} reports no times")
        return 0.0
    store.add_compiled(row.key, run.phase, target, seconds)
    say(f"{run.phase} on {row.name}: {time(plan.estimate.seconds)} planned, {time(seconds)} compiled")
    return seconds
