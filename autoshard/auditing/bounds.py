"""The bounds within which a compiled program is as planned.

An audit fails if a figure leaves its bounds, for differences of any class.

| figure | bounds | reason for the margin |
|---|---|---|
| communicated bytes, for each set of mesh axes | `WIRE` of those that the plan expects there | padding to tiles |
| peak memory, on TPUs and GPUs | `MEMORY` of the planned peak | the compiler's own buffers |
| arguments and results, on every target | `MEMORY` of the planned peak more than planned | |
| donated arguments that no result overwrites | `MEMORY` of the planned peak | |
| FLOPs of all matmuls | `FLOPS` more than planned | small products formed once for each use |
| FLOPs of the matmuls of one source line | `NOTICEABLE` of all planned FLOPs more than planned | padding |
| missing collectives, unplanned ones | `NOTICEABLE` of the plan's communication time | sums of scalars |
| planned collectives in a costlier form | `HIGHER_COST` of the plan's communication time | rows of padding sent |

Rows of padding of a reduce-scatter, which a permute sends, have to be `HIGHER_COST` of the planned bytes, too: one tile is all
latency.

A step that takes more than `SLOWER` times the plan by the replay of its schedule is reported as slow. That is an error
of the model or the compiler, not of the layout, and the program may be as planned all the same.
Rings of which the schedule hides less than planned, by more than `HIDDEN` of their time, are reported and fail no audit
either.

The bytes that the plan expects are the planned ones, minus the compilers' savings (one array sent once for two uses,
float32 that a matmul reads as bfloat16), and more if host devices send 16-bit floats as float32. Fewer FLOPs than
planned are within bounds: compilers turn small matmuls into multiplications and sums, which are not counted.
"""

from __future__ import annotations

WIRE = 0.02
"""The relative difference allowed between the bytes on a set of mesh axes and those that the plan expects."""
SMALLEST_WIRE = 0.001
"""The part of all planned bytes below which a difference on one set of mesh axes is ignored."""
MEMORY = 0.05
"""The relative difference allowed between the compiled and the planned peak."""
FLOPS = 0.05
"""The part by which the FLOPs of all matmuls may exceed the planned ones."""
HIDDEN = 0.15
"""The part of a ring's time by which the schedule may hide less than planned."""
NOTICEABLE = 0.01
"""The part of the plan's communication time, or of its FLOPs, above which missing and unplanned work counts."""
HIGHER_COST = 0.02
"""The part of the plan's communication time by which the compiler may make the same plan costlier."""
SLOWER = 1.3
"""The multiple of the planned time above which audits report a compiled step as slow."""
