"""The checker's own count of matmuls of grouped rows (`costmodels.program.grouped`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from costmodels.machine.chips import Chip
from costmodels.program.grouped import CHAIN
from costmodels.program.program import Operation, Output

GROUPED = ("ragged_dot_general", CHAIN)


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
        """The rows of the chip with the most."""
        held = prod(self.local[i] for i in self._rows)
        return min(held, self.load * held * self.local[self._groups] / self.op.factors[self._groups].size)

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
    def own_rows(self) -> float:
        """The elements of the larger of the buffers of a chain's rows before and after its matmuls."""
        groups, made = self._groups, self.op.outputs[0].dims
        first = next(use.dims for use in self.op.inputs if use.dims[:1] == ((groups,),))
        split = self.local[groups] < self.op.factors[groups].size
        before = split or all(use.dims != ((0,), first[1]) for use in self.op.inputs)
        after = split or made[0] != (0,)
        return self.rows * max(before * self.local[first[1][0]], after * self.local[made[1][0]])

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
        passed = arrays * hidden + self.rows * self.local[first[1][0]] * (2 if gathers else 4 * split)
        passed += self.rows * self.local[self.op.outputs[0].dims[1][0]] * (3 if adds else 4 * split)
        rate = chip.vector_elements_per_second
        slowest = max(itemsize / chip.reached_hbm_bytes_per_second, 1 / rate if rate else 0.0)
        return passed * slowest + (arrays - 1) * chip.op_overhead_seconds + chip.vector_overhead_seconds

    def flops(self, tile: float, least: float) -> float:
        """FLOPs of the matrix unit, in whole tiles."""
        held = prod(self.local[i] for i in self._rows)
        height, whole = min(tile, held), self.op.factors[self._groups].size
        tiles = ceil(self.rows / height) + self._read * (whole - 1) / whole
        return 2 * tiles * max(height, least) * sum(self._areas(tile))

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
