"""Strategies: the factor that each mesh axis splits in one operation, and the layouts that this forces.

One generic function derives from an operation's factors the legal splits, the layout of each operand, the layout of
each result, and the reductions that run inside the operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from costmodels.program.grouped import groups_factor
from costmodels.program.program import Factor, Operation
from search.formulation.layouts import Axes, Layout, assignments

Sizes = tuple[tuple[str, int], ...]
LoopedSide = int | Literal["result"]
"""The side of a product whose collective is looped with it: an operand, or the result."""


class Strategy(NamedTuple):
    """A split of an operation's factors over mesh axes.

    `splits` has the mesh axes that split each factor, major to minor; those of groups to which rows are dispatched split the
    tokens, too. `carried` has, per linear group, the axes whose
    partial sums pass through. `looped` is the operand (0, 1, ...) or the result whose collective is looped with the
    operation, if the pricing has looped collectives (`costmodels.machine.conventions`).
    """

    splits: tuple[Axes, ...]
    carried: tuple[Axes, ...] = ()
    looped: LoopedSide | None = None

    @property
    def axes(self) -> Axes:
        """The mesh axes in use, each once."""
        return tuple(dict.fromkeys(axis for split in self.splits for axis in split))


@dataclass(frozen=True)
class StrategySpace:
    """Every strategy of an operation with the layouts it forces.

    `inputs[k][s]` is the layout that operand `k` must have under strategy `s`, `outputs[k][s]` the layout of result
    `k`; `shards` (`[strategies, factors]`) is the number of shards of each factor.
    """

    strategies: tuple[Strategy, ...]
    inputs: tuple[tuple[Layout, ...], ...]
    outputs: tuple[tuple[Layout, ...], ...]
    shards: np.ndarray


def strategy_space(operation: Operation, sizes: Sizes, looped: bool = False) -> StrategySpace:
    """Every legal strategy of an operation on a mesh with these axis sizes; the one that splits nothing comes first.

    **Arguments:**

    - `looped`: whether a matmul's strategies name the collective that is looped with it.
    """
    if looped and operation.op_class == "matmul":
        return _make_looped_space(operation.signature, sizes)
    return _space(operation.signature, sizes)


@lru_cache(maxsize=1024)
def _make_looped_space(signature: tuple, sizes: Sizes) -> StrategySpace:
    """Each strategy once for each collective that may be looped with it; once if there is none."""
    plain = _space(signature, sizes)
    axes = sum(size > 1 for _, size in sizes)
    chosen: list[tuple[int, LoopedSide | None]] = []
    for s in range(len(plain.strategies)):
        inputs = [k for k, layouts in enumerate(plain.inputs) if len(layouts[s].axes) < axes]
        result: list[LoopedSide] = ["result"] if plain.outputs[0][s].partial else []
        sides: list[LoopedSide | None] = [*result, *inputs]
        chosen.extend((s, side) for side in sides or [None])
    at = [s for s, _ in chosen]
    return StrategySpace(
        tuple(plain.strategies[s]._replace(looped=which) for s, which in chosen),
        tuple(tuple(layouts[s] for s in at) for layouts in plain.inputs),
        tuple(tuple(layouts[s] for s in at) for layouts in plain.outputs),
        plain.shards[at],
    )


@lru_cache(maxsize=4096)
def _space(signature: tuple, sizes: Sizes) -> StrategySpace:
    factors, inputs, outputs, linear, _ = signature
    table, least = dict(sizes), fewest_gathered(factors, inputs, outputs)
    compound = [dim for dims in (*inputs, *outputs) for dim in dims if len(dim) > 1]
    shards_of = cache(lambda axes: prod(table[axis] for axis in axes))
    free = [i for i, factor in enumerate(factors) if factor.kind != "whole" and factor.size > 1]
    axes = [axis for axis, size in sizes if size > 1]
    found: list[Strategy] = []
    for ordered, carried in assignments(axes, len(free), len(linear)):
        splits: list[Axes] = [()] * len(factors)
        for i, chosen in zip(free, ordered, strict=True):
            splits[i] = chosen
        if _legal(factors, compound, list(map(shards_of, splits)), least):
            found.extend(Strategy(each, carried) for each in _with_dispatch(factors, inputs, tuple(splits), table))
    counts = np.array([list(map(shards_of, s.splits)) for s in found], dtype=float)
    return StrategySpace(
        tuple(found),
        tuple(tuple(input_layout(signature, s, k) for s in found) for k in range(len(inputs))),
        tuple(tuple(output_layout(signature, s, k) for s in found) for k in range(len(outputs))),
        counts.reshape(len(found), len(factors)),
    )


def _with_dispatch(
    factors: Sequence[Factor], inputs: Sequence, splits: tuple[Axes, ...], table: dict[str, int]
) -> Iterator[tuple[Axes, ...]]:
    """The splits, and those with groups split over axes that split dispatched tokens too; none if other factors forbid it.

    With split tokens, rows and groups have no axes of their own: a chip has the rows of its tokens, and sends them to the chips
    of their groups along some of the axes.
    """
    tokens = next((i for i, factor in enumerate(factors) if factor.kind == "dispatched"), None)
    if tokens is None or not splits[tokens]:
        yield splits
        return
    rows, groups = 0, groups_factor(inputs[-1])
    if splits[rows] or splits[groups]:
        return
    axes = splits[tokens]
    for count in range(len(axes) + 1):
        for chosen in combinations(axes, count):
            if factors[groups].size % prod(table[axis] for axis in chosen) == 0:
                yield (*splits[:groups], chosen, *splits[groups + 1 :])


def fewest_gathered(factors: Sequence[Factor], inputs: Sequence, outputs: Sequence) -> int:
    """The fewest elements in a shard of a gathered factor: as many as the results make of it, such as the best k."""
    given = {i for dims in inputs for dim in dims for i in dim}
    made = {i for dims in outputs for dim in dims for i in dim} - given
    return prod(factors[i].size for i in made)


def _legal(factors: Sequence[Factor], compound: Sequence, counts: Sequence[int], least: int) -> bool:
    """Whether factors divide, compound dimensions have contiguous shards, and gathered shards are large enough."""
    for factor, count in zip(factors, counts, strict=True):
        if factor.size % count or (factor.kind == "gathered" and count > 1 and factor.size // count < least):
            return False
    return all(_contiguous(factors, dim, counts) for dim in compound)


def _contiguous(factors: Sequence[Factor], dim: Sequence[int], counts: Sequence[int]) -> bool:
    """A minor factor may be split only if every factor more major than it is cut down to single elements."""
    whole = True
    for i in dim:
        if counts[i] > 1 and not whole:
            return False
        whole = whole and counts[i] == factors[i].size
    return True


def _dims(dims: Sequence[Sequence[int]], strategy: Strategy) -> tuple[Axes, ...]:
    splits = strategy.splits
    return tuple(splits[dim[0]] if len(dim) == 1 else tuple(axis for i in dim for axis in splits[i]) for dim in dims)


def input_layout(signature: tuple, strategy: Strategy, k: int) -> Layout:
    """The layout that operand `k` must have; partial over the axes carried by the linear groups it belongs to."""
    _, inputs, _, linear, _ = signature
    carried = [axis for group, axes in zip(linear, strategy.carried, strict=True) if k in group for axis in axes]
    return Layout(_dims(inputs[k], strategy), tuple(sorted(carried)))


def output_layout(signature: tuple, strategy: Strategy, k: int) -> Layout:
    """The layout of result `k`; partial over the axes that split a summed factor and those carried.

    Where groups are split over the axes of dispatched tokens, each chip gets all its results back.
    """
    factors, _, outputs, _, _ = signature
    summed = [axis for f, axes in zip(factors, strategy.splits, strict=True) if f.kind == "sum" for axis in axes]
    returned = {a for f, axes in zip(factors, strategy.splits, strict=True) if f.kind == "dispatched" for a in axes}
    carried = [axis for axes in strategy.carried for axis in axes]
    partial = sorted((set(summed) - returned) | set(carried))
    return Layout(_dims(outputs[k], strategy), tuple(partial))
