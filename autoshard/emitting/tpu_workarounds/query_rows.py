"""Rows of zeros for attention with few queries per head of keys on v5e, so that scores fill the tiles.

With grouped queries, a decode step has one row of scores per query head of a group. Float32 tiles have 8 rows. For two
to four rows the compiler (libtpu 0.0.50) takes tiles of 2 or 4, and then 1.3 times as long for the scores as for reading
the keys. With rows of zeros, from the queries to the product with the values, it takes as long as the reading.
Microseconds of the compiler for both products and the softmax, v5e, one chip, bfloat16, heads of 128, 2,048 columns:

| sequences × heads of keys | rows | without | with |
|---|---|---|---|
| 512 × 1 | 2 | 1,043 | 928 |
| 512 × 1 | 4 | 1,071 | 928 |
| 64 × 8 | 4 | 1,087 | 935 |
| 512 × 1 | 6 | 934 | 922 |
| 512 × 1 | 7 | 935 | 923 |

Rows of zeros in one product alone cost a copy of the scores: 1,118 instead of 1,071. So the rows stay through the softmax.
Only scores that stay on the chip (`Chip.on_chip_bytes`) get them, so that the rows take no HBM.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.rules.rule import Dims, Rule
from autoshard.tracing.blocks import Traced
from costmodels.machine.topology import Topology
from costmodels.operations import matrix_factors
from costmodels.program.program import Factor
from search.answer.assignment import Choice, kept_layout, needed_layout, produced_layout

ROWS_OF_ZEROS = "rows_of_zeros_{}_of_{}"
"""The name scope of products with rows of zeros: the rows that they need, and all."""
ROWS = 8
"""The rows of a float32 tile."""
FEW = (2, 3, 4)
"""The numbers of rows on one chip that get rows of zeros; see the table."""
CHIPS = ("v5e",)
"""The chips on which it pays. Two and four rows, 512 × 1, with over without: v5e 0.89 and 0.87, v4 1.00 and 0.98, v6e 0.86
and 0.97; but decode of Llama 3 8B at batch 64 on v6e:2x4 takes 1.009 times as long. v5p was not measured.
"""
LEAST_COLUMNS = 128
"""The columns of a tile, which shorter scores do not fill."""
LEAST_BYTES = 2 * 2**20
"""The bytes of keys on one chip from which on scores get rows of zeros.

Replayed decode steps of scanned Llama 3 8B on v5e:2x4, with over without: 1.007 for half a MiB a layer, 0.996 for 2, 0.993
for 4, 0.973 for 8, 0.957 for 16. Keys of up to 32 MiB that a step only reads may be brought on the chip whole before the
product; attention alone then takes 1.00 to 1.05 times as long.
"""


@dataclass(frozen=True)
class Grown:
    """An operation that runs with rows of zeros.

    - `factor`: the factor of its rows; `rows`: their number on one chip without zeros; `chips`: the shards of the factor.
    - `begins`: whether its operands get the rows of zeros; `ends`: whether its result loses them.
    """

    factor: int
    rows: int
    chips: int
    begins: bool = False
    ends: bool = False

    def factors(self, factors: Sequence[Factor]) -> tuple[Factor, ...]:
        """The operation's factors, with the rows of zeros of all chips."""
        longer = replace(factors[self.factor], size=ROWS * self.chips)
        return tuple(longer if k == self.factor else each for k, each in enumerate(factors))

    def name(self) -> AbstractContextManager[Any]:
        """The name scope of a product, by which `hlo_costs` counts no zeros; none for other operations."""
        is_product = self.begins or self.ends
        return jax.named_scope(ROWS_OF_ZEROS.format(self.rows, ROWS)) if is_product else nullcontext()

    def operands(self, rule: Rule, pieces: Sequence[Any]) -> list[Any]:
        """The shards of the operands, with rows of zeros before the first product."""
        return [self._resized(*each) for each in zip(pieces, rule.inputs, strict=True)] if self.begins else [*pieces]

    def results(self, rule: Rule, pieces: Sequence[Any]) -> list[Any]:
        """The shards of the results, without rows of zeros behind the last product."""
        return [self._resized(*each) for each in zip(pieces, rule.outputs, strict=True)] if self.ends else [*pieces]

    def _resized(self, piece: Any, dims: Dims) -> Any:
        if (self.factor,) not in dims:
            return piece
        at = dims.index((self.factor,))
        if self.ends:
            return lax.slice_in_dim(piece, 0, self.rows, axis=at)
        config = [(0, ROWS - self.rows if dim == at else 0, 0) for dim in range(piece.ndim)]
        return lax.pad(piece, jnp.zeros((), piece.dtype), config)


def find_few_rows(traced: Traced, choice: Choice, topology: Topology) -> dict[int, Grown]:
    """The operations of a plan that run with rows of zeros: from products of few rows to the products with the values."""
    found: dict[int, Grown] = {}
    if topology.chip.name in CHIPS:
        walk = _Walk(traced, choice, topology)
        for at, _ in traced.program.matmuls():
            region = walk.region(at)
            found |= {} if region.keys() & found.keys() else region
    return found


class _Walk:
    """The way from a product of few rows to the products that have its result's rows as their own."""

    def __init__(self, traced: Traced, choice: Choice, topology: Topology) -> None:
        self.traced, self.program, self.choice, self.topology = traced, traced.program, choice, topology

    def region(self, first: int) -> dict[int, Grown]:
        """The operations with a product's rows, from it to the next products; empty if the rows get no zeros."""
        begin = self._begin(first)
        if begin is None:
            return {}
        found, (result,) = {first: begin}, self.program.operations[first].outputs
        longer, waiting = {result.value: result.dims.index((begin.factor,))}, [result.value]
        while waiting:
            value = waiting.pop()
            for at in self._around(value):
                op, each = self.program.operations[at], self._next(at, value, longer[value], begin.rows)
                if each is None or (at in found and found[at].factor != each.factor):
                    return {}
                if at in found:
                    continue
                if op.op_class == "matmul" and not each.ends:  # another product makes what these rows meet
                    return {}
                found[at] = each
                for use in op.inputs if each.ends else (*op.inputs, *op.outputs):
                    if use.value not in longer and (each.factor,) in use.dims:
                        longer[use.value] = use.dims.index((each.factor,))
                        waiting.append(use.value)
        return found if any(each.ends for each in found.values()) else {}

    def _around(self, value: int) -> list[int]:
        """The operations that make or use a value."""
        return [self.program.producers[value][0], *(at for at, _ in self.program.consumers.get(value, ()))]

    def _begin(self, at: int) -> Grown | None:
        """The rows of a product of scores, if it has few."""
        op = self.program.operations[at]
        groups = matrix_factors(op)
        if groups is None or not groups.batch or not self._is_simple(at):
            return None
        if self.program.values[op.outputs[0].value].dtype != "float32":
            return None
        local = self._local_sizes(at)
        sides = [[f for f in side if local[f] > 1] for side in (groups.rows, groups.columns)]
        sizes = [prod(local[f] for f in side) for side in sides]
        few = int(sizes[1] < sizes[0])
        scores = 4.0 * prod(local[f] for f in groups.batch) * ROWS * sizes[1 - few]
        keys = prod(local[f] for dim in op.inputs[1 - few].dims for f in dim)
        keys *= self.program.values[op.inputs[1 - few].value].itemsize
        if sizes[few] not in FEW or len(sides[few]) != 1 or sizes[1 - few] < LEAST_COLUMNS or keys < LEAST_BYTES:
            return None
        factor = sides[few][0]
        is_own = all((factor,) in use.dims for use in (op.inputs[few], op.outputs[0]))
        if not is_own or scores > self.topology.chip.on_chip_bytes:
            return None
        return self._grown(at, factor, sizes[few], begins=True)

    def _next(self, at: int, value: int, dim: int, rows: int) -> Grown | None:
        """An operation that makes or uses a value with rows of zeros in a dimension; None if it cannot."""
        op = self.program.operations[at]
        made, kept = (each(self.program, self.choice, value) for each in (produced_layout, kept_layout))
        places = [k for k, use in enumerate(op.inputs) if use.value == value]
        needed = [needed_layout(self.program, self.choice, at, place) for place in places]
        if made.partial or any(each != made for each in (kept, *needed)) or not self._is_simple(at):
            return None
        found = {use.dims[dim] for use in (*op.inputs, *op.outputs) if use.value == value}
        factor = next(iter(found))[0] if len(found) == 1 and len(next(iter(found))) == 1 else None
        if factor is None or op.factors[factor].kind != "parallel" or self._local_sizes(at)[factor] != rows:
            return None
        if any(factor in dims and dims != (factor,) for use in (*op.inputs, *op.outputs) for dims in use.dims):
            return None
        if any((factor,) not in use.dims for use in op.outputs):
            return None
        ends = op.op_class == "matmul" and bool(places)
        if op.op_class == "matmul" and sum((factor,) in use.dims for use in op.inputs) != 1:
            return None
        return self._grown(at, factor, rows, ends=ends)

    def _is_simple(self, at: int) -> bool:
        """Whether an operation sends nothing itself, has no padding, and is elementwise, a reduction or a product."""
        op, strategy = self.program.operations[at], self.choice.strategies[at]
        inside = any(
            axes and factor.kind != "parallel" and (op.op_class != "matmul" or factor.kind != "sum")
            for factor, axes in zip(op.factors, strategy.splits, strict=True)
        )
        has_padding = at in self.traced.cuts or any(at == masked for masked, _ in self.traced.masks)
        return op.op_class in ("matmul", "fused") and strategy.looped is None and not inside and not has_padding

    def _local_sizes(self, at: int) -> list[int]:
        op, splits = self.program.operations[at], self.choice.strategies[at].splits
        sizes = self.topology.axis_sizes
        return [f.size // prod(sizes[axis] for axis in axes) for f, axes in zip(op.factors, splits, strict=True)]

    def _grown(self, at: int, factor: int, rows: int, begins: bool = False, ends: bool = False) -> Grown:
        chips = self.program.operations[at].factors[factor].size // rows
        return Grown(factor, rows, chips, begins, ends)
