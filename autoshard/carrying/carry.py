"""The three ways to carry a plan, compiled beside each other, and constraints that make the partitioner follow it.

The constraints are those of `autoshard.carrying.choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from math import inf
from typing import Any, Literal, TypeVar

import jax

from autoshard.auditing.audit import Audit, audit
from autoshard.auditing.findings import CompileTarget, find_in_time, seconds_of
from autoshard.carrying.candidates import Place, places
from autoshard.carrying.choose import MOST, Trial, choose, within
from autoshard.emitting import bind, targets
from autoshard.emitting.formats import of_the_compiler
from autoshard.emitting.jitted import refuse_padding
from autoshard.errors import AutoshardError
from autoshard.planning.carriage import WAYS, Carriage, CarriedProgram, Carry, Constraint
from autoshard.planning.records import PlanRecord

P = TypeVar("P", bound=PlanRecord)
Say = Callable[[str], None]


SLOWER = 1.1
"""The multiple of the planned step above which unplanned work on the core is named as the cause.

Audits report from 1.3 on. A scanned decode step of PaLM 8B by specs takes 1.28, by slices of the cache that are copied; the
bytes, of which it sends fewer than planned, were named before.
"""


def carry(
    plan: P,
    fn: Callable[..., Any],
    *args: Any,
    target: CompileTarget | Literal["auto"] = "auto",
    ways: Collection[Carry] = WAYS,
    most: int = MOST,
    progress: Say | None = None,
) -> P:
    """The plan with its carriage: a program compiled in each way to carry it, and the constraints of the second way.

        plan = autoshard.carry(plan, decode, params, cache, tokens, position)
        plan.carriage.fastest, plan.carriage.constraints
        print(autoshard.carriage_text(plan))

    **Arguments:**

    - `args`: the arguments that the plan was searched for, arrays or `jax.ShapeDtypeStruct`s; nothing is allocated or run.
    - `target`: the compiler, as for `audit`; "auto" is the TPU compiler for TPUs if it is installed, else "host".
    - `ways`: the ways to compile; the manual one is always compiled, as what the others are compared with.
    - `most`: the number of programs that are compiled to choose constraints; at least 1.
    - `progress`: called with a line of text for each compiled program.

    A compiler that aborts on some specs ends the process; compile them in a process of their own if that may happen.

    **Raises:** `PlanMismatchError` when the plan is of another function or other arguments; `AuditError` when the compiler
    refuses the manual program; `AutoshardError` when the target is not available, and for a plan with padding, which the
    manual program alone adds, unless `ways` has no other way.
    """
    for way in ways:
        refuse_padding(plan, way)
    found = target_of(plan) if target == "auto" else target
    run = Carrier(plan, fn, args, found, progress or (lambda line: None))
    manual = run.program("manual", run.audited("manual"))
    programs, chosen = [manual], None
    if "constraints" in ways:
        every = places(bind.trace_as_planned(plan, fn, args), plan.choice, plan.topology)
        chosen = choose(run.constrained, every, manual, most)
        programs.append(chosen.program)
    if "specs" in ways:
        programs.append(run.try_way("specs")[0])
    carriage = Carriage(
        target=found,
        compiler=compiler_of(found),
        programs=tuple(programs),
        constraints=tuple(place.constraint for place in chosen.chosen) if chosen else (),
        within=chosen is not None and within(chosen.program, manual),
        compilations=run.compilations,
    )
    return replace(plan, carriage=carriage)


def target_of(plan: PlanRecord) -> CompileTarget:
    """The plan's own compiler, if it is installed, else the host's."""
    try:
        metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return "host"
    return "tpu" if plan.topology.chip.kind == "tpu" else "host"


def compiler_of(target: CompileTarget) -> str:
    """The versions that a compiled program depends on."""
    own = f", libtpu {metadata.version('libtpu')}" if target == "tpu" else ""
    return f"jax {jax.__version__}{own}"


def with_own_formats(plan: P, fn: Callable[..., Any], args: Sequence[Any], target: CompileTarget) -> P:
    """The plan with the formats that the TPU compiler chooses for the function as it is written, carried by specs.

    The plan's own orders suit its program, whose loops are updated in place. A `scan` as it is written may read its arrays
    in other orders, and then copies them in every step. On other targets, and if the compiler refuses, the plan is unchanged.
    """
    if target != "tpu":
        return plan
    mesh = targets.mesh_of(targets.devices_of(plan.topology, target), plan.topology.axis_sizes)
    try:
        return of_the_compiler(plan, fn, args, mesh, "specs")
    except jax.errors.JaxRuntimeError:
        return plan


class Carrier:
    """One function and plan, compiled again and again."""

    def __init__(
        self,
        plan: PlanRecord,
        fn: Callable[..., Any],
        args: Sequence[Any],
        target: CompileTarget,
        say: Say = lambda line: None,
    ) -> None:
        self.plan, self.fn, self.args, self.say = plan, fn, args, say
        self.target: CompileTarget = target
        self.compilations = 0

    def audited(self, way: Carry, constraints: Sequence[Constraint] = ()) -> Audit:
        """The audit of a program in one way."""
        plan = self.plan
        if way == "constraints":
            plan = replace(plan, carriage=Carriage(self.target, "", (), tuple(constraints)))
        self.compilations += 1
        return audit(plan, self.fn, *self.args, target=self.target, carry=way)

    def constrained(self, chosen: Sequence[Place]) -> Trial:
        """The program with constraints at some places."""
        program, costs = self.try_way("constraints", [place.constraint for place in chosen])
        return Trial(tuple(chosen), program, costs)

    def try_way(self, way: Carry, constraints: Sequence[Constraint] = ()) -> tuple[CarriedProgram, Mapping[str, float]]:
        """The program of one way, with its unplanned seconds by source line; infinite seconds, and why, if there is none."""
        try:
            found = self.audited(way, constraints)
        except AutoshardError as error:
            why = str(error)
        else:
            count = f" ({len(constraints)})" if constraints else ""
            return self.program(way, found, count), costs_by_line(self.plan, found)
        self.say(f"{way}: not compiled. {why}")
        return CarriedProgram(way, inf, inf, inf, inf, why=why), {}

    def program(self, way: Carry, found: Audit, count: str = "") -> CarriedProgram:
        """The figures of an audit."""
        program = CarriedProgram(
            way,
            step_seconds=step_seconds(self.plan, found),
            wire_bytes=sum(compiled for _, compiled in found.wire_bytes().values()),
            wire_seconds=found.collective_seconds,
            peak_bytes=found.peak_bytes or 0.0,
            flops=found.flops,
            cause=cause_of(self.plan, found),
        )
        ms = [f"{seconds * 1e3:.3g} ms" for seconds in (program.step_seconds, program.wire_seconds)]
        self.say(f"{way}{count}: a step of {ms[0]}, {ms[1]} of collectives")
        return program


def step_seconds(plan: PlanRecord, found: Audit) -> float:
    """The replayed step, or, off TPUs, the planned operations, by compiled FLOPs, with the compiled collectives."""
    if found.step_seconds is not None:
        return found.step_seconds
    on_chip = plan.estimate.seconds - plan.estimate.collective_seconds
    more = max(found.flops / found.planned_flops - 1, 0.0) if found.planned_flops else 0.0
    return on_chip + more * plan.estimate.compute_seconds + found.collective_seconds


def cause_of(plan: PlanRecord, found: Audit) -> str:
    """The costliest difference of a program from its plan, in words; empty if it is as planned.

    It is unplanned work on the core, if that takes longer than what the collectives take more than planned, and the step
    takes more than `SLOWER` times the planned one.
    """
    slow = list(find_in_time(plan.estimate.seconds, found.step_seconds or 0.0, found.costs, SLOWER))
    counting = [each for each in found.differences if each.counts]
    on_core = sum(max(each.unplanned_seconds, 0.0) for each in found.costs)
    first = (
        slow + counting if on_core > found.collective_seconds - plan.estimate.collective_seconds else counting + slow
    )
    return f"{first[0].kind}: {first[0].text}" if first else ""


def costs_by_line(plan: PlanRecord, found: Audit) -> dict[str, float]:
    """Seconds of a compiled program that are not planned, by source line: collectives, and time on the core."""
    costs: dict[str, float] = {}
    for pair in found.pairs:
        planned = sum(each.seconds / each.count * pair.count for each in pair.planned)
        for each in pair.compiled:
            seconds = seconds_of(each, plan.topology) * pair.count - planned / len(pair.compiled)
            if seconds > 0:
                costs[each.source] = costs.get(each.source, 0.0) + seconds
    for line, due, done in found.line_flops:
        more = max(done - due, 0.0) / found.planned_flops * plan.estimate.compute_seconds
        costs[line] = costs.get(line, 0.0) + more
    for cost in found.costs:
        if cost.unplanned_seconds > 0:
            line = cost.instruction.source
            costs[line] = costs.get(line, 0.0) + cost.unplanned_seconds
    return costs
