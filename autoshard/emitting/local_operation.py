"""One operation on one chip's shards, in its planned strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.emitting.collectives.min_max_reduce import reduce_over_chips
from autoshard.emitting.collectives.reshard_steps import run_step
from autoshard.emitting.memory_orders import Order
from autoshard.emitting.tpu_workarounds.slab_gathers import look_up
from autoshard.emitting.tpu_workarounds.vector_matmul import product
from autoshard.rules import Rule
from costmodels.machine.topology import Topology
from costmodels.program.program import REDUCED_INSIDE, Factor
from search.formulation.intra_op import gathers
from search.formulation.strategies import Strategy


@dataclass(frozen=True)
class StrategyPieces:
    """One operation's strategy, as an argument of its rule's `local` function."""

    rule: Rule
    factors: tuple[Factor, ...]
    strategy: Strategy
    topology: Topology
    order: Order = ()

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.topology.axis_sizes

    @property
    def on_tpu(self) -> bool:
        return self.topology.chip.kind == "tpu"

    @property
    def expert_load(self) -> float:
        return self.topology.pricing.expert_load

    def size(self, factor: int) -> int:
        return self.factors[factor].size // prod(self.sizes[axis] for axis in self.strategy.splits[factor])

    def start(self, factor: int) -> Any:
        if not self.strategy.splits[factor]:
            return jnp.int32(0)
        return lax.axis_index(self.strategy.splits[factor]) * self.size(factor)

    def is_split(self, factor: int) -> bool:
        return bool(self.strategy.splits[factor]) or self.factors[factor].size != self.rule.factors[factor].size

    def chips(self, factor: int) -> int:
        return prod(self.sizes[axis] for axis in self.strategy.splits[factor])

    def axes(self, factor: int) -> tuple[str, ...]:
        return self.strategy.splits[factor]

    def along(self, axis: str) -> int:
        return self.sizes[axis]

    def gathered(self, factor: int, piece: Any) -> Any:
        row = lax.optimization_barrier(lax.reshape(piece, (1, piece.size)))
        for step in gathers(self.strategy.splits[factor], self.topology):
            row = run_step(step, row, self.sizes)
        # Without the barriers the TPU compiler (libtpu 0.0.42) maps few elements to lanes, and emits an all-reduce.
        return lax.reshape(lax.optimization_barrier(row), (row.shape[0], *piece.shape))

    def permuted(self, factor: int, piece: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        if all(sender == receiver for sender, receiver in pairs):
            return piece
        axes, in_order = self.strategy.splits[factor], tuple(a for a in self.sizes if a in self.strategy.splits[factor])
        numbers = np.arange(prod(self.sizes[axis] for axis in axes)).reshape([self.sizes[axis] for axis in axes])
        place = np.argsort(np.transpose(numbers, [axes.index(axis) for axis in in_order]).ravel())
        return lax.ppermute(piece, in_order, [(int(place[a]), int(place[b])) for a, b in pairs])

    def look_up(self, primitive: Any, operand: Any, indices: Any, params: Mapping[str, Any]) -> Any:
        if self.on_tpu:
            return look_up(primitive, operand, indices, params)
        return primitive.bind(operand, indices, **params)


def run_locally(eqn: Any, rule: Rule, pieces: StrategyPieces, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs one equation on local shards: unchanged, or by its rule's `local` function."""
    if rule.local is not None:
        return rule.local(eqn, rule, pieces, *operands)
    if eqn.primitive.name == "dot_general" and pieces.on_tpu:
        return [product(eqn, *operands)]
    results = eqn.primitive.bind(*operands, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def all_reduce_inside(rule: Rule, strategy: Strategy, piece: Any) -> Any:
    """The result of the all-reduce inside the operation of a split maximum, minimum, conjunction or disjunction."""
    for factor, axes in zip(rule.factors, strategy.splits, strict=True):
        if axes and factor.kind in REDUCED_INSIDE:
            piece = reduce_over_chips(factor.kind, piece, axes)
    return piece
