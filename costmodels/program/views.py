"""View operations: primitives that compute nothing, by what they do to an array's elements.

Each analysis that looks through views composes its own set from these, because compilers treat the kinds differently: a
rename is a bitcast or a relayout, a broadcast is fused into its reader, a part may need a copy, a cast changes the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from costmodels.program.program import Operation, Program

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


def uses_through(program: Program, value: int, is_passed: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
    """The uses of a value, and of the results of those that are passed: operations, and which of their operands it is.

    **Arguments:**

    - `is_passed`: whether to take the uses of an operation's results instead of the operation. Chains may have any length.
    """
    waiting, seen = [value], {value}
    while waiting:
        for at, position in program.consumers.get(waiting.pop(), ()):
            if not is_passed(at):
                yield at, position
                continue
            made = {use.value for use in program.operations[at].outputs} - seen
            seen |= made
            waiting += sorted(made)
