"""Barriers in long sums of 16-bit floats, such as a transformer's residual stream.

The TPU compiler (libtpu 0.0.42) adds 16-bit floats in 32 bits and omits the rounding between two additions. The final
residual of an unrolled model is then one sum of all layers' outputs, which stay live until its end: 64 of them in a model
of 32 layers, 0.5 GiB of Mixtral 8×7B's prefill on 16 chips. A barrier forces the rounded partial sum. A barrier at every
addition keeps matmuls from accumulating into the sum. Of one barrier per 1, 4, 8 and 16 additions, 8 gave the fewest
cycles (prefill on v5e:4x4: Llama 3 8B 1 % fewer than without, Mixtral 8×7B 14 %).

Unless the plan says otherwise, sums get barriers only if their terms exceed the chip's on-chip memory. Where they free
nothing, barriers change what the compiler fetches ahead, for better or worse. Replayed decode steps without barriers over
those with them, unrolled: Llama 3 8B on v5e:2x4 with 32 layers 0.82, with 8 layers 0.81 (batch 64) and 0.93 (batch 8), on
v4:2x2x2 1.00; Llama 3 70B on v5e:4x4 1.03, on v5p:2x2x2 1.00; Mixtral 8×7B on v5e:4x4 1.15 (batch 64), 1.12 (batch 16),
0.998 with grouped matmuls, on v5p:2x2x2 0.998; 0.98 in the geometric mean. `verify` compiles both.
"""

from __future__ import annotations

import jax.numpy as jnp

from autoshard.planning.emission import Emission
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from costmodels.program.views import RENAMES
from search.answer.assignment import Choice, kept_layout
from search.formulation.layouts import shards

_ADDITIONS = frozenset({"add", "add_any", "sub"})
_IN_A_SUM = _ADDITIONS | RENAMES

_TERMS = 8
"""The number of additions, at most, between two barriers."""


def residual_barriers(program: Program, choice: Choice, topology: Topology, emission: Emission) -> frozenset[int]:
    """The partial sums that get a barrier under a plan; none off TPUs."""
    if topology.chip.kind != "tpu" or emission.residual_barriers is False:
        return frozenset()
    found = find_residual_barriers(program)
    frees = emission.residual_barriers or _term_bytes(program, choice, topology) > topology.chip.on_chip_bytes
    return found if frees else frozenset()


def _term_bytes(program: Program, choice: Choice, topology: Topology) -> float:
    """Bytes on one chip of the terms of all sums of 16-bit floats: of each addition one, as large as its result."""
    sums = [op.outputs[0].value for op in program.operations if op.primitive in _ADDITIONS]
    return sum(
        program.values[value].bytes / shards(kept_layout(program, choice, value), topology.axis_sizes)
        for value in sums
        if _short(program, value)
    )


def find_residual_barriers(program: Program) -> frozenset[int]:
    """The partial sums of 16-bit floats that get a barrier: each 8th in a chain of additions."""
    additions: dict[int, int] = {}
    found: set[int] = set()
    for op in program.operations:
        if op.primitive not in _IN_A_SUM or not _short(program, op.outputs[0].value):
            continue
        value = op.outputs[0].value
        additions[value] = max((additions.get(use.value, 0) for use in op.inputs), default=0)
        additions[value] += op.primitive in _ADDITIONS
        if additions[value] >= _TERMS:
            found.add(value)
            additions[value] = 0
    return frozenset(found)


def _short(program: Program, value: int) -> bool:
    array = program.values[value]
    return array.itemsize == 2 and jnp.issubdtype(array.dtype, jnp.floating)
