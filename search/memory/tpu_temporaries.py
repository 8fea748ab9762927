"""Arrays that libtpu makes for an operation beside its operands and its result.

Measured with libtpu 0.0.42 on v5e, for bfloat16 arrays of one size each:

| operation | arrays | of them the operation's own |
|---|---|---|
| `sort(a)` | 5 | a copy in another memory order, and 32-bit indices (2) |
| `sort(a)` of float32 | 8 | the same (2 and 2) |
| `top_k(a)` | 2 | a copy in another memory order |
| `cumsum(a)` | 3 | the sums within tiles |
| `concatenate(tanh(a), tanh(b))` or `stack`, also within `tanh` | 6 | both operands (2) |
| the same, summed over its rows or columns | 2 | none |
| a scatter of one number to each row, padded | 2 | the scatter |
| `roll(a)`, also within `tanh` | 2 | none: both parts are read where they are |
| `a[:, i]`, `a.at[:, i].set(b)` | 2, and `b` | a copy in another memory order |
| `x[:, i]` of the slices `x` of a stack, in a loop | the stack and 2 | the slice and its copy |
| `a[i]`, `a[i, j]`, `(a @ b)[:, i]`, `take_along_axis(a, i, -1)` | their own | none |

Two operands are sorted without such a copy. A concatenation in a kernel reads its operands when the kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple

from costmodels.machine.topology import Topology
from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program
from search.formulation.layouts import Layout, local_shape
from search.memory.fused_products import formed_in_products
from search.memory.kernels import REDUCTIONS, is_inlined

INDEX_BYTES = 4
LANES = 128
"""Elements of a row of a tile: a dimension that comes last in the copy is padded to a multiple of them."""
JOINS = ("concatenate", "stack")


def temporary_bytes(program: Program, topology: Topology, operation: int, layout: Layout) -> float:
    """Bytes of the arrays that an operation makes of its first operand on one chip; 0 where they stay on the chip.

    **Arguments:**

    - `layout`: that of the operand.
    """
    value = program.values[program.operations[operation].inputs[0].value]
    elements = prod(local_shape(value.shape, layout, topology.axis_sizes))
    if topology.chip.kind != "tpu" or elements * value.itemsize <= topology.chip.on_chip_bytes:
        return 0.0
    op = program.operations[operation]
    window = _window(op)
    if window is not None:
        is_slice = program.operations[program.producers[op.inputs[0].value][0]].primitive == "loop_slice"
        lanes = local_shape(value.shape, layout, topology.axis_sizes)[window]
        return elements * value.itemsize * (ceil(lanes / LANES) * LANES / lanes + is_slice)
    return elements * (value.itemsize + (INDEX_BYTES if op.primitive == "sort" else 0))


@cached_analysis
def operations_with_temporaries(program: Program) -> tuple[int, ...]:
    """Sorts of one array, selections of the largest elements, running sums, and columns picked or written by index."""
    return tuple(i for i, op in enumerate(program.operations) if _has_temporaries(program, op))


def _has_temporaries(program: Program, op: Operation) -> bool:
    if op.primitive == "sort":
        return len(op.inputs) == 1
    if _window(op) is not None:
        return not (op.primitive == "gather" and _is_made_for(program, op.inputs[0].value))
    return op.primitive == "top_k" or op.primitive.startswith("cum")


def _is_made_for(program: Program, value: int) -> bool:
    """Whether one operation alone reads a value, which is then made in the memory order that it wants."""
    made_by = program.operations[program.producers[value][0]]
    return made_by.op_class not in ("source", "boundary") and len(program.consumers[value]) == 1


def _window(op: Operation) -> int | None:
    """The last whole dimension of an array that is read or written at several indices along its last one; None without one."""
    if op.primitive != "gather" and not op.primitive.startswith("scatter"):
        return None
    array, indices, windows = op.inputs[0], op.inputs[1], op.outputs[0] if op.primitive == "gather" else op.inputs[2]
    kept = {factor for dim in windows.dims for factor in dim}
    chosen = {factor for dim in indices.dims[:-1] for factor in dim}
    several = prod(op.factors[factor].size for factor in chosen) > 1
    whole = [i for i, dim in enumerate(array.dims) if dim and set(dim) <= kept - chosen]
    last = array.dims[-1] if array.dims else ()
    shared = {factor for dim in array.dims for factor in dim} & chosen
    return whole[-1] if whole and several and last and not set(last) & kept and not shared else None


class Joined(NamedTuple):
    """An operand of a concatenation, and the first and the last operation during which it is an array."""

    value: int
    first: int
    last: int


@cached_analysis
def joined_operands(program: Program) -> tuple[Joined, ...]:
    """Fused operands of concatenations from their operations to the ends of the kernels that join them.

    So are padded scatters, such as the gradient of labels' logits, if there is a label for all positions but one. Operands that
    are arrays anyway are needed from the concatenation to there.
    """
    return tuple(
        each
        for i, op in enumerate(program.operations)
        if op.primitive in JOINS or _pads_scatter(program, op)
        for each in _joined(program, i)
    )


def _pads_scatter(program: Program, op: Operation) -> bool:
    """Whether an operation pads the result of a scatter that would run in its kernel otherwise."""
    if op.primitive != "pad":
        return False
    made = program.producers[op.inputs[0].value][0]
    return program.operations[made].primitive.startswith("scatter") and is_inlined(program, made)


def _joined(program: Program, at: int) -> Iterator[Joined]:
    if program.operations[at].outputs[0].value in formed_in_products(program) or _rotates(program, at):
        return
    ends = _kernel_ends(program, at)
    if all(program.operations[end].primitive.startswith(REDUCTIONS) for end in ends):
        return
    for value in dict.fromkeys(use.value for use in program.operations[at].inputs):
        made = program.producers[value][0]
        if program.operations[made].op_class == "source":
            continue
        inside = is_inlined(program, made) and all(is_inlined(program, user) for user, _ in program.consumers[value])
        if inside or max(ends) > at:
            yield Joined(value, made if inside else at + 1, max(ends))


def _rotates(program: Program, at: int) -> bool:
    """Whether an operation joins the two parts of an array that is in memory: the kernel reads them there."""
    made_by = [program.operations[program.producers[use.value][0]] for use in program.operations[at].inputs]
    if len(made_by) != 2 or any(op.primitive != "slice" for op in made_by):
        return False
    whole = {op.inputs[0].value for op in made_by}
    parts = {use.value for use in program.operations[at].inputs}
    if len(whole) > 1 or len(parts) == 1:
        return False
    (value,) = whole
    is_whole = sum(program.values[part].bytes for part in parts) == program.values[value].bytes
    return is_whole and not is_inlined(program, program.producers[value][0])


def _kernel_ends(program: Program, at: int) -> list[int]:
    """The operations that end the kernels that a fused operation is part of."""
    found, waiting, seen = [], [at], {at}
    while waiting:
        each = waiting.pop()
        op = program.operations[each]
        users = {user for use in op.outputs for user, _ in program.consumers.get(use.value, ())}
        inside = users and all(is_inlined(program, user) for user in users) and is_inlined(program, each)
        if not inside or op.primitive.startswith(REDUCTIONS):
            found.append(each)
        else:
            waiting += users - seen
            seen |= users
    return found
