"""Other plans of a program: the k best, and the best under other constraints.

They are searched from the program that a plan contains, so a plan from a file is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from autoshard.annotating.fingerprint import fingerprint
from autoshard.annotating.pins import pin_program
from autoshard.comparing.diff import Difference, diff
from autoshard.errors import AutoshardError, OptionError
from autoshard.plan import Plan
from autoshard.planning import records_of
from autoshard.planning.baselines import FAMILIES, MOST_SECONDS
from autoshard.planning.baselines import solve_baseline as solved_family
from autoshard.planning.infeasibility import refusal
from autoshard.planning.recording import apply_orders
from autoshard.planning.records import ArrayPlan
from autoshard.rules.pin import Pins
from costmodels.program.program import Program
from search.answer.assignment import needed_layout, produced_layout
from search.answer.check import check
from search.formulation.layer_folding import classes, identity_classes
from search.formulation.layouts import Layout, shards
from search.formulation.problem import build
from search.k_best import rank
from search.solve import DEFAULTS, Limits, NoPlan, Solution, search

Say = Callable[[str], None]


@dataclass(frozen=True)
class BestPlans(Sequence[Plan]):
    """Plans in order of their step times; `proven` means that no other plan is before or between them."""

    plans: tuple[Plan, ...]
    proven: bool

    def __getitem__(self, i):
        return self.plans[i]

    def __len__(self) -> int:
        return len(self.plans)


def best_plans(plan: Plan, k: int, time_limit: float | None = None, progress: Say = lambda _: None) -> BestPlans:
    """The k best plans of a program that differ in the split of a matmul, the plan itself first; fewer if there are no more.

    Matmuls that take less than a hundredth of the step do not count, nor do swaps of interchangeable mesh axes.

    **Arguments:**

    - `time_limit`: seconds for all of them; the plans found by then are returned, unproven.

    **Raises:** `AutoshardError` for a plan whose file lacks the program.
    """
    if k < 1:
        raise OptionError(f"k must be 1 or more, got {k}.")
    found = rank(_solution(plan), k, limits_of(plan, time_limit), progress)
    return BestPlans((plan, *(relaid(plan, other) for other in found.solutions[1:])), found.proven)


def why_not(
    plan: Plan,
    family: str = "",
    pins: Pins | None = None,
    memory_bytes: float | None = None,
    time_limit: float | None = None,
    progress: Say = lambda _: None,
) -> Difference:
    """Compares a plan with the best plan under another layout, operation by operation.

        print(autoshard.why_not(plan, "Megatron 1D"))
        print(autoshard.why_not(plan, pins={"params.*.wq": P(None, "x", ("y", "z"))}))

    **Arguments:**

    - `family`: one of `autoshard.planning.baselines.FAMILIES`.
    - `pins`: layouts of arguments, as for `autoshard.search`.
    - `memory_bytes`: the memory limit of the other plan per chip; by default that of this plan.

    **Raises:** `AutoshardError` for an unknown family, or a plan whose file lacks the program; `PinError`;
    `InfeasibleError` if no such plan fits.
    """
    if family and family not in FAMILIES:
        raise OptionError(f"The layout must be one of {', '.join(FAMILIES)}, got {family!r}.")
    other = _other_plan(plan, family, pins, memory_bytes, time_limit, progress)
    return diff(plan, replace(other, name=f"{plan.name}, {_name_of_request(family, pins, memory_bytes)}"))


def plan_under(
    plan: Plan,
    pins: Pins | None = None,
    memory_bytes: float | None = None,
    time_limit: float | None = None,
    progress: Say = lambda _: None,
) -> Plan:
    """The best plan with these pins of arguments, or within this memory limit per chip.

    **Raises:** as `why_not`.
    """
    return _other_plan(plan, "", pins, memory_bytes, time_limit, progress)


def _other_plan(
    plan: Plan, family: str, pins: Pins | None, memory_bytes: float | None, time_limit: float | None, progress: Say
) -> Plan:
    program, topology = program_of(plan), plan.topology
    limits = limits_of(plan, time_limit)
    limits = limits if memory_bytes is None else replace(limits, memory_bytes=memory_bytes)
    program, pinned = pin_program(program, [array.path for array in plan.arguments], topology, pins)
    try:
        found = (
            solved_family(family, program, topology, limits) if family else search(program, topology, limits, progress)
        )
    except NoPlan as error:
        raise refusal(error, program, pinned, topology, limits) from error
    return relaid(plan, found)


def plain_plans(plan: Plan, cutoff_seconds: float, time_limit: float | None = None) -> Iterator[tuple[str, Plan]]:
    """The best plan of each baseline that fits and takes less than `cutoff_seconds`, by the model."""
    limits = limits_of(plan, MOST_SECONDS if time_limit is None else min(time_limit, MOST_SECONDS))
    for name in FAMILIES:
        try:
            yield name, relaid(plan, solved_family(name, program_of(plan), plan.topology, limits, cutoff_seconds))
        except NoPlan:
            continue


def _name_of_request(family: str, pins: Pins | None, memory_bytes: float | None) -> str:
    parts = (family, "pinned" if pins else "", f"in {memory_bytes / 2**30:g} GiB" if memory_bytes is not None else "")
    return ", ".join(part for part in parts if part) or "searched anew"


def relaid(plan: Plan, solution: Solution) -> Plan:
    """Another solution for a plan's program, as a plan with the orders of its own layouts."""
    program = solution.problem.program
    found = replace(
        plan,
        fingerprint=plan.fingerprint if program is plan.program else fingerprint(program),
        arguments=tuple(_sources(solution, program.arguments, plan.arguments)),
        constants=tuple(_sources(solution, program.constants, plan.constants)),
        results=tuple(_sinks(solution, plan.results)),
        choice=solution.choice,
        estimate=records_of.estimate(solution),
        proof=solution.proof,
        operations=records_of.operation_plans(solution),
        program=program,
        baselines=(),
    )
    return apply_orders(found)


def _sources(solution: Solution, operations: Sequence[int], arrays: Sequence[ArrayPlan]) -> Iterator[ArrayPlan]:
    program = solution.problem.program
    for at, array in zip(operations, arrays, strict=True):
        value = program.operations[at].outputs[0].value
        yield _stored_array(solution, array, produced_layout(program, solution.choice, value))


def _sinks(solution: Solution, arrays: Sequence[ArrayPlan]) -> Iterator[ArrayPlan]:
    program = solution.problem.program
    for at, array in zip(program.results, arrays, strict=True):
        found = program.operations[at].inputs
        yield _stored_array(solution, array, needed_layout(program, solution.choice, at, 0)) if found else array


def _stored_array(solution: Solution, array: ArrayPlan, layout: Layout) -> ArrayPlan:
    sizes = solution.problem.topology.axis_sizes
    whole = array.bytes_per_chip * shards(array.layout, sizes)
    return replace(array, layout=layout, bytes_per_chip=whole / shards(layout, sizes))


def program_of(plan: Plan) -> Program:
    if plan.program is None:
        raise AutoshardError(f"The plan of {plan.name} is from an older file, which lacks its program; search again.")
    return plan.program


def limits_of(plan: Plan, time_limit: float | None) -> Limits:
    """The limits of the plan's own search."""
    held = replace(DEFAULTS, reserve_bytes=0.0, memory_bytes=plan.estimate.budget_bytes)
    return held if time_limit is None else replace(held, wall_seconds=time_limit)


def _solution(plan: Plan) -> Solution:
    """The solution behind a plan."""
    program, strategies = program_of(plan), plan.choice.strategies
    alike = classes(program)
    if any(strategies[i] != strategies[first] for i, first in enumerate(alike)):
        alike = identity_classes(program)  # it was searched with layers that may differ
    problem = build(program, plan.topology, plan.estimate.budget_bytes, alike)
    return Solution(problem, plan.choice, plan.proof, check(program, plan.topology, plan.choice))
