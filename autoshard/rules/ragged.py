"""Rules of matmuls over ragged groups of rows: mixtures of experts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.rule import Dims, Factors, Pieces, Rule, register, whole_rule


@register("ragged_dot_general")
def ragged_dot(inputs, outputs, *, ragged_dot_dimension_numbers, group_offset=None, **_):
    """`[m,k],[g,k,n],[g] -> [m,n] sum={g,k}`: rows in consecutive groups, each times the matrix of its group.

    Rows may be split: each chip counts its rows of each group. Groups may be split, which is expert parallelism: each chip
    multiplies the rows of its own groups, has zeros elsewhere, and leaves a partial sum. If the rows are contracted, as in the
    gradient of the matrices, the result has the groups: `[m,k],[m,n],[g] -> [g,k,n] sum={m}`.
    """
    numbers = ragged_dot_dimension_numbers
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    lhs, rhs, sizes = inputs[:3]
    shared = sizes.ndim == 1  # otherwise each row of the batch has its own groups
    outer = not shared and sizes.shape[:-1] != tuple(lhs.shape[i] for i in lhs_batch)
    if ragged in lhs_batch or group_offset is not None or outer:
        return whole_rule(inputs, outputs)
    factors = Factors()
    left = {int(i): factors.new(lhs.shape[i]) for i in lhs_batch}
    right = {int(j): left[int(i)] for i, j in zip(lhs_batch, rhs_batch, strict=True)}
    batch = list(left.values())
    kind = "whole" if not shared else "parallel" if ragged in lhs_sum else "sum"
    groups, counted = factors.new(sizes.shape[-1], kind), factors.new(sizes.shape[-1], "whole")
    right.update({int(j): groups for j in numbers.rhs_group_dimensions})
    for i, j in zip(lhs_sum, rhs_sum, strict=True):
        left[int(i)] = right[int(j)] = factors.new(lhs.shape[i], "sum")
    free = [*_fill(factors, left, lhs), *_fill(factors, right, rhs)]
    result = [groups, *batch, *free] if ragged in lhs_sum else [*batch, *free]
    counts = [counted] if shared else [*batch, counted]
    return Rule(
        factors.done(),
        (_in_order(left), _in_order(right), tuple((i,) for i in counts)),
        (tuple((i,) for i in result),),
        (frozenset({0}), frozenset({1})),
        op_class="matmul",
        traffic=(0, 1, -1),
        flops_per_point=2.0
        / max(1, sizes.shape[-1]) ** 2,  # each row meets one group's matrix; the counts are not a loop
        local=_local_ragged_dot,
    )


def _fill(factors: Factors, side: dict[int, int], aval) -> list[int]:
    """New factors for the dimensions of an operand that have none yet."""
    made = {i: factors.new(aval.shape[i]) for i in range(aval.ndim) if i not in side}
    side.update(made)
    return list(made.values())


def _in_order(side: dict[int, int]) -> Dims:
    return tuple((side[i],) for i in range(len(side)))


def _local_ragged_dot(eqn, rule: Rule, pieces: Pieces, lhs, rhs, sizes):
    (lhs_sum, rhs_sum), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (ragged,) = map(int, eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions)
    (rows,) = rule.inputs[0][ragged]
    groups = rule.inputs[2][-1][0] - 1  # created just before the factor of the counts
    if pieces.is_split(rows) or pieces.is_split(groups):
        sizes = _within(sizes, pieces.start(rows), pieces.size(rows))
    if not pieces.is_split(groups):
        return [eqn.primitive.bind(lhs, rhs, sizes, **eqn.params)]
    ends = jnp.cumsum(sizes, dtype=np.int32)
    own = lax.dynamic_slice_in_dim(sizes, pieces.start(groups), pieces.size(groups))
    count = jnp.sum(own, dtype=np.int32)
    before = lax.dynamic_index_in_dim(ends, pieces.start(groups) + pieces.size(groups) - 1, keepdims=False) - count
    lhs = jnp.roll(lhs, -before, ragged)
    if ragged in lhs_sum:
        at = int(rhs_sum[list(lhs_sum).index(ragged)])
        rhs = _first(jnp.roll(rhs, -before, at), count, at)
        return [eqn.primitive.bind(_first(lhs, count, ragged), rhs, own, **eqn.params)]
    found = eqn.primitive.bind(lhs, rhs, own, **eqn.params)
    at = rule.outputs[0].index((rows,))
    return [jnp.roll(_first(found, count, at), before, at)]


def _within(sizes, start, count: int):
    """The number of rows of each group among the `count` rows from `start` on."""
    ends = jnp.cumsum(sizes, axis=-1, dtype=np.int32)
    begins = ends - sizes.astype(np.int32)
    inside = jnp.clip(ends - start, 0, count) - jnp.clip(begins - start, 0, count)
    return inside.astype(sizes.dtype)


def _first(array, count, dim: int):
    """The first `count` elements along a dimension, followed by zeros."""
    place = lax.broadcasted_iota(np.int32, array.shape, dim)
    return jnp.where(place < count, array, jnp.zeros_like(array))
