"""Long sums of 16-bit numbers, such as a transformer's residual, and where what they have come to is kept.

The TPU compiler (libtpu 0.0.42) adds 16-bit floats in 32 bits and leaves out the roundings between two additions. What an
unrolled model's residual ends with is then a sum of its own of all layers' outputs, which are held till then: 64 of them in a
model of 32 layers, 0.5 GiB of Mixtral 8×7B's prefill on 16 chips. A barrier now and then lets the sum begin anew from what
was rounded; at every addition it would keep matmuls from adding to the sum as they end. Of one barrier in 1, 4, 8 and 16
additions, 8 gave the fewest cycles (prefill on v5e:4x4: Llama 3 8B 1 % fewer than without, Mixtral 8×7B 14 %).
"""

from __future__ import annotations

import jax.numpy as jnp

from costmodels.program.program import Program
from costmodels.program.views import RENAMES

_ADDITIONS = frozenset({"add", "add_any", "sub"})
_IN_A_SUM = _ADDITIONS | RENAMES

_TERMS = 8
"""So many additions, at most, from one barrier to the next."""


def resting(program: Program) -> frozenset[int]:
    """The values at which a sum of 16-bit floats begins anew: each 8th in a row of additions."""
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
