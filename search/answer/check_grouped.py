"""The checker's own count of matmuls of grouped rows (`costmodels.program.grouped`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod, sqrt

from costmodels.machine.chips import Chip
from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN, DEVIATIONS, ROW_TILE
from costmodels.program.program import Factor, Operation, Output, Program
from search.answer.assignment import Choice

GROUPED = ("ragged_dot_general", CHAIN)
Splits = Sequence[tuple[str, ...]]


def _dispatches(factor: Factor) -> bool:
    return factor.kind == "dispatched"


def own_splits(op: Operation, splits: Splits) -> Splits:
    """The splits without those axes of groups along which rows are dispatched, if they are in the order of the tokens' axes."""
    for factor, axes in zip(op.factors, splits, strict=True):
        if _dispatches(factor) and axes:
            groups = op.inputs[-1].dims[-1][0] - 1
            if [axis for axis in axes if axis in splits[groups]] == [*splits[groups]] and not splits[0]:
                return [() if i == groups else split for i, split in enumerate(splits)]
    return splits


def dispatched_seconds(program: Program, topology: Topology, op: Operation, splits: Splits) -> float:
    """Seconds of the all-to-alls that send rows of tokens to the chips of their groups, and back."""
    found = 0.0
    for f, factor in enumerate(op.factors):
        chips_along = splits[op.inputs[-1].dims[-1][0] - 1] if _dispatches(factor) else ()
        if not splits[f] or not chips_along:
            continue
        for use in (*op.inputs, *op.outputs):
            if use.dims[0] == (f,):
                width = program.values[use.value].itemsize * prod(op.factors[i].size for i in use.dims[1])
                sent = width * sent_rows(topology, op, splits)
                found += float(seconds_on(topology, "all-to-all", chips_along, sent))
    return found


def sent_rows(topology: Topology, op: Operation, splits: Splits) -> float:
    """The rows of the buffers of an all-to-all: for each chip, the most rows and what they vary, in whole registers."""
    found = 0.0
    for factor, axes in zip(op.factors, splits, strict=True):
        if _dispatches(factor):
            sources = prod(topology.axis_sizes[axis] for axis in axes)
            chips = prod(topology.axis_sizes[axis] for axis in splits[op.inputs[-1].dims[-1][0] - 1])
            share = op.factors[0].size / sources
            most = share * min(chips, topology.pricing.expert_load) / chips
            most += DEVIATIONS * sqrt(most)
            found += chips * min(ceil(share), ROW_TILE * ceil(most / ROW_TILE)) if sources > 1 < chips else 0.0
    return found


@dataclass(frozen=True)
class GroupedWork:
    """One chip's share of a grouped matmul; `local` has the sizes of its factors on the chip, `sizes` the whole ones."""

    op: Operation
    local: list[float]
    load: float

    @property
    def _groups(self) -> int:
        return self.op.inputs[-1].dims[-1][0] - 1

    @property
    def _rows(self) -> set[int]:
        """The factors of the rows: of the first operand, and neither of one group's matrix nor of a batch."""
        left, right, made = ({i for dim in use.dims for i in dim} for use in (*self.op.inputs[:2], self.op.outputs[0]))
        if self.op.primitive == CHAIN:
            return {0}
        return (left & made) - right if self._groups in right else (left & right) - made

    @property
    def rows(self) -> float:
        """The rows of the chip with the most; of a chain those of its buffer, in whole registers."""
        held = prod(self.local[i] for i in self._rows)
        chips = self.op.factors[self._groups].size / self.local[self._groups]
        if self.op.primitive != CHAIN:
            return min(held, self.load * held / chips)
        if self.sources == 1:
            return min(held, ROW_TILE * ceil(self.load * held / chips / ROW_TILE))
        room = ROW_TILE * ceil(held * min(self.load, chips) / self.sources / ROW_TILE)
        each = held * min(self.load, chips) / (self.sources * chips)
        sent = ROW_TILE * ceil((each + DEVIATIONS * sqrt(each)) / ROW_TILE)
        return min(held, room, chips * min(ceil(held / self.sources), sent))

    @property
    def sources(self) -> float:
        """The number of shards of the tokens of a chain."""
        split = (factor.size / n for factor, n in zip(self.op.factors, self.local, strict=True) if _dispatches(factor))
        return next(split, 1.0)

    @property
    def _read(self) -> float:
        return min(self.local[self._groups], ceil(self.rows))

    def elements(self, place: int | Output) -> float:
        """The elements of an operand or result that pass through HBM."""
        dims = self.op.use(place).dims
        inside = [i for dim in dims for i in dim]
        if isinstance(place, int) and (self._groups,) in dims:
            return self._read * prod(self.local[i] for i in inside if i != self._groups)
        if isinstance(place, int) and self.op.primitive == CHAIN and self._rows & set(inside):
            return self.rows * prod(self.local[i] for i in inside if i not in self._rows)
        return prod(self.local[i] for i in inside)

    @property
    def own_rows(self) -> tuple[float, float]:
        """The elements of the buffers of a chain's rows before its matmuls, and after them."""
        groups, made = self._groups, self.op.outputs[0].dims
        first = next(use.dims for use in self.op.inputs if use.dims[:1] == ((groups,),))
        split = self.local[groups] < self.op.factors[groups].size
        before = split or all(use.dims != ((0,), first[1]) for use in self.op.inputs)
        after = split or made[0] != (0,)
        return self.rows * before * self.local[first[1][0]], self.rows * after * self.local[made[1][0]]

    @property
    def hidden(self) -> tuple[int, float]:
        """The number of hidden arrays of a chain, and the elements of each."""
        if self.op.primitive != CHAIN:
            return 0, 0.0
        matrices = [use.dims for use in self.op.inputs if use.dims[:1] == ((self._groups,),)]
        (last,) = [dims for dims in matrices if dims[2] == self.op.outputs[0].dims[1]]
        return len(matrices), self.rows * self.local[last[1][0]]

    def between_seconds(self, chip: Chip, itemsize: float) -> float:
        """Seconds of the passes over hidden arrays and buffers between the matmuls of a chain, and of their starts."""
        if self.op.primitive != CHAIN:
            return 0.0
        (arrays, hidden), groups = self.hidden, self._groups
        split = self.local[groups] < self.op.factors[groups].size
        first = next(use.dims for use in self.op.inputs if use.dims[:1] == ((groups,),))
        gathers = all(use.dims != ((0,), first[1]) for use in self.op.inputs)
        adds = self.op.outputs[0].dims[0] != (0,)
        passed = self._looked_up
        if split and self.sources > 1:  # rows that are sent are copied once more on each side
            hidden += 2 * self.rows * (self.local[first[1][0]] + self.local[self.op.outputs[0].dims[1][0]]) / arrays
        passed += arrays * hidden + self.rows * self.local[first[1][0]] * (2 if gathers else 4 * split)
        passed += self.rows * self.local[self.op.outputs[0].dims[1][0]] * (3 if adds else 4 * split)
        rate = chip.vector_elements_per_second
        slowest = max(itemsize / chip.reached_hbm_bytes_per_second, 1 / rate if rate else 0.0)
        return passed * slowest + (arrays - 1) * chip.op_overhead_seconds + chip.vector_overhead_seconds

    @property
    def _looked_up(self) -> float:
        """The elements that gathers of rows for each group, such as biases, write and are read from."""
        tables = [
            use.dims for use in self.op.inputs if len(use.dims) == 2 and use.dims[0] == self.op.inputs[-1].dims[0]
        ]
        return sum(2 * self.rows * prod(self.local[i] for i in dims[1]) for dims in tables)

    def buffers(self, sent: float, room: float) -> float:
        """The elements of a chain's buffers in HBM; those of the path for an overflow are there even if it does not run.

        **Arguments:**

        - `sent`: the rows of the buffers that a chip sends.
        - `room`: the elements that on-chip memory holds.
        """
        (arrays, hidden), made = self.hidden, self.op.outputs[0].dims
        moments = ([*[hidden] * max(arrays - 1, 1), self.own_rows[0]], [hidden, self.own_rows[1]])
        inside = max(sum(held) - min(room, sum(n for n in held if n <= room)) for held in moments)
        if self.sources == 1:
            return inside
        first = next(use.dims for use in self.op.inputs if use.dims[:1] == ((self._groups,),))
        before, after = self.local[first[1][0]], self.local[made[1][0]]
        slab = [
            arrays_held / 2 * hidden + self.rows * width
            for arrays_held, width in ((max(arrays - 1, 1), before), (1, after))
        ]
        return max(inside, *slab, 2 * sent * max(before, after))

    def flops(self, tile: float, least: float) -> float:
        """FLOPs of the matrix unit, in whole tiles."""
        held = prod(self.local[i] for i in self._rows)
        height, whole = min(tile, held), self.op.factors[self._groups].size
        tiles = ceil(self.rows / height) + self._read * (whole - 1) / whole
        return 2 * tiles * max(height, least) * sum(self._areas(tile)) + self._counting_flops(tile, least)

    def _counting_flops(self, tile: float, least: float) -> float:
        """FLOPs of the product of one-hot arrays that counts the rows between each pair of chips."""
        chips = self.op.factors[self._groups].size / self.local[self._groups]
        if self.sources == 1 or chips == 1:
            return 0.0
        rows = tile * ceil(self.op.factors[0].size / tile)
        return 2 * rows * max(self.sources, least) * tile * ceil(chips / tile)

    def _areas(self, tile: float) -> list[float]:
        """The elements of one group's matrices, in whole tiles, times the batch."""
        uses = [use for use in (*self.op.inputs[:-1], *self.op.outputs) if (self._groups,) in use.dims]
        shared = {i for dim in self.op.inputs[0].dims for i in dim} & {i for dim in self.op.inputs[1].dims for i in dim}
        batch = shared & {i for dim in self.op.outputs[0].dims for i in dim} if self.op.primitive != CHAIN else set()
        found = []
        for use in uses:
            sides = [set(dim) - batch for dim in use.dims if dim != (self._groups,)]
            lengths = [prod(self.local[i] for i in side) for side in sides if side]
            found.append(prod(tile * ceil(n / tile) for n in lengths) * prod(self.local[i] for i in batch))
        return found


def chain_buffers(program: Program, topology: Topology, choice: Choice, at: int) -> float:
    """The bytes of the hidden arrays of a chain of grouped matmuls, and of its rows before and after the matmuls."""
    op, splits = program.operations[at], choice.strategies[at].splits
    pieces = [prod(topology.axis_sizes[axis] for axis in split) for split in splits]
    local = [factor.size / n for factor, n in zip(op.factors, pieces, strict=True)]
    work = GroupedWork(op, local, topology.pricing.expert_load)
    size, chip = program.values[op.outputs[0].value].itemsize, topology.chip
    room = chip.prefetch_bytes / size if chip.on_chip_bytes else 0.0
    return work.buffers(sent_rows(topology, op, splits), room) * size
