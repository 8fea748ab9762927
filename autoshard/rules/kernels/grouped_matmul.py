"""The rule of megablox's grouped matmul: columns, the contracted dimension, or the groups may be split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from autoshard.rules.kernels.candidate import Candidate, kernel_of
from autoshard.rules.rule import Factors, Pieces, Rule
from costmodels.program.program import Output


def candidates(module: Any, closed: Any) -> Iterator[Candidate]:
    """The calls of `gmm` that a jaxpr may be, without a group offset and without an existing result.

    `[m,k],[g,k,n],[g] -> [m,n] sum={g,k}`: as `ragged_dot`, except that rows stay whole. Where groups are split, every chip
    multiplies the rows of its own groups, has zeros elsewhere, and leaves a partial sum.
    """
    if len(closed.in_avals) != 3:
        return
    kernel = kernel_of(closed)
    left, _, result = kernel.params["grid_mapping"].block_mappings
    (rows, depth), (_, columns) = _lengths(left), _lengths(result)
    lhs, rhs, _ = closed.in_avals
    for transposed in (False, True):
        if rhs.shape[2 if transposed else 1] != lhs.shape[1]:
            continue
        static = functools.partial(
            module.gmm,
            preferred_element_type=closed.out_avals[0].dtype,
            transpose_rhs=transposed,
            interpret=kernel.params["interpret"],
        )
        tiles = (rows, depth, columns)
        call = functools.partial(static, tiling=tiles)
        yield Candidate(call, _rule(closed.in_avals, transposed), functools.partial(_run, static, tiles, transposed))


def _lengths(block: Any) -> tuple[int, ...]:
    return tuple(each.block_size for each in block.block_shape if hasattr(each, "block_size"))


def _rule(avals: Any, transposed: bool) -> Rule:
    (rows, depth), rhs, (groups,) = (aval.shape for aval in avals)
    factors = Factors()
    m, k, n = factors.new(rows, "whole"), factors.new(depth, "sum"), factors.new(rhs[1 if transposed else 2])
    g, counted = factors.new(groups, "sum"), factors.new(groups, "whole")
    matrices = ((g,), (n,), (k,)) if transposed else ((g,), (k,), (n,))
    return Rule(
        factors.done(),
        (((m,), (k,)), matrices, ((counted,),)),
        (((m,), (n,)),),
        (frozenset({0}), frozenset({1})),
        op_class="matmul",
        traffic=(0, 1, Output()),
        flops_per_point=2.0 / max(1, groups) ** 2,  # each row meets one group's matrix; the counts are not a loop
    )


def _run(
    static: Callable[..., Any],
    tiles: Sequence[int],
    transposed: bool,
    eqn: Any,
    rule: Rule,
    pieces: Pieces,
    *operands: Any,
) -> Sequence[Any]:
    """The grouped matmul of one chip's shards; tiles are at most as large as the shards."""
    lhs, rhs, sizes = operands
    depth, columns = lhs.shape[1], rhs.shape[1 if transposed else 2]
    fitting = (tiles[0], min(tiles[1], depth), min(tiles[2], columns))
    (groups,) = rule.inputs[1][0]
    offset = pieces.start(groups).astype(np.int32) if pieces.is_split(groups) else None
    return [static(lhs, rhs, sizes, tiling=fitting, group_offset=offset)]
