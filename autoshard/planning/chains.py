"""The choice between a function as it is and with its chains of grouped matmuls as one operation each.

A chain as one operation can be split by groups through all of its matmuls (expert parallelism). As several, each can be
split along its contracted dimension. Each program is searched and proven on its own, and the faster plan is kept.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic

from autoshard._util.tables import time
from autoshard.annotating.annotated_function import AnnotatedFunction, annotate_pins
from autoshard.errors import InfeasibleError
from autoshard.planning.options import Options
from autoshard.planning.solving import LEAST_GAIN, ProgramChoice, solve
from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN


def choose_chains(function: AnnotatedFunction, topology: Topology, options: Options) -> ProgramChoice:
    """The faster plan of a function with and without chains; the one without, if it has none.

    **Raises:** `InfeasibleError` if neither fits, `PinError`.
    """
    if function.chained is None:
        return _solve(function, topology, options)
    started = monotonic()
    plain = _try(function, topology, options)
    left = None if options.time_limit is None else options.time_limit - (monotonic() - started)
    if left is not None and left <= 0:
        return replace(_found(plain), notes=("the time limit left chains of grouped matmuls as one operation untried",))
    chained = _try(function.chained, topology, replace(options, time_limit=left))
    if isinstance(chained, InfeasibleError) or not _is_faster(chained, plain):
        return _found(plain)
    count = sum(op.primitive == CHAIN for op in chained.function.program.operations)
    other = "does not fit" if isinstance(plain, InfeasibleError) else f"takes {time(plain.solution.check.seconds)}"
    note = (
        f"chains of grouped matmuls ({count}) are one operation each; with each matmul on its own the best plan {other}"
    )
    return replace(chained, notes=(note,))


def _solve(function: AnnotatedFunction, topology: Topology, options: Options) -> ProgramChoice:
    pinned = annotate_pins(function, topology, options.pins)
    return ProgramChoice(pinned, solve(pinned, topology, options))


def _try(function: AnnotatedFunction, topology: Topology, options: Options) -> ProgramChoice | InfeasibleError:
    try:
        return _solve(function, topology, options)
    except InfeasibleError as error:
        return error


def _found(tried: ProgramChoice | InfeasibleError) -> ProgramChoice:
    """A choice that fits.

    **Raises:** `InfeasibleError` if it does not.
    """
    if isinstance(tried, InfeasibleError):
        raise tried
    return tried


def _is_faster(one: ProgramChoice, other: ProgramChoice | InfeasibleError) -> bool:
    if isinstance(other, InfeasibleError):
        return True
    return one.solution.check.seconds < other.solution.check.seconds * (1 - LEAST_GAIN)
