"""Arrays that libtpu copies into another memory order, which doubles their memory for a moment: results, and parts of stacks.

A product is written in tiles of its matrix's rows and columns (`search.formulation.tpu_tiles`). A result of the
program is stored like an argument of its shape, padded the least. If that puts other dimensions into the tiles, as for
one chip's [16, 1024, 50257] logits, the finished product is copied. libtpu 0.0.42 does so for results of 2 to 4
dimensions. If other operations come between the product and the result, the product's own array is counted beside
theirs already, though they may be one.

A loop writes into its stack in the stack's order. What comes in another order is an array, and a copy of it. Measured with
libtpu 0.0.42 on v5e, for bfloat16 slices `x` [8192, 8192] of a stack, another matrix `a` and a carry `c`:

| stacked | arrays beside both stacks, `a` and `c` |
|---|---|
| `x.T`, `tanh(x.T)`, `x + x.T`; `c.T + x` | 2: the slice, or the kernel's operands, and the copy |
| `x.transpose(1, 0, 2)` of a larger `x`, whose last dimension stays | 1: the slice |
| `c.T` | 1 |
| `x @ a`, `tanh(x @ a)`, `softmax(x)`, `softmax(x @ a, 0)` | none |
| `softmax(x @ a, -1)`, `(x @ a) / (x @ a).sum(-1)` | 2: the sums are fused with the product, which turns it over |
| the same of a float32 product, in bfloat16 | the product and 1 |

Slices of up to 32 MiB, and some of 64, stay on the chip.

A stack's tiles have two dimensions of its slices, which pads stacks of small slices (`search.formulation.tpu_tiles`). A
result is copied into the order of an argument, if that is padded less. An array that a loop reads slice by slice is copied
into the order of a stack, if it is padded more there. Measured with libtpu 0.0.50 on v5e, in MiB:

| bfloat16 stack | elements | tiles |
|---|---|---|
| [4096, 32, 16, 64], written or read | 256 | 512 |
| [16384, 200, 20] | 125 | 192: the 20 are the rows |
| [8192, 2, 3, 2560] | 240 | 240 |
| float32 [8388608, 8] | 256 | 4,096 |
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from costmodels.machine.topology import Topology
from costmodels.operations import matrix_factors
from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program, Use
from costmodels.program.views import RENAMES
from search.formulation.layouts import Layout, local_shape
from search.formulation.tpu_tiles import argument_tile, least_ratio, stack_ratio
from search.memory.fused_products import is_stacked
from search.memory.kernels import REDUCTIONS, is_in_place, is_inlined
from search.memory.views import IN_PLACE, is_slice_of_stack, is_whole_slice, views

KEPT, TURNED, MOVED = 0, 1, 2
"""The order in which a kernel writes what it reads: the same, another that ends with the same dimension, or any other."""


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


class StackCopy(NamedTuple):
    """Arrays that a loop makes to write into a stack: their size is that of a value, during two operations and between."""

    value: int
    count: int
    first: int
    last: int


@cached_analysis
def stack_copies(program: Program) -> tuple[StackCopy, ...]:
    """The arrays that loops make of what they write into stacks in another memory order, in order of the writes."""
    found = dict[StackCopy, None]()
    for op in program.operations:
        found |= dict.fromkeys(_copies_for(program, op))
    return tuple(found)


class SlicedStack(NamedTuple):
    """An array that a loop reads slice by slice, and the first and the last operation of its copy in a stack's order.

    `replaces`: whether nothing reads the array itself once it is copied.
    """

    value: int
    first: int
    last: int
    replaces: bool


@cached_analysis
def sliced_stacks(program: Program) -> tuple[SlicedStack, ...]:
    """The arrays that loops read slice by slice, without those that loops stacked, or that have been sliced before."""
    found = dict[SlicedStack, None]()
    for at, op in enumerate(program.operations):
        if op.primitive != "loop_slice":
            continue
        value = source = op.inputs[0].value
        made_by = program.operations[program.producers[source][0]]
        while made_by.primitive in RENAMES and made_by.inputs:
            source = made_by.inputs[0].value
            made_by = program.operations[program.producers[source][0]]
        if made_by.op_class != "boundary":
            region = op.outputs[0].region
            last = max(i for i, each in enumerate(program.operations) if region in program.enclosing(each.region))
            alone = source == value and made_by.op_class != "source" and len(program.consumers[value]) == 1
            found[SlicedStack(value, at, last, alone)] = None
    return tuple(found)


@cached_analysis
def stacks_of_loops(program: Program) -> frozenset[int]:
    """The values that loops write slice by slice: stacked results, and what an update in place writes at one leading index."""
    return frozenset(op.outputs[0].value for op in program.operations if _writes_slices(program, op))


def _writes_slices(program: Program, op: Operation) -> bool:
    if op.primitive != "dynamic_update_slice":
        return op.primitive == "loop_stack" and bool(op.inputs)
    whole, part = (program.values[use.value].shape for use in op.inputs[:2])
    return _is_in_loop(program, op) and part[:1] == (1,) != whole[:1] and is_whole_slice(whole, part)


def padded_bytes(program: Program, topology: Topology, value: int, layout: Layout, is_result: bool) -> float:
    """Further bytes of a loop's stack on one chip: by which its tiles exceed its elements, and of its copy as a result."""
    array = program.values[value]
    sizes = local_shape(array.shape, layout, topology.axis_sizes)
    ratio, least = stack_ratio(sizes, array.itemsize), least_ratio(sizes, array.itemsize)
    return array.itemsize * prod(sizes) * (ratio - 1 + (least if is_result and ratio > least else 0))


def resliced_bytes(program: Program, topology: Topology, sliced: SlicedStack, layout: Layout) -> tuple[float, float]:
    """Further bytes on one chip while an array is copied for the loop that slices it, and from then on.

    None if the copy stays on the chip, or if no other order pads the array less.
    """
    array = program.values[sliced.value]
    sizes = local_shape(array.shape, layout, topology.axis_sizes)
    held, ratio = array.itemsize * prod(sizes), stack_ratio(sizes, array.itemsize)
    if ratio <= least_ratio(sizes, array.itemsize) or held * ratio <= topology.chip.on_chip_bytes:
        return 0.0, 0.0
    return held * ratio, held * (ratio - sliced.replaces)


def _copies_for(program: Program, op: Operation) -> Iterator[StackCopy]:
    is_stack = op.primitive == "loop_stack"
    written = op.inputs[:1] if is_stack else op.inputs[-1:] if op.primitive.startswith("scatter") else op.inputs[1:2]
    if not is_stack and not (op.primitive in IN_PLACE and _is_in_loop(program, op)):
        return
    for value in (use.value for use in written):
        made = program.producers[value][0]
        sources = _sources(program, value)
        for source, turn in sources.items():
            maker, is_slice = program.operations[program.producers[source][0]], _is_slice(program, source)
            is_own = maker.op_class == "matmul" and len(program.consumers[source]) == 1
            is_copied = (turn == MOVED or (turn and not is_slice)) and not is_own
            count = (is_copied and (is_stack or made in views(program))) + (is_slice and any(sources.values()))
            if count:
                yield StackCopy(source, count, made, made)
            elif is_stack and maker.op_class == "matmul" and source in _summed_over_columns(program):
                yield _of_summed_product(program, source, value)


def _of_summed_product(program: Program, product: int, value: int) -> StackCopy:
    """The copy of what a stack gets of a product and its sums; beside it a narrower array, which is not in the product's."""
    made = program.producers[value][0]
    first = min(made, max(at for at, _ in program.consumers[product]))
    is_narrower = program.values[value].bytes < program.values[product].bytes
    return StackCopy(value, 1 + (is_narrower and not is_stacked(program, value)), first, made)


def _is_in_loop(program: Program, op: Operation) -> bool:
    return any(program.regions[region].kind == "loop" for region in program.enclosing(op.region))


def _is_slice(program: Program, value: int) -> bool:
    """Whether a value is the slice of a stack at one index."""
    op = program.operations[program.producers[value][0]]
    return op.primitive == "loop_slice" or is_slice_of_stack(program, op)


def _sources(program: Program, value: int) -> dict[int, int]:
    """The arrays that a kernel reads to make a value, of its size, and what it does to the order of each."""
    found, waiting, seen = dict[int, int](), [(value, KEPT)], {(value, KEPT)}
    while waiting:
        value, turn = waiting.pop()
        at = program.producers[value][0]
        op = program.operations[at]
        if _is_slice(program, value) or not is_inlined(program, at) or op.primitive.startswith(REDUCTIONS):
            found[value] = max(turn, found.get(value, KEPT))
            continue
        if op.primitive == "transpose" and not is_in_place(op, 0):
            turn = max(turn, TURNED if op.inputs[0].dims[-1] == op.outputs[0].dims[-1] else MOVED)
        new = {(use.value, turn) for use in op.inputs if _is_as_large(program, use.value, value)} - seen
        seen |= new
        waiting += sorted(new)
    return found


def _is_as_large(program: Program, a: int, b: int) -> bool:
    """Whether two values have the same number of elements."""
    return prod(program.values[a].shape) == prod(program.values[b].shape)


@cached_analysis
def _summed_over_columns(program: Program) -> frozenset[int]:
    """The values of which a kernel reduces the last dimension alone, as they are or after elementwise work."""
    found = set[int]()
    for op in reversed(program.operations):
        if op.op_class != "fused" or not op.inputs:
            continue
        if op.primitive.startswith(REDUCTIONS):
            kept = {factor for dim in op.outputs[0].dims for factor in dim}
            reduced = [not set(dim) <= kept for dim in op.inputs[0].dims]
            if reduced and reduced[-1] and not any(reduced[:-1]):
                found.add(op.inputs[0].value)
        elif op.outputs[0].value in found:
            found |= {use.value for use in op.inputs if _is_as_large(program, use.value, op.outputs[0].value)}
    return frozenset(found)


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
