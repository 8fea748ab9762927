"""The collectives that run within operations along a split factor.

A maximum over a split dimension is closed by an all-reduce. A factor of kind `gathered` is closed by all-gathers: of what each
chip has found, where the results do not have the factor, such as the best of its piece; else of one element along it, such as
the total of its piece of a running sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from costmodels.program import REDUCED_INSIDE, Operation, Program
from costmodels.topology import Topology
from search.layouts import Axes, Layout, shards
from search.reshard import Step, emittable
from search.strategies import Strategy, output_layout


class Inside(NamedTuple):
    """A collective within an operation.

    - `factor`: along which it runs; `result`: whose pieces it works on; `layout`: that of the result.
    - `thinned`: whether one element along the factor takes part, not a chip's piece; `copies`: the axes whose chips' parts its
      payload holds beside one another.
    """

    kind: str
    axes: Axes
    factor: int
    result: int
    layout: Layout
    thinned: bool = False
    copies: Axes = ()


def closing(op: Operation, strategy: Strategy, topology: Topology) -> Iterator[Inside]:
    """The collectives that run within an operation, in order."""
    for i, (factor, axes) in enumerate(zip(op.factors, strategy.splits, strict=True)):
        if axes and factor.kind in REDUCED_INSIDE:
            yield Inside("all-reduce", axes, i, 0, output_layout(op.signature, strategy, 0))
        elif axes and factor.kind == "gathered":
            for k, use in enumerate(op.outputs):
                layout, thinned = output_layout(op.signature, strategy, k), any(i in dim for dim in use.dims)
                for step in gathers(axes, topology):
                    copies = tuple(axis for axis in axes if axis not in step.target.axes)
                    yield Inside(step.kind, step.axes, i, k, layout, thinned, copies)


def gathers(axes: Axes, topology: Topology) -> tuple[Step, ...]:
    """How an array of one element per chip along these axes is gathered: at once, if the compiler leaves that as it is."""
    spread, whole = Layout((axes,)), Layout(((),))
    at_once = Step("all-gather", axes, spread, whole, source_dim=0)
    if emittable(at_once, (1,), 1, topology):
        return (at_once,)
    major = Layout((axes[:1],))
    minor = Step("all-gather", axes[1:], spread, major, source_dim=0)
    return (minor, Step("all-gather", axes[:1], major, whole, source_dim=0))


def payload(program: Program, op: Operation, strategy: Strategy, found: Inside, topology: Topology) -> float:
    """Bytes of a collective within an operation, by the collectives' convention."""
    sizes = topology.axis_sizes
    part = program.values[op.outputs[found.result].value].bytes / shards(found.layout, sizes)
    if found.thinned:
        part /= op.factors[found.factor].size / prod(sizes[axis] for axis in strategy.splits[found.factor])
    return part * prod(sizes[axis] for axis in found.copies)
