"""The choice between a function as it is and with its chains of grouped matmuls as one operation each.

A chain as one operation can be split by groups through all of its matmuls (expert parallelism). As several, each can be
split along its contracted dimension. Each program is searched and proven on its own, and the faster plan is kept.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic

from autoshard._util.tables import time
from autoshard.annotating.annotated_function import AnnotatedFunction, annotate_pins
from autoshard.planning.options import Options
from autoshard.planning.solving import LEAST_GAIN, ProgramChoice, accept, attempt, solve
from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN
from search.solve import NoPlan, Solution


def choose_chains(function: AnnotatedFunction, topology: Topology, options: Options) -> ProgramChoice:
    """The faster plan of a function with and without chains; the one without, if it has none.

    **Raises:** `InfeasibleError` if neither fits, `PinError`.
    """
    plain = annotate_pins(function, topology, options.pins)
    if function.chained is None:
        return ProgramChoice(plain, solve(plain, topology, options))
    started = monotonic()
    found = attempt(plain, topology, options)
    left = None if options.time_limit is None else options.time_limit - (monotonic() - started)
    if left is not None and left <= 0:
        note = "the time limit left chains of grouped matmuls as one operation untried"
        return ProgramChoice(plain, accept(found, plain, topology, options), notes=(note,))
    chained = annotate_pins(function.chained, topology, options.pins)
    composed = attempt(chained, topology, replace(options, time_limit=left))
    if isinstance(composed, NoPlan) or not _is_faster(composed, found):
        return ProgramChoice(plain, accept(found, plain, topology, options))
    count = sum(op.primitive == CHAIN for op in chained.program.operations)
    other = "does not fit" if isinstance(found, NoPlan) else f"takes {time(found.check.seconds)}"
    note = (
        f"chains of grouped matmuls ({count}) are one operation each; with each matmul on its own the best plan {other}"
    )
    return ProgramChoice(chained, composed, notes=(note,))


def _is_faster(one: Solution, other: Solution | NoPlan) -> bool:
    return isinstance(other, NoPlan) or one.check.seconds < other.check.seconds * (1 - LEAST_GAIN)
