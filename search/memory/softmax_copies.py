"""Scores of attention that libtpu holds twice, because it does not fuse their maximum with the product that forms them.

A product of float32 scores is fused with the maximum over its columns, and the softmax then overwrites nothing. For
long columns of a batched product, the product is written first, and a second kernel writes the exponentials into an
array of their own, beside it. Measured on v5e, masked and unmasked alike, with libtpu 0.0.42, and for grouped queries of
several sequences with 0.0.50:

| scores | columns | arrays |
|---|---|---|
| one dimension of rows (multi-head attention), float32 | 1,024 and 2,048 | 1 |
| the same | 3,072 and 4,096 | 2 |
| the same, bfloat16 | 4,096 | 1 |
| two dimensions of rows (grouped queries), float32, one dimension of batch or heads | 2,048, 4,096 and 8,192 | 1 |
| the same, with several sequences and several heads | 512, 1,024 and 2,048 | 1 |
| the same | 4,096 | 2 |

Between 2,048 and 3,072 columns nothing was measured; two arrays are counted. One position per sequence (decode), whose
rows are the grouped queries and whose scores are transposed, has one array. Projections that were fused with the product
gave two arrays of 2,048 columns as well; barriers keep them apart (`autoshard.emitting.tpu_workarounds.score_barriers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from costmodels.machine.topology import Topology
from costmodels.operations import matrix_factors
from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Program
from search.formulation.layouts import Layout, local_shape

MOST_COLUMNS = 2048
"""The number of columns on one chip up to which the maximum is fused with the product."""


@dataclass(frozen=True)
class Scores:
    """A product of scores: its value, and the dimensions of its columns, its rows, and its batch and heads."""

    value: int
    column: int
    rows: tuple[int, ...]
    batch: tuple[int, ...]


def second_array_bytes(program: Program, topology: Topology, scores: Scores, layout: Layout) -> float:
    """Bytes of the second array of scores that one chip holds before their softmax; 0 if it holds one.

    **Arguments:**

    - `scores`: one of `score_maxima`; `layout`: that of the product.
    """
    array = program.values[scores.value]
    sizes = local_shape(array.shape, layout, topology.axis_sizes)
    several = sum(sizes[dim] > 1 for dim in scores.batch) > 1
    if topology.chip.kind != "tpu" or sizes[scores.column] <= MOST_COLUMNS or not (len(scores.rows) == 1 or several):
        return 0.0
    return array.itemsize * prod(sizes)


@cached_analysis
def score_maxima(program: Program) -> dict[int, Scores]:
    """The maxima over the columns of a float32 batched product with one or two dimensions of rows."""
    found: dict[int, Scores] = {}
    for at, op in enumerate(program.operations):
        if op.primitive != "reduce_max" or program.values[op.inputs[0].value].dtype != "float32":
            continue
        kept = {factor for dim in op.outputs[0].dims for factor in dim}
        reduced = [i for i, dim in enumerate(op.inputs[0].dims) if not set(dim) <= kept]
        made = _product_and_dims(program, op.inputs[0].value)
        if made is not None and len(reduced) == 1:
            product, order = made
            scores = _scores_of(program, product, order[reduced[0]])
            is_transposed = order != tuple(range(len(order)))
            if scores is not None and not (is_transposed and len(scores.rows) == 1):
                found[at] = scores
    return found


def product_of(program: Program, value: int) -> int | None:
    """The product of which elementwise operations and transpositions make a value; None if there is none."""
    found = _product_and_dims(program, value)
    return None if found is None else found[0]


def _product_and_dims(program: Program, value: int) -> tuple[int, tuple[int, ...]] | None:
    """That product, and per dimension of the value its dimension in the product."""
    waiting, seen = [(value, tuple(range(len(program.values[value].shape))))], {value}
    while waiting:
        value, places = waiting.pop()
        at, position = program.producers[value]
        op, dims = program.operations[at], program.operations[at].outputs[position].dims
        if op.op_class == "matmul":
            return value, places
        for use in reversed(op.inputs) if op.op_class == "fused" else ():  # the first operand is looked at first
            order = _order_of(use.dims, dims) if use.value not in seen else None
            if order is not None:
                seen.add(use.value)
                waiting.append((use.value, tuple(order[dim] for dim in places)))
    return None


def _order_of(operand: Sequence[tuple[int, ...]], result: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Per dimension of a result its dimension in an operand of the same dimensions; None if they are not the same."""
    if operand == result:
        return tuple(range(len(result)))
    if not all(result) or sorted(operand) != sorted(result):
        return None
    return tuple(operand.index(dim) for dim in result)


def _scores_of(program: Program, product: int, column: int) -> Scores | None:
    """A batched product with a dimension of columns and one or two of rows; None if it is not such a product."""
    at, position = program.producers[product]
    op = program.operations[at]
    groups = matrix_factors(op)
    if groups is None or not groups.batch:
        return None
    dims = op.outputs[position].dims
    batch, rows, columns = (
        tuple(i for i, dim in enumerate(dims) if dim and set(dim) <= set(side))
        for side in (groups.batch, groups.rows, groups.columns)
    )
    others = rows if column in columns else columns if column in rows else ()
    return Scores(product, column, others, batch) if len(others) in (1, 2) else None
