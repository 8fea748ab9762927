"""Baselines: families of hand-chosen layouts, solved as restricted problems, to compare the plan with.

A baseline restricts how matmuls by a weight are split and how weights are stored. The search optimises everything else,
so each baseline is as good as its family allows.

| baseline | matmuls by a weight | weights are stored |
|---|---|---|
| data parallel | split by batch or sequence only | replicated |
| fully sharded | split by batch or sequence only | in as many shards as divide |
| Megatron 1D | split along the contracted or along the output dimension, never both; tokens whole | as they are used |
| weight-stationary 2D | large ones split along both; tokens whole | as they are used |
| weight-gathered | large ones split by batch or sequence, and along the weight if faster | in as many shards as divide |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf

from autoshard.naming.strategy_names import weight_roles
from autoshard.naming.weights import is_product, weight_operand, weight_sources
from autoshard.planning.records import Baseline
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.formulation.layouts import shards
from search.formulation.strategies import Strategy, output_layout, strategy_space
from search.presolve.limits import Say
from search.solve import Limits, NoPlan, Solution, search

LARGE_PART = 1 / 64
"""The fraction of all weights' bytes from which a weight counts as large."""
MOST_SECONDS = 10.0
"""The time limit of a baseline's search; the plan found by then may not be the best of its family."""

Allow = Callable[[int, Strategy], bool]


def baselines(program: Program, topology: Topology, limits: Limits, say: Say = lambda _: None) -> Iterator[Baseline]:
    """Solves every baseline, each within the limits and `MOST_SECONDS`."""
    limits = replace(limits, wall_seconds=min(limits.wall_seconds, MOST_SECONDS))
    for name in FAMILIES:
        say(f"comparing with {name}")
        try:
            found = solve_baseline(name, program, topology, limits)
            yield Baseline(name, found.check.seconds, found.proof.bound_seconds)
        except NoPlan as error:
            yield Baseline(
                name, inf, inf, f"does not fit the memory{'' if error.proven else ', as far as was searched'}"
            )


def solve_baseline(name: str, program: Program, topology: Topology, limits: Limits, cutoff: float = inf) -> Solution:
    """The best plan of one baseline below `cutoff` seconds.

    **Raises:** `NoPlan`.
    """
    weights = _Weights(program, topology)
    rule, store = FAMILIES[name]
    kept = {source: store for i in weights.operand for source in weights.sources_of(i)}

    def allow(operation: int, strategy: Strategy) -> bool:
        if operation in weights.operand:
            return rule(weights, operation, strategy)
        return operation not in kept or kept[operation](weights, operation, strategy)

    return search(program, topology, limits, allow=allow, symmetric=True, cutoff=cutoff)


class _Weights:
    """The matmuls by a weight, with the roles of their factors."""

    def __init__(self, program: Program, topology: Topology) -> None:
        self.program, self.topology = program, topology
        found = ((i, weight_operand(program, i)) for i, op in program.matmuls() if is_product(op))
        self.operand = {i: weight for i, weight in found if weight is not None}
        self.roles = {i: weight_roles(program.operations[i], weight) for i, weight in self.operand.items()}
        stored = {source for i in self.operand for source in self.sources_of(i)}
        self._total = sum(self._bytes(at) for at in stored)
        self._most: dict[int, int] = {}

    def sources_of(self, operation: int) -> tuple[int, ...]:
        """The operations of the arguments that a matmul's weight is made of."""
        use = self.program.operations[operation].inputs[self.operand[operation]]
        return weight_sources(self.program, use.value)

    def _bytes(self, source: int) -> float:
        return self.program.values[self.program.operations[source].outputs[0].value].bytes

    def is_large(self, operation: int) -> bool:
        """Whether the weight has at least `LARGE_PART` of all weights' bytes."""
        return sum(self._bytes(source) for source in self.sources_of(operation)) >= LARGE_PART * self._total

    def split(self, operation: int, strategy: Strategy) -> set[str]:
        """The roles of the factors that a strategy splits: "contracted", "output", "batch", "sequence"."""
        pairs = zip(self.roles[operation], strategy.splits, strict=True)
        return {role for role, axes in pairs if axes}

    def can_split(self, operation: int, wanted: set[str]) -> bool:
        """Whether any strategy splits a matmul along all these roles."""
        space = strategy_space(self.program.operations[operation], tuple(self.topology.axis_sizes.items()))
        return any(wanted <= self.split(operation, strategy) for strategy in space.strategies)

    def most_pieces(self, source: int) -> int:
        """The largest number of shards of an argument."""
        if source not in self._most:
            space = strategy_space(self.program.operations[source], tuple(self.topology.axis_sizes.items()))
            self._most[source] = max(self.pieces(source, strategy) for strategy in space.strategies)
        return self._most[source]

    def pieces(self, source: int, strategy: Strategy) -> int:
        """The number of shards of an argument under a strategy."""
        layout = output_layout(self.program.operations[source].signature, strategy, 0)
        return shards(layout, self.topology.axis_sizes)


_WEIGHT = {"contracted", "output"}


def _by_tokens(weights: _Weights, operation: int, strategy: Strategy) -> bool:
    return not weights.split(operation, strategy) & _WEIGHT


def _is_split_one_way(weights: _Weights, operation: int, strategy: Strategy) -> bool:
    split = weights.split(operation, strategy)
    return split < _WEIGHT


def _is_split_both_ways(weights: _Weights, operation: int, strategy: Strategy) -> bool:
    split = weights.split(operation, strategy)
    if not weights.is_large(operation) or not weights.can_split(operation, _WEIGHT):
        return split <= _WEIGHT
    return split == _WEIGHT


def _is_gathered(weights: _Weights, operation: int, strategy: Strategy) -> bool:
    return not weights.is_large(operation) or bool(weights.split(operation, strategy) - _WEIGHT)


def _is_whole(weights: _Weights, source: int, strategy: Strategy) -> bool:
    return weights.pieces(source, strategy) == 1


def _finest(weights: _Weights, source: int, strategy: Strategy) -> bool:
    return weights.pieces(source, strategy) == weights.most_pieces(source)


def _is_any_split(weights: _Weights, source: int, strategy: Strategy) -> bool:
    return True


Rule = Callable[[_Weights, int, Strategy], bool]
FAMILIES: dict[str, tuple[Rule, Rule]] = {
    "data parallel": (_by_tokens, _is_whole),
    "fully sharded": (_by_tokens, _finest),
    "Megatron 1D": (_is_split_one_way, _is_any_split),
    "weight-stationary 2D": (_is_split_both_ways, _is_any_split),
    "weight-gathered": (_is_gathered, _finest),
}
