"""The record of a search: the solution as a plan with paths, strategy names and source lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import jax

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.annotating.padding import paddings_by_value
from autoshard.annotating.pins import keep_pins
from autoshard.planning import records_of
from autoshard.planning.baselines import baselines
from autoshard.planning.options import Options
from autoshard.planning.padding_costs import padding_notes
from autoshard.planning.records import Baseline, PlanRecord, predecessors, with_orders
from autoshard.planning.solving import LOG
from search.answer.orders import orders
from search.solve import Solution

P = TypeVar("P", bound=PlanRecord)


def record(
    function: AnnotatedFunction,
    solution: Solution,
    options: Options | None = None,
    notes: Sequence[str] = (),
    handed_results: Sequence[int] = (),
) -> PlanRecord:
    """A solution as a plan, with the baselines that the options request, and more `notes` among its warnings."""
    traced = function.traced
    paddings = paddings_by_value(function.program, function.padding)
    found = PlanRecord(
        name=function.program.name,
        topology=solution.problem.topology,
        fingerprint=function.fingerprint,
        arguments=records_of.argument_plans(traced, solution, function.weak, paddings),
        constants=records_of.constant_plans(traced, solution, paddings),
        results=records_of.result_plans(traced, solution, paddings),
        padding=function.padding,
        handed_results=tuple(handed_results),
        in_tree=function.in_tree,
        out_tree=function.out_tree,
        choice=solution.choice,
        estimate=records_of.estimate(solution),
        proof=solution.proof,
        operations=records_of.operation_plans(solution),
        donate_argnums=function.donate_argnums,
        warnings=(*records_of.warnings(traced, solution), *notes),
        jax_version=jax.__version__,
        program=function.program,
        dimensions=function.dimensions,
        baselines=_baselines(function, solution, options),
    )
    found = apply_orders(found)
    return replace(found, warnings=(*found.warnings, *padding_notes(found)))


def apply_orders(plan: P, ordered: Sequence[tuple[int, ...]] | None = None) -> P:
    """The plan with these orders of its arguments, by default by the rule (`search.answer.orders`).

    The result that overwrites a donated argument has its order.
    """
    program = plan.require_program()
    ordered = orders(program, plan.choice, plan.topology) if ordered is None else ordered
    over = predecessors(plan.arguments, plan.results, program.donated)
    return replace(
        plan,
        arguments=with_orders(plan.arguments, ordered),
        results=with_orders(plan.results, [ordered[over[k]] if k in over else () for k in range(len(plan.results))]),
        emission=replace(plan.emission, formats="rule" if any(ordered) else "default"),
    )


def _baselines(function: AnnotatedFunction, solution: Solution, options: Options | None) -> tuple[Baseline, ...]:
    if options is None or not options.baselines or solution.proof.stopped == "interrupted":
        return ()
    program, topology = keep_pins(function.program, ()), solution.problem.topology
    return tuple(baselines(program, topology, options.limits(), options.progress or LOG.info))
