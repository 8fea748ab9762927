"""Elementwise work inside the kernels of products: operands formed there, and results written over the product.

Measured with libtpu 0.0.42 on v5e, in arrays of one size each:

| program | arrays |
|---|---|
| `tanh(a) @ b`, `a @ tanh(b)`, `roll(a) @ b` | 3: the product reads `a` |
| `tanh(a @ b)`, `tanh(a @ b) * (a @ b)` | 3: the result lies in the product's memory |
| `a @ b + c @ d` | 5 |

The first is counted where all that the kernel reads is in memory anyway: arguments that are not donated, outside of loops,
with one reader for each step.
"""

from __future__ import annotations

from collections.abc import Iterator

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Program
from search.memory.kernels import REDUCTIONS, is_in_place, is_inlined


@cached_analysis
def formed_in_products(program: Program) -> frozenset[int]:
    """The values that one product forms from arguments, and that are never arrays."""
    donated = {program.arguments[argument] for argument, _ in program.donated}
    sources = (op for at, op in enumerate(program.operations) if op.op_class == "source" and at not in donated)
    arguments = {use.value for op in sources for use in op.outputs}
    formed, found = set(arguments), set[int]()
    for at, op in enumerate(program.operations):
        if op.region == 0 and _is_elementwise(program, at) and all(use.value in formed for use in op.inputs):
            value = op.outputs[0].value
            readers = {user for user, _ in program.consumers.get(value, ())}
            if len(readers) == 1:
                formed.add(value)
                if any(program.operations[user].op_class == "matmul" for user in readers):
                    found.add(value)
    return frozenset(found)


def _is_elementwise(program: Program, operation: int) -> bool:
    """Whether an operation is fused, and neither a reduction nor a running sum."""
    op = program.operations[operation]
    return op.op_class == "fused" and not op.primitive.startswith((*REDUCTIONS, "cum"))


def written_over(program: Program) -> Iterator[tuple[int, int]]:
    """Each product and the result of the one elementwise kernel that reads it, if it lies in the product's memory."""
    donated = {program.operations[program.results[result]].inputs[0].value for _, result in program.donated}
    for op in program.operations:
        if op.op_class == "matmul" and len(op.outputs) == 1:
            ends = set(_ends(program, op.outputs[0].value, op.region))
            results = {each for each in ends if each is not None} - donated
            if len(ends) == len(results) == 1:
                (result,) = results
                given, made = (program.values[value] for value in (op.outputs[0].value, result))
                if given.bytes == made.bytes:
                    yield op.outputs[0].value, result


def _ends(program: Program, product: int, region: int) -> Iterator[int | None]:
    """The results of the kernels that read a product; None if one reads it in another order, or is none."""
    waiting, seen = [product], {product}
    while waiting:
        value = waiting.pop()
        for at, position in program.consumers.get(value, ()):
            op = program.operations[at]
            if op.region != region or not is_inlined(program, at) or not is_in_place(op, position):
                yield None
                return
            made = op.outputs[0].value
            users = [user for user, _ in program.consumers.get(made, ())]
            if not users or not all(is_inlined(program, user) for user in users):
                yield made
            elif made not in seen:
                seen.add(made)
                waiting.append(made)
