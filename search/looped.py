"""What a looped collective einsum would hide of a plan.

A product whose operand is gathered can begin with the piece that is there, and one whose result is reduced and scattered can
send a piece as soon as it is done (Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition",
ASPLOS; Pope et al. 2022, §3.5). The pair then takes the longer of both times. Latency and launches are not hidden.

It is a price of a given plan, and none that the search minimises: how several collectives share one product that they hide
behind is no sum over operations and single changes of layout.
"""

from __future__ import annotations

import numpy as np

from costmodels.collectives import seconds_on
from costmodels.operations import price
from costmodels.program import Program
from costmodels.topology import Topology
from search.solution import Choice, Collective, collectives, produced

_SPLIT = ("all-gather", "reduce-scatter")
"""The collectives that can be cut into pieces beside a product."""


def hidden_seconds(program: Program, topology: Topology, choice: Choice) -> float:
    """The seconds of one step that would be hidden; every collective behind one product at most."""
    on_wire: dict[int, float] = {}
    for each in collectives(program, topology, choice):
        at = _product(program, choice, each) if each.kind in _SPLIT else None
        if at is not None:
            latency = float(seconds_on(topology, each.kind, each.axes, 0.0)) * each.count
            on_wire[at] = on_wire.get(at, 0.0) + each.seconds - latency
    return sum(min(sent, _computing(program, topology, choice, at)) for at, sent in on_wire.items())


def _product(program: Program, choice: Choice, each: Collective) -> int | None:
    """The matmul that takes what is gathered, or that made what is reduced."""
    if each.kind == "all-gather":
        users = [at for at, _ in program.consumers.get(each.value, ())] if each.operation < 0 else [each.operation]
        return next((at for at in users if program.operations[at].op_class == "matmul"), None)
    value = each.value
    while value in program.producers:
        at = program.producers[value][0]
        op = program.operations[at]
        if op.op_class == "matmul":
            return at
        # Partial sums travel through additions: the last of their operands that is one came last.
        partial = [use.value for use in op.inputs if produced(program, choice, use.value).partial]
        if op.op_class != "fused" or not partial:
            return None
        value = max(partial, key=lambda v: program.producers[v][0])
    return None


def _computing(program: Program, topology: Topology, choice: Choice, at: int) -> float:
    """The seconds of all runs of a matmul, without its overhead."""
    op = program.operations[at]
    sizes = topology.axis_sizes
    pieces = [np.prod([sizes[axis] for axis in axes]) for axes in choice.strategies[at].splits]
    cost = price(program, op, np.array([pieces], dtype=float), topology.chip)
    return float(max(cost.compute_seconds[0], cost.memory_seconds[0])) * program.multiplicity(op.region)
