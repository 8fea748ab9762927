"""The checker's own count of memory: the bytes of one chip during each operation, from the program and a plan.

It shares no code with the solver's rows (`search.memory`), so it finds errors in them. Arrays that share memory are
the connected components of a graph of values. The life of each follows from its readers, and bytes are added up
operation by operation. The rules are those of XLA's buffers. Tests compare them with compiled programs:

- A view (a transposition, a reshape, the slice of a stack at one index) that is only read takes no memory. Its source
  lives until the view's readers are done. A slice that is read after a write to its stack is not a view, nor is a
  transposition of which a gather picks, if others read its source.
- The stacked results of a loop are allocated before it begins, and values made only for them are written into them.
  They take a donated argument's memory if nothing reads that from then on.
- An update in place takes its operand's memory if nothing reads that any more. A loop carry takes the memory of its
  initial value if nothing else needs that. A result takes the memory of the donated argument, once nothing reads that
  any more (`search.answer.check_donations`).
- A branch reads arrays around it where they lie. Its result lies in that of the conditional, which begins as a copy if a
  branch returns an array around it (`search.memory.branches`).
- Results are allocated before the program begins, and other arrays lie in their memory before (`search.answer.check_results`).
- A chain of grouped matmuls holds its hidden arrays, and a copy of the rows of a chip's own groups, in on-chip memory
  as far as half of it goes.
- A TPU holds long float32 scores of attention twice (`search.memory.softmax_copies`).
- A TPU holds further arrays for sorts, columns, joins and stacks (`search.answer.check_temporaries`, `check_tiles`).
- Fused values live in registers, unless an unfused operation, a loop or the caller needs them.
- A value that enters a loop lives until the loop ends. Arguments live as long as their phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from itertools import accumulate
from math import prod

from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, Move, kept_layout, moves
from search.answer.check_donations import Overwrites, formed, inside_kernels, kernel_results, over_carries
from search.answer.check_grouped import chain_buffers
from search.answer.check_results import Life, with_results_first
from search.answer.check_temporaries import Holds, second_scores, temporaries
from search.answer.check_tiles import StackTiles
from search.formulation.layouts import shards

_SHOWN = {"transpose", "reshape", "squeeze", "broadcast_in_dim"}


def alive_bytes(
    program: Program, topology: Topology, choice: Choice, moved: Sequence[Move] | None = None
) -> list[float]:
    """The bytes that one chip holds during each operation of the program, in order.

    **Arguments:**

    - `moved`: the plan's `moves`, if they are known.
    """
    account, sizes = _Account(program), topology.axis_sizes
    tiles = StackTiles(program, topology, choice, account.maker, account.readers)
    moved = list(moves(program, choice)) if moved is None else moved
    further = [*tiles.copies(), *_further(program, topology, choice, account, moved)]
    local = cache(lambda value: program.values[value].bytes / shards(kept_layout(program, choice, value), sizes))

    def filled(lives: Iterable[Life]) -> Iterator[float]:
        changes = [0.0] * (len(program.operations) + 1)
        held = [(first, last, local(min(values)) + tiles.padding(values)) for values, first, last in lives]
        for first, last, size in (*held, *further):
            changes[first] += size
            changes[last + 1] -= size
        return accumulate(changes[:-1])

    lives = list(account.lives())
    reserved = with_results_first(program, lives, account.readers, account.is_fused)
    return [max(both) for both in zip(filled(lives), filled(reserved), strict=True)]


def _further(program: Program, topology: Topology, choice: Choice, account: _Account, moved: Iterable[Move]) -> Holds:
    """The copies that reshards make, and the arrays that operations make of their own."""
    for move in moved:
        whole = program.values[move.value].bytes
        if move.value in account.in_registers:
            at = account.maker[move.value]
            last = at if move.operation is None else account.copy_life(move.value, move.operation)[1]
            yield at, last, sum(whole / shards(each, topology.axis_sizes) for each in (move.source, move.target))
        elif move.operation is None:
            at = account.maker[move.value]
            yield at, at, whole / shards(move.source, topology.axis_sizes)
        else:
            yield *account.copy_life(move.value, move.operation), whole / shards(move.target, topology.axis_sizes)
    yield from temporaries(
        program, topology, choice, account.maker, account.readers, account.is_fused, account.views, account.formed
    )
    for at, op in enumerate(program.operations):
        if op.primitive == "reduce_max":
            made, held = second_scores(program, topology, choice, account.maker, at)
            yield made, made, held
        elif op.primitive == CHAIN:
            yield at, at, chain_buffers(program, topology, choice, at)


class _Account:
    """The makers, sharers and readers of each value."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.maker = {use.value: i for i, op in enumerate(program.operations) for use in op.outputs}
        self.readers: dict[int, list[int]] = {}
        for i, op in enumerate(program.operations):
            for use in op.inputs:
                self.readers.setdefault(use.value, []).append(i)

    def lives(self) -> Iterator[Life]:
        """The values of each array in memory, with the first and the last operation of its life."""
        overwritten = list(self._overwritten())
        for values in self._sharing((*self._pairs(), *((given, taken) for given, taken, _ in overwritten))):
            if any(self._is_stored(value) for value in values):
                makers = [self.maker[value] for value in values]
                first, last = min(map(self._begins, values)), max(self.needed_until(value) for value in values)
                if any(self.program.operations[at].op_class == "source" for at in makers):
                    first = self._phase(first)[0]
                yield Life(tuple(values), first, last)
        yield from (Life((taken,), *both) for _, taken, both in overwritten if both is not None)

    @cached_property
    def _results(self) -> dict[int, int]:
        """Each value that kernels read element by element to their one result."""
        return kernel_results(self.program, self.readers, self.is_fused)

    @cached_property
    def _inside(self) -> dict[int, int]:
        """Each product to the result of the kernel that takes it in."""
        return inside_kernels(self.program, self._results)

    @cached_property
    def _carried(self) -> list[tuple[int, int]]:
        """Each array that a loop carries, and the next one, that is written over it."""
        return list(over_carries(self.program, self.readers, self._results, self._inside))

    @cached_property
    def in_registers(self) -> dict[int, int]:
        """The products that are arrays only while they change their layout, to the results of their kernels."""
        carried = {following for _, following in self._carried}
        names = {value: {self.program.operations[i].primitive for i in at} for value, at in self.readers.items()}
        stacked = {value for value, each in names.items() if each == {"loop_stack"}}
        sizes = self.program.values
        return {a: b for a, b in self._inside.items() if b in carried | stacked or sizes[a].bytes != sizes[b].bytes}

    @cached_property
    def _began(self) -> dict[int, int]:
        """The results of kernels that take in products, to the first of these."""
        return {result: self.maker[product] for product, result in reversed(self.in_registers.items())}

    def _begins(self, value: int) -> int:
        """The first operation of a value's life; stacked results live as long as their loop."""
        at = min(self.maker[value], self._began.get(value, self.maker[value]))
        op = self.program.operations[at]
        if op.primitive != "loop_stack" or not op.inputs:
            return at
        return next(i for i, each in enumerate(self.program.operations) if each.region == op.inputs[0].region)

    def needed_until(self, value: int) -> int:
        """The last operation that needs a value."""
        if self.program.operations[self.maker[value]].op_class == "source":
            return self._phase(self.maker[value])[1]
        return max((self._last_iteration_end(at) for at in self.readers.get(value, ())), default=self.maker[value])

    def _last_iteration_end(self, at: int) -> int:
        """The end of a reader's need: a view ends with its own readers, a loop with its last operation."""
        last, readers = at, [at]
        while readers:
            op = self.program.operations[at := readers.pop()]
            if at in self.views:
                readers += self.readers.get(op.outputs[0].value, ())
                continue
            entered = {use.region for use in op.outputs} - {op.region}
            last = max(last, at, *(self._ends[region] for region in entered if op.op_class == "boundary"))
        return last

    @cached_property
    def _ends(self) -> list[int]:
        """The last operation inside each region; regions follow those that contain them."""
        regions = range(len(self.program.regions))
        found = [
            max((i for i, op in enumerate(self.program.operations) if op.region == r), default=-1) for r in regions
        ]
        for region in reversed(regions):
            around = self.program.regions[region].parent
            if around is not None:
                found[around] = max(found[around], found[region])
        return found

    def _phase(self, at: int) -> tuple[int, int]:
        begun = [start for start in self.program.phases if start <= at]
        later = [start for start in self.program.phases if start > at]
        return begun[-1], min(later, default=len(self.program.operations)) - 1

    @cached_property
    def views(self) -> set[int]:
        """The operations whose result is their operand in another order or shape."""
        found: set[int] = set()
        for i, op in reversed(list(enumerate(self.program.operations))):
            if self._shows(op) or (self._is_slice(op) and self._is_read_first(op, found)):
                (made,) = (use.value for use in op.outputs)
                shared = len(self.readers[op.inputs[0].value]) > 1
                turned = op.primitive == "transpose" and shared and self._is_gathered(made, found)
                if not turned and all(self._only_reads(at, made, found) for at in self.readers.get(made, ())):
                    found.add(i)
        return found

    def _is_gathered(self, value: int, views: set[int]) -> bool:
        """Whether a gather picks elements of a value, or of a view of it."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            for op in map(self.program.operations.__getitem__, self.readers.get(value, ())):
                if op.primitive == "gather" and op.inputs[0].value == value:
                    return True
            waiting += [
                self.program.operations[at].outputs[0].value for at in self.readers.get(value, ()) if at in views
            ]
        return False

    def _is_slice(self, op: Operation) -> bool:
        """Whether an operation takes everything in a stack that has certain leading indices."""
        if op.primitive != "dynamic_slice" or op.op_class != "fused":
            return False
        whole, part = (self.program.values[use.value].shape for use in (op.inputs[0], op.outputs[0]))
        return any(whole[k:] == part[k:] and prod(part[:k]) == 1 for k in range(len(whole) + 1))

    def _is_read_first(self, op: Operation, views: set[int]) -> bool:
        """Whether the readers of a slice come before all writers into its stack."""
        stack, waiting, last = op.inputs[0].value, [op.outputs[0].value], -1
        while waiting:
            for at in self.readers.get(waiting.pop(), ()):
                if at in views:
                    waiting.append(self.program.operations[at].outputs[0].value)
                else:
                    last = max(last, at)
        return all(last < at for at in self.readers[stack] if _writes_into(self.program.operations[at], stack))

    def _shows(self, op: Operation) -> bool:
        if op.primitive not in _SHOWN or op.op_class != "fused" or len(op.inputs) != 1:
            return False
        before, after = self.program.values[op.inputs[0].value], self.program.values[op.outputs[0].value]
        return (prod(before.shape), before.itemsize) == (prod(after.shape), after.itemsize)

    def _only_reads(self, at: int, value: int, views: set[int]) -> bool:
        op = self.program.operations[at]
        shows = self._shows(op) or self._is_slice(op)
        plain = op.op_class in ("matmul", "fused", "memory") and not shows and not _writes_into(op, value)
        return at in views or plain

    def _sharing(self, pairs: Iterable[tuple[int, int]]) -> Iterator[list[int]]:
        """Groups of values that are one array in memory."""
        beside: dict[int, set[int]] = {value: set() for value in self.maker}
        for a, b in pairs:
            beside[a].add(b)
            beside[b].add(a)
        seen: set[int] = set()
        for value in beside:
            group, new = [], [] if value in seen else [value]
            while new:
                each = new.pop()
                if each not in seen:
                    seen.add(each)
                    group.append(each)
                    new += beside[each]
            if group:
                yield group

    def _pairs(self) -> Iterator[tuple[int, int]]:
        sizes = self.program.values
        yield from ((a, b) for a, b in self._inside.items() if sizes[a].bytes == sizes[b].bytes)
        yield from self._carried
        for i, op in enumerate(self.program.operations):
            given = [use.value for use in op.inputs]
            made = [use.value for use in op.outputs]
            written = _writes(op) and self.needed_until(given[0]) <= i and not self._is_lent(given[0])
            if i in self.views or op.primitive == "loop_constant" or self._is_only_lent(op) or written:
                yield given[0], made[0]
            if op.primitive == "branch_join":
                yield from ((value, made[0]) for value in given if self._is_in_join(value, given))
            if op.primitive == "loop_carry":
                yield made[0], made[1]
                yield from ((value, made[0]) for value in given if self._becomes_carry(value, i))

    def _overwritten(self) -> Iterator[tuple[int, int, tuple[int, int] | None]]:
        """Each donated argument, the result in its memory, and when that needs an array of its own before."""
        if not self.program.donated:
            return
        group_of = {value: i for i, group in enumerate(self._groups) for value in group}
        account = Overwrites(self.program, self.readers, self.is_fused, self._last_iteration_end)
        taken_groups: set[int] = set()
        for argument, result in self.program.donated:
            given = self.program.operations[self.program.arguments[argument]].outputs[0].value
            taken = self.program.operations[self.program.results[result]].inputs[0].value
            group = self._groups[group_of[taken]]
            is_given = any(self.program.operations[self.maker[value]].op_class == "source" for value in group)
            if not is_given and group_of[taken] not in taken_groups:
                taken_groups.add(group_of[taken])
                yield given, taken, account.overlap(given, group, min(map(self._begins, group)))

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The groups of values that share memory, without donations."""
        return list(self._sharing(self._pairs()))

    def _is_lent(self, value: int) -> bool:
        """Whether a value belongs to the code around its branch."""
        return self.program.operations[self.maker[value]].primitive == "branch_constant"

    def _is_only_lent(self, op: Operation) -> bool:
        """Whether a branch gets an array, and does not return it."""
        after = [self.program.operations[at].primitive for use in op.outputs for at in self.readers.get(use.value, ())]
        return op.primitive == "branch_constant" and "branch_join" not in after

    def _is_in_join(self, value: int, others: Iterable[int]) -> bool:
        """Whether the result of a branch lies in that of the conditional, which may begin as a copy of a lent array."""
        maker, lent = self.program.operations[self.maker[value]], any(map(self._is_lent, others))
        once = maker.op_class in ("matmul", "fused", "memory") and self.readers[value] == self.readers[value][:1]
        writes = _writes(maker) and self._is_lent(maker.inputs[0].value)
        return self._is_lent(value) or (once and writes == lent)

    def _becomes_carry(self, value: int, carry: int) -> bool:
        maker = self.program.operations[self.maker[value]]
        if self.program.values[value].region == self.program.operations[carry].region:
            return maker.op_class != "source" and len(self.readers[value]) == 1 and not self._is_lent(value)
        return _writes(maker) or (maker.primitive == "loop_carry" and maker.outputs[1].value == value)

    def _is_stored(self, value: int) -> bool:
        """Whether a value must be in memory."""
        at = self.maker[value]
        op = self.program.operations[at]
        if op.primitive == "loop_slice" or at in self.views or value in self.in_registers:
            return False
        readers = [self.program.operations[each].primitive for each in self.readers.get(value, ())]
        turned = [each for each in self.readers.get(value, ()) if each not in self.views]
        apart = op.primitive.startswith(("reduce_", "arg")) and any(
            self.program.operations[each].primitive == "transpose" for each in turned
        )
        return set(readers) != {"loop_stack"} and (apart or not self.is_fused(at) or self._leaves(value))

    def _leaves(self, value: int) -> bool:
        """Whether an unfused operation reads a value or a view of it, and does not form it."""
        shown = [value]
        while shown:
            value = shown.pop()
            for at in self.readers.get(value, ()) if value not in self.formed else ():
                if at in self.views:
                    shown.append(self.program.operations[at].outputs[0].value)
                elif not self.is_fused(at):
                    return True
        return False

    @cached_property
    def formed(self) -> set[int]:
        """The values that products form."""
        return formed(self.program, self.readers)

    def is_fused(self, at: int) -> bool:
        """Elementwise work, and a scatter of one element to each row of a constant array, which XLA fuses."""
        op = self.program.operations[at]
        if op.op_class == "fused" or not op.primitive.startswith("scatter") or len(op.inputs) != 3:
            return op.op_class == "fused"
        onto, indices, updates = op.inputs
        filled = self.program.operations[self.maker[onto.value]]
        rows = {i for dim in onto.dims for i in dim}
        single = all(i in rows or op.factors[i].size == 1 for dim in updates.dims for i in dim)
        count = prod(self.program.values[indices.value].shape[:-1])
        each = single and prod(self.program.values[updates.value].shape) == count
        return each and filled.primitive == "broadcast_in_dim" and not filled.inputs

    def copy_life(self, value: int, at: int) -> tuple[int, int]:
        """The operations during which an operand's resharded copy lives.

        A gather begins beside the matmul before its own.
        """
        before = self._matmuls_before[at] if self.program.operations[at].op_class == "matmul" else None
        return at if before is None else max(before, self.maker[value]), self._last_iteration_end(at)

    @cached_property
    def _matmuls_before(self) -> list[int | None]:
        latest: dict[int, int] = {}
        found: list[int | None] = []
        for i, op in enumerate(self.program.operations):
            found.append(latest.get(op.region))
            if op.op_class == "matmul":
                latest[op.region] = i
        return found


def _writes(op: Operation) -> bool:
    """Whether an operation may write into its first operand."""
    kind, _, how = op.primitive.partition("-")
    return op.primitive == "dynamic_update_slice" or (
        kind == "scatter" and how in ("", "add", "sub", "mul", "min", "max")
    )


def _writes_into(op: Operation, value: int) -> bool:
    """Whether an operation writes into a value."""
    return _writes(op) and op.inputs[0].value == value
