"""The cost of every strategy of an operation on one chip, without the reshards around it."""

from __future__ import annotations

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.operations import price
from costmodels.program.program import CLOSED_INSIDE, Operation, Program
from search.formulation.intra_op import closing, payload
from search.formulation.reshard import step_seconds
from search.formulation.strategies import StrategySpace
from search.formulation.tpu_tiles import repacked

_TIE = 1e-10
"""The tie-breaker between strategies of equal cost, as a part of an operation's cost."""


def strategy_seconds(program: Program, op: Operation, space: StrategySpace, topology: Topology) -> np.ndarray:
    """Seconds of one run under every strategy, with the collectives that run within the operation."""
    cost = price(program, op, space.shards, topology.chip).seconds
    cost = cost + inside_seconds(program, op, space, topology)
    return cost * (1 + _TIE * repacked(op, space.shards)) if op.op_class == "matmul" else cost


def product_seconds(program: Program, op: Operation, shards: np.ndarray, topology: Topology) -> np.ndarray:
    """Seconds that collectives may hide behind in a product's run: the longer of compute and HBM, without overhead.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.
    """
    cost = price(program, op, shards, topology.chip)
    return np.maximum(cost.compute_seconds, cost.memory_seconds)


def inside_seconds(program: Program, op: Operation, space: StrategySpace, topology: Topology) -> np.ndarray:
    """Seconds of the collectives that run within an operation (the maximum over a split dimension)."""
    found = np.zeros(len(space.strategies))
    if all(factor.kind not in CLOSED_INSIDE for factor in op.factors):
        return found
    for s, strategy in enumerate(space.strategies):
        for each in closing(op, strategy, topology):
            found[s] += step_seconds(each.kind, each.axes, payload(program, op, strategy, each, topology), topology)
    return found
