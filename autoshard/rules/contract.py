"""Rules of contractions, reductions and scans along a dimension."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import lax

from autoshard.rules.rule import Factors, Pieces, Rule, register
from costmodels.program.program import FactorKind, Output


@register("dot_general")
def dot_general(inputs, outputs, *, dimension_numbers, precision=None, **_):
    """`[b,i,k],[b,k,j] -> [b,i,j] sum={k}`, with the dimensions in the order of the dimension numbers."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    lhs, rhs = inputs
    factors = Factors()
    left: dict[int, int] = {i: factors.new(lhs.shape[i]) for i in lhs_batch}
    right = {j: left[i] for i, j in zip(lhs_batch, rhs_batch, strict=True)}
    result = [left[i] for i in lhs_batch]
    for i in range(lhs.ndim):
        if i not in lhs_batch and i not in lhs_sum:
            left[i] = factors.new(lhs.shape[i])
            result.append(left[i])
    for j in range(rhs.ndim):
        if j not in rhs_batch and j not in rhs_sum:
            right[j] = factors.new(rhs.shape[j])
            result.append(right[j])
    for i, j in zip(lhs_sum, rhs_sum, strict=True):
        left[i] = right[j] = factors.new(lhs.shape[i], "sum")
    sides = tuple(tuple((found[i],) for i in range(len(found))) for found in (left, right))
    dims = tuple((i,) for i in result)
    return Rule(
        factors.done(),
        sides,
        (dims,),
        op_class="matmul",
        traffic=(0, 1, Output()),
        flops_per_point=2.0,
        rounded=_rounded(inputs, precision),
    )


def _rounded(inputs, precision) -> tuple[int, ...]:
    """The float32 operands of a product at default precision."""
    given = precision if isinstance(precision, tuple) else (precision,)
    default = all(each in (None, lax.Precision.DEFAULT) for each in given)
    return tuple(k for k, each in enumerate(inputs) if default and each.dtype == jnp.float32)


def _reduce(inputs, outputs, axes, kind):
    """`[a,b] -> [a]`, `b` reduced; reductions of several operands share their factors."""
    factors = Factors()
    dims = tuple((factors.new(n, kind if i in axes else "parallel"),) for i, n in enumerate(inputs[0].shape))
    kept = tuple(dim for i, dim in enumerate(dims) if i not in axes)
    linear = (frozenset({0}),) if kind == "sum" else ()
    return Rule(factors.done(), (dims,) * len(inputs), (kept,) * len(outputs), linear)


@register("reduce_sum")
def reduce_sum(inputs, outputs, *, axes, **_):
    """A sum leaves a partial sum over the axes that split it."""
    return _reduce(inputs, outputs, axes, "sum")


@register("reduce_max")
def reduce_max(inputs, outputs, *, axes, **_):
    """A maximum over a split dimension is an all-reduce within the operation."""
    return _reduce(inputs, outputs, axes, "max")


@register("reduce_min")
def reduce_min(inputs, outputs, *, axes, **_):
    """A minimum, as `reduce_max`."""
    return _reduce(inputs, outputs, axes, "min")


@register("reduce_and")
def reduce_and(inputs, outputs, *, axes, **_):
    """A conjunction, as `reduce_max`; that of integers is bit by bit, as `reduce_prod`."""
    return _reduce(inputs, outputs, axes, "and") if inputs[0].dtype == bool else _reduce_again(inputs, outputs, axes)


@register("reduce_or")
def reduce_or(inputs, outputs, *, axes, **_):
    """A disjunction, as `reduce_and`."""
    return _reduce(inputs, outputs, axes, "or") if inputs[0].dtype == bool else _reduce_again(inputs, outputs, axes)


@register("reduce_prod", "reduce_xor")
def reduce_prod(inputs, outputs, *, axes, **_):
    """A product over a split dimension; there is no such all-reduce, so the shards' products are gathered and multiplied."""
    return _reduce_again(inputs, outputs, axes)


def _reduce_again(inputs, outputs, axes):
    return replace(_reduce(inputs, outputs, axes, "gathered"), local=_local_reduce_again)


def _local_reduce_again(eqn, rule: Rule, pieces: Pieces, operand):
    found = eqn.primitive.bind(operand, **eqn.params)
    for factor in _split_gathered_factors(rule, pieces):
        found = eqn.primitive.bind(pieces.gathered(factor, found), **{**eqn.params, "axes": (0,)})
    return [found]


def _split_gathered_factors(rule: Rule, pieces: Pieces) -> list[int]:
    """The split factors along which shards need data from each other."""
    return [i for i, factor in enumerate(rule.factors) if factor.kind == "gathered" and pieces.is_split(i)]


@register("argmax", "argmin")
def arg_whole(inputs, outputs, *, axes, **_):
    """The index of an extreme. The dimension stays whole unless tracing decomposes the operation (`decompositions`)."""
    return _reduce(inputs, outputs, axes, "whole")


@register("reduce")
def reduce_by(inputs, outputs, *, dimensions, **_):
    """`[a,b],[] -> [a]`: a reduction by the user's function, from an initial value; the dimension stays whole."""
    count = len(outputs)
    rule = _reduce(inputs[:count], outputs, dimensions, "whole")
    return replace(rule, inputs=(*rule.inputs, *((),) * count))


_JOINED = {"cumsum": lax.add, "cumprod": lax.mul, "cummax": lax.max, "cummin": lax.min, "cumlogsumexp": jnp.logaddexp}
"""Combines the reduction of all shards before a shard with the shard's cumulative reduction."""


def _cumulative(inputs, axis, linear=()):
    factors = Factors()
    kinds: list[FactorKind] = ["gathered" if i == axis else "parallel" for i in range(inputs[0].ndim)]
    dims = tuple((factors.new(n, kind),) for n, kind in zip(inputs[0].shape, kinds, strict=True))
    return Rule(factors.done(), (dims,), (dims,), linear, local=_local_cumulative)


def _local_cumulative(eqn, rule: Rule, pieces: Pieces, operand):
    """Scans the chip's own shard, gathers the totals of all shards, and combines those before it with the scan."""
    found, axis, reverse = eqn.primitive.bind(operand, **eqn.params), eqn.params["axis"], eqn.params["reverse"]
    for factor in _split_gathered_factors(rule, pieces):
        total = lax.index_in_dim(found, 0 if reverse else -1, axis, keepdims=False)
        totals = eqn.primitive.bind(pieces.gathered(factor, total), **{**eqn.params, "axis": 0})
        before = pieces.start(factor) // pieces.size(factor) + (1 if reverse else -1)
        there = (before >= 0) & (before < len(totals))
        ahead = lax.dynamic_index_in_dim(totals, jnp.clip(before, 0, len(totals) - 1), keepdims=False)
        joined = _JOINED[eqn.primitive.name](found, jnp.broadcast_to(jnp.expand_dims(ahead, axis), found.shape))
        found = jnp.where(there, joined, found)
    return [found]


@register("cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(inputs, outputs, *, axis, **_):
    """`[a,b] -> [a,b] gathered={b}`: cumulative reductions; the totals of the shards of a split dimension are gathered."""
    return _cumulative(inputs, axis)


@register("cumsum")
def cumsum(inputs, outputs, *, axis, **_):
    """`[a,b] -> [a,b] gathered={b}`: as `cumprod`, and linear."""
    return _cumulative(inputs, axis, (frozenset({0}),))


@register("sort")
def sort(inputs, outputs, *, dimension, **_):
    """The sorted dimension stays whole."""
    factors = Factors()
    dims = factors.each(inputs[0].shape, whole=[dimension])
    sides = (dims,) * len(inputs)
    return Rule(factors.done(), sides, sides, op_class="memory", traffic=(0, Output()))


def _top(inputs, outputs, axis, kind: FactorKind, local=None):
    factors = Factors()
    axis %= len(inputs[0].shape)
    kinds: list[FactorKind] = [kind if i == axis else "parallel" for i in range(inputs[0].ndim)]
    dims = tuple((factors.new(n, kind),) for n, kind in zip(inputs[0].shape, kinds, strict=True))
    chosen = (factors.new(outputs[0].shape[axis], "whole"),)
    kept = (*dims[:axis], chosen, *dims[axis + 1 :])
    return Rule(
        factors.done(),
        (dims,),
        (kept,) * len(outputs),
        op_class="memory",
        traffic=(0, Output()),
        flops_per_point=0.0,
        local=local,
    )


@register("top_k")
def top_k(inputs, outputs, *, axis=-1, **_):
    """`[a,b] -> [a,k],[a,k] gathered={b}`: the best of each shard, with their indices, are gathered."""
    return _top(inputs, outputs, axis, "gathered", _local_top_k)


def _local_top_k(eqn, rule: Rule, pieces: Pieces, operand):
    """Ties are broken by position within a shard and among shards, so the result is that of one chip."""
    axis = eqn.params.get("axis", -1) % operand.ndim
    values, places = eqn.primitive.bind(operand, **eqn.params)
    for factor in _split_gathered_factors(rule, pieces):
        places = places + pieces.start(factor).astype(places.dtype)
        every, at = (_concatenate_blocks(pieces.gathered(factor, each), axis) for each in (values, places))
        values, best = eqn.primitive.bind(every, **eqn.params)
        places = jnp.take_along_axis(at, best, axis)
    return [values, places]


def _concatenate_blocks(stacked, axis: int):
    """Arrays stacked in a leading dimension, concatenated along `axis`."""
    moved = jnp.moveaxis(stacked, 0, axis)
    shape = moved.shape
    return jnp.reshape(moved, (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))


@register("approx_top_k")
def approx_top_k(inputs, outputs, *, reduction_dimension, **_):
    """As `top_k`, but the searched dimension stays whole: the result depends on all of it."""
    return _top(inputs, outputs, reduction_dimension, "whole")
