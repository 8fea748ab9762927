"""The collectives that run within operations along a split factor.

A maximum over a split dimension is closed by an all-reduce. A factor of kind `gathered` is closed by all-gathers. If
the results lack the factor, they gather each chip's result, such as the best of its shard. Otherwise they gather one
element along the factor, such as the total of a chip's shard of a running sum.

A factor of kind `exchanged` is that of $n$ equal parts, which are concatenated along a dimension of the operand or of
the result. Cut over $p$ chips, that dimension has $np$ blocks, of which chip $j$ holds $nj + s$ for $0 \\le s < n$; of
the parts chip $r$ holds block $ip + r$, for each part $i$. Every chip sends and gets $n$ blocks, so $n$ permutations
do it (`exchange`).

A factor of kind `dispatched` is that of tokens, whose rows go to the chips of their groups and back: two all-to-alls along the
axes that split the groups, too (`costmodels.program.grouped`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.program.grouped import groups_factor, rows_for_each
from costmodels.program.program import REDUCED_INSIDE, Operation, Output, Program
from search.formulation.collective_steps import CollectiveStep, emittable
from search.formulation.layouts import Axes, Layout, shards
from search.formulation.strategies import Strategy, output_layout


class Inside(NamedTuple):
    """A collective within an operation.

    - `factor`: the factor along which it runs; `result`: the result whose shards it works on; `layout`: that of the
      result.
    - `thinned`: whether one element along the factor takes part instead of a chip's shard; `copies`: the axes whose
      chips' parts its payload holds side by side; `parts`: the number of equal parts of a shard, of which it sends
      one. `sent`: the operand or result whose columns each sent row has, if it sends rows to the chips of their groups.
    """

    kind: str
    axes: Axes
    factor: int
    result: int
    layout: Layout
    thinned: bool = False
    copies: Axes = ()
    parts: int = 1
    sent: int | Output | None = None


def intra_op_collectives(op: Operation, strategy: Strategy, topology: Topology) -> Iterator[Inside]:
    """The collectives that run within an operation, in order."""
    for i, (factor, axes) in enumerate(zip(op.factors, strategy.splits, strict=True)):
        if axes and factor.kind in REDUCED_INSIDE:
            yield Inside("all-reduce", axes, i, 0, output_layout(op.signature, strategy, 0))
        elif axes and factor.kind == "gathered":
            for k, use in enumerate(op.outputs):
                layout, thinned = output_layout(op.signature, strategy, k), any(i in dim for dim in use.dims)
                for step in gathers(axes, topology):
                    copies = tuple(axis for axis in axes if axis not in step.target.axes)
                    yield Inside(step.kind, step.axes, i, k, layout, thinned, copies)
        elif axes and factor.kind == "exchanged":
            (joined,) = (dim for use in (*op.inputs, *op.outputs) for dim in use.dims if i in dim and len(dim) > 1)
            count = op.factors[joined[1]].size
            layout = output_layout(op.signature, strategy, 0)
            parts = count if joined in op.outputs[0].dims else 1
            for moved in exchange_axes(count, axes, topology):
                yield Inside("collective-permute", moved, i, 0, layout, parts=parts)
        elif axes and factor.kind == "dispatched" and (chips := strategy.splits[groups_factor(op.inputs[-1].dims)]):
            layout = output_layout(op.signature, strategy, 0)
            tokens = next(k for k, use in enumerate(op.inputs) if use.dims[:1] == ((i,),))
            for sent in (tokens, Output()):
                yield Inside("all-to-all", chips, i, 0, layout, sent=sent)


def gathers(axes: Axes, topology: Topology) -> tuple[CollectiveStep, ...]:
    """The all-gathers of an array of one element per chip along these axes.

    It is one step, if the compiler keeps that as it is.
    """
    spread, whole = Layout((axes,)), Layout(((),))
    at_once = CollectiveStep("all-gather", axes, spread, whole, source_dim=0)
    if emittable(at_once, (1,), 1, topology):
        return (at_once,)
    major = Layout((axes[:1],))
    minor = CollectiveStep("all-gather", axes[1:], spread, major, source_dim=0)
    return (minor, CollectiveStep("all-gather", axes[:1], major, whole, source_dim=0))


def payload(program: Program, op: Operation, strategy: Strategy, found: Inside, topology: Topology) -> float:
    """Bytes of a collective within an operation, by the collectives' convention."""
    sizes = topology.axis_sizes
    if found.sent is not None:
        counts = (
            prod(sizes[axis] for axis in strategy.splits[f]) for f in (found.factor, groups_factor(op.inputs[-1].dims))
        )
        sources, chips = counts
        use, rows = op.use(found.sent), op.factors[0].size
        width = program.values[use.value].bytes / op.factors[found.factor].size
        return chips * rows_for_each(rows, sources, chips, topology.pricing.expert_load) * width
    part = program.values[op.outputs[found.result].value].bytes / shards(found.layout, sizes)
    if found.thinned:
        part /= op.factors[found.factor].size / prod(sizes[axis] for axis in strategy.splits[found.factor])
    return part * prod(sizes[axis] for axis in found.copies) / found.parts


class Sent(NamedTuple):
    """One block of an exchange: the source chip, the slot in its shard, the target chip, and the part it belongs to."""

    chip: int
    slot: int
    to: int
    part: int


@lru_cache(maxsize=256)
def exchange(parts: int, chips: int) -> tuple[tuple[Sent, ...], ...]:
    """The rounds that move the blocks of joined parts to those of the separate parts.

    In each, every chip sends and gets one block.

    With $g = \\gcd(n, p)$ and $a_j = \\lfloor jg/p \\rfloor$, in round $t$ chip $j$ sends slot $s = (t + a_j) \\bmod
    n$ to chip $(nj + s) \\bmod p$. That is one to one: chips that differ in $a_j$ differ in $s$ modulo $g$, and so do
    those that they send to, as $g$ divides $nj$ and $p$; for the others $nj$ differs modulo $p$.
    """
    shared = gcd(parts, chips)

    def sent_share(chip: int, turn: int) -> Sent:
        slot = (turn + chip * shared // chips) % parts
        part, to = divmod(parts * chip + slot, chips)
        return Sent(chip, slot, to, part)

    return tuple(tuple(sent_share(chip, turn) for chip in range(chips)) for turn in range(parts))


def exchange_axes(parts: int, axes: Axes, topology: Topology) -> tuple[Axes, ...]:
    """Per round of an exchange that moves anything, the axes along which it moves."""
    counts = [topology.axis_sizes[axis] for axis in axes]
    places = np.indices(counts).reshape(len(axes), -1)
    rounds = exchange(parts, prod(counts))
    moved = [np.any(places != places[:, [each.to for each in sent]], axis=1) for sent in rounds]
    return tuple(tuple(axis for axis, there in zip(axes, each, strict=True) if there) for each in moved if any(each))
