"""The buffers of a program: arrays that share memory, and the points at which they live.

An array lives from the operation that makes it to its last use. One that enters a loop lives until the loop ends. A
stacked result of a loop is allocated in full before the first iteration. Arrays that share memory (a donated argument
and its result, a loop's carry, an update in place, a view) are one buffer. Values inside a fused kernel take no
memory: results of fused operations count only if an unfused operation, a loop or the caller needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from costmodels.program.program import Program
from costmodels.program.views import uses_through
from search.memory.branches import BRANCH_CONSTANT, is_lent, is_read_by_branch, results_of_branches
from search.memory.donations import Donations
from search.memory.fused_products import absorbed, formed_in_products, is_stacked, overwritten_carries, written_over
from search.memory.kernels import REDUCTIONS, is_inlined
from search.memory.views import IN_PLACE, views


@dataclass(frozen=True)
class Buffer:
    """Arrays that share memory: the array that stands for them, and the first and last point of their life."""

    value: int
    members: tuple[int, ...]
    first: int
    last: int


def buffers(program: Program) -> tuple[Buffer, ...]:
    """Every buffer that takes memory, with its life."""
    groups = _Groups(program)
    last, shown = last_uses(program), views(program)
    for i, op in enumerate(program.operations):
        if i in shown:
            groups.join(op.inputs[0].value, op.outputs[0].value)
        is_written = op.primitive in IN_PLACE and last[op.inputs[0].value] <= i
        if (
            op.primitive == "loop_constant"
            or is_read_by_branch(program, op)
            or (is_written and not is_lent(program, op))
        ):
            groups.join(op.inputs[0].value, op.outputs[0].value)
        for value in results_of_branches(program, op):
            groups.join(value, op.outputs[0].value)
        if op.primitive == "loop_carry":
            groups.join(op.outputs[0].value, op.outputs[1].value)
            for use in op.inputs:
                if _ends_here(program, use.value, i):
                    groups.join(op.outputs[0].value, use.value)
    for before, after in (*written_over(program), *overwritten_carries(program)):
        groups.join(before, after)
    starts = stack_starts(program)
    starts |= {result: program.producers[product][0] for product, result in absorbed(program).items()}
    beside = list(_join_donated(program, groups, starts))
    joined = (_buffer(program, members, last, starts) for members in groups.found() if _takes_memory(program, members))
    return (*joined, *beside)


def _join_donated(program: Program, groups: _Groups, starts: dict[int, int]) -> Iterator[Buffer]:
    """Joins each donated argument with its result; yields the result's own array, if it has one for a while."""
    ends = region_ends(program)
    donations = Donations(program, lambda at: _need_end(program, at, ends))
    members = {value: group for group in groups.found() for value in group} if program.donated else {}
    overwriting = set[int]()
    for argument, result in program.donated:
        given = program.operations[program.arguments[argument]].outputs[0].value
        taken = program.operations[program.results[result]].inputs[0].value
        own = [value for value in members[taken] if value in program.producers]
        is_made = all(program.operations[program.producers[value][0]].op_class != "source" for value in own)
        if is_made and own[0] not in overwriting:
            overwriting.update(own)
            life = donations.overlap(given, own, min(starts.get(each, program.producers[each][0]) for each in own))
            if life is not None:
                yield Buffer(taken, (taken,), *life)
            groups.join(given, taken)


def _ends_here(program: Program, value: int, carry: int) -> bool:
    """Whether only the carry needs an array that enters the loop, or that an iteration of the loop updates in place."""
    at, position = program.producers[value]
    made_by = program.operations[at]
    if program.values[value].region == program.operations[carry].region:
        is_own = made_by.op_class != "source" and made_by.primitive != BRANCH_CONSTANT
        return is_own and len(program.consumers[value]) == 1
    return made_by.primitive in IN_PLACE or (made_by.primitive == "loop_carry" and position == 1)


def stack_starts(program: Program) -> dict[int, int]:
    """Each stacked result of a loop, allocated before the first iteration, to the first operation of the loop."""
    first: dict[int, int] = {}
    for i, op in enumerate(program.operations):
        first.setdefault(op.region, i)
    return {
        op.outputs[0].value: first.get(op.inputs[0].region, i)
        for i, op in enumerate(program.operations)
        if op.primitive == "loop_stack" and op.inputs
    }


class _Groups:
    """Union-find over values."""

    def __init__(self, program: Program) -> None:
        self._root = list(range(len(program.values)))

    def root(self, value: int) -> int:
        while self._root[value] != value:
            value = self._root[value]
        return value

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self._root[b] = a

    def found(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for value in range(len(self._root)):
            groups.setdefault(self.root(value), []).append(value)
        return list(groups.values())


def region_ends(program: Program) -> dict[int, int]:
    """Region to its last operation, regions inside it included."""
    ends: dict[int, int] = {}
    for i, op in enumerate(program.operations):
        for region in program.enclosing(op.region):
            ends[region] = max(ends.get(region, i), i)
    return ends


def last_uses(program: Program) -> dict[int, int]:
    """Value to the last point at which it lives: its last use, or the end of the loop that it enters."""
    ends = region_ends(program)
    last = {value: at for value, (at, _) in program.producers.items()}
    for value, uses in program.consumers.items():
        for at, _ in uses:
            last[value] = max(last[value], _need_end(program, at, ends))
    for op in program.operations:
        if op.op_class == "source":
            last[op.outputs[0].value] = program.phase_of(program.producers[op.outputs[0].value][0])[1]
    return last


def _need_end(program: Program, operation: int, ends: dict[int, int]) -> int:
    """The end of the need for an operand of this operation: of a view, when nothing reads the view any more."""
    op = program.operations[operation]
    if operation in views(program):
        uses = uses_through(program, op.outputs[0].value, views(program).__contains__)
        return max((_need_end(program, at, ends) for at, _ in uses), default=operation)
    inner = [use.region for use in op.outputs if use.region != op.region]
    if op.op_class == "boundary" and inner:
        return max(ends.get(region, operation) for region in inner)
    return operation


def _takes_memory(program: Program, members: list[int]) -> bool:
    return any(_is_materialised(program, value) for value in members if value in program.producers)


def _is_materialised(program: Program, value: int) -> bool:
    made_by = program.operations[program.producers[value][0]]
    if made_by.primitive == "loop_slice" or program.producers[value][0] in views(program):
        return False
    if is_stacked(program, value) or value in absorbed(program):
        return False
    if made_by.primitive.startswith(REDUCTIONS) and _is_transposed(program, value):
        return True
    return not is_inlined(program, program.producers[value][0]) or _leaves_kernel(program, value)


def _is_transposed(program: Program, value: int) -> bool:
    """Whether a kernel writes a value in another order, which is none that reduces."""
    operations = {at: program.operations[at].primitive for at, _ in program.consumers.get(value, ())}
    return any(name == "transpose" and at not in views(program) for at, name in operations.items())


def _leaves_kernel(program: Program, value: int) -> bool:
    """Whether an unfused operation, a loop or the caller needs a value, as it is or as a view."""
    formed = formed_in_products(program)

    def is_passed(at: int) -> bool:
        return at in views(program) and program.operations[at].outputs[0].value not in formed

    return value not in formed and any(
        at not in views(program) and not is_inlined(program, at) for at, _ in uses_through(program, value, is_passed)
    )


def _buffer(program: Program, members: list[int], last: dict[int, int], starts: dict[int, int]) -> Buffer:
    made = [value for value in members if value in program.producers]
    first = min(starts.get(value, program.producers[value][0]) for value in made)
    whole = any(program.operations[program.producers[value][0]].op_class == "source" for value in made)
    end = max(last[value] for value in made)
    return Buffer(made[0], tuple(members), program.phase_of(first)[0] if whole else first, end)


def copy_life(program: Program, value: int, operation: int, ends: dict[int, int]) -> tuple[int, int]:
    """The first and last point at which an operand's resharded copy lives.

    Compilers start a gather early, to hide it behind the matmul before the one that needs it. So the copy lives from
    there, once its source is made, to the operation, or through the whole loop if it is made for one.
    """
    ahead = program.matmul_before[operation]
    made = program.producers[value][0]
    first = operation
    if ahead is not None and program.operations[operation].op_class == "matmul":
        first = max(ahead, made)
    return first, _need_end(program, operation, ends)
