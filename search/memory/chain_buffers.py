"""The buffers of a chain of grouped matmuls: hidden arrays, and rows of a chip's own groups (`costmodels.program.grouped`)."""

from __future__ import annotations

import numpy as np

from costmodels.grouped_costs import grouped_rows, hidden_bytes, sent_rows
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
    """Per strategy of a chain, the bytes of its buffers on one chip.

    Rows are copied before the matmuls, and their results after, if a chip has some of the groups, or if the rows are gathered
    from those of tokens, or added to them. The first copy is dead when the second is made. Where a chip sends its rows to the
    chips of their groups, it has the buffers that it sends and gets. The path that gathers all tokens instead has these, and
    all their results (`costmodels.program.grouped.OVERFLOW`). Memory is reserved for both.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.
    """
    op, load = program.operations[at], topology.pricing.expert_load
    groups = grouped(op)
    if groups is None:
        return np.zeros(len(shards))
    hidden = evaluate(hidden_bytes(program, op, load), op, shards)
    size = program.values[op.outputs[0].value].itemsize
    rows = evaluate(grouped_rows(groups, load), op, shards) * size
    sizes, split = np.array([factor.size for factor in op.factors]) / shards, shards[:, groups.groups] > 1
    before, after = (sizes[:, each[0]] for each in (groups.matrices[0].contracted, groups.matrices[-1].columns))
    inside = hidden + rows * np.maximum(before * (split | groups.gathers), after * (split | groups.adds))
    if groups.tokens is None:
        return inside
    sent = evaluate(sent_rows(groups, load), op, shards) * size
    gathered = op.factors[groups.tokens].size * size * (before + after) * (shards[:, groups.tokens] > 1)
    return np.maximum(inside + gathered, 2 * sent * np.maximum(before, after))
