"""More on-chip memory for one operation of a TPU program.

The TPU compiler (libtpu 0.0.50) lets one operation use 16 MiB of on-chip memory by default, and keeps the rest for what it
fetches ahead. With more, attention keeps whole rows of its scores on the chip. Causal attention on one chip, replayed, in
microseconds and MiB of peak memory:

| heads × rows × columns | default | 32 MiB | 64 MiB | 96 MiB | 112 MiB |
|---|---|---|---|---|---|
| 12 × 2,048 × 2,048, v5e | 880, 212 | 829, 212 | 768, 212 | 774, 212 | 829, 218 |
| 4 × 4,096 × 4,096, v5e | 2,509, 532 | 1,063, 276 | 1,015, 276 | 1,085, 276 | 1,155, 292 |

With 64 MiB two whole steps of Llama 3 8B gain as well: prefill of 2,048 tokens on v5e:2x2 takes 68.0 instead of 70.7 ms, a
scanned decode of batch 8 on v6e:2x2 4.75 instead of 4.88 ms. What operations use is missing for copies ahead of their
neighbours, so other programs may lose, and no rule decides. `verify` compiles both.
"""

from __future__ import annotations

from autoshard.planning.emission import Emission

LARGE_KIB = 65_536
"""The on-chip memory for one operation that `verify` tries."""
_OPTION = "xla_tpu_scoped_vmem_limit_kib"


def memory_option(emission: Emission) -> dict[str, str | bool]:
    """The compiler option of a plan; empty for the default."""
    return {} if emission.scoped_memory_kib is None else {_OPTION: str(emission.scoped_memory_kib)}
