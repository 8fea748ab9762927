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

Two operands are sorted without such a copy. A concatenation in a kernel reads its operands when the kernel runs.

A loop whose iterations convert their slices of a stack to a narrower type, such as float32 weights to bfloat16, has the
whole stack converted before it: of [16, 4096, 4096], 50 arrays instead of 34, with or without a barrier before the
conversion. If the loop also piles up the converted slices, they are not converted twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from costmodels.machine.topology import Topology
from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program
from costmodels.program.views import CAST, RENAMES
from search.formulation.layouts import Layout, local_shape
from search.memory.donations import REDUCTIONS
from search.memory.fused_scatters import is_inlined
from search.memory.views import is_slice_of_stack

INDEX_BYTES = 4
JOINS = ("concatenate", "stack")


def temporary_bytes(program: Program, topology: Topology, operation: int, layout: Layout) -> float:
    """Bytes of the arrays that a sort, a selection or a running sum makes on one chip; 0 where they stay on the chip.

    **Arguments:**

    - `layout`: that of the operand.
    """
    value = program.values[program.operations[operation].inputs[0].value]
    elements = prod(local_shape(value.shape, layout, topology.axis_sizes))
    if topology.chip.kind != "tpu" or elements * value.itemsize <= topology.chip.on_chip_bytes:
        return 0.0
    own = INDEX_BYTES if program.operations[operation].primitive == "sort" else 0
    return elements * (value.itemsize + own)


@cached_analysis
def operations_with_temporaries(program: Program) -> tuple[int, ...]:
    """Sorts of one array, selections of the largest elements, and running sums."""
    return tuple(i for i, op in enumerate(program.operations) if _has_temporaries(op))


def _has_temporaries(op: Operation) -> bool:
    if op.primitive == "sort":
        return len(op.inputs) == 1
    return op.primitive == "top_k" or op.primitive.startswith("cum")


class Joined(NamedTuple):
    """An operand of a concatenation, and the first and the last operation during which it is an array."""

    value: int
    first: int
    last: int


@cached_analysis
def joined_operands(program: Program) -> tuple[Joined, ...]:
    """Fused operands of concatenations from their operations to the ends of the kernels that join them.

    Operands that are arrays anyway are needed from the concatenation to there.
    """
    return tuple(
        each for i, op in enumerate(program.operations) if op.primitive in JOINS for each in _joined(program, i)
    )


def _joined(program: Program, at: int) -> Iterator[Joined]:
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


class Converted(NamedTuple):
    """A stack that is converted before a loop: a slice in the loop, all bytes, and the loop's first and last operation."""

    part: int
    bytes: float
    first: int
    last: int


@cached_analysis
def converted_stacks(program: Program) -> tuple[Converted, ...]:
    """Stacks whose slices a loop converts to a narrower type."""
    found: dict[tuple[int, int, str], Converted] = {}
    for op in program.operations:
        if op.primitive == CAST and op.inputs and program.regions[op.region].kind == "loop":
            part, stack = _slice_of(program, op)
            made, given = (program.values[use.value] for use in (op.outputs[0], op.inputs[0]))
            users = [program.operations[user].primitive for user, _ in program.consumers.get(op.outputs[0].value, ())]
            if stack is not None and made.itemsize < given.itemsize and "loop_stack" not in users:
                inside = [i for i, each in enumerate(program.operations) if op.region in program.enclosing(each.region)]
                held = made.itemsize * prod(program.values[stack].shape)
                key = program.values[stack].origin or stack, op.region, made.dtype
                found.setdefault(key, Converted(part, held, inside[0], inside[-1]))
    return tuple(found.values())


def _slice_of(program: Program, op: Operation) -> tuple[int, int | None]:
    """The slice of a stack that an operation converts, as it is or as a view, and the stack; None if it is none."""
    value = op.inputs[0].value
    maker = program.operations[program.producers[value][0]]
    while maker.region == op.region and maker.primitive in RENAMES:
        value = maker.inputs[0].value
        maker = program.operations[program.producers[value][0]]
    if maker.primitive == "loop_slice":
        return value, maker.inputs[0].value
    if maker.region == op.region and is_slice_of_stack(program, maker):
        stack = maker.inputs[0].value
        if program.operations[program.producers[stack][0]].primitive == "loop_constant":
            return value, stack
    return value, None
