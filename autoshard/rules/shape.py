"""Rules of primitives that move, cut and join dimensions without computing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd, prod

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.rule import Dims, Factors, Pieces, Rule, local_shape, register, summable, whole_rule
from costmodels.program import FactorKind
from search.inside import exchange

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
    """`[a] -> [a,b]`: each chip makes its own piece of the new dimension."""
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

    Shapes are cut where their running products agree; a cut-out group such as `(6, 4) -> (4, 6)`, whose products do not
    divide one another, keeps its common major factor and leaves the rest whole.
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
            left += _cut(group, table)
            right += _cut(other, table)
        else:
            major = gcd(group[0], other[0])
            shared = factors.new(major)
            left += _head_and_rest(factors, group, shared, major)
            right += _head_and_rest(factors, other, shared, major)
    return tuple(left), tuple(right)


def _products(sizes: Sequence[int]) -> list[int]:
    """Running products from the minor end: `(2, 3) -> [1, 3, 6]`."""
    return [prod(sizes[i:]) for i in range(len(sizes), -1, -1)]


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions on both sides with equal products, ones attached to the run before."""
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


def _cut(sizes: Sequence[int], table: dict[int, int]) -> list[tuple[int, ...]]:
    """The factors of each dimension, major to minor; `table` maps a factor's upper running product to its index."""
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
    """`-> [a,b]`: each chip counts from where its piece begins."""
    factors = Factors()
    dims = factors.each(outputs[0].shape)
    return Rule(factors.done(), ((),) * len(inputs), (dims,), flops_per_point=0.0, local=_local_iota)


def _local_empty(eqn, rule: Rule, pieces: Pieces, *_):
    return [lax.full(local_shape(rule.outputs[0], pieces), 0, eqn.outvars[0].aval.dtype)]


@register("empty", "empty2")
def empty(inputs, outputs, **_):
    """`-> [a,b]`: memory that nothing has been written to yet; zeros will do."""
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


def windowed(
    factors: Factors,
    full: Sequence[int],
    part: Sequence[int],
    single: FactorKind = "whole",
    shifted: Sequence[int] = (),
) -> tuple[Dims, Dims]:
    """Dimensions of an array and of a window of it: equal ones, but for those in `shifted`, are shared and may be split.

    Where the window is a single element of a longer dimension, only one chip holds it and the dimension may be split as
    well: `single` says what that does, `sum` to what is read (the other chips answer zero), `parallel` to what is written. So
    may the dimension of a longer window: what of it lies on a chip is read or written there; but one of half the dimension
    or more costs less to read from a dimension that is gathered first.
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
            left.append((factors.new(n, single if single != "sum" or 2 * m < n else "whole"),))
            right.append((factors.new(m, "whole"),))
    return tuple(left), tuple(right)


def element(rule: Rule, pieces: Pieces, dim: int, index):
    """Where the element at `index` of a split dimension lies on this chip's piece, and whether it does."""
    (factor,) = rule.inputs[0][dim]
    local = index - pieces.start(factor)
    last = pieces.size(factor) - 1
    return jnp.clip(local, 0, last), (local >= 0) & (local <= last)


def cut_dims(rule: Rule, pieces: Pieces, window: Dims) -> list[int]:
    """The split dimensions of which the window is a part."""
    pairs = enumerate(zip(rule.inputs[0], window, strict=True))
    return [i for i, (dim, part) in pairs if dim != part and any(pieces.is_split(f) for f in dim)]


def single_elements(rule: Rule, pieces: Pieces, window: Dims) -> list[int]:
    """The split dimensions of which the window is a single element."""
    return [i for i in cut_dims(rule, pieces, window) if not window[i]]


def shifted_by(array, dim: int, start, size: int):
    """`size` elements along a dimension from `start` on, which may lie before the first or past the last: zeros there."""
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
            operand = shifted_by(operand, i, begin, limits[i] - starts[i])
    for i, dim in enumerate(rule.inputs[0]):
        if any(pieces.is_split(f) for f in dim):
            starts[i], limits[i] = 0, operand.shape[i]
    found = lax.slice(operand, starts, limits, eqn.params["strides"])
    return [jnp.where(here, found, jnp.zeros_like(found)) if picked else found]


@register("slice")
def slice_(inputs, outputs, **_):
    """`[a,b,c] -> [a,d,1] sum={b,c}`: of a split dimension each chip gives what it holds of the window, and zeros."""
    factors = Factors()
    single = "sum" if summable(inputs[0]) else "whole"
    left, right = windowed(factors, inputs[0].shape, outputs[0].shape, single)
    return Rule(factors.done(), (left,), (right,), _FIRST, flops_per_point=0.0, local=_local_slice)


@register("pad")
def pad(inputs, outputs, *, padding_config, **_):
    """`[a,b],[] -> [a,c]`: the padded dimensions stay whole."""
    factors = Factors()
    padded = [i for i, config in enumerate(padding_config) if any(config)]
    left, right = windowed(factors, inputs[0].shape, outputs[0].shape, shifted=padded)
    return Rule(factors.done(), (left, ()), (right,), flops_per_point=0.0)


@register("rev")
def rev(inputs, outputs, *, dimensions, **_):
    """`[a,b] -> [a,b]`: the reversed dimensions stay whole."""
    factors = Factors()
    dims = factors.each(inputs[0].shape, whole=dimensions)
    return Rule(factors.done(), (dims,), (dims,), _FIRST, flops_per_point=0.0)


def _parts(whole, parts, axis: int) -> tuple[Factors, Dims, tuple[Dims, ...]]:
    """The dimensions of an array and of parts of it that lie one behind the other along `axis`.

    Equal parts share their factor there, of kind `exchanged`. The array's dimension has it and how many there are: cut over
    chips, both are cut alike, though their pieces lie on different chips.
    """
    factors = Factors()
    equal = len(parts) > 1 and len({aval.shape[axis] for aval in parts}) == 1
    shared = list(factors.each(whole.shape, whole=[axis])) if not equal else []
    if equal:
        kinds: list[FactorKind] = ["exchanged" if i == axis else "parallel" for i in range(whole.ndim)]
        shared = [(factors.new(n, kind),) for n, kind in zip(parts[0].shape, kinds, strict=True)]
        part = tuple(shared)
        shared[axis] = (*shared[axis], factors.new(len(parts), "whole"))
        return factors, tuple(shared), (part,) * len(parts)
    cuts = [(factors.new(aval.shape[axis], "whole"),) for aval in parts]
    return factors, tuple(shared), tuple((*shared[:axis], cut, *shared[axis + 1 :]) for cut in cuts)


def _local_concatenate(eqn, rule: Rule, pieces: Pieces, *operands):
    """Blocks of the parts go to the chips that hold them in the joined array."""
    axis = eqn.params["dimension"]
    found = _exchanged(rule, pieces, rule.inputs[0][axis][0])
    if found is None:
        return [eqn.primitive.bind(*operands, **eqn.params)]
    factor, rounds, own = found
    parts, received = jnp.stack(operands), []
    for sent in rounds:
        sender = {each.to: each for each in sent}
        part = lax.dynamic_index_in_dim(
            parts, _at([sender[chip].part for chip in range(len(sent))], own), keepdims=False
        )
        received.append(pieces.permuted(factor, part, [(each.to, each.chip) for each in sent]))
    slots = [
        [_turn(rounds, lambda each, c=c, s=s: each[:2] == (c, s)) for c in range(len(rounds[0]))]
        for s in range(len(rounds))
    ]
    return [lax.concatenate(_in_turn(received, slots, own), axis)]


def _local_split(eqn, rule: Rule, pieces: Pieces, operand):
    """Blocks of the joined array go to the chips that hold them in the parts."""
    axis = eqn.params["axis"]
    found = _exchanged(rule, pieces, rule.outputs[0][axis][0])
    if found is None:
        return eqn.primitive.bind(operand, **eqn.params)
    factor, rounds, own = found
    size, received = pieces.size(factor), []
    for sent in rounds:
        at = _at([each.slot * size for each in sent], own)
        block = lax.dynamic_slice_in_dim(operand, at, size, axis, allow_negative_indices=False)
        received.append(pieces.permuted(factor, block, [(each.chip, each.to) for each in sent]))
    parts = [
        [_turn(rounds, lambda each, c=c, i=i: each[2:] == (c, i)) for c in range(len(rounds[0]))]
        for i in range(len(rounds))
    ]
    return _in_turn(received, parts, own)


def _exchanged(rule: Rule, pieces: Pieces, factor: int):
    """A factor along which equal parts lie, how their blocks go round, and this chip's place; None where it is not split."""
    if not pieces.is_split(factor):
        return None
    (joined,) = {dim for dims in (*rule.inputs, *rule.outputs) for dim in dims if factor in dim and len(dim) > 1}
    chips = rule.factors[factor].size // pieces.size(factor)
    own = pieces.start(factor) // pieces.size(factor)
    return factor, exchange(rule.factors[joined[1]].size, chips), own


def _at(table: Sequence[int], own):
    """This chip's entry of a table with one for each."""
    return lax.dynamic_index_in_dim(np.asarray(table, np.int32), own, keepdims=False)


def _turn(rounds, wanted) -> int:
    """The round in which a block is sent."""
    return next(turn for turn, sent in enumerate(rounds) if any(map(wanted, sent)))


def _in_turn(received: Sequence, tables: Sequence[Sequence[int]], own) -> list:
    """What was received, in the order that each chip's tables of rounds say."""
    stacked = jnp.stack(received)
    return [lax.dynamic_index_in_dim(stacked, _at(table, own), keepdims=False) for table in tables]


@register("concatenate")
def concatenate(inputs, outputs, *, dimension, **_):
    """`[a,b],[a,b] -> [a,bc] exchanged={b}`: parts of one size may be split, others stay whole: `[a,b],[a,c] -> [a,d]`."""
    factors, joined, parts = _parts(outputs[0], inputs, dimension)
    linear = (frozenset(range(len(inputs))),)
    return Rule(factors.done(), parts, (joined,), linear, flops_per_point=0.0, local=_local_concatenate)


@register("split")
def split(inputs, outputs, *, axis, **_):
    """`[a,bc] -> [a,b],[a,b] exchanged={b}`: into parts of one size the dimension may be split, into others it stays whole."""
    factors, cut, parts = _parts(inputs[0], outputs, axis)
    return Rule(factors.done(), (cut,), parts, _FIRST, flops_per_point=0.0, local=_local_split)


def _layers(stacked, axis: int) -> tuple[Factors, Dims, Dims]:
    factors = Factors()
    dims = factors.each(stacked.shape, whole=[axis])
    return factors, dims, (*dims[:axis], *dims[axis + 1 :])


@register("stack")
def stack(inputs, outputs, *, axis, **_):
    """`[a],[a] -> [a,b]`: the new dimension stays whole."""
    factors, stacked, layer = _layers(outputs[0], axis)
    sides = (layer,) * len(inputs)
    return Rule(factors.done(), sides, (stacked,), (frozenset(range(len(inputs))),), flops_per_point=0.0)


@register("unstack")
def unstack(inputs, outputs, *, axis, **_):
    """`[a,b] -> [a],[a]`: the dimension that is taken apart stays whole."""
    factors, stacked, layer = _layers(inputs[0], axis)
    return Rule(factors.done(), (stacked,), (layer,) * len(outputs), _FIRST, flops_per_point=0.0)
