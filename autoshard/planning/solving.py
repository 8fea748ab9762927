"""The search of an annotated function, with errors that name its arrays and pins, and the choice among programs for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import inf

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.planning.infeasibility import refusal
from autoshard.planning.options import Options
from costmodels.machine.topology import Topology
from costmodels.program.grouped import grouped
from search.formulation.strategies import Strategy
from search.solve import NoPlan, Solution, search

LOG = logging.getLogger("autoshard")
LEAST_GAIN = 0.001
"""The fraction of a step that another program must save, padded or with chains, to replace the function as it is written.

Both plans are proven; of two that are nearly equal, the simpler one is kept.
"""


@dataclass(frozen=True)
class ProgramChoice:
    """The chosen program of a function, its solution, and sentences about the choice."""

    function: AnnotatedFunction
    solution: Solution
    notes: tuple[str, ...] = ()


def solve(function: AnnotatedFunction, topology: Topology, options: Options) -> Solution:
    """The best layout of a function on a topology.

    **Raises:** `InfeasibleError`; `PinError` for pins that contradict each other.
    """
    return accept(attempt(function, topology, options), function, topology, options)


def attempt(function: AnnotatedFunction, topology: Topology, options: Options) -> Solution | NoPlan:
    """The best layout of a function, or the search's answer that there is none, which is not explained yet."""
    try:
        return _search(function, topology, options)
    except NoPlan as error:
        return error


def accept(found: Solution | NoPlan, function: AnnotatedFunction, topology: Topology, options: Options) -> Solution:
    """The layout that an attempt found.

    **Raises:** `InfeasibleError`, or `PinError` for pins that contradict each other. The error looks for pins that hold
        together and for a topology that is large enough, which may take longer than the search.
    """
    if not isinstance(found, NoPlan):
        return found
    raise refusal(found, function.program, function.pinned, topology, options.limits()) from found


def solve_below(function: AnnotatedFunction, topology: Topology, options: Options, cutoff: float) -> Solution | None:
    """The best layout of a function, if it takes less than `cutoff` seconds; None if no plan that fits does."""
    try:
        return _search(function, topology, options, cutoff)
    except NoPlan:
        return None


def _search(function: AnnotatedFunction, topology: Topology, options: Options, cutoff: float = inf) -> Solution:
    def keeps_rows(operation: int, strategy: Strategy) -> bool:
        groups = grouped(program.operations[operation])
        if groups is None or groups.tokens is None:
            return True
        return not (strategy.splits[groups.tokens] and strategy.splits[groups.groups])

    program, say = function.program, options.progress or LOG.info
    allow = None if options.sends_rows else keeps_rows
    return search(
        program, topology, options.limits(), say, allow=allow, symmetric=True, fold=options.fold, cutoff=cutoff
    )
