"""The checker's own account of the tiles in which a TPU keeps the stacks of loops (measured, `search.memory.order_copies`).

The dimension over which a loop runs is in no tile of its stacks, except for slices of one dimension. So slices whose other
dimensions are short take more than their elements. What a loop reads slice by slice, and another order pads less, is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from math import prod

from costmodels.machine.topology import Topology
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, kept_layout

_RENAMED = ("reshape", "squeeze", "expand_dims", "transpose")


class StackTiles:
    """The padding of stacks under a plan.

    **Arguments:**

    - `maker`: the operation that makes each value; `readers`: those that read it.
    """

    def __init__(
        self,
        program: Program,
        topology: Topology,
        choice: Choice,
        maker: Mapping[int, int],
        readers: Mapping[int, Sequence[int]],
    ) -> None:
        self.program, self.topology, self.choice, self.maker, self.readers = program, topology, choice, maker, readers

    def padding(self, values: Iterable[int]) -> float:
        """Further bytes of an array in which a loop writes slices, and no argument lies: its tiles', and those of its copy.

        A result is copied if an argument of its shape is padded less.
        """
        makers = {value: self.program.operations[self.maker[value]] for value in sorted(values) if value in self.maker}
        stacks = [value for value, op in makers.items() if self._stacks(op)]
        if not stacks or self.topology.chip.kind != "tpu" or any(op.op_class == "source" for op in makers.values()):
            return 0.0
        held, stacked, least = self._sizes(stacks[0])
        after = {self.program.operations[at].op_class for value in makers for at in self.readers.get(value, ())}
        return held * (stacked + (least if "sink" in after and stacked > least else 0) - 1)

    def _stacks(self, op: Operation) -> bool:
        """Whether a loop writes one slice of a stack with an operation."""
        if op.primitive == "loop_stack":
            return len(op.inputs) > 0
        if op.primitive != "dynamic_update_slice":
            return False
        whole, piece = (self.program.values[use.value].shape for use in op.inputs[:2])
        loops = any(self.program.regions[each].kind == "loop" for each in self.program.enclosing(op.region))
        complete = any(piece[k:] == whole[k:] and prod(piece[:k]) == 1 for k in range(1, len(whole) + 1))
        return loops and complete and piece[0] < whole[0]

    def copies(self) -> Iterator[tuple[int, int, float]]:
        """The arrays that loops copy to read their slices: first and last operation of their lives, and bytes on one chip."""
        seen: set[tuple[int, int]] = set()
        for at, op in enumerate(self.program.operations):
            if op.primitive != "loop_slice" or self.topology.chip.kind != "tpu":
                continue
            array, loop = op.inputs[0].value, op.outputs[0].region
            behind = array
            while (made_by := self.program.operations[self.maker[behind]]).primitive in _RENAMED and made_by.inputs:
                behind = made_by.inputs[0].value
            held, stacked, least = self._sizes(array)
            is_copied = stacked > least and held * stacked > self.topology.chip.on_chip_bytes
            if is_copied and made_by.op_class != "boundary" and (array, at) not in seen:
                seen.add((array, at))
                end = max(
                    i for i, each in enumerate(self.program.operations) if loop in self.program.enclosing(each.region)
                )
                yield at, end, held * stacked
                if behind == array and made_by.op_class != "source" and len(self.readers[array]) == 1:
                    yield at + 1, end, -held  # the array itself is gone

    def _sizes(self, value: int) -> tuple[float, float, float]:
        """One chip's bytes of a stack, and those of its tiles over them: as a stack, and as any array."""
        array, cuts = self.program.values[value], kept_layout(self.program, self.choice, value).dims
        local = [
            n // prod(self.topology.axis_sizes[axis] for axis in axes)
            for n, axes in zip(array.shape, cuts, strict=True)
        ]
        long = [n for n in local if n > 1]
        inner = [n for n in local[1:] if n > 1]
        within = permutations(inner, 2) if len(inner) > 1 else ((local[0], n) for n in inner)
        stacked = min((_padded(rows, lanes, array.itemsize) for rows, lanes in within), default=1.0)
        least = min((_padded(rows, lanes, array.itemsize) for rows, lanes in permutations(long, 2)), default=1.0)
        return array.itemsize * prod(local), stacked, least


def _padded(rows: int, lanes: int, itemsize: float) -> float:
    """Bytes of tiles of 8 rows by 128 lanes over those of the array; 1, 2 and 4 rows are enough where they fill 4 bytes."""
    few = [n for n in (1, 2, 4) if n >= rows and n * itemsize >= 4] if rows <= 4 else []
    stored = few[0] if few else -(-rows // 8) * 8
    return stored * (-(-lanes // 128) * 128) / (rows * lanes)
