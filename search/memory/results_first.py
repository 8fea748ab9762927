"""Results are allocated before the program begins; other arrays may lie in their memory before they are made.

XLA gives every result an allocation of its own. One that begins as a copy of an argument, as a loop's carry, is written at
once. Going from the largest array to the smallest, it puts each other array into the smallest of these allocations that holds
it and is free during its life. What finds no room goes into one heap. So the program takes its arguments, all results, and
the fullest point of the heap. Measured with libtpu 0.0.42 on v5e, in arrays of one size, `softmax(a @ b)` takes 4: the
product is read while the result is written.

A result that elementwise work makes of an argument is made in one kernel with what other such work of its size makes of the
argument, so what is made after that does not lie in its memory. With libtpu 0.0.50, `f(s, a), tanh(a)` takes 1,152 MiB for a
loop `f` over donated bfloat16 [3, 8192, 8192] that multiplies by float32 `a`: the loop's conversion of `a` is in that kernel.

A result that overwrites a donated argument while a kernel reads that has no second array of its own: the argument is copied
when the program begins, and its own memory is that of a result. Measured with libtpu 0.0.50 for donated `a`, 4 arrays for
`until(b) @ a`, of which the loop holds all. A loop's stack is allocated when the program begins, too, and copied at its end.

Which arrays lie in results' memory is decided by the sizes of whole arrays. An array that is larger on one chip than the
result around it counts in its place: rows with and without this rule both hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from costmodels.program.program import Program
from search.memory.buffers import Buffer
from search.memory.conversions import conversions
from search.memory.kernels import REDUCTIONS, is_inlined


def results_first(program: Program, buffers: Sequence[Buffer]) -> Iterator[tuple[Buffer, ...]]:
    """The buffers if results live from the beginning of their phase, without those in results' memory; none if equal."""
    donated = {value for each in buffers if is_given(program, each) for value in each.members}
    results = {each.value: each for each in buffers if each.value not in donated and is_result(program, each)}
    results |= {each.value: each for each in buffers if _is_second_array(program, each, donated)}
    begins = {value: program.phase_of(each.first)[0] for value, each in results.items()}
    inside = _inside(program, buffers, results, begins)
    if inside or any(results[value].first > first for value, first in begins.items()):
        kept = (each for each in buffers if each not in inside)
        yield tuple(replace(each, first=begins.get(each.value, each.first)) for each in kept)


def _is_second_array(program: Program, buffer: Buffer, donated: set[int]) -> bool:
    """Whether a buffer is beside a donated argument, which is copied at once; a loop's carry is copied after its loop."""
    made_by = program.operations[program.producers[buffer.value][0]]
    return buffer.value in donated and not is_given(program, buffer) and made_by.primitive != "loop_carry"


def _is_stack_beside(program: Program, buffer: Buffer, buffers: Sequence[Buffer]) -> bool:
    """Whether a buffer is the stack of a loop that is copied into a donated argument after the loop."""
    made_by = program.operations[program.producers[buffer.value][0]]
    return made_by.primitive == "loop_stack" and any(buffer.value in each.members for each in buffers if each != buffer)


def is_given(program: Program, buffer: Buffer) -> bool:
    """Whether a buffer holds an argument or a constant."""
    made = (program.producers[value][0] for value in buffer.members if value in program.producers)
    return any(program.operations[at].op_class == "source" for at in made)


def is_result(program: Program, buffer: Buffer) -> bool:
    """Whether a buffer holds a result."""
    readers = (at for value in buffer.members for at, _ in program.consumers.get(value, ()))
    return any(program.operations[at].op_class == "sink" for at in readers)


def _begins_as_copy(program: Program, result: Buffer) -> bool:
    """Whether a loop begins with a copy of an argument in a result's memory: the copy is made at once."""
    made = {program.producers[value] for value in result.members if value in program.producers}
    carried = (program.operations[at] for at, k in made if k == 0 and program.operations[at].primitive == "loop_carry")
    given = (program.producers[use.value][0] for op in carried for use in op.inputs)
    return any(program.operations[at].op_class == "source" for at in given)


def _inside(
    program: Program, buffers: Sequence[Buffer], results: dict[int, Buffer], begins: dict[int, int]
) -> set[Buffer]:
    """The buffers that lie in the memory of results."""
    ends, early = _kernel_ends(program), _made_early(program)
    copied = {each.value for each in results.values() if _begins_as_copy(program, each)}
    copied |= {each.value for each in results.values() if _is_stack_beside(program, each, buffers)}
    rooms = [each for value, each in results.items() if value not in copied]
    rooms.sort(key=lambda each: program.values[each.value].bytes)
    sizes = [program.values[each.value].bytes for each in rooms]
    closes = [min(each.first, *(early.get(value, each.first) for value in each.members)) for each in rooms]
    taken: list[list[tuple[int, int]]] = [[] for _ in rooms]  # in order, as they do not overlap
    latest = max(closes, default=0)
    found: set[Buffer] = set()
    for each in sorted(buffers, key=lambda each: (-program.values[each.value].bytes, each.first)):
        first, last = each.first, _read_until(program, each, ends)
        if last >= latest or each.value in results or first == program.phase_of(first)[0]:
            continue
        for k in range(bisect_left(sizes, program.values[each.value].bytes), len(rooms)):
            is_before = begins[rooms[k].value] <= first and last < closes[k]
            place = bisect_left(taken[k], (last + 1,)) if is_before else 0
            if is_before and (not place or taken[k][place - 1][1] < first):
                taken[k].insert(place, (first, last))
                found.add(each)
                break
    return found


def _read_until(program: Program, buffer: Buffer, ends: list[int]) -> int:
    """The end of the last kernel that reads a buffer."""
    readers = (at for value in buffer.members for at, _ in program.consumers.get(value, ()))
    return max(buffer.last, *(ends[at] for at in readers), 0)


def _kernel_ends(program: Program) -> list[int]:
    """For each operation the last operation of the last kernel of which it is part."""
    found = list(range(len(program.operations)))
    for at in reversed(found):
        op = program.operations[at]
        if is_inlined(program, at) and not op.primitive.startswith(REDUCTIONS):
            users = {user for use in op.outputs for user, _ in program.consumers.get(use.value, ())}
            found[at] = max((found[user] for user in users if is_inlined(program, user)), default=at)
    return found


def _made_early(program: Program) -> dict[int, int]:
    """Each value that elementwise work makes of arguments alone to the first kernel of its size that reads one of them.

    Compilers make one kernel of both. A loop that converts an argument does so when it begins.
    """
    kernels: dict[tuple[int, int], int] = {}
    for each in conversions(program):
        kernels.setdefault((each.whole, prod(program.values[each.whole].shape)), each.first)
    read: dict[int, frozenset[int]] = {}
    early: dict[int, int] = {}
    for at, op in enumerate(program.operations):
        if op.op_class == "source":
            read |= {use.value: frozenset((use.value,)) for use in op.outputs}
        elif op.region == 0 and is_inlined(program, at) and all(use.value in read for use in op.inputs):
            sources = frozenset[int]().union(*(read[use.value] for use in op.inputs))
            read |= {use.value: sources for use in op.outputs}
            for made in (use.value for use in op.outputs):
                size = prod(program.values[made].shape)
                is_end = not all(is_inlined(program, user) for user, _ in program.consumers.get(made, ()))
                for source in sources if is_end else ():
                    early[made] = min(kernels.setdefault((source, size), at), early.get(made, at))
    return early
