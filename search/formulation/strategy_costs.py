"""The cost of every strategy of an operation on one chip, without the reshards around it."""

from __future__ import annotations

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.operations import price, windows
from costmodels.program.asynchronous import is_deferred, static_operands
from costmodels.program.program import CLOSED_INSIDE, Operation, Program
from search.formulation.intra_op import intra_op_collectives, payload
from search.formulation.reshard import step_seconds
from search.formulation.strategies import LoopedSide, StrategySpace
from search.formulation.tpu_tiles import count_retiled

_TIE = 1e-10
"""The tie-breaker between strategies of equal cost, as a part of an operation's cost."""


def strategy_seconds(program: Program, op: Operation, space: StrategySpace, topology: Topology) -> np.ndarray:
    """Seconds of one run under every strategy, with the collectives that run within the operation."""
    pricing = topology.pricing
    cost = price(program, op, space.shards, topology.chip, pricing.asynchronous, pricing.expert_load).seconds
    cost = cost + inside_seconds(program, op, space, topology)
    return cost * (1 + _TIE * count_retiled(op, space.shards)) if op.op_class == "matmul" else cost


def product_seconds(program: Program, op: Operation, shards: np.ndarray, topology: Topology) -> np.ndarray:
    """Seconds that collectives may hide behind in a product's run: all but its start.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.
    """
    cost = price(program, op, shards, topology.chip, load=topology.pricing.expert_load)
    return cost.seconds - cost.overhead_seconds


def hiding_seconds(
    program: Program, operation: int, which: LoopedSide, shards: np.ndarray, partial: np.ndarray, topology: Topology
) -> np.ndarray:
    """Seconds of a matmul's run that hide the reshard of an operand (0, 1, ...) or of its "result" under "async".

    Gathers of arguments and reductions of deferred results are beside the chain of dependences and share its time. Of the
    reshards on the chain, only one is hidden: that of the result if it is a partial sum, that of an operand if not.

    **Arguments:**

    - `shards`: `[strategies, factors]`; `partial`: whether the result of each strategy is a partial sum.
    """
    op = program.operations[operation]
    static, deferred = static_operands(program, op), is_deferred(program, operation)
    found = windows(program, operation, shards, topology.chip, topology.size, topology.pricing.expert_load)
    if which in static or (which == "result" and deferred):
        return found.beside / (len(static) + deferred)
    sharers = 1 if which == "result" else len(op.inputs) - len(static)
    return np.where(partial == (which == "result"), found.chain / sharers, 0.0)


def inside_seconds(program: Program, op: Operation, space: StrategySpace, topology: Topology) -> np.ndarray:
    """Seconds of the collectives that run within an operation (the maximum over a split dimension)."""
    found = np.zeros(len(space.strategies))
    if all(factor.kind not in CLOSED_INSIDE for factor in op.factors):
        return found
    for s, strategy in enumerate(space.strategies):
        for each in intra_op_collectives(op, strategy, topology):
            found[s] += step_seconds(each.kind, each.axes, payload(program, op, strategy, each, topology), topology)
    return found
