"""The checker's own account of donated arguments that are read while the result that overwrites them is made.

Elementwise work inside the kernels of products is here, too (measured, `search.memory.fused_products`).
It follows kernels from their ends to what they read, and shares no code with `search.memory.donations`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from costmodels.program.program import Operation, Program


class Overwrites:
    """The kernels that read each donated argument, and the results that wait for such readers.

    **Arguments:**

    - `readers`: the operations that read each value.
    - `is_fused`: whether an operation runs inside the kernel that uses its result.
    - `needed_until`: the last operation for which an operation needs its operands.
    """

    def __init__(
        self,
        program: Program,
        readers: Mapping[int, Sequence[int]],
        is_fused: Callable[[int], bool],
        needed_until: Callable[[int], int],
    ) -> None:
        self.program, self.readers, self.is_fused, self.needed_until = program, readers, is_fused, needed_until
        self.maker = {use.value: i for i, op in enumerate(program.operations) for use in op.outputs}
        self.waits: list[tuple[int, int]] = []
        self._reads = self._kernel_reads() if program.donated else {}

    def _kernel_reads(self) -> dict[int, dict[int, bool]]:
        """Donated argument to the kernels that read it, and whether each reads it in the order in which it writes."""
        sources = {self.program.arguments[argument] for argument, _ in self.program.donated}
        seen: dict[int, dict[int, bool]] = {}
        found: dict[int, dict[int, bool]] = {}
        for i, op in enumerate(self.program.operations):
            if i in sources:
                seen[op.outputs[0].value] = {op.outputs[0].value: True}
                continue
            read: dict[int, bool] = {}
            for k, use in enumerate(op.inputs):
                for argument, straight in seen.get(use.value, {}).items():
                    read[argument] = read.get(argument, True) and straight and _keeps_order(op, k)
            if self._is_last(i):
                for argument, straight in read.items():
                    found.setdefault(argument, {})[i] = straight
            elif read:
                seen[op.outputs[0].value] = read
        return found

    def _is_last(self, at: int) -> bool:
        """Whether an operation is the last of its kernel."""
        op = self.program.operations[at]
        if not self.is_fused(at) or op.primitive.startswith("reduce_") or op.primitive.startswith("arg"):
            return True
        after = [each for use in op.outputs for each in self.readers.get(use.value, ())]
        return not after or any(not self.is_fused(each) for each in after)

    def overlap(self, argument: int, result: Collection[int], begins: int) -> tuple[int, int] | None:
        """The operations during which an argument and the result that overwrites it are two arrays, if there are any."""
        made_by = {self.maker[value] for value in result}
        kernels = self._reads.get(argument, {})
        during = {at for at in kernels if at in made_by and not kernels[at]}
        during |= {at for at in made_by if any(self._is_formed_by(at, each) for each in kernels)}
        delayed = {first for first, _ in self.waits}
        after = {at for at in kernels if at not in made_by and (self.needed_until(at) >= begins or at in delayed)}
        operations = self.program.operations
        if all(operations[at].op_class == "fused" for at in made_by) and any(kernels.get(at) for at in made_by):
            reached = self._following(made_by)  # kernels of one argument that compilers fuse
            after = {at for at in after if not kernels[at] or operations[at].op_class != "fused" or at in reached}
        if not during and not after:
            return None
        if not during and self._may_follow(result, made_by, after):
            self.waits += [(maker, at) for maker in made_by for at in after]
            return None
        return begins, max(begins, *map(self.needed_until, during | after))

    def _is_formed_by(self, product: int, kernel: int) -> bool:
        """Whether a product takes in a kernel whose result nothing else reads."""
        operations = self.program.operations
        if operations[product].op_class != "matmul" or operations[kernel].op_class != "fused":
            return False
        return [reader for use in operations[kernel].outputs for reader in self.readers.get(use.value, ())] == [product]

    def _may_follow(self, result: Collection[int], made_by: set[int], after: set[int]) -> bool:
        """Whether these operations can all run before the result is made."""
        kinds = [self.program.operations[at].op_class for at in after]
        ends = [self.program.operations[at].op_class for value in result for at in self.readers.get(value, ())]
        if "boundary" in kinds or "sink" in kinds or set(ends) - {"sink"}:
            return False
        return not self._following(made_by) & after

    def _following(self, made_by: set[int]) -> set[int]:
        """Operations that need one of these, or wait for one."""
        reached, new = set(made_by), list(made_by)
        while new:
            at = new.pop()
            follow = [each for use in self.program.operations[at].outputs for each in self.readers.get(use.value, ())]
            follow += [maker for maker, awaited in self.waits if awaited == at]
            new += [each for each in set(follow) if each not in reached]
            reached.update(follow)
        return reached


def _keeps_order(op: Operation, operand: int) -> bool:
    """Whether an operation reads each element of an operand where it writes one of its result."""
    if op.primitive == "loop_carry" or op.primitive == "dynamic_update_slice" or op.primitive.startswith("scatter"):
        return operand == 0
    if op.op_class != "fused" or op.primitive in ("slice", "rev") or op.primitive.startswith(("cum", "reduce_", "arg")):
        return False
    given, made = op.inputs[operand].dims, op.outputs[0].dims
    orders = [[i for dim in dims for i in dim if op.factors[i].size > 1] for dims in (given, made)]
    return orders[0] == orders[1]


# --- elementwise work inside the kernels of products

Readers = Mapping[int, Sequence[int]]


def formed(program: Program, readers: Readers) -> set[int]:
    """The operands that products form themselves, with one reader for each step.

    They form them from arguments that are not donated, or whose memory the product's own result takes.
    """
    maker = {use.value: at for at, op in enumerate(program.operations) for use in op.outputs}
    taken = {
        program.operations[program.arguments[argument]].outputs[0].value: maker[
            program.operations[program.results[result]].inputs[0].value
        ]
        for argument, result in program.donated
    }
    waits: dict[int, set[int]] = {}  # each step to the makers of the results that take the memory of what it is made of
    for op in program.operations:  # in their order: as many steps as a program has
        if op.op_class == "source":
            waits |= {use.value: {taken[use.value]} if use.value in taken else set() for use in op.outputs}
        elif all(use.value in waits for use in op.inputs) and op.op_class == "fused" and op.region == 0:
            once = (
                [] if _reduces(op) else [use.value for use in op.outputs if len(set(readers.get(use.value, ()))) == 1]
            )
            waits |= {value: set().union(*(waits[use.value] for use in op.inputs)) for value in once}
    found = {
        use.value
        for at, op in enumerate(program.operations)
        if op.op_class == "matmul"
        for use in op.inputs
        if use.value in waits and waits[use.value] <= {at} and program.operations[maker[use.value]].op_class == "fused"
    }
    return found | set(_widened(program, maker, taken))


def _widened(program: Program, maker: Mapping[int, int], donated: Collection[int]) -> Iterator[int]:
    """The bfloat16 arguments and parts of loops' arrays that are cast for products alone, which round them again."""
    exact = {
        use.value
        for op in program.operations
        for k, use in enumerate(op.inputs)
        if not (op.op_class == "matmul" and k in op.rounded)
    }
    rounded = {use.value for op in program.operations for use in op.inputs} - exact
    for op in program.operations:
        if op.primitive == "convert_element_type" and op.inputs and op.outputs[0].value in rounded:
            given = op.inputs[0].value
            made_by = program.operations[maker[given]]
            kept = made_by.primitive in ("loop_slice", "loop_constant")
            if program.values[given].dtype == "bfloat16" and (
                kept or (made_by.op_class == "source" and given not in donated)
            ):
                yield op.outputs[0].value


def kernel_results(program: Program, readers: Readers, is_fused: Callable[[int], bool]) -> dict[int, int]:
    """Each value to the one result of the kernels that read it, if each keeps its order; in one walk from the end."""
    found: dict[int, set[int | None]] = {}
    for at, op in reversed(list(enumerate(program.operations))):
        ends: set[int | None] = {None}
        if is_fused(at):
            made = op.outputs[0].value
            after = readers.get(made, ())
            ends = found[made] if after and all(map(is_fused, after)) else {made}
        for k, use in enumerate(op.inputs):
            kept = len(ends) == 1 and op.region == program.values[use.value].region and _keeps_order(op, k)
            found.setdefault(use.value, set()).update(ends if kept else {None})
    return {value: end for value, ends in found.items() for end in ends if len(ends) == 1 and end is not None}


def inside_kernels(program: Program, results: Mapping[int, int]) -> dict[int, int]:
    """Each product, and the result of the one kernel that reads it, element by element."""
    taken = {program.operations[program.results[result]].inputs[0].value for _, result in program.donated}
    products = (op.outputs[0].value for op in program.operations if op.op_class == "matmul" and len(op.outputs) == 1)
    return {each: results[each] for each in products if each in results and results[each] not in taken}


def over_carries(
    program: Program, readers: Readers, results: Mapping[int, int], inside: Mapping[int, int]
) -> Iterator[tuple[int, int]]:
    """Each loop carry and its next value, if one elementwise kernel makes that of it, with one product at most."""
    made = Counter(inside.values())
    for at, op in enumerate(program.operations):
        if op.primitive != "loop_carry" or len(op.inputs) != 2:
            continue
        state, following = op.outputs[0].value, op.inputs[1].value
        if list(readers[following]) == [at] and made[following] < 2 and results.get(state) == following:
            yield state, following


def _reduces(op: Operation) -> bool:
    return op.primitive.startswith(("reduce_", "arg", "cum"))
