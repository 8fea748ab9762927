"""The record of a search: the solution as a plan with paths, strategy names and source lines."""

from __future__ import annotations

from dataclasses import replace

import jax

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.annotating.pins import unpinned
from autoshard.planning import records_of
from autoshard.planning.baselines import baselines
from autoshard.planning.emission import BY_DEFAULT
from autoshard.planning.options import Options
from autoshard.planning.records import Baseline, PlanRecord, predecessors, with_orders
from autoshard.planning.solving import LOG
from search.answer.orders import orders
from search.solve import Solution


def record(function: AnnotatedFunction, solution: Solution, options: Options | None = None) -> PlanRecord:
    """A solution as a plan, with the baselines that the options request."""
    traced = function.traced
    ordered = orders(function.program, solution.choice, solution.problem.topology)
    arguments = records_of.argument_plans(traced, solution, function.weak)
    results = records_of.result_plans(traced, solution)
    over = predecessors(arguments, results, function.program.donated)
    return PlanRecord(
        name=function.program.name,
        topology=solution.problem.topology,
        fingerprint=function.fingerprint,
        arguments=with_orders(arguments, ordered),
        constants=records_of.constant_plans(traced, solution),
        results=with_orders(results, [ordered[over[k]] if k in over else () for k in range(len(results))]),
        in_tree=function.in_tree,
        out_tree=function.out_tree,
        choice=solution.choice,
        estimate=records_of.estimate(solution),
        proof=solution.proof,
        operations=records_of.operation_plans(solution),
        donate_argnums=function.donate_argnums,
        warnings=records_of.warnings(traced, solution),
        jax_version=jax.__version__,
        program=function.program,
        dimensions=function.dimensions,
        baselines=_baselines(function, solution, options),
        emission=replace(BY_DEFAULT, formats="rule") if any(ordered) else BY_DEFAULT,
    )


def _baselines(function: AnnotatedFunction, solution: Solution, options: Options | None) -> tuple[Baseline, ...]:
    if options is None or not options.baselines or solution.proof.stopped == "interrupted":
        return ()
    program, topology = unpinned(function.program, ()), solution.problem.topology
    return tuple(baselines(program, topology, options.limits(), options.progress or LOG.info))
