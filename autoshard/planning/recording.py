"""The record of a search: the solution as a plan in the user's words."""

from __future__ import annotations

import jax

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.annotating.pins import unpinned
from autoshard.planning import records_of
from autoshard.planning.baselines import baselines
from autoshard.planning.options import Options
from autoshard.planning.records import Baseline, PlanRecord
from autoshard.planning.solving import LOG
from search.solve import Solution


def record(function: AnnotatedFunction, solution: Solution, options: Options | None = None) -> PlanRecord:
    """A solution as a plan; with the baselines that the options ask for."""
    traced = function.traced
    return PlanRecord(
        name=function.program.name,
        topology=solution.problem.topology,
        fingerprint=function.fingerprint,
        arguments=records_of.argument_plans(traced, solution, function.weak),
        constants=records_of.constant_plans(traced, solution),
        results=records_of.result_plans(traced, solution),
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
    )


def _baselines(function: AnnotatedFunction, solution: Solution, options: Options | None) -> tuple[Baseline, ...]:
    if options is None or not options.baselines or solution.proof.stopped == "interrupted":
        return ()
    program, topology = unpinned(function.program, ()), solution.problem.topology
    return tuple(baselines(program, topology, options.limits(), options.progress or LOG.info))
