"""Elementwise work inside the kernels of products: operands formed there, and results written over the product.

Measured with libtpu 0.0.42 on v5e, in arrays of one size each:

| program | arrays |
|---|---|
| `tanh(a) @ b`, `a @ tanh(b)`, `roll(a) @ b` | 3: the product reads `a` |
| `tanh(a @ b)`, `tanh(a @ b) * (a @ b)` | 3: the result lies in the product's memory |
| `a @ b + c @ d` | 5 |
| `w.astype(float32)` of bfloat16 `w`, in products that round their operands to bfloat16 | none: they read `w` |
| `c + x.T @ x` in a loop over `s` that carries `c` | `s` and 1: the sum lies in the carry's memory |
| `(a @ b).astype(bfloat16)` of a float32 product | `a`, `b` and 1: the product is in registers |
| `tanh(x @ a)` in a loop that stacks it | the stack, `s` and `a`: the kernel writes into the stack |

The first is counted where all that the kernel reads is in memory anyway: arguments that are not donated, or donated to the
product's own result, outside of loops, with one reader for each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program, Use
from costmodels.program.views import CAST
from search.memory.kernels import REDUCTIONS, is_in_place, is_inlined


@cached_analysis
def formed_in_products(program: Program) -> frozenset[int]:
    """The values that one product forms from arguments, and that are never arrays."""
    overwriting = {program.arguments[each]: _maker_of_result(program, result) for each, result in program.donated}
    formed: dict[
        int, frozenset[int]
    ] = {}  # the products that must read a value: those that overwrite what it is made of
    found = {op.outputs[0].value for op in program.operations if _is_rounded_back(program, op)}
    for at, op in enumerate(program.operations):
        if op.op_class == "source":
            formed |= {use.value: frozenset({overwriting[at]} if at in overwriting else ()) for use in op.outputs}
        if op.region == 0 and _is_elementwise(program, at) and all(use.value in formed for use in op.inputs):
            value = op.outputs[0].value
            readers = {user for user, _ in program.consumers.get(value, ())}
            if len(readers) == 1:
                formed[value] = frozenset[int]().union(*(formed[use.value] for use in op.inputs))
                if any(program.operations[user].op_class == "matmul" for user in readers) and formed[value] <= readers:
                    found.add(value)
    return frozenset(found)


def _is_rounded_back(program: Program, op: Operation) -> bool:
    """Whether an operation widens bfloat16 elements of an array in memory for products that round them to bfloat16."""
    if op.primitive != CAST or not op.inputs or program.values[op.inputs[0].value].dtype != "bfloat16":
        return False
    at = program.producers[op.inputs[0].value][0]
    is_argument = program.operations[at].op_class == "source" and at not in _donated(program)
    users = program.consumers.get(op.outputs[0].value, ())
    rounds = all(position in program.operations[user].rounded for user, position in users)
    return (
        bool(users) and rounds and (is_argument or program.operations[at].primitive in ("loop_slice", "loop_constant"))
    )


def _donated(program: Program) -> set[int]:
    return {program.arguments[argument] for argument, _ in program.donated}


def _maker_of_result(program: Program, result: int) -> int:
    return program.producers[program.operations[program.results[result]].inputs[0].value][0]


def _is_elementwise(program: Program, operation: int) -> bool:
    """Whether an operation is fused, and neither a reduction nor a running sum."""
    op = program.operations[operation]
    return op.op_class == "fused" and not op.primitive.startswith((*REDUCTIONS, "cum"))


def written_over(program: Program) -> Iterator[tuple[int, int]]:
    """Each product and the result of the one elementwise kernel that reads it, if it lies in the product's memory."""
    return (each for each in taken_in(program) if _is_as_large(program, *each))


def _is_as_large(program: Program, product: int, result: int) -> bool:
    return program.values[product].bytes == program.values[result].bytes


@cached_analysis
def absorbed(program: Program) -> dict[int, int]:
    """Each product that is only an array if it changes its layout, and the result of the elementwise kernel that takes it in.

    The kernel writes into a loop's carry or stack, or its result is of another size.
    """
    carried = {following for _, following in overwritten_carries(program)}
    found = dict(taken_in(program))
    return {
        product: result
        for product, result in found.items()
        if result in carried or not _is_as_large(program, product, result) or is_stacked(program, result)
    }


def is_stacked(program: Program, value: int) -> bool:
    """Whether a value is made in the stack of a loop: nothing else reads it."""
    users = program.consumers.get(value, ())
    return bool(users) and all(program.operations[at].primitive == "loop_stack" for at, _ in users)


def taken_in(program: Program) -> Iterator[tuple[int, int]]:
    """Each product and the result of the one elementwise kernel that reads it."""
    donated = {program.operations[program.results[result]].inputs[0].value for _, result in program.donated}
    results = _kernel_results(program)
    for op in program.operations:
        if op.op_class == "matmul" and len(op.outputs) == 1:
            product = op.outputs[0].value
            if product in results and results[product] not in donated:
                yield product, results[product]


def overwritten_carries(program: Program) -> Iterator[tuple[int, int]]:
    """Each loop carry that one elementwise kernel alone reads, and what that kernel writes over it for the next iteration.

    The kernel may take in one product. A second one is an array of its own until it is added.
    """
    products = Counter(result for _, result in taken_in(program))
    results = _kernel_results(program)
    for op in program.operations:
        if op.primitive == "loop_carry" and len(op.inputs) == 2:
            carry, following = op.outputs[0].value, op.inputs[1].value
            once = len(program.consumers[following]) == 1 and products[following] <= 1
            if once and results.get(carry) == following:
                yield carry, following


@cached_analysis
def _kernel_results(program: Program) -> dict[int, int]:
    """Each value to the one result of the kernels that read it, if there is one, and if none changes the order.

    Readers come after what they read, except carries of loops, which are not kernels.
    """
    results: dict[int, int] = {}
    for op in reversed(program.operations):
        for use in op.outputs:
            result = _kernel_result(program, use, results)
            if result is not None:
                results[use.value] = result
    return results


def _kernel_result(program: Program, read: Use, results: dict[int, int]) -> int | None:
    """The one result of the kernels that read a value; `results` has those of the values made after it."""
    result = None
    for at, position in program.consumers.get(read.value, ()):
        op = program.operations[at]
        if op.region != read.region or not is_inlined(program, at) or not is_in_place(op, position):
            return None
        made = op.outputs[0].value
        users = program.consumers.get(made, ())
        is_end = not users or not all(is_inlined(program, user) for user, _ in users)
        end = made if is_end else results.get(made)
        if end is None or result not in (None, end):
            return None
        result = end
    return result
