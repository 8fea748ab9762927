"""Barriers between the projections of attention and its long float32 scores.

The TPU compiler (libtpu 0.0.50) may fuse the projection of the keys into the product that forms the scores. The scores are
then written before their maximum, which is otherwise part of that product, and the softmax writes a second array of
their size. A barrier keeps the projection apart. Multi-head attention on a v5e, in millions of cycles and in arrays of
scores that are live at once:

| batch × heads, rows, columns | without | with |
|---|---|---|
| 10 × 2,048 × 2,048 | 2.28, 2 arrays | 0.99, 1 array |
| 12 × 2,048 × 2,048 | 2.73, 2 arrays | 1.17, 1 array |
| 3 × 2,048 × 2,048 | 0.17, none | 0.16, none |
| 8 and 40 × 2,048 × 2,048 | 0.81 and 3.84, 1 array | the same |
| 2 × 4,096 × 4,096 | 1.94, 2 arrays | 1.95, 2 arrays |
| 12 × 1,024 × 1,024 | 0.19, none | 0.17, none |
| 96 × 512 × 512 | 0.36, none | 0.43, none |

Shorter columns therefore get no barrier, unless the plan says otherwise. `verify` compiles both.
"""

from __future__ import annotations

from autoshard.planning.emission import Emission
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice, produced_layout
from search.formulation.layouts import local_shape
from search.memory.softmax_copies import product_of, score_maxima

LEAST_COLUMNS = 2048
"""The number of columns of scores on one chip from which on the projections are kept apart."""


def score_barriers(program: Program, choice: Choice, topology: Topology, emission: Emission) -> frozenset[int]:
    """The projections that get a barrier under a plan; none off TPUs."""
    if topology.chip.kind != "tpu" or emission.score_barriers is False:
        return frozenset()
    return find_score_barriers(program, choice, topology, 1 if emission.score_barriers else LEAST_COLUMNS)


def find_score_barriers(program: Program, choice: Choice, topology: Topology, least_columns: int = 1) -> frozenset[int]:
    """The operands of products of scores with as many columns that elementwise operations make of another product."""
    found: set[int] = set()
    for scores in score_maxima(program).values():
        shape, layout = program.values[scores.value].shape, produced_layout(program, choice, scores.value)
        if local_shape(shape, layout, topology.axis_sizes)[scores.column] >= least_columns:
            found.update(use.value for use in program.operations[program.producers[scores.value][0]].inputs)
    return frozenset(value for value in found if product_of(program, value) is not None)
