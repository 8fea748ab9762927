"""Plans with their compiled programs: their ranking, the ways to emit a plan, and a new search after a refusal.

If the compiler refuses a plan for lack of memory, its own figure lowers the memory limit, and the search begins again.
The new limit is the plan's peak times the available over the needed bytes: with the same error of the model, a plan
within it compiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from autoshard._util.tables import size, time
from autoshard.auditing.audit import Audit, AuditError, audit
from autoshard.auditing.findings import CompileTarget
from autoshard.emitting import bind
from autoshard.emitting.formats import choose_formats, without_orders
from autoshard.emitting.targets import COMPILERS
from autoshard.emitting.tpu_workarounds.residual_barriers import find_residual_barriers, residual_barriers
from autoshard.emitting.tpu_workarounds.scoped_memory import LARGE_KIB
from autoshard.emitting.tpu_workarounds.score_barriers import find_score_barriers, score_barriers
from autoshard.errors import AutoshardError, InfeasibleError
from autoshard.planning.emission import Emission
from autoshard.planning.records import PlanRecord
from costmodels.program.program import Program
from search.answer.assignment import rings

P = TypeVar("P", bound=PlanRecord)
Say = Callable[[str], None]
WORTH = 0.01
"""The part of a step that another way to emit a plan must save to be kept."""
MOST_REFUSALS = 8
"""The number of refusals after which no further plan is searched."""
_STEP = 0.99
"""The largest part of the last peak that the next memory limit may be."""
_USED = re.compile(r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm")
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Refusal:
    """The compiler's refusal of a plan for lack of memory, in bytes per chip.

    `limit_bytes` is the memory limit of the next search.
    """

    planned_bytes: float
    needed_bytes: float
    available_bytes: float

    @property
    def limit_bytes(self) -> float:
        return self.planned_bytes * min(self.available_bytes / self.needed_bytes, _STEP)

    def words(self) -> str:
        """The refusal as a sentence."""
        return (
            f"The compiler refused a plan with a peak of {size(self.planned_bytes)}: it needs {size(self.needed_bytes)}"
            f" of {size(self.available_bytes)}. The search began again within {size(self.limit_bytes)} per chip."
        )


@dataclass(frozen=True)
class Candidate(Generic[P]):
    """A plan and its audit, or the compiler's reason for rejecting it.

    `place` is its rank in the model, from 1; plans other than the model's best have a `name`. `refusal` has the figures if
    memory was the reason.
    """

    place: int
    plan: P
    audit: Audit | None
    why: str = ""
    name: str = ""
    refusal: Refusal | None = None

    @property
    def seconds(self) -> float:
        """The time of one compiled step: its replayed schedule, else compiler cycles and planned collectives."""
        if self.audit is None:
            return float("inf")
        if self.audit.step_seconds is not None:
            return self.audit.step_seconds
        if self.audit.compute_seconds is None:
            return float("inf")
        return self.audit.compute_seconds + self.audit.collective_seconds

    @property
    def slowdown(self) -> str:
        """The slowdown of the compiled program against the plan, and its cause; empty if it is not much slower."""
        if self.audit is None or not self.audit.is_slow:
            return ""
        return next((each.text for each in self.audit.differences if each.kind == "slower than planned"), "")


def compile_plan(plan: P, fn: Callable[..., Any], args: Sequence[Any], target: CompileTarget) -> Candidate[P]:
    """A plan with its audit, or with the compiler's reason."""
    try:
        return Candidate(0, plan, audit(plan, fn, *args, target=target))
    except AuditError as error:
        text = str(error)
        return Candidate(0, plan, None, text.splitlines()[0], refusal=read_refusal(text, plan.estimate.peak_bytes))


def read_refusal(text: str, planned_bytes: float) -> Refusal | None:
    """The bytes in a compiler's error; None if memory is not its reason."""
    found = _USED.search(text)
    if found is None:
        return None
    needed, available = (float(found[at]) * _UNITS[found[at + 1]] for at in (1, 3))
    return Refusal(planned_bytes, needed, available) if needed > available else None


def fit_memory(
    plan: P, again: Callable[[float], P], compile_candidate: Callable[[P], Candidate[P]], say: Say = lambda _: None
) -> tuple[Candidate[P], tuple[Refusal, ...]]:
    """The first plan that compiles, and the refusals before it; a refused one if none compiles.

    **Arguments:**

    - `again`: searches the best plan within a limit on the bytes of each chip, and raises `InfeasibleError` if none fits.
    """
    found, refusals = compile_candidate(plan), list[Refusal]()
    while found.refusal is not None and len(refusals) < MOST_REFUSALS:
        refusals.append(found.refusal)
        say(found.refusal.words())
        try:
            plan = again(found.refusal.limit_bytes)
        except InfeasibleError as error:
            return replace(found, why=f"{found.why} No plan fits in less: {str(error).splitlines()[0]}"), (*refusals,)
        found = compile_candidate(plan)
    return found, tuple(refusals)


def rank(candidates: Iterable[Candidate[P]]) -> tuple[Candidate[P], ...]:
    """The fastest program first, refused ones last; without times, programs as planned first, in the given order."""

    def key(each: Candidate[P]) -> tuple[bool, float, bool]:
        return each.audit is None, each.seconds, each.audit is None or not each.audit.ok

    return tuple(sorted(candidates, key=key))


def pick_fastest(first: Candidate[P], others: Iterable[Candidate[P]]) -> Candidate[P]:
    """The first candidate, or the fastest of the others if that gains more than `WORTH`."""
    best = rank((first, *others))[0]
    return best if best.seconds < (1 - WORTH) * first.seconds else first


def compile_variants(
    first: Candidate[P], fn: Callable[..., Any], args: Sequence[Any], target: CompileTarget, say: Say
) -> Iterator[Candidate[P]]:
    """The other ways to emit a plan, compiled: formats, rings, barriers, and on-chip memory for an operation, in this order.

    Each step begins with the fastest way so far. There are none if the compiler reports no cycles.
    """
    if first.audit is None or first.audit.compute_seconds is None:
        return
    found: list[Candidate[P]] = []
    for formats in ("compiler", "default"):
        if formats != first.plan.emission.formats:
            found.append(replace(_with_formats(formats, first.plan, fn, args, target, say), place=first.place))
            yield found[-1]
    program = bind.trace_as_planned(first.plan, fn, args).program
    for change in (_without_rings, _other_residual_barriers, _other_score_barriers, _more_scoped_memory):
        best = pick_fastest(first, found).plan
        emission = change(program, best)
        if emission is not None:
            plan = replace(best, emission=emission)
            say(f"compiling with {emission_words(plan)}")
            found.append(replace(compile_plan(plan, fn, args, target), place=first.place))
            yield found[-1]


def _without_rings(program: Program, plan: PlanRecord) -> Emission | None:
    """With all collectives at once; None if the plan has no rings."""
    has_some = plan.emission.rings is not False and bool(rings(program, plan.topology, plan.choice))
    return replace(plan.emission, rings=False) if has_some else None


def _other_residual_barriers(program: Program, plan: PlanRecord) -> Emission | None:
    """With barriers in residual sums where the plan has none, and the other way round; None if there are no such sums."""
    if not find_residual_barriers(program):
        return None
    has_some = bool(residual_barriers(program, plan.choice, plan.topology, plan.emission))
    return replace(plan.emission, residual_barriers=not has_some)


def _other_score_barriers(program: Program, plan: PlanRecord) -> Emission | None:
    """With barriers before attention scores where the plan has none, and the other way round; None without such scores."""
    if not find_score_barriers(program, plan.choice, plan.topology):
        return None
    has_some = bool(score_barriers(program, plan.choice, plan.topology, plan.emission))
    return replace(plan.emission, score_barriers=not has_some)


def _more_scoped_memory(program: Program, plan: PlanRecord) -> Emission | None:
    """With more on-chip memory for an operation; None where it has that already."""
    del program
    return None if plan.emission.scoped_memory_kib else replace(plan.emission, scoped_memory_kib=LARGE_KIB)


def _with_formats(
    formats: str, plan: P, fn: Callable[..., Any], args: Sequence[Any], target: CompileTarget, say: Say
) -> Candidate[P]:
    """The plan with the compiler's formats, or with the device's own."""
    if formats == "default":
        plan = without_orders(plan)
    else:
        say("letting the compiler choose formats")
        try:
            plan = choose_formats(plan, fn, *args)
        except AutoshardError as error:
            return Candidate(0, plan, None, str(error).splitlines()[0])
    say(f"compiling with {emission_words(plan)}")
    return compile_plan(plan, fn, args, target)


def emission_words(plan: PlanRecord) -> str:
    """The way in which a plan is emitted, as text."""
    return plan.emission.words() or "formats by default"


def tune_plan(
    plan: P, again: Callable[[float], P], fn: Callable[..., Any], args: Sequence[Any], say: Say = lambda _: None
) -> P:
    """The plan as `verify(k=1)` finds it best: within the compiler's memory, in the fastest way to emit it.

    Its warnings say what was refused, and what was gained.

    **Raises:** `AuditError` if the compiler refuses every plan.
    """
    target = COMPILERS[plan.topology.chip.kind]
    first, refusals = fit_memory(plan, again, lambda each: compile_plan(each, fn, args, target), say)
    if first.audit is None:
        raise AuditError(first.why)
    best = pick_fastest(first, compile_variants(first, fn, args, target, say))
    words = [each.words() for each in refusals]
    if best is not first:
        words.append(
            f"Tuned: {emission_words(best.plan)}. The compiled step takes {time(best.seconds)} instead of"
            f" {time(first.seconds)}."
        )
    if best.slowdown:
        words.append(f"Compiled, {best.slowdown}.")
    return replace(best.plan, warnings=(*best.plan.warnings, *words)) if words else best.plan
