"""Rules of primitives that concatenate or split arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.rule import Dims, Factors, Pieces, Rule, register
from costmodels.program.program import FactorKind
from search.formulation.intra_op import Sent, exchange

_FIRST = (frozenset({0}),)


def _parts(whole, parts, axis: int) -> tuple[Factors, Dims, tuple[Dims, ...]]:
    """The dimensions of an array and of its consecutive parts along `axis`.

    Equal parts share their factor there, of kind `exchanged`. The array's dimension has that factor and the number of parts.
    Both are split over the same axes, but their shards are on different chips.
    """
    factors = Factors()
    if len(parts) > 1 and len({aval.shape[axis] for aval in parts}) == 1:
        kinds: list[FactorKind] = ["exchanged" if i == axis else "parallel" for i in range(whole.ndim)]
        part = tuple((factors.new(n, kind),) for n, kind in zip(parts[0].shape, kinds, strict=True))
        joined = (*part[axis], factors.new(len(parts), "whole"))
        return factors, (*part[:axis], joined, *part[axis + 1 :]), (part,) * len(parts)
    shared = factors.each(whole.shape, whole=[axis])
    cuts = [(factors.new(aval.shape[axis], "whole"),) for aval in parts]
    return factors, shared, tuple((*shared[:axis], cut, *shared[axis + 1 :]) for cut in cuts)


def _local_concatenate(eqn, rule: Rule, pieces: Pieces, *operands):
    """Sends blocks of the parts to the chips that hold them in the concatenated array."""
    axis = eqn.params["dimension"]
    found = _find_exchange(rule, pieces, rule.inputs[0][axis][0])
    if found is None:
        return [eqn.primitive.bind(*operands, **eqn.params)]
    factor, rounds, own = found
    parts, received = jnp.stack(operands), []
    for sent in rounds:
        sender = {each.to: each for each in sent}
        part = lax.dynamic_index_in_dim(
            parts, _own_entry([sender[chip].part for chip in range(len(sent))], own), keepdims=False
        )
        received.append(pieces.permuted(factor, part, [(each.to, each.chip) for each in sent]))
    slots = _turns(rounds, lambda each: (each.chip, each.slot))
    return [lax.concatenate(_order_received(received, slots, own), axis)]


def _local_split(eqn, rule: Rule, pieces: Pieces, operand):
    """Sends blocks of the array to the chips that hold them in the parts."""
    axis = eqn.params["axis"]
    found = _find_exchange(rule, pieces, rule.outputs[0][axis][0])
    if found is None:
        parts = len(eqn.params["sizes"])
        equal = operand.shape[axis] != sum(eqn.params["sizes"])  # with padding in each part
        params = {"sizes": (operand.shape[axis] // parts,) * parts} if equal else {}
        return eqn.primitive.bind(operand, **{**eqn.params, **params})
    factor, rounds, own = found
    size, received = pieces.size(factor), []
    for sent in rounds:
        at = _own_entry([each.slot * size for each in sent], own)
        block = lax.dynamic_slice_in_dim(operand, at, size, axis, allow_negative_indices=False)
        received.append(pieces.permuted(factor, block, [(each.chip, each.to) for each in sent]))
    parts = _turns(rounds, lambda each: (each.to, each.part))
    return _order_received(received, parts, own)


def _find_exchange(rule: Rule, pieces: Pieces, factor: int):
    """The factor of equal parts, the rounds of sending their blocks, and this chip's position; None if it is not split."""
    chips = pieces.chips(factor)
    if chips == 1:
        return None
    (joined,) = {dim for dims in (*rule.inputs, *rule.outputs) for dim in dims if factor in dim and len(dim) > 1}
    own = pieces.start(factor) // pieces.size(factor)
    return factor, exchange(rule.factors[joined[1]].size, chips), own


def _own_entry(table: Sequence[int], own):
    """This chip's entry of a table with one for each."""
    return lax.dynamic_index_in_dim(np.asarray(table, np.int32), own, keepdims=False)


def _turns(rounds, block: Callable[[Sent], tuple[int, int]]) -> list[list[int]]:
    """Per slot or part, and per chip, the round in which its block is sent; `block` returns the chip and the slot or part."""
    known = {block(each): turn for turn, sent in enumerate(rounds) for each in sent}
    return [[known[chip, k] for chip in range(len(rounds[0]))] for k in range(len(rounds))]


def _order_received(received: Sequence, tables: Sequence[Sequence[int]], own) -> list:
    """The received blocks, in the order of each chip's tables of rounds."""
    stacked = jnp.stack(received)
    return [lax.dynamic_index_in_dim(stacked, _own_entry(table, own), keepdims=False) for table in tables]


@register("concatenate")
def concatenate(inputs, outputs, *, dimension, **_):
    """`[a,b],[a,b] -> [a,bc] exchanged={b}`: equal parts may be split; unequal parts stay whole: `[a,b],[a,c] -> [a,d]`."""
    factors, joined, parts = _parts(outputs[0], inputs, dimension)
    linear = (frozenset(range(len(inputs))),)
    once = prod(outputs[0].shape) / max(1, prod(factor.size for factor in factors.done()))  # each element is written
    return Rule(factors.done(), parts, (joined,), linear, flops_per_point=once, local=_local_concatenate)


@register("split")
def split(inputs, outputs, *, axis, **_):
    """`[a,bc] -> [a,b],[a,b] exchanged={b}`: the dimension may be split if the parts are equal, and stays whole otherwise."""
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
    """`[a,b] -> [a],[a]`: the unstacked dimension stays whole."""
    factors, stacked, layer = _layers(inputs[0], axis)
    return Rule(factors.done(), (stacked,), (layer,) * len(outputs), _FIRST, flops_per_point=0.0)
