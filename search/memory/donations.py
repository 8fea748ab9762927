"""Donated arguments that are read while the result that overwrites them is made: both are in memory until then.

XLA gives such a result an array of its own, and copies it into the argument's when nothing reads the argument any more.
A kernel that reads the argument element by element, a loop that carries it and an update in place overwrite it as they
go. A kernel that needs nothing of the result runs before it. Measured with libtpu 0.0.42 on v5e, donated `a`:

| results | arrays of the size of `a` |
|---|---|
| `tanh(a)`; `tanh(a), a @ b` | 1 and `b`; 2 and `b` |
| `a.T`, `tanh(a.T)`, `roll(a)`, `a @ a` | 2 |
| `b * 2, a * 2` of donated `a` and `b` | 3 |
| `b @ a.astype(bfloat16)`, in float32 like `a` | 2 and `b` |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

from costmodels.program.program import Program
from search.memory.kernels import REDUCTIONS, is_in_place, is_inlined


@dataclass
class Donations:
    """The donated arguments of a program, in order: a result that waits for readers of one is later for the next.

    **Arguments:**

    - `ends`: the last point at which an operation needs its operands.
    """

    program: Program
    ends: Callable[[int], int]
    _delayed: dict[int, set[int]] = field(default_factory=dict)

    def overlap(self, given: int, taken: Collection[int], first: int) -> tuple[int, int] | None:
        """The first and the last point at which an argument and the result that overwrites it are two arrays.

        None if they are one.

        **Arguments:**

        - `given`: the argument's value; `taken`: the values in the array of its result, made from `first` on.
        """
        makers = {self.program.producers[value][0] for value in taken}
        readers = dict(_readers(self.program, given))
        found = [at for at in makers if not readers.get(at, True) or self._forms_from(at, readers)]
        later = {at for at in readers.keys() - makers if self.ends(at) >= first or at in self._delayed}
        if self._writes_in_kernel(makers, readers):
            later -= {
                at for at in later if self._writes_in_kernel({at}, readers) and not self._needed_by({at}) & makers
            }
        if later and self._can_wait(taken, makers, later) and not found:
            for maker in makers:
                self._delayed.setdefault(maker, set()).update(later)
            return None
        last = max((self.ends(at) for at in (*found, *later)), default=first)
        return (first, max(first, last)) if found or later else None

    def _forms_from(self, product: int, readers: Collection[int]) -> bool:
        """Whether an operation is a product that forms an operand itself, with a kernel that reads the argument."""
        op = self.program.operations[product]
        given = [use.value for use in op.inputs] if op.op_class == "matmul" else []
        return any(self.program.producers[value][0] in readers and self._is_read_once(value) for value in given)

    def _is_read_once(self, value: int) -> bool:
        is_fused = self.program.operations[self.program.producers[value][0]].op_class == "fused"
        return is_fused and len(self.program.consumers[value]) == 1

    def _writes_in_kernel(self, makers: Collection[int], readers: Mapping[int, bool]) -> bool:
        """Whether elementwise kernels alone make an array, of which one may write over the argument that it reads.

        Compilers fuse several such kernels of one argument into one.
        """
        fused = all(self.program.operations[at].op_class == "fused" for at in makers)
        return fused and any(readers.get(at, False) for at in makers)

    def _can_wait(self, taken: Collection[int], makers: set[int], later: set[int]) -> bool:
        """Whether a result can be made after these operations."""
        users = [at for value in taken for at, _ in self.program.consumers.get(value, ())]
        kinds = {self.program.operations[at].op_class for at in later}
        returned = all(self.program.operations[at].op_class == "sink" for at in users)
        return returned and not kinds & {"boundary", "sink"} and not self._needed_by(later) & makers

    def _needed_by(self, operations: set[int]) -> set[int]:
        """Operations that these need or wait for."""
        found, new = set[int](), list(operations)
        while new:
            at = new.pop()
            before = {self.program.producers[use.value][0] for use in self.program.operations[at].inputs}
            before |= self._delayed.get(at, set())
            new += before - found
            found |= before
        return found


def _readers(program: Program, value: int) -> Iterator[tuple[int, bool]]:
    """The operations that end the kernels that read a value, and whether each may write over what it reads."""
    in_place = {value: True}
    waiting = sorted({at for at, _ in program.consumers.get(value, ())})
    while waiting:
        at = heappop(waiting)
        op = program.operations[at]
        read = [(use.value, k) for k, use in enumerate(op.inputs) if use.value in in_place]
        same = all(in_place[each] and is_in_place(op, k) for each, k in read)
        users = {user for use in op.outputs for user, _ in program.consumers.get(use.value, ())}
        if _ends_kernel(program, at, users):
            yield at, same
        else:
            in_place[op.outputs[0].value] = same
            for user in users - set(waiting):
                heappush(waiting, user)


def _ends_kernel(program: Program, operation: int, users: Collection[int]) -> bool:
    is_inside = is_inlined(program, operation) and not program.operations[operation].primitive.startswith(REDUCTIONS)
    return not is_inside or not users or not all(is_inlined(program, user) for user in users)
