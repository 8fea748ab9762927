"""The checker's own account of results' memory, which XLA allocates before the program begins.

An array that is neither an argument nor a result may lie in the memory of a result that is made after all kernels that read
the array. The largest arrays choose first, each the smallest result that holds it and is free. Sizes are those of whole arrays.
It shares no code with `search.memory.results_first`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from costmodels.program.program import Program
from search.answer.check_temporaries import converted_before


class Life(NamedTuple):
    """The values that share an array, and the first and the last operation of its life."""

    values: tuple[int, ...]
    first: int
    last: int


class _Room(NamedTuple):
    """A result's memory before the result is made: its bytes, its operations, and the lives of the arrays in it."""

    bytes: float
    opens: int
    closes: int
    guests: list[Life]


def with_results_first(
    program: Program,
    lives: Sequence[Life],
    readers: Mapping[int, Sequence[int]],
    is_fused: Callable[[int], bool],
) -> Iterator[Life]:
    """The lives of the arrays that lie beside each other, with results from the beginning of their phase.

    An array beside a donated argument is a loop's carry, a stack that is copied into the argument at the end, or the argument's
    copy, made at once.
    """
    sources = {use.value for op in program.operations if op.op_class == "source" for use in op.outputs}
    returned = {program.operations[at].inputs[0].value for at in program.results if program.operations[at].inputs}
    given = {value for each in lives if not sources.isdisjoint(each.values) for value in each.values}
    joint = _joint_kernels(program, is_fused, readers)
    primitive = {use.value: op.primitive for op in program.operations for use in op.outputs}
    rooms: list[_Room] = []
    others: list[Life] = []
    for each in lives:
        begin = program.phase_of(each.first)[0]
        beside = primitive[each.values[0]] if given.issuperset(each.values) else ""  # of a donated argument
        if not sources.isdisjoint(each.values):
            yield each
        elif beside == "loop_carry" or (not beside and returned.isdisjoint(each.values)):
            others.append(each)
        else:
            if beside != "loop_stack" and not _is_copied_first(program, each, sources):
                closes = min([each.first, *(joint[value] for value in each.values if value in joint)]) - 1
                rooms.append(_Room(_size(program, each), begin, closes, []))
            yield each._replace(first=begin)
    rooms.sort(key=lambda room: room.bytes)
    ends = _kernels(program, readers, is_fused)
    for each in sorted(others, key=lambda each: (-_size(program, each), each.first)):
        last = max([each.last, *(ends[at] for value in each.values for at in readers.get(value, ()))])
        stay = each._replace(last=last)
        room = next((room for room in rooms if room.bytes >= _size(program, each) and _has_place(room, stay)), None)
        if room is None or each.first == program.phase_of(each.first)[0]:
            yield each
        else:
            room.guests.append(stay)


def _joint_kernels(
    program: Program, is_fused: Callable[[int], bool], readers: Mapping[int, Sequence[int]]
) -> dict[int, int]:
    """The values made of arguments by elementwise work alone, and the first operation of their kernel.

    That kernel also makes all else that such work of the same number of elements makes of the same argument, casts too.
    """
    outside = {use.value for op in program.operations if op.op_class == "source" for use in op.outputs}
    behind = {value: {value} for value in outside}
    ends: list[tuple[int, int]] = []
    for at, op in enumerate(program.operations):
        given = [use.value for use in op.inputs]
        if op.op_class != "source" and op.region == 0 and is_fused(at) and behind.keys() >= set(given):
            for made in (use.value for use in op.outputs):
                behind[made] = set().union(*(behind[value] for value in given))
                if any(not is_fused(reader) for reader in readers.get(made, ())):
                    ends.append((at, made))
    first = dict(converted_before(program, readers))
    kernels = {(array, prod(program.values[array].shape)): at for array, at in first.items()}
    found: dict[int, int] = {}
    for at, made in ends:
        for array in behind[made]:
            known = kernels.setdefault((array, prod(program.values[made].shape)), at)
            found[made] = min(known, found.get(made, at))
    return found


def _is_copied_first(program: Program, life: Life, sources: set[int]) -> bool:
    """Whether a result begins as a copy of an argument that a loop carries, which is made at once."""
    carries = (op for op in program.operations if op.primitive == "loop_carry" and op.outputs[0].value in life.values)
    return any(use.value in sources for op in carries for use in op.inputs)


def _size(program: Program, life: Life) -> float:
    return program.values[min(life.values)].bytes


def _has_place(room: _Room, life: Life) -> bool:
    within = room.opens <= life.first and life.last <= room.closes
    return within and all(life.last < guest.first or guest.last < life.first for guest in room.guests)


def _kernels(program: Program, readers: Mapping[int, Sequence[int]], is_fused: Callable[[int], bool]) -> dict[int, int]:
    """Each operation to the end of the last kernel that it is part of."""
    ends: dict[int, int] = {}
    for at in range(len(program.operations) - 1, -1, -1):
        op = program.operations[at]
        reduces = op.primitive.startswith(("reduce_", "arg"))
        after = [] if reduces or not is_fused(at) else [use.value for use in op.outputs]
        ends[at] = max([at, *(ends[user] for value in after for user in readers.get(value, ()) if is_fused(user))])
    return ends
