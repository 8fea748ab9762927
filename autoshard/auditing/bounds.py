"""The bounds within which a compiled program is the plan.

An audit fails when a figure leaves its bounds, whatever the class of the differences that take it there.

| figure | bounds | why not tighter |
|---|---|---|
| bytes on the wire, for each set of mesh axes | `WIRE` of those that the plan expects there | padding to tiles |
| peak memory, on TPUs and GPUs | `MEMORY` of the planned peak | the compiler's own buffers |
| arguments and results, on every target | `MEMORY` of the planned peak more than planned | |
| donated arguments that no result overwrites | `MEMORY` of the planned peak | |
| FLOPs of all matmuls | `FLOPS` more than planned | small products formed once for each use |
| FLOPs of the matmuls of one source line | `NOTICEABLE` of all planned FLOPs more than planned | padding |
| missing collectives, unplanned ones | `NOTICEABLE` of the plan's time on the wire | sums of scalars |
| planned collectives in a dearer form | `HIGHER_COST` of the plan's time on the wire | rows of padding sent to their owners |

A step that takes more than `SLOWER` times the plan by the replay of its schedule is said to be slow; that is a fault of the
model's or the compiler's, not of the layout, and the program may be as planned all the same.

The bytes that the plan expects are the planned ones, less what compilers save (one array sent once for two uses, float32
that a matmul reads as bfloat16), and more where host devices send 16-bit floats as float32. Fewer FLOPs than planned are
within bounds: compilers turn small matmuls into multiplications and sums, which nobody counts.
"""

from __future__ import annotations

WIRE = 0.02
"""By which part the bytes on a set of mesh axes may differ from those that the plan expects."""
SMALLEST_WIRE = 0.001
"""The part of all planned bytes below which a difference on one set of mesh axes is not looked at."""
MEMORY = 0.05
"""By which part of the planned peak the compiled one may differ."""
FLOPS = 0.05
"""By which part the FLOPs of all matmuls may exceed the planned ones."""
NOTICEABLE = 0.01
"""The part of the plan's time on the wire, or of its FLOPs, above which missing and unplanned work counts."""
HIGHER_COST = 0.02
"""The part of the plan's time on the wire by which the compiler may make the same plan dearer."""
SLOWER = 1.3
"""How many times the planned time a compiled step may take until audits say so."""
