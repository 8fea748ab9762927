"""Results that libtpu copies into another tiling on return, which doubles their memory for a moment.

A product is written in tiles of its matrix's rows and columns (`search.formulation.tpu_tiles`). A result of the
program is stored like an argument of its shape, padded the least. If that puts other dimensions into the tiles, as for
one chip's [16, 1024, 50257] logits, the finished product is copied. libtpu 0.0.42 does so for results of 2 to 4
dimensions. If other operations come between the product and the result, the product's own array is counted beside
theirs already, though they may be one.
"""

from __future__ import annotations

from math import prod

from costmodels.machine.topology import Topology
from costmodels.operations import matrix_factors
from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program, Use
from search.formulation.layouts import Layout, local_shape
from search.formulation.tpu_tiles import argument_tile


def copied_bytes(program: Program, topology: Topology, operation: int, layout: Layout) -> float:
    """Bytes of the second array that one chip holds while a result is copied.

    They are 0 if it keeps its tiling, or stays on the chip.

    **Arguments:**

    - `operation`: the result's operation; `layout`: that of the result.
    """
    sides = _sides(program, program.operations[operation].inputs[0].value)
    if topology.chip.kind != "tpu" or sides is None:
        return 0.0
    value = program.values[program.operations[operation].inputs[0].value]
    sizes = local_shape(value.shape, layout, topology.axis_sizes)
    held = value.itemsize * prod(sizes)
    matrix = {max(side, key=lambda i: (sizes[i], i)) for side in sides}
    if held <= topology.chip.on_chip_bytes or set(argument_tile(sizes, value.itemsize)) == matrix:
        return 0.0
    return held


@cached_analysis
def _sides(program: Program, value: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The row and the column dimensions of a value that is a product; None if it is not one."""
    at, position = program.producers[value]
    return _tile_splits(program.operations[at], program.operations[at].outputs[position])


def _tile_splits(op: Operation, result: Use) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    groups = matrix_factors(op)
    if groups is None or groups.batch:
        return None
    rows = tuple(i for i, dim in enumerate(result.dims) if set(dim) <= set(groups.rows))
    columns = tuple(i for i, dim in enumerate(result.dims) if set(dim) <= set(groups.columns))
    return (rows, columns) if rows and columns else None
