"""Rules of primitives that move, cut and merge dimensions without arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd, prod

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.rule import Dims, Factors, Pieces, Rule, local_shape, picked_kind, register, whole_rule
from costmodels.program.program import FactorKind

_FIRST = (frozenset({0}),)


@register("transpose")
def transpose(inputs, outputs, *, permutation, **_):
    """`[a,b] -> [b,a]`."""
    factors = Factors()
    dims = factors.each(inputs[0].shape)
    return Rule(factors.done(), (dims,), (tuple(dims[i] for i in permutation),), _FIRST, flops_per_point=0.0)


@register("squeeze")
def squeeze(inputs, outputs, *, dimensions, **_):
    """`[a,1] -> [a]`."""
    factors = Factors()
    dims = tuple(() if i in dimensions else (factors.new(n),) for i, n in enumerate(inputs[0].shape))
    kept = tuple(dim for i, dim in enumerate(dims) if i not in dimensions)
    return Rule(factors.done(), (dims,), (kept,), _FIRST, flops_per_point=0.0)


def _local_broadcast(eqn, rule: Rule, pieces: Pieces, operand, *_):
    shape = local_shape(rule.outputs[0], pieces)
    return [lax.broadcast_in_dim(operand, shape, eqn.params["broadcast_dimensions"])]


@register("broadcast_in_dim")
def broadcast_in_dim(inputs, outputs, *, broadcast_dimensions, **_):
    """`[a] -> [a,b]`: each chip broadcasts to its own shard of the new dimension."""
    factors = Factors()
    result = factors.each(outputs[0].shape)
    operand = inputs[0]
    pairs = zip(operand.shape, broadcast_dimensions, strict=True)
    dims = tuple(result[j] if n == outputs[0].shape[j] else () for n, j in pairs)
    return Rule(factors.done(), (dims,), (result,), _FIRST, flops_per_point=0.0, local=_local_broadcast)


def _local_reshape(eqn, rule: Rule, pieces: Pieces, operand, *_):
    return [lax.reshape(operand, local_shape(rule.outputs[0], pieces))]


@register("reshape")
def reshape(inputs, outputs, *, dimensions=None, **_):
    """`[ab] -> [a,b]` and back: dimensions that merge or split share their factors."""
    if dimensions is not None:  # the dimensions are permuted first; no JAX function still asks for this
        return whole_rule(inputs, outputs, exact=True)
    factors = Factors()
    left, right = common_factors(factors, inputs[0].shape, outputs[0].shape)
    return Rule(factors.done(), (left,), (right,), _FIRST, flops_per_point=0.0, local=_local_reshape)


def common_factors(factors: Factors, before: Sequence[int], after: Sequence[int]) -> tuple[Dims, Dims]:
    """Splits both shapes of a reshape into their common factors.

    Shapes are cut where their cumulative products agree. A group such as `(6, 4) -> (4, 6)`, whose products do not divide
    each other, keeps its common major factor and leaves the rest whole.
    """
    if 0 in before:
        return factors.each(before, range(len(before))), factors.each(after, range(len(after)))
    left: list[tuple[int, ...]] = []
    right: list[tuple[int, ...]] = []
    for group, other in _groups(before, after):
        bounds = sorted({*_products(group), *_products(other)})
        if all(b % a == 0 for a, b in pairwise(bounds)):
            sizes = [b // a for a, b in pairwise(bounds)]
            made = [factors.new(n) for n in reversed(sizes)]
            table = dict(zip(reversed(bounds[1:]), made, strict=True))
            left += _cut_sizes(group, table)
            right += _cut_sizes(other, table)
        else:
            major = gcd(group[0], other[0])
            shared = factors.new(major)
            left += _head_and_rest(factors, group, shared, major)
            right += _head_and_rest(factors, other, shared, major)
    return tuple(left), tuple(right)


def _products(sizes: Sequence[int]) -> list[int]:
    """Cumulative products from the minor end: `(2, 3) -> [1, 3, 6]`."""
    return [prod(sizes[i:]) for i in range(len(sizes), -1, -1)]


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions on both sides with equal products; dimensions of 1 belong to the group before."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        group = list(before[i : i + 1])
        other = list(after[j : j + 1])
        i, j = i + 1, j + 1
        while prod(group) != prod(other):
            if prod(group) < prod(other):
                group.append(before[i])
                i += 1
            else:
                other.append(after[j])
                j += 1
        found.append((group, other))
    return found


def _cut_sizes(sizes: Sequence[int], table: dict[int, int]) -> list[tuple[int, ...]]:
    """The factors of each dimension, major to minor; `table` maps a factor's upper cumulative product to its index."""
    products = _products(sizes)[::-1]
    spans = zip(products[1:], products, strict=False)
    return [tuple(table[bound] for bound in sorted(table, reverse=True) if low < bound <= high) for low, high in spans]


def _head_and_rest(factors: Factors, sizes: Sequence[int], shared: int, major: int) -> list[tuple[int, ...]]:
    rest = [sizes[0] // major, *sizes[1:]]
    made = [(factors.new(n, "whole"),) for n in rest]
    return [(shared, *made[0]), *made[1:]]


def _local_iota(eqn, rule: Rule, pieces: Pieces, *_):
    dim = eqn.params["dimension"]
    (factor,) = rule.outputs[0][dim]
    if not pieces.is_split(factor):
        return [lax.broadcasted_iota(eqn.params["dtype"], local_shape(rule.outputs[0], pieces), dim)]
    count = lax.broadcasted_iota(np.int32, local_shape(rule.outputs[0], pieces), dim)
    return [lax.convert_element_type(count + pieces.start(factor), eqn.params["dtype"])]


@register("iota")
def iota(inputs, outputs, **_):
    """`-> [a,b]`: each chip counts from the start of its shard."""
    factors = Factors()
    dims = factors.each(outputs[0].shape)
    return Rule(factors.done(), ((),) * len(inputs), (dims,), flops_per_point=0.0, local=_local_iota)


def _local_empty(eqn, rule: Rule, pieces: Pieces, *_):
    return [lax.full(local_shape(rule.outputs[0], pieces), 0, eqn.outvars[0].aval.dtype)]


@register("empty", "empty2")
def empty(inputs, outputs, **_):
    """`-> [a,b]`: uninitialised memory; zeros are used."""
    factors = Factors()
    dims = factors.each(outputs[0].shape)
    return Rule(factors.done(), (), (dims,), flops_per_point=0.0, local=_local_empty)


def _local_tile(eqn, rule: Rule, pieces: Pieces, operand, *_):
    repeats = [prod(pieces.size(f) for f in dim[:-1]) for dim in rule.outputs[0]]
    return [eqn.primitive.bind(operand, **{**eqn.params, "reps": tuple(repeats)})]


@register("tile")
def tile(inputs, outputs, *, reps, **_):
    """`[b] -> [ab]`: the repetition is the major factor of its dimension."""
    factors = Factors()
    result = tuple((factors.new(repeat), factors.new(n)) for repeat, n in zip(reps, inputs[0].shape, strict=True))
    dims = tuple(dim[1:] for dim in result)
    return Rule(factors.done(), (dims,), (result,), _FIRST, flops_per_point=0.0, local=_local_tile)


def window_dims(
    factors: Factors,
    full: Sequence[int],
    part: Sequence[int],
    single: FactorKind = "whole",
    shifted: Sequence[int] = (),
) -> tuple[Dims, Dims]:
    """Dimensions of an array and of a window of it: equal ones, except those in `shifted`, are shared and may be split.

    If the window is a single element of a longer dimension, only one chip holds it and the dimension may be split as
    well. `single` is then the factor's kind: `sum` or `or` for reads (`picked_kind`), `parallel` for writes. A
    longer window may be split too: each chip reads or writes its part. A window of half the dimension or more is cheaper
    to read after a gather, so its dimension stays whole.
    """
    left: list[tuple[int, ...]] = []
    right: list[tuple[int, ...]] = []
    for i, (n, m) in enumerate(zip(full, part, strict=True)):
        if n == m:
            left.append((factors.new(n, "whole" if i in shifted else "parallel"),))
            right.append(left[-1])
        elif m == 1:
            left.append((factors.new(n, single),))
            right.append(())
        else:
            left.append((factors.new(n, single if single == "parallel" or 2 * m < n else "whole"),))
            right.append((factors.new(m, "whole"),))
    return tuple(left), tuple(right)


def element(rule: Rule, pieces: Pieces, dim: int, index):
    """The position on this chip's shard of the element at `index` of a split dimension, and whether it is there."""
    (factor,) = rule.inputs[0][dim]
    local = index - pieces.start(factor)
    last = pieces.size(factor) - 1
    return jnp.clip(local, 0, last), (local >= 0) & (local <= last)


def cut_dims(rule: Rule, pieces: Pieces, window: Dims) -> list[int]:
    """The split dimensions of which the window covers a part."""
    pairs = enumerate(zip(rule.inputs[0], window, strict=True))
    return [i for i, (dim, part) in pairs if dim != part and any(pieces.is_split(f) for f in dim)]


def single_elements(rule: Rule, pieces: Pieces, window: Dims) -> list[int]:
    """The split dimensions of which the window is a single element."""
    return [i for i in cut_dims(rule, pieces, window) if not window[i]]


def shift(array, dim: int, start, size: int):
    """`size` elements along a dimension from `start` on, with zeros before the first and past the last element."""
    config = [(size, size, 0) if i == dim else (0, 0, 0) for i in range(array.ndim)]
    padded = lax.pad(array, jnp.zeros((), array.dtype), config)
    at = jnp.clip(start + size, 0, array.shape[dim] + size)
    return lax.dynamic_slice_in_dim(padded, at, size, dim, allow_negative_indices=False)


def _local_slice(eqn, rule: Rule, pieces: Pieces, operand, *_):
    starts, limits = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    picked = single_elements(rule, pieces, rule.outputs[0])
    here = np.True_
    for i in cut_dims(rule, pieces, rule.outputs[0]):
        if i in picked:
            at, inside = element(rule, pieces, i, jnp.int32(starts[i]))
            operand = lax.dynamic_slice_in_dim(operand, at, 1, i, allow_negative_indices=False)
            here = here & inside
        else:
            begin = starts[i] - pieces.start(rule.inputs[0][i][0])
            operand = shift(operand, i, begin, limits[i] - starts[i])
    for i, dim in enumerate(rule.inputs[0]):
        if any(pieces.is_split(f) for f in dim):
            starts[i], limits[i] = 0, operand.shape[i]
    found = lax.slice(operand, starts, limits, eqn.params["strides"])
    return [jnp.where(here, found, jnp.zeros_like(found)) if picked else found]


@register("slice")
def slice_(inputs, outputs, **_):
    """`[a,b,c] -> [a,d,1] sum={b,c}`: along a split dimension each chip contributes its part of the window, and zeros."""
    factors = Factors()
    left, right = window_dims(factors, inputs[0].shape, outputs[0].shape, picked_kind(inputs[0]))
    return Rule(factors.done(), (left,), (right,), _FIRST, flops_per_point=0.0, local=_local_slice)


@register("pad")
def pad(inputs, outputs, *, padding_config, **_):
    """`[a,b],[] -> [a,c]`: the padded dimensions stay whole."""
    factors = Factors()
    padded = [i for i, config in enumerate(padding_config) if any(config)]
    left, right = window_dims(factors, inputs[0].shape, outputs[0].shape, shifted=padded)
    return Rule(factors.done(), (left, ()), (right,), flops_per_point=0.0)


@register("rev")
def rev(inputs, outputs, *, dimensions, **_):
    """`[a,b] -> [a,b]`: the reversed dimensions stay whole."""
    factors = Factors()
    dims = factors.each(inputs[0].shape, whole=dimensions)
    return Rule(factors.done(), (dims,), (dims,), _FIRST, flops_per_point=0.0)
