"""The checker's seconds of the collectives within operations."""

from __future__ import annotations

from math import prod

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.program.program import REDUCED_INSIDE, Program
from search.answer.assignment import Choice, produced_layout
from search.answer.check_grouped import dispatched_seconds
from search.formulation.intra_op import exchange_axes, gathers
from search.formulation.layouts import shards


def inside_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    """Seconds of the collectives within all runs of an operation."""
    op = program.operations[i]
    total = dispatched_seconds(program, topology, op, choice.strategies[i].splits)
    for factor, axes in zip(op.factors, choice.strategies[i].splits, strict=True):
        if factor.kind in REDUCED_INSIDE and axes:
            value = op.outputs[0].value
            local = program.values[value].bytes / shards(produced_layout(program, choice, value), topology.axis_sizes)
            total += float(seconds_on(topology, "all-reduce", axes, local))
    total += _gathered_seconds(program, topology, choice, i) + _exchanged_seconds(program, topology, choice, i)
    return total * program.multiplicity(op.region)


def _exchanged_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    """Seconds of the permutations within one run of an operation.

    A payload is one part of an operand's or a result's shard.
    """
    op, splits, sizes = program.operations[i], choice.strategies[i].splits, topology.axis_sizes
    total = 0.0
    for f, (factor, axes) in enumerate(zip(op.factors, splits, strict=True)):
        if factor.kind == "exchanged" and axes:
            sides = (op.inputs, op.outputs) if (f,) in op.inputs[0].dims else (op.outputs, op.inputs)
            local = [
                op.factors[k].size / prod(sizes[axis] for axis in splits[k]) for dim in sides[0][0].dims for k in dim
            ]
            sent = program.values[sides[0][0].value].itemsize * prod(local)
            for moved in exchange_axes(len(sides[0]), axes, topology):
                total += float(seconds_on(topology, "collective-permute", moved, sent))
    return total


def _gathered_seconds(program: Program, topology: Topology, choice: Choice, i: int) -> float:
    """Seconds of the all-gathers within one run of an operation: of results, or of one element along the factor."""
    op, splits, sizes = program.operations[i], choice.strategies[i].splits, topology.axis_sizes
    pieces = [prod(sizes[axis] for axis in split) for split in splits]
    total = 0.0
    for f, (factor, axes) in enumerate(zip(op.factors, splits, strict=True)):
        if factor.kind != "gathered":
            continue
        for use in op.outputs:
            others = [k for dim in use.dims for k in dim if k != f]
            sent = program.values[use.value].itemsize * prod(op.factors[k].size / pieces[k] for k in others)
            for step in gathers(axes, topology) if axes else ():
                sent *= prod(sizes[axis] for axis in step.axes)
                total += float(seconds_on(topology, step.kind, step.axes, sent))
    return total
