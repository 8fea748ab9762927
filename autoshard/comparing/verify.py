"""Search with the compiler in the loop: the best few plans, compiled ahead of time and ranked by their programs.

The fastest of them is then emitted in other ways, between which no rule decides, and the plan keeps the fastest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median
from typing import Any, Literal

from autoshard._util.tables import WIDTH, item, size, table, time
from autoshard.auditing.audit import Audit, AuditError, audit
from autoshard.comparing.other_plans import best_plans, plain_plans
from autoshard.emitting import bind
from autoshard.emitting.formats import choose_formats, without_orders
from autoshard.emitting.tpu_workarounds.residual_barriers import resting
from autoshard.errors import AutoshardError
from autoshard.plan import Plan
from costmodels.machine.topology import Topology, as_its_chip_has_it

Say = Callable[[str], None]
NEAR = 0.1
"""The relative difference in modelled step time within which a plain layout is compiled as well."""
WORTH = 0.01
"""The part of a step that another way to emit a plan must save to be kept."""
EFFICIENCIES = ("matmul_efficiency", "hbm_efficiency")
"""The constants that a correction changes."""


@dataclass(frozen=True)
class Candidate:
    """A plan and its audit, or the compiler's reason for rejecting it.

    `place` is its rank in the model, from 1; plain layouts come after the best plans, and have their `name`.
    """

    place: int
    plan: Plan
    audit: Audit | None
    why: str = ""
    name: str = ""

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


@dataclass(frozen=True)
class Verification:
    """The best few plans with their compiled programs, in the model's order; `proven` as in `best_plans`.

    `variants` are other ways to emit the first of `ranked`.
    """

    candidates: tuple[Candidate, ...]
    proven: bool
    variants: tuple[Candidate, ...] = ()

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Programs as planned before others, then the fastest first."""
        return _ranked(self.candidates)

    @property
    def chosen(self) -> Candidate:
        """The fastest program of the first plan and its variants; the first plan's if none is clearly faster."""
        return _fastest(self.ranked[0], self.variants)

    @property
    def best(self) -> Plan:
        """The chosen plan, emitted in the fastest way. Warnings say if it is not the model's first, or if it is slow."""
        first, plan, words = self.ranked[0], self.chosen.plan, []
        if first.place != 1:
            what = first.name or f"the model's place {first.place}"
            words += [f"This plan, {what}, has the fastest program of the {len(self.candidates)} compiled plans."]
        if self.is_slow:
            words += [f"Compiled, {self.chosen.slowdown}."]
        return replace(plan, warnings=(*plan.warnings, *words)) if words else plan

    @property
    def is_slow(self) -> bool:
        """Whether even the best compiled program takes much longer than planned."""
        return bool(self.chosen.slowdown)

    @property
    def gain(self) -> float:
        """The speed-up of the first plan's program by the fastest way to emit it."""
        before, after = self.ranked[0].seconds, self.chosen.seconds
        return before / after if isfinite(after) and after > 0 and isfinite(before) else 1.0

    def correction(self) -> float:
        """The ratio of compiled to planned time on the chip: the median over the candidates."""
        pairs = [(each.plan.estimate, each.audit) for each in self.candidates if each.audit is not None]
        found = [
            found.compute_seconds / (planned.seconds - planned.collective_seconds)
            for planned, found in pairs
            if found.compute_seconds is not None
        ]
        return median(found) if found else 1.0

    def calibrated(self) -> Topology:
        """The topology with efficiencies under which these plans take as long as their compiled programs, at most 1."""
        topology, factor = self.candidates[0].plan.topology, self.correction()
        chip = topology.chip
        changed = {name: min(getattr(chip, name) / factor, 1.0) for name in EFFICIENCIES}
        source = f"{len(self.candidates)} compiled programs of {self.candidates[0].plan.name} on {topology.name}"
        return replace(
            as_its_chip_has_it(replace(topology, chip=chip.override(changed, source))), pricing=topology.pricing
        )

    def render(self, width: int = WIDTH) -> str:
        """The candidates as a table, and the model's errors."""
        headers = (
            "model",
            "step",
            "on the chip",
            "collectives",
            "compiled step",
            "on the chip",
            "collectives",
            "peak",
            "",
        )
        lines = [f"{len(self.candidates)} plans by their compiled programs"]
        lines += [f"  {line}" for line in table(headers, [_row(each) for each in self.ranked], "<>>>>>>>~", width - 2)]
        order = [each.place for each in self.ranked]
        agreed = "keeps the model's order" if order == sorted(order) else "changes the model's order"
        lines.append(
            f"  The compiler {agreed}. On the chip its programs take {self.correction():.2f} times the planned time."
        )
        if self.is_slow:
            lines += item(f"Of the best of them {self.chosen.slowdown}.", width)
        lines += self._emissions(width) if self.variants else ()
        if not self.proven:
            lines.append("  The time limit ended the search: there may be other plans between these.")
        return "\n".join(lines) + "\n"

    def _emissions(self, width: int) -> Iterator[str]:
        first, chosen = self.ranked[0], self.chosen
        rows = [_emitted(each) for each in _ranked((first, *self.variants))]
        yield f"Ways to emit {first.name or 'the first of them'}"
        headers = ("", "compiled step", "on the chip", "collectives", "peak", "")
        yield from (f"  {line}" for line in table(headers, rows, "<>>>>~", width - 2))
        yield (
            "  The plan is unchanged."
            if chosen is first
            else f"  The plan keeps {_way(chosen.plan)}: {time(chosen.seconds)} instead of"
            f" {time(first.seconds)}, {self.gain:.2f} times as fast."
        )

    def __str__(self) -> str:
        return self.render()


def _fastest(first: Candidate, others: Iterable[Candidate]) -> Candidate:
    """The first candidate, or the fastest of the others if that gains more than `WORTH`, or is as planned alone."""
    best = _ranked((first, *others))[0]
    unplanned = first.audit is None or not first.audit.ok
    gains = best.seconds < (1 - WORTH) * first.seconds
    return best if gains or (unplanned and best.audit is not None and best.audit.ok) else first


def _ranked(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Plans as planned before others, then the fastest first; of equally fast ones the first given."""
    return tuple(sorted(candidates, key=lambda each: (each.audit is None or not each.audit.ok, each.seconds)))


def verify(
    plan: Plan,
    fn: Callable[..., Any],
    *args: Any,
    target: Literal["host", "tpu", "gpu"] = "tpu",
    k: int = 4,
    time_limit: float | None = None,
    progress: Say = lambda _: None,
    tune: bool = True,
) -> Verification:
    """Compiles the k best plans of a function and the plain layouts that are nearly as good, and ranks the programs.

        verified = autoshard.verify(plan, decode, params, cache, tokens, position, k=4)
        print(verified); plan = verified.best

    Only the TPU compiler reports cycles; elsewhere programs as planned come first, in the model's order. With cycles,
    the first plan is also emitted in other ways: with the formats that the compiler chooses, and without barriers in
    residual sums. The plan keeps the fastest.

    **Arguments:**

    - `plan`: the best plan, as `autoshard.search` found it for this function and these arguments.
    - `time_limit`: seconds for finding the other plans; compiling comes on top.
    - `tune`: whether other ways to emit the first plan are compiled, which takes four or five more compilations.

    **Raises:** as `autoshard.audit`, except that a program which the compiler rejects is a candidate in last place.
    """
    found = best_plans(plan, k, time_limit, progress)
    known = [each.choice for each in found]
    plain = [(name, each) for name, each in plain_plans(plan, NEAR, time_limit) if each.choice not in known]
    candidates: list[Candidate] = []
    for place, (name, each) in enumerate([*(("", each) for each in found), *plain], start=1):
        progress(f"compiling plan {place} of {len(found) + len(plain)}")
        candidates.append(replace(_compiled(each, fn, args, target), place=place, name=name))
    first = _ranked(candidates)[0]
    if not tune or first.audit is None or first.audit.compute_seconds is None:
        return Verification(tuple(candidates), found.proven)
    return Verification(tuple(candidates), found.proven, tuple(_variants(first, fn, args, target, progress)))


def _variants(
    first: Candidate, fn: Callable[..., Any], args: Sequence[Any], target: Any, say: Say
) -> Iterator[Candidate]:
    """The other ways to emit a plan, compiled: other formats, then with or without barriers with the fastest."""
    found: list[Candidate] = []
    for formats in ("compiler", "default"):
        if formats != first.plan.emission.formats:
            found.append(replace(_with_formats(formats, first.plan, fn, args, target, say), place=first.place))
            yield found[-1]
    fastest = _fastest(first, found).plan
    if resting(bind.traced_as(fastest, fn, args).program):
        barriers = not fastest.emission.residual_barriers
        plan = replace(fastest, emission=replace(fastest.emission, residual_barriers=barriers))
        say(f"compiling with {_way(plan)}")
        yield replace(_compiled(plan, fn, args, target), place=first.place)


def _with_formats(
    formats: str, plan: Plan, fn: Callable[..., Any], args: Sequence[Any], target: Any, say: Say
) -> Candidate:
    """The plan with the compiler's formats, or with the device's own."""
    if formats == "default":
        plan = without_orders(plan)
    else:
        say("letting the compiler choose formats")
        try:
            plan = choose_formats(plan, fn, *args)
        except AutoshardError as error:
            return Candidate(0, plan, None, str(error).splitlines()[0])
    say(f"compiling with {_way(plan)}")
    return _compiled(plan, fn, args, target)


def _way(plan: Plan) -> str:
    return plan.emission.words() or "formats by default"


def _compiled(plan: Plan, fn: Callable[..., Any], args: Sequence[Any], target: Any) -> Candidate:
    try:
        return Candidate(0, plan, audit(plan, fn, *args, target=target))
    except AuditError as error:
        return Candidate(0, plan, None, str(error).splitlines()[0])


def _emitted(each: Candidate) -> tuple[str, ...]:
    what = _way(each.plan)
    if each.audit is None or each.audit.compute_seconds is None:
        return what, "-", "-", "-", "-", each.why
    peak = "-" if each.audit.peak_bytes is None else size(each.audit.peak_bytes)
    times = (each.seconds, each.audit.compute_seconds, each.audit.collective_seconds)
    return what, *map(time, times), peak, "" if each.audit.ok else "not as planned"


def _row(each: Candidate) -> tuple[str, ...]:
    planned = each.plan.estimate
    head = (each.name or str(each.place), time(planned.seconds), time(planned.seconds - planned.collective_seconds))
    if each.audit is None:
        return (*head, time(planned.collective_seconds), "-", "-", "-", "-", each.why)
    on_chip = each.audit.compute_seconds
    compiled = ("-", "-") if on_chip is None else (time(each.seconds), time(on_chip))
    peak = "-" if each.audit.peak_bytes is None else size(each.audit.peak_bytes)
    wire = time(each.audit.collective_seconds)
    said = "" if each.audit.ok else "not as planned"
    if each.slowdown:
        said += f"{', ' if said else ''}{each.seconds / planned.seconds:.2f} × the plan"
    return (*head, time(planned.collective_seconds), *compiled, wire, peak, said)
