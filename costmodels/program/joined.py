"""Programs of several phases, each with its weight in the sum of their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from costmodels.program.program import Operation, Program, Region, Use, Value


@dataclass(frozen=True)
class Span:
    """The place of a phase in the joined program: the offsets of its operations, values, arguments and results."""

    operations: int
    values: int
    arguments: int
    results: int


def join(programs: Sequence[Program], weights: Sequence[float]) -> tuple[Program, tuple[Span, ...]]:
    """One program of several phases that run serially and share no memory.

    **Arguments:**

    - `weights`: the number of runs of each phase, which may be a fraction: for example 1 prefill and 64 decode steps.

    **Returns:** the program, whose cost is the weighted sum of the phases' costs, and the place of each phase in it.
    """
    values, operations, arguments, constants, results, donated = [], [], [], [], [], []
    regions, spans = [Region("main")], []
    for program, weight in zip(programs, weights, strict=True):
        span = Span(len(operations), len(values), len(arguments), len(results))
        first = len(regions)
        spans.append(span)
        for region in program.regions:
            parent = 0 if region.parent is None else region.parent + first
            kind, count = ("phase", weight) if region.parent is None else (region.kind, region.count)
            regions.append(Region(kind, parent, count, region.name or program.name))
        values += [_shift_value(value, span, first) for value in program.values]
        operations += [_shift(op, span, first) for op in program.operations]
        arguments += [at + span.operations for at in program.arguments]
        constants += [at + span.operations for at in program.constants]
        results += [at + span.operations for at in program.results]
        donated += [(a + span.arguments, r + span.results) for a, r in program.donated]
    joined = Program(
        " + ".join(program.name for program in programs),
        tuple(values),
        tuple(operations),
        tuple(regions),
        tuple(arguments),
        tuple(constants),
        tuple(results),
        tuple(donated),
        tuple(dict.fromkeys(warning for program in programs for warning in program.warnings)),
        tuple(span.operations for span in spans),
    )
    return joined, tuple(spans)


def _shift_value(value: Value, span: Span, regions: int) -> Value:
    origin = None if value.origin is None else value.origin + span.values
    return replace(value, region=value.region + regions, origin=origin)


def _shift(op: Operation, span: Span, regions: int) -> Operation:
    def shift_uses(uses: Sequence[Use]) -> tuple[Use, ...]:
        return tuple(Use(use.value + span.values, use.dims, use.region + regions) for use in uses)

    return replace(op, inputs=shift_uses(op.inputs), outputs=shift_uses(op.outputs), region=op.region + regions)
