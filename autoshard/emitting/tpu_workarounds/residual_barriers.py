"""Barriers in long sums of 16-bit floats, such as a transformer's residual stream.

The TPU compiler (libtpu 0.0.42) adds 16-bit floats in 32 bits and omits the rounding between two additions. The final
residual of an unrolled model is then one sum of all layers' outputs, which stay live until its end: 64 of them in a model
of 32 layers, 0.5 GiB of Mixtral 8×7B's prefill on 16 chips. A barrier forces the rounded partial sum. A barrier at every
addition keeps matmuls from accumulating into the sum. Of one barrier per 1, 4, 8 and 16 additions, 8 gave the fewest
cycles (prefill on v5e:4x4: Llama 3 8B 1 % fewer than without, Mixtral 8×7B 14 %).
"""

from __future__ import annotations

import jax.numpy as jnp

from costmodels.program.program import Program
from costmodels.program.views import RENAMES

_ADDITIONS = frozenset({"add", "add_any", "sub"})
_IN_A_SUM = _ADDITIONS | RENAMES

_TERMS = 8
"""The number of additions, at most, between two barriers."""


def resting(program: Program) -> frozenset[int]:
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
