"""The buffers of a chain of grouped matmuls: hidden arrays, and rows of a chip's own groups (`costmodels.program.grouped`)."""

from __future__ import annotations

import numpy as np

from costmodels.grouped_costs import grouped_rows, hidden_elements, sent_rows
from costmodels.machine.topology import Topology
from costmodels.operations import evaluate
from costmodels.program.analysis import cached_analysis
from costmodels.program.grouped import CHAIN, grouped
from costmodels.program.program import Program


@cached_analysis
def chains(program: Program) -> tuple[int, ...]:
    """The chains of grouped matmuls of a program."""
    return tuple(i for i, op in enumerate(program.operations) if op.primitive == CHAIN)


def chain_buffer_bytes(program: Program, topology: Topology, at: int, shards: np.ndarray) -> np.ndarray:
    """Per strategy of a chain, the bytes of its buffers in the HBM of one chip.

    Rows are copied before the matmuls, and their results after, if a chip has some of the groups, or if the rows are gathered
    from those of tokens, or added to them. The elementwise work overwrites one of its operands, so a chain of $n$ matmuls holds
    $n - 1$ hidden arrays and the rows at once, and later one hidden array and the results. Of these, a chip with on-chip memory
    for results keeps as much there as fits (`kept_on_chip`).

    Where a chip sends its rows to the chips of their groups, it has the buffers that it sends and gets. The path for an
    overflow (`costmodels.program.grouped.OVERFLOW`) is a loop, so its arrays are in HBM: those of half of the rows, and what a
    sum over the chips takes and makes. Memory is reserved for both.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.
    """
    op, load = program.operations[at], topology.pricing.expert_load
    groups = grouped(op)
    if groups is None:
        return np.zeros(len(shards))
    size = program.values[op.outputs[0].value].itemsize
    hidden = evaluate(hidden_elements(groups, load), op, shards) * size
    rows = evaluate(grouped_rows(groups, load), op, shards) * size
    sizes, split = np.array([factor.size for factor in op.factors]) / shards, shards[:, groups.groups] > 1
    before, after = (sizes[:, each[0]] for each in (groups.matrices[0].contracted, groups.matrices[-1].columns))
    first, last = rows * before * (split | groups.gathers), rows * after * (split | groups.adds)
    held = max(groups.hidden_arrays - 1, 1)
    room = kept_on_chip(topology)
    at_first = held * hidden + first - _on_chip(room, (held, hidden), (1, first))
    at_last = hidden + last - _on_chip(room, (1, hidden), (1, last))
    inside = np.maximum(at_first, at_last)
    if groups.tokens is None:
        return inside
    sent = evaluate(sent_rows(groups, load), op, shards) * size
    overflow = np.maximum(held * hidden / 2 + rows * before, hidden / 2 + rows * after)
    overflow *= shards[:, groups.tokens] > 1
    return np.maximum.reduce([inside, overflow, 2 * sent * np.maximum(before, after)])


def kept_on_chip(topology: Topology) -> float:
    """The bytes of a chain's buffers that the compiler keeps in on-chip memory.

    That is what weights fetched ahead leave of it: as much as they take, half of a v5e's 128 MiB. libtpu 0.0.50 keeps rows of
    32 and 48 MiB and hidden arrays of 18 and 28 MiB there, up to one of the latter.
    """
    return topology.chip.prefetch_bytes if topology.chip.on_chip_bytes else 0.0


def _on_chip(room: float, *arrays: tuple[int, np.ndarray]) -> np.ndarray:
    """The bytes of some arrays, each with their number, that are in on-chip memory: of those that fit on their own."""
    return np.minimum(room, sum(count * bytes_ * (bytes_ <= room) for count, bytes_ in arrays))
