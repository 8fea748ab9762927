"""The arrays that pass through the vector unit, and the loops over them.

A compiler fuses elementwise work into the matmul that reads its result, where the matmul hides it. All other fused work is
a loop over its arrays on the vector unit: reductions, residual additions, results that leave for a collective, a carry or a
cache. The vector unit loads and stores each of these arrays tile by tile, whether it is in HBM or in on-chip memory. So it
does with the results of a matmul. Matmuls of grouped rows are kernels of their own, into which nothing is fused.

A reduction of an array in HBM takes the time of HBM and of its loads: its loop does not read while it computes. In the cycles
of libtpu 0.0.50, maxima, sums, sums of squares and of exponentials of 4 to 64 Mi elements are within 6 % of this on v4, v5e and
v6e, and within 18 % on v5p. An elementwise loop that writes what it computes takes the longer of both. So does a softmax, which
is one loop: arithmetic uses its exponentials after their sum again.

A mask of a matmul's operand is a pass over it. Masks of the vector unit's own loops are not costed. In the cycles of libtpu
0.0.50 on v5e, the mask of a weight of 16 Mi elements adds 5 cycles for 8 * 128 elements to matmuls of 8 and 128 rows, and the
mask of their activations 1.2 µs. Masks change sums and softmaxes of 4 Mi elements by -38 to 14 % on v5e and by -19 to 66 %
on v4: as often they are faster.

A matmul whose operand is stored in a narrower type, such as int8 weights, waits for the conversion of each element.

In a loop of the program a matmul reads slices of stacked weights. The compiler cannot fetch them ahead, so the matrix unit
waits for the first tile. Outside of loops operands are fetched ahead.

A slice that elementwise work of the loop's body reads in another shape, such as the scale of a norm or the decays of a
recurrent state, is cut out by a loop of its own. In the cycles of libtpu 0.0.50, such slices of 64 to 65536 elements take 1.2
to 1.6 µs each on v5e and v5p. One that is read in its own shape, but for dimensions of one element, or by a matmul, is part of
its reader.
"""

from __future__ import annotations

from costmodels.program.analysis import cached_analysis
from costmodels.program.grouped import grouped
from costmodels.program.program import Operation, Output, Program
from costmodels.program.views import BROADCASTS, CAST, RENAMES, is_view, uses_through

REGISTER = 1024
"""Elements of a vector register (8 · 128): loops over fewer points have no start-up time."""


def vector_uses(program: Program, operation: Operation) -> tuple[int | Output, ...]:
    """The operands (0, 1, ...) and results (`Output(0)`, ...) of an operation that the vector unit loads or stores."""
    if operation.op_class == "matmul":
        return (*map(Output, range(len(operation.outputs))), *operation.masked)
    if operation.op_class != "fused":
        return ()
    looped = _is_looped(program, operation)
    once = {operation.use(k).value: k for k in operation.traffic}
    return tuple(k for value, k in once.items() if looped or (not isinstance(k, Output) and _is_left(program, value)))


def converted_operands(program: Program, operation: Operation) -> tuple[int, ...]:
    """The operands of a matmul that are stored in a narrower type than it multiplies."""
    if operation.op_class != "matmul":
        return ()
    widths = ((use.stored_itemsize, program.values[use.value].itemsize) for use in operation.inputs)
    return tuple(k for k, (stored, own) in enumerate(widths) if 0 < stored < own)


def ends_pass(program: Program, operation: Operation) -> bool:
    """Whether a loop of the vector unit ends with an operation: it reduces, writes its result, or copies in memory.

    So does the first operation in a loop of the program that shows a slice in another shape, if arithmetic reads that.
    """
    if operation.op_class == "memory":
        return bool(operation.traffic)
    if is_view(operation) and operation.outputs[0].value in _reshaped_slices(program):
        return True
    return _is_looped(program, operation) and (
        _reduces(operation) or any(isinstance(use, Output) for use in operation.traffic)
    )


def waits_for_reads(program: Program, operation: Operation) -> bool:
    """Whether an operation's reads from HBM add to its time on the vector unit: it only feeds a reduction, or is one."""
    reads = operation.op_class == "fused" and bool(operation.traffic)
    if not reads or any(isinstance(use, Output) for use in operation.traffic) or not _is_looped(program, operation):
        return False
    return (_sums(operation) and not _is_used_again(program, operation)) or any(
        use.value in _summed(program) for use in operation.outputs
    )


def is_streamed(program: Program, operation: Operation) -> bool:
    """Whether an operation is a matmul in a loop of the program, whose operands are not fetched ahead."""
    loops = (program.regions[region].kind == "loop" for region in program.enclosing(operation.region))
    return operation.op_class == "matmul" and any(loops)


@cached_analysis
def _reshaped_slices(program: Program) -> frozenset[int]:
    """The values that show a slice of a loop in another shape to elementwise work; the first of each slice."""
    shown = (_first_shown(program, op.outputs[0].value) for op in program.operations if op.primitive == "loop_slice")
    return frozenset(value for value in shown if value is not None)


def _first_shown(program: Program, slice_: int) -> int | None:
    """The first view of a slice, or of a cast of it, from which arithmetic of another shape reads, but for 1s."""

    def elements(value: int) -> list[int]:
        return [n for n in program.values[value].shape if n > 1]

    def is_passed(at: int) -> bool:
        return is_view(program.operations[at]) or program.operations[at].primitive == CAST

    for at, _ in sorted(uses_through(program, slice_, lambda at: program.operations[at].primitive == CAST)):
        op = program.operations[at]
        if not is_view(op) or op.primitive not in RENAMES | BROADCASTS:
            continue
        users = (program.operations[user] for user, _ in uses_through(program, op.outputs[0].value, is_passed))
        if any(user.op_class == "fused" and elements(user.outputs[0].value) != elements(slice_) for user in users):
            return op.outputs[0].value
    return None


def _is_left(program: Program, value: int) -> bool:
    """Whether a loop of the vector unit stores a value only for the elementwise work that a matmul is fused with."""
    while (op := program.operations[program.producers[value][0]]).inputs and (is_view(op) or op.primitive == CAST):
        value = op.inputs[0].value
    return _is_looped(program, op) and Output(program.producers[value][1]) not in op.traffic


def _is_looped(program: Program, operation: Operation) -> bool:
    """Whether an operation computes in a loop of the vector unit, and not within the matmul that reads its result."""
    if operation.op_class != "fused" or not operation.flops_per_point or is_view(operation):
        return False
    return _reduces(operation) or not all(use.value in _fused_into_matmuls(program) for use in operation.outputs)


@cached_analysis
def _fused_into_matmuls(program: Program) -> frozenset[int]:
    """The values that only matmuls use, directly or after elementwise work."""
    found: set[int] = set()

    def fuses(op: Operation) -> bool:
        if op.op_class == "matmul":
            return not grouped(op)
        return op.op_class == "fused" and not _reduces(op) and all(use.value in found for use in op.outputs)

    for op in reversed(program.operations):
        for use in op.outputs:
            users = [program.operations[at] for at, _ in program.consumers.get(use.value, ())]
            if users and all(map(fuses, users)):
                found.add(use.value)
    return frozenset(found)


@cached_analysis
def _summed(program: Program) -> frozenset[int]:
    """The values that a reduction reads, directly or after elementwise work."""
    found: set[int] = set()
    for op in reversed(program.operations):
        made = any(use.value in found for use in op.outputs)
        if op.op_class == "fused" and ((_sums(op) and not _is_used_again(program, op)) or (made and not _reduces(op))):
            found.update(use.value for use in op.inputs)
    return frozenset(found)


def _is_used_again(program: Program, reduction: Operation) -> bool:
    """Whether arithmetic made what a reduction reads, directly or through casts, and other arithmetic reads it, too."""

    def is_shown(op: Operation) -> bool:
        return bool(op.inputs) and (is_view(op) or op.primitive == CAST)

    value = reduction.inputs[0].value
    while is_shown(made_by := program.operations[program.producers[value][0]]):
        value = made_by.inputs[0].value
    users = uses_through(program, value, lambda at: is_shown(program.operations[at]))
    others = (op for at, _ in users if (op := program.operations[at]) is not reduction)
    return made_by.op_class == "fused" and any(op.op_class == "fused" for op in others)


def _sums(operation: Operation) -> bool:
    """Whether an operation is a sum, a maximum or the like over elements."""
    return operation.primitive.startswith("reduce_") and operation.primitive != "reduce_precision"


@cached_analysis
def _reduces(operation: Operation) -> bool:
    """Whether elements are reduced, sliced, or concatenated from several arrays."""
    kept = {factor for use in operation.outputs for dim in use.dims for factor in dim}
    return any(factor not in kept for use in operation.inputs for dim in use.dims for factor in dim)
