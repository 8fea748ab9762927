"""The best plan that one way of carrying can carry, among plans that are compiled for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

from autoshard._util.tables import WIDTH, item, table, time
from autoshard.auditing.audit import AuditError
from autoshard.auditing.findings import CompileTarget
from autoshard.carrying.carry import Carrier, carry, compiler_of, with_own_formats
from autoshard.carrying.choose import within
from autoshard.comparing.other_plans import best_plans, plain_plans
from autoshard.comparing.plans_by_sums import plans_by_sums
from autoshard.emitting.jitted import refuse_padding
from autoshard.errors import AutoshardError
from autoshard.plan import Plan
from autoshard.planning.carriage import Carriage, CarriedProgram, Carry
from costmodels.program.program import Program
from search.memory.views import IN_PLACE

NEAR = 0.5
"""The relative difference in modelled step time within which a baseline is compiled as well."""
CLOSE = 0.10
"""The part by which a step may exceed the planned one, or that of the plan's manual program, if it is carried as planned.

A plan that is carried as planned may also take this much more than the fastest program.
"""
FEW = 12
"""The number of programs compiled to choose the least constraints, if specs alone do not carry a plan.

The scanned decode steps of PaLM 8B and Llama 3 8B (v5e 2x4, plans by sums) are carried by the first, without constraints.
"""


@dataclass(frozen=True)
class CarriedPlan:
    """A plan compiled in one way.

    - `plan`: the plan with the formats that suit this way; `planned` with its own.
    - `program`: its program in that way.
    - `costs`: the seconds of it that are not planned, by source line.
    - `manual`: its manual program with its own formats, if it was compiled to compare with.
    """

    name: str
    plan: Plan
    planned: Plan
    program: CarriedProgram
    costs: Mapping[str, float]
    manual: CarriedProgram | None = None

    @property
    def is_as_planned(self) -> bool:
        """Whether the step is within `CLOSE` of the planned or the manual one, and bytes and peak are within their bounds.

        The manual program may be faster than planned: the compiler can fuse it further than the cost model assumes.
        """
        if self.manual is None:
            return False
        step = max(self.manual.step_seconds, self.plan.estimate.seconds)
        return within(self.program, replace(self.manual, step_seconds=step), CLOSE)

    def with_carriage(self, target: CompileTarget) -> Plan:
        """The plan with its compiled program, whose way `plan.jit` then takes by default."""
        return replace(self.plan, carriage=Carriage(target, compiler_of(target), (self.program,)))


@dataclass(frozen=True)
class CarriedPlans:
    """The compiled plans, the fastest first; the chosen one is compared with its manual program.

    If specs alone carry no plan as planned, `constrained` is a plan with the least constraints found, often none: its
    program updates loops in place and keeps memory orders in them, which specs of a function as it is written cannot.
    """

    way: Carry
    target: CompileTarget
    plans: tuple[CarriedPlan, ...]
    chosen: CarriedPlan
    best_planned_seconds: float
    constrained: CarriedPlan | None = None

    @property
    def best(self) -> Plan:
        """The chosen plan with its carriage, or the constrained one if that is faster. Warnings say how it is carried.

        **Raises:** `AutoshardError` if no plan compiles in this way.
        """
        other = self.constrained
        if other and other.program.step_seconds < self.chosen.program.step_seconds:
            return replace(other.plan, warnings=(*other.plan.warnings, *self.words()))
        if not isfinite(self.chosen.program.step_seconds):
            raise AutoshardError(
                f"None of the {len(self.plans)} compiled plans can be carried by {self.way}: {self.chosen.program.why}"
            )
        plan = self.chosen.with_carriage(self.target)
        return replace(plan, warnings=(*plan.warnings, *self.words()))

    def words(self) -> Iterator[str]:
        """The result in sentences: the chosen plan, and whether it is carried as planned."""
        found, manual = self.chosen, self.chosen.manual
        yield (
            f"Of {len(self.plans)} compiled plans, this one ({found.name}) was chosen for its step carried by {self.way}:"
            f" {time(found.program.step_seconds)}. The best plan for manual collectives is planned with"
            f" {time(self.best_planned_seconds)}."
        )
        if manual is None:
            return
        both = _steps(found, self.way, manual)
        if found.is_as_planned:
            yield f"It is carried as planned: {both}."
            return
        yield f"No plan within {CLOSE:.0%} of that step is carried as planned. This one takes {both}. {_reason(found)}"
        if self.constrained and self.constrained.manual and isfinite(self.constrained.program.step_seconds):
            yield _words_of_constraints(self.constrained, self.constrained.manual)

    def __str__(self) -> str:
        rows = [
            (
                each.name,
                time(each.plan.estimate.seconds),
                time(each.program.step_seconds) if isfinite(each.program.step_seconds) else "-",
                time(each.program.wire_seconds) if isfinite(each.program.step_seconds) else "-",
                each.program.why or _verdict(each),
            )
            for each in self.plans
        ]
        headers = ("plan", "planned", f"carried by {self.way}", "collectives", "")
        lines = table(headers, rows, "<>>>~", WIDTH)
        if isfinite(self.chosen.program.step_seconds):
            lines = [*lines, *(line for words in self.words() for line in item(words, WIDTH))]
        return "\n".join(lines) + "\n"


def _steps(found: CarriedPlan, way: str, manual: CarriedProgram) -> str:
    """The step of a program beside the planned and the manual one."""
    return (
        f"{time(found.program.step_seconds)} by {way}, {time(found.plan.estimate.seconds)} planned,"
        f" {time(manual.step_seconds)} by manual collectives"
    )


def _words_of_constraints(found: CarriedPlan, manual: CarriedProgram) -> str:
    """Whether the least constraints carry a plan, and how many they are."""
    carriage = found.plan.carriage
    count = carriage.count if carriage else 0
    how = "as planned" if found.is_as_planned else "not as planned"
    calls = f"{count} calls of with_sharding_constraint" if count else "no constraint"
    return (
        f'plan.jit(fn, carry="constraints") carries {found.name} {how} with {calls}:'
        f" {_steps(found, 'constraints', manual)}. It updates loops in place and keeps memory orders in them, which the"
        " function as it is written does not."
    )


def _verdict(each: CarriedPlan) -> str:
    if each.manual is None:
        return ""
    return "as planned" if each.is_as_planned else "not as planned"


def _reason(found: CarriedPlan) -> str:
    """The costliest difference of a program from its plan, and the largest argument that its line reads."""
    line = max(found.costs, key=lambda line: found.costs[line], default="")
    array = array_at(found.plan, line)
    where = f" It concerns {array}." if array else ""
    return f"The costliest difference: {found.program.cause or 'none that an audit names'}.{where}"


def array_at(plan: Plan, line: str) -> str:
    """The name of the largest argument, or array made of one, that the operations or the loop of a source line read."""
    program = plan.program
    if program is None or not line:
        return ""
    loops = {k for k, region in enumerate(program.regions) if region.name.endswith(f"({line})")}
    read = {
        use.value
        for op in program.operations
        if op.source == line or any(program.values[made.value].region in loops for made in op.outputs)
        for use in op.inputs
    }
    sizes = {_argument_of(program, value): program.values[value].bytes for value in sorted(read)}
    names = [array.path for array in plan.arguments if array.path in sizes]
    return max(names, key=lambda name: sizes[name], default="")


def _argument_of(program: Program, value: int) -> str:
    """The name of the argument that a value is a part or an updated copy of; of another value, its own name."""
    array = program.values[value]
    if array.origin is not None:
        return program.values[array.origin].name
    op = program.operations[program.producers[value][0]] if value in program.producers else None
    if op is not None and op.primitive in IN_PLACE and op.inputs:
        return _argument_of(program, op.inputs[0].value)
    return array.name.removeprefix("carry ")  # as `Builder.end_carry` names it in a loop


def best_carried(
    plan: Plan,
    fn: Callable[..., Any],
    *args: Any,
    way: Carry = "specs",
    target: CompileTarget = "tpu",
    k: int = 4,
    time_limit: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> CarriedPlans:
    """Compiles plans carried in one way, and ranks them by their programs.

    The plans are, for specs, up to `k` plans that need no collectives but sums (`plans_by_sums`); then the k best ones and
    baselines near them, unless they are planned to take longer than the fastest program so far. For TPUs, specs are
    compiled with the formats that the compiler chooses for the arguments of the function as it is written; the plan keeps
    them. If specs carry no plan as planned, the best plan by sums is compiled with the least constraints that carry it.

    **Arguments:**

    - `args`: the arguments that the plan was searched for.
    - `k`: the number of best plans that are compiled; the others come on top.

    **Raises:** `AutoshardError` for a plan whose file lacks the program, for one with padding, or for constraints, which
    each plan has its own of.
    """
    if way == "constraints":
        raise AutoshardError("way must be 'specs' or 'manual', got 'constraints': use autoshard.carry for one plan.")
    refuse_padding(plan, way)
    found: dict[Any, CarriedPlan] = {}
    by_sums: list[Plan] = []

    def compile(name: str, each: Plan) -> tuple[float, Mapping[str, float]]:
        key = each.choice.strategies
        if key not in found:
            progress(f"compiling {name}, planned with {time(each.estimate.seconds)}")
            formatted = with_own_formats(each, fn, args, target) if way == "specs" else each
            program, costs = Carrier(formatted, fn, args, target, progress).try_way(way)
            found[key] = CarriedPlan(name, formatted, each, program, costs)
        return found[key].program.step_seconds, found[key].costs

    if way == "specs":
        by_sums += plans_by_sums(plan, compile, k, time_limit)
    for place, each in enumerate(best_plans(plan, k, time_limit, progress), 1):
        if each.estimate.seconds < _fastest(found.values()):
            compile("the best plan" if place == 1 else f"place {place}", each)
    least = min((1 + NEAR) * plan.estimate.seconds, _fastest(found.values()))
    for name, each in plain_plans(plan, least, time_limit):
        compile(name, each)
    ranked = sorted(found.values(), key=lambda each: each.program.step_seconds)
    compared = list(_compared(ranked, way, lambda each: Carrier(each, fn, args, target, progress).try_way("manual")[0]))
    ranked[: len(compared)] = compared
    chosen = next((each for each in compared if each.is_as_planned), ranked[0])
    constrained = None
    if way == "specs" and not chosen.is_as_planned:
        first = found[by_sums[0].choice.strategies] if by_sums else chosen
        constrained = _with_least_constraints(first, fn, args, target, progress)
    return CarriedPlans(way, target, tuple(ranked), chosen, plan.estimate.seconds, constrained)


def _with_least_constraints(
    found: CarriedPlan, fn: Callable[..., Any], args: Sequence[Any], target: CompileTarget, say: Callable[[str], None]
) -> CarriedPlan | None:
    """The plan in its own formats with the least constraints that carry it; none if its manual program is refused.

    Its carriage lacks the manual program, so that the fastest of the partitioner's is the default.
    """
    say(f"choosing the least constraints for {found.name}")
    try:
        plan = carry(found.planned, fn, *args, target=target, ways=("constraints", "specs"), most=FEW, progress=say)
    except AuditError:
        return None
    assert plan.carriage is not None
    by_way = {each.way: each for each in plan.carriage.programs}
    manual = by_way.pop("manual")
    plan = replace(plan, carriage=replace(plan.carriage, programs=tuple(by_way.values())))
    return CarriedPlan(found.name, plan, found.planned, by_way["constraints"], {}, manual)


def _fastest(found: Iterable[CarriedPlan]) -> float:
    return min((each.program.step_seconds for each in found), default=inf)


def _compared(
    ranked: Sequence[CarriedPlan], way: Carry, by_hand: Callable[[Plan], CarriedProgram]
) -> Iterator[CarriedPlan]:
    """The first plans with their manual programs, up to one that is carried as planned, if it is nearly as fast."""
    for each in ranked:
        if way == "manual" or each.program.step_seconds > (1 + CLOSE) * ranked[0].program.step_seconds:
            return
        each = replace(each, manual=by_hand(each.planned))
        yield each
        if each.is_as_planned:
            return
