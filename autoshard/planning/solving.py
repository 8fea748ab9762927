"""The search of an annotated function, with errors that name its arrays and pins."""

from __future__ import annotations

import logging

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.planning.infeasibility import conflict, explained
from autoshard.planning.options import Options
from autoshard.rules.pin import PinError
from costmodels.machine.topology import Topology
from search.solve import NoPlan, Solution, search

LOG = logging.getLogger("autoshard")


def solve(function: AnnotatedFunction, topology: Topology, options: Options) -> Solution:
    """The best layout of a function on a topology.

    **Raises:** `InfeasibleError`; `PinError` for pins that contradict each other.
    """
    try:
        return search(function.program, topology, options.limits(), options.progress or LOG.info, fold=options.fold)
    except NoPlan as error:
        clash = conflict(function.program, function.pinned, topology, options.limits())
        raise (PinError(clash) if clash else explained(error)) from error
