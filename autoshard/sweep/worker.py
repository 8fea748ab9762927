"""The solution of one point, as workers run it in this process or on another machine."""

from __future__ import annotations

import time
import zlib

from autoshard.errors import AutoshardError, InfeasibleError
from autoshard.phases import search_phases
from autoshard.pipeline import plan_function
from autoshard.plan import Plan
from autoshard.planning.files.plan_file import dumps, loads
from autoshard.planning.records import PlanRecord
from autoshard.sweep.points import Point, key, options_of, trace_run, workload_of
from autoshard.sweep.results import FAILED, INFEASIBLE, SOLVED, Result, phase_result


def solve(point: Point, expected: str = "") -> Result:
    """Searches a point; an error becomes a result.

    **Arguments:**

    - `expected`: the point's key on the job's machine; a worker that reads other files has another key.
    """
    started = time.monotonic()
    try:
        if expected and key(point) != expected:
            why = "This worker reads another version of the target file, of autoshard or of JAX than the job's machine."
            return Result(FAILED, why)
        plans, handoff_seconds = _plans(point)
    except InfeasibleError as error:
        return Result(INFEASIBLE, str(error), wall_seconds=time.monotonic() - started)
    except AutoshardError as error:
        return Result(FAILED, str(error))
    except Exception as error:  # an error of one point must not stop the others
        return Result(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")
    proofs = [plan.proof for plan in plans.values()]
    return Result(
        SOLVED,
        phases={name: phase_result(plan) for name, plan in plans.items()},
        status="OPTIMAL" if all(proof.status == "OPTIMAL" for proof in proofs) else "FEASIBLE",
        gap=max(proof.gap for proof in proofs),
        handoff_seconds=handoff_seconds,
        wall_seconds=time.monotonic() - started,
        proofs={name: plan.proof.account() for name, plan in plans.items()},
        plans={name: pack(plan) for name, plan in plans.items()},
    )


def _plans(point: Point) -> tuple[dict[str, PlanRecord], float]:
    """The plan of each phase, and the total seconds of the hand-overs between them."""
    if len(point.runs) == 1:
        (run,) = point.runs
        return {run.phase: plan_function(trace_run(run), point.topology, options_of(point))}, 0.0
    repeats = {run.phase: run.repeats for run in point.runs}
    found = search_phases(
        {run.phase: workload_of(run) for run in point.runs},
        shared=point.shared,
        topology=point.topology,
        weights=repeats,
        reserve_bytes=point.reserve_bytes,
        time_limit=point.time_limit,
        padding=point.padding,
    )
    makers = [phase for phase in repeats if any(result.startswith(f"{phase}.") for result, _ in found.handed)]
    return dict(found.plans), found.handoff_seconds * max((repeats[phase] for phase in makers), default=1.0)


def pack(plan: PlanRecord) -> bytes:
    """A plan as compressed JSON."""
    return zlib.compress(dumps(plan).encode())


def unpack(data: bytes) -> Plan:
    """The inverse of `pack`."""
    return Plan.of(loads(zlib.decompress(data), "The stored plan"))
