"""View operations: primitives that compute nothing, by what they do to an array's elements.

Each analysis that looks through views composes its own set from these, because compilers treat the kinds differently: a
rename is a bitcast or a relayout, a broadcast is fused into its reader, a part may need a copy, a cast changes the width.
"""

from __future__ import annotations

from costmodels.program.program import Operation

CAST = "convert_element_type"

RENAMES = frozenset({"reshape", "squeeze", "expand_dims", "transpose"})
"""Every element once, in another shape."""
BROADCASTS = frozenset({"broadcast_in_dim"})
"""Every element once or several times."""
PARTS = frozenset({"slice", "rev"})
"""Elements chosen or reordered by constants."""
IDENTITIES = frozenset({"copy", "stop_gradient", "name"})
"""The array itself."""


def is_view(op: Operation) -> bool:
    """Whether an operation is fused and computes nothing: no FLOPs, no HBM traffic of its own."""
    return op.op_class == "fused" and not op.flops_per_point
