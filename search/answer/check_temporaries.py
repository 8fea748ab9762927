"""The checker's own account of arrays that a TPU makes beside operands and results (measured, `search.memory.tpu_temporaries`).

A sort of one array holds a copy of it and an index per element, a selection and a running sum hold a copy. What a
concatenation joins is an array until the kernel that joins it ends, unless reductions alone use the concatenation. A stack
whose slices a loop converts to a narrower type, but does not pile up, is converted whole before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from costmodels.machine.topology import Topology
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, kept_layout, needed_layout
from search.formulation.layouts import shards

Holds = Iterator[tuple[int, int, float]]
"""The first and the last operation of an array's life, and its bytes on one chip."""


def sorting(program: Program, topology: Topology, choice: Choice) -> Holds:
    """The arrays that sorts, selections and running sums make."""
    for at, op in enumerate(program.operations):
        alone = op.primitive == "sort" and len(op.inputs) == 1
        if topology.chip.kind == "tpu" and (alone or op.primitive == "top_k" or op.primitive[:3] == "cum"):
            array = program.values[op.inputs[0].value]
            pieces = shards(needed_layout(program, choice, at, 0), topology.axis_sizes)
            held, elements = array.bytes / pieces, prod(array.shape) / pieces
            if held > topology.chip.on_chip_bytes:
                yield at, at, held + (4 * elements if alone else 0)


def joining(
    program: Program,
    topology: Topology,
    choice: Choice,
    readers: Mapping[int, Sequence[int]],
    is_fused: Callable[[int], bool],
) -> Holds:
    """The operands of concatenations, where they are not arrays already."""
    maker = {use.value: i for i, op in enumerate(program.operations) for use in op.outputs}
    ends = _kernel_ends(program, readers, is_fused) if topology.chip.kind == "tpu" else {}
    for at, op in enumerate(program.operations):
        if op.primitive not in ("concatenate", "stack") or at not in ends or not ends[at]:
            continue
        for value in {use.value for use in op.inputs}:
            made, last = maker[value], max(ends[at])
            fused = is_fused(made) and all(map(is_fused, readers[value]))
            if program.operations[made].op_class != "source" and (fused or last > at):
                held = program.values[value].bytes / shards(kept_layout(program, choice, value), topology.axis_sizes)
                yield (made if fused else at + 1), last, held


def _kernel_ends(
    program: Program, readers: Mapping[int, Sequence[int]], is_fused: Callable[[int], bool]
) -> dict[int, set[int]]:
    """Each operation to the operations that end the kernels of which it is part; none if all of these are reductions."""
    found: dict[int, set[int]] = {}
    for at in reversed(range(len(program.operations))):
        op = program.operations[at]
        after = {each for use in op.outputs for each in readers.get(use.value, ())}
        if op.op_class == "fused" and op.primitive.startswith(("reduce_", "arg")):
            found[at] = set()
        elif not after or not is_fused(at) or not all(map(is_fused, after)):
            found[at] = {at}
        else:
            found[at] = set().union(*(found[each] or {each} for each in after))
            if all(not found[each] for each in after):
                found[at] = set()
    return found


def converting(program: Program, topology: Topology, choice: Choice, readers: Mapping[int, Sequence[int]]) -> Holds:
    """The stacks that are converted before the loops that use their slices."""
    maker = {use.value: op for op in program.operations for use in op.outputs}
    seen: set[tuple[int, int, str]] = set()
    for op in program.operations if topology.chip.kind == "tpu" else ():
        is_cast = op.primitive == "convert_element_type" and op.inputs and program.regions[op.region].kind == "loop"
        if not is_cast or program.values[op.outputs[0].value].itemsize >= program.values[op.inputs[0].value].itemsize:
            continue
        made, part = program.values[op.outputs[0].value], op.inputs[0].value
        while maker[part].region == op.region and maker[part].primitive in _RENAMED:
            part = maker[part].inputs[0].value
        stack = _stack_of(program, maker, part, op.region)
        piled = any(program.operations[at].primitive == "loop_stack" for at in readers.get(op.outputs[0].value, ()))
        if stack is None or piled or (program.values[stack].origin or stack, op.region, made.dtype) in seen:
            continue
        seen.add((program.values[stack].origin or stack, op.region, made.dtype))
        during = [i for i, each in enumerate(program.operations) if op.region in program.enclosing(each.region)]
        pieces = shards(kept_layout(program, choice, part), topology.axis_sizes)
        yield min(during), max(during), made.itemsize * prod(program.values[stack].shape) / pieces


_RENAMED = ("reshape", "squeeze", "expand_dims", "transpose")


def _stack_of(program: Program, maker: Mapping[int, Operation], part: int, region: int) -> int | None:
    """The stack that does not change in a loop and of which a value is the slice at one index, if there is one."""
    cut = maker[part]
    if cut.primitive == "loop_slice":
        return cut.inputs[0].value
    if cut.region != region or cut.primitive != "dynamic_slice" or cut.op_class != "fused":
        return None
    stack = cut.inputs[0].value
    whole, piece = program.values[stack].shape, program.values[part].shape
    at_one_index = any(whole[k:] == piece[k:] and prod(piece[:k]) == 1 for k in range(len(whole) + 1))
    return stack if at_one_index and maker[stack].primitive == "loop_constant" else None
