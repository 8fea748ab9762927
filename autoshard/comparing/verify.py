"""Search with the compiler in the loop: the best few plans, compiled ahead of time and ranked by their programs.

If the compiler refuses the best plan for lack of memory, the search begins again within what the compiler has, until a
plan compiles. Baselines and the user's pins are compiled as well, and no plan is returned that is slower than they are. For
TPUs so is the best plan with rings of permutes beside matmuls, because the compiler's schedule decides what they hide.
The fastest plan is then emitted in other ways, between which no rule decides, and the plan keeps the fastest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median
from typing import Any

from autoshard._util.tables import WIDTH, item, size, table, time
from autoshard.auditing.findings import CompileTarget
from autoshard.candidates import (
    Candidate,
    Refusal,
    compile_plan,
    compile_variants,
    emission_words,
    fit_memory,
    pick_fastest,
    rank,
)
from autoshard.comparing.other_plans import best_plans, plain_plans, plan_under
from autoshard.errors import InfeasibleError
from autoshard.plan import Plan
from autoshard.rules.pin import PinError, Pins
from costmodels.machine.topology import Topology, complete_axes
from search.answer.assignment import rings

Say = Callable[[str], None]
NEAR = 0.1
"""The relative difference in modelled step time within which a baseline is compiled where programs have no times."""
FAR = 2.0
"""The multiple of the fastest compiled step from which on a baseline, by the model, is not compiled.

Compiled programs took at least 0.7 of their planned times in `make bench-chip`.
"""
EFFICIENCIES = ("matmul_efficiency", "hbm_efficiency")
"""The constants that a correction changes."""


@dataclass(frozen=True)
class Verification:
    """The best few plans with their compiled programs, in the model's order; `proven` as in `best_plans`.

    - `variants`: other ways to emit the first of `ranked`.
    - `refusals`: the plans that the compiler refused for lack of memory before the first candidate.
    """

    candidates: tuple[Candidate[Plan], ...]
    proven: bool
    variants: tuple[Candidate[Plan], ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @property
    def ranked(self) -> tuple[Candidate[Plan], ...]:
        """The fastest program first; without times, programs as planned before others."""
        return rank(self.candidates)

    @property
    def chosen(self) -> Candidate[Plan]:
        """The fastest program of the first plan and its variants; the first plan's if none is clearly faster."""
        return pick_fastest(self.ranked[0], self.variants)

    @property
    def best(self) -> Plan:
        """The chosen plan, emitted in the fastest way.

        Warnings name refusals, and say if the plan is not the model's first, if it is slow, or if it does not compile.
        """
        first, plan, words = self.ranked[0], self.chosen.plan, [each.words() for each in self.refusals]
        if first.place != 1:
            what = first.name or f"the model's place {first.place}"
            words += [f"This plan, {what}, has the fastest program of the {len(self.candidates)} compiled plans."]
        if self.is_slow:
            words += [f"Compiled, {self.chosen.slowdown}."]
        if self.is_refused:
            words += [f"No plan compiled. {first.why}"]
        return replace(plan, warnings=(*plan.warnings, *words)) if words else plan

    @property
    def is_slow(self) -> bool:
        """Whether even the best compiled program takes much longer than planned."""
        return bool(self.chosen.slowdown)

    @property
    def is_refused(self) -> bool:
        """Whether the compiler refused every plan."""
        return self.ranked[0].audit is None

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
        return replace(complete_axes(replace(topology, chip=chip.override(changed, source))), pricing=topology.pricing)

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
        lines = [line for each in self.refusals for line in item(each.words(), width)]
        lines.append(f"{len(self.candidates)} plans by their compiled programs")
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
        rows = [_emission_row(each) for each in rank((first, *self.variants))]
        yield f"Ways to emit {first.name or 'the first of them'}"
        headers = ("", "compiled step", "on the chip", "collectives", "peak", "")
        yield from (f"  {line}" for line in table(headers, rows, "<>>>>~", width - 2))
        yield (
            "  The plan is unchanged."
            if chosen is first
            else f"  The plan keeps {emission_words(chosen.plan)}: {time(chosen.seconds)} instead of"
            f" {time(first.seconds)}, {self.gain:.2f} times as fast."
        )

    def __str__(self) -> str:
        return self.render()


def verify(
    plan: Plan,
    fn: Callable[..., Any],
    *args: Any,
    target: CompileTarget = "tpu",
    k: int = 4,
    time_limit: float | None = None,
    progress: Say = lambda _: None,
    tune: bool = True,
    pins: Mapping[str, Pins] | None = None,
) -> Verification:
    """Compiles the k best plans of a function, the baselines and pinned plans, and ranks the programs.

        verified = autoshard.verify(plan, decode, params, cache, tokens, position, k=4)
        print(verified); plan = verified.best

    If the compiler refuses the best plan for lack of memory, the search begins again within the memory that the
    compiler's own figure leaves, until a plan compiles. Baselines that take `FAR` times the fastest compiled step by the
    model are left out. Only the TPU compiler reports cycles; elsewhere programs as planned come first, in the model's
    order, and only baselines within `NEAR` are compiled. For the TPU compiler the best plan under `overlap="looped"` is
    compiled too, or without overlap if `plan` has it. With cycles, the first plan is also emitted in other ways: with
    the formats that the compiler chooses, and with or without barriers in residual sums. The plan keeps the fastest.

    **Arguments:**

    - `plan`: the best plan, as `autoshard.search` found it for this function and these arguments.
    - `time_limit`: seconds for finding the other plans; compiling comes on top.
    - `tune`: whether other ways to emit the first plan are compiled, which takes up to three more compilations.
    - `pins`: layouts to compare with, by a name: `{"batch-sharded cache": {"cache.*": P(None, ("x", "y"))}}`. Each is the
      best plan with these pins.

    **Raises:** as `autoshard.audit`, except that a program which the compiler rejects is a candidate in last place;
    `PinError` for pins that cannot hold.
    """

    def compile(each: Plan) -> Candidate[Plan]:
        return compile_plan(each, fn, args, target)

    progress("compiling plan 1")
    first, refusals = fit_memory(
        plan, lambda limit: plan_under(plan, None, limit, time_limit, progress), compile, progress
    )
    found = best_plans(first.plan, k, time_limit, progress)
    candidates = [replace(first, place=1)]
    for each in found[1:]:
        progress(f"compiling plan {len(candidates) + 1} of {len(found)}")
        candidates.append(replace(compile(each), place=len(candidates) + 1))
    known = [(each.choice, each.topology.pricing) for each in found]
    for name, other in _others(first.plan, target, rank(candidates)[0].seconds, pins or {}, time_limit, progress):
        if (other.choice, other.topology.pricing) not in known:
            progress(f"compiling {name}")
            candidates.append(replace(compile(other), place=len(candidates) + 1, name=name))
    best = rank(candidates)[0]
    tuned = tuple(compile_variants(best, fn, args, target, progress)) if tune else ()
    return Verification(tuple(candidates), found.proven, tuned, refusals)


def _others(
    plan: Plan,
    target: CompileTarget,
    fastest_seconds: float,
    pins: Mapping[str, Pins],
    time_limit: float | None,
    say: Say,
) -> Iterator[tuple[str, Plan]]:
    """The best plan under each of the user's pins, of each baseline that may compile to a faster program, and with rings."""
    for name, each in pins.items():
        try:
            yield name, plan_under(plan, each, None, time_limit, say)
        except InfeasibleError as error:
            raise PinError(f"The pins {name!r} leave no plan that fits. {error}") from error
    if target == "tpu":
        yield from _plans_with_rings(plan, time_limit, say)
    seconds = plan.estimate.seconds
    far = FAR * fastest_seconds if isfinite(fastest_seconds) else (1 + NEAR) * seconds
    yield from plain_plans(plan, far, time_limit)


def _plans_with_rings(plan: Plan, time_limit: float | None, say: Say) -> Iterator[tuple[str, Plan]]:
    """The best plan with rings of permutes beside matmuls, if it has any; of a plan with rings, the best without."""
    pricing = plan.topology.pricing
    if pricing.bandwidth != "per-axis" or not (pricing.looped or pricing.overlap == 0):
        return
    other = replace(plan.topology, pricing=replace(pricing, overlap=0.0 if pricing.looped else "looped"))
    try:
        found = plan_under(replace(plan, topology=other), None, None, time_limit, say)
    except InfeasibleError:  # the time limit came first
        return
    if pricing.looped:
        yield "no rings", found
    elif found.program is not None and rings(found.program, other, found.choice):
        yield "rings beside matmuls", found


def _emission_row(each: Candidate[Plan]) -> tuple[str, ...]:
    what = emission_words(each.plan)
    if each.audit is None or each.audit.compute_seconds is None:
        return what, "-", "-", "-", "-", each.why
    peak = "-" if each.audit.peak_bytes is None else size(each.audit.peak_bytes)
    times = (each.seconds, each.audit.compute_seconds, each.audit.collective_seconds)
    return what, *map(time, times), peak, "" if each.audit.ok else "not as planned"


def _row(each: Candidate[Plan]) -> tuple[str, ...]:
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
