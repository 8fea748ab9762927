"""The cost of a plan's padding: padded elements, masks, and calls whose arrays come or go without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from autoshard._util.tables import percent, size, time
from autoshard.annotating.padding import Padding, occurrences_of
from autoshard.planning.records import ArrayPlan, PlanRecord
from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.operations import price
from costmodels.program.program import Program
from search.answer.assignment import Choice


@dataclass(frozen=True)
class PaddedDimension:
    """One padded dimension: its name, its sizes, and what its padding adds on one chip.

    - `name`: the first argument that has the dimension, or else the first array.
    - `arguments`: the number of arguments and closed-over constants with the dimension.
    - `bytes`: of these arrays; `flops`: of matmuls in one step.
    """

    name: str
    size: int
    padded: int
    arguments: int
    bytes: float
    flops: float


@dataclass(frozen=True)
class PaddingCost:
    """The costs of a plan's padding.

    - `masks`, `mask_seconds`: the masked operands, and the seconds of their masks in one step, which the step includes.
    - `call_seconds`: the least time that a call takes to pad all its arguments; the step does not include it.
    - `cut_seconds`: the least time that a call takes to cut its results; the step does not include it.
    """

    dimensions: tuple[PaddedDimension, ...]
    masks: int
    mask_seconds: float
    call_seconds: float
    cut_seconds: float


def padding_cost(plan: PlanRecord) -> PaddingCost:
    """The cost of a plan's padding.

    **Raises:** `MissingProgramError` for a plan from an older file, which lacks its program.
    """
    program = plan.require_program()
    masks, seconds = mask_seconds(program, plan.topology, plan.choice)
    return PaddingCost(
        tuple(_dimension(plan, program, each) for each in plan.padding),
        masks,
        seconds,
        sum(rewrite_seconds(row, plan.topology) for row in plan.arguments if row.padding),
        cut_seconds(plan.results, program, plan.topology, plan.handed_results),
    )


def mask_seconds(program: Program, topology: Topology, choice: Choice) -> tuple[int, float]:
    """The number of masked operands, and the seconds of their masks in one step."""
    count, total = 0, 0.0
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        if not op.masked:
            continue
        shards = np.array([[float(prod(topology.axis_sizes[axis] for axis in split)) for split in strategy.splits]])
        with_masks, without = (
            float(price(program, each, shards, topology.chip, load=topology.pricing.expert_load).seconds[0])
            for each in (op, replace(op, masked=()))
        )
        count += len(op.masked)
        total += program.multiplicity(op.region) * (with_masks - without)
    return count, total


def cut_seconds(results: Sequence[ArrayPlan], program: Program, topology: Topology, kept: Sequence[int] = ()) -> float:
    """The least seconds that a call takes to cut its results, but those that replace a donated argument or are `kept`."""
    uncut = {*kept, *(result for _, result in program.donated)}
    return sum(_cut_seconds(row, topology) for k, row in enumerate(results) if k not in uncut)


def repeated_seconds(
    arguments: Sequence[ArrayPlan], results: Sequence[ArrayPlan], program: Program, topology: Topology
) -> float:
    """The least seconds that a call takes to pad donated arguments that come without padding, and to cut their results."""
    padded = sum(rewrite_seconds(row, topology) for row in arguments if row.donated and row.padding)
    return padded + sum(_cut_seconds(results[result], topology) for _, result in program.donated)


def _cut_seconds(row: ArrayPlan, topology: Topology) -> float:
    """Seconds to cut an array. A cut dimension is gathered first, because the mesh does not divide it."""
    return _gather_seconds(row, topology) + rewrite_seconds(row, topology) if row.padding else 0.0


def padding_notes(plan: PlanRecord) -> Iterator[str]:
    """Sentences about the cost of a plan's padding."""
    if not plan.padding:
        return
    cost = padding_cost(plan)
    done = sum(op.flops for op in plan.operations if op.matmul)
    more = sum(each.flops for each in cost.dimensions)
    yield (
        f"padding adds {size(sum(each.bytes for each in cost.dimensions))} of arguments per chip"
        f" and {percent(more / done if done else 0.0)} of the matmuls' FLOPs; its {cost.masks} masks take"
        f" {time(cost.mask_seconds)} of the step"
    )
    if cost.call_seconds:
        yield (
            f"a call whose arguments come without padding takes at least {time(cost.call_seconds)} more to pad them all;"
            " plan.place(...) pads once"
        )
    if cost.cut_seconds:
        yield f"each call takes at least {time(cost.cut_seconds)} more to cut its results"


def _dimension(plan: PlanRecord, program: Program, padding: Padding) -> PaddedDimension:
    found = occurrences_of(program, replace(padding, size=padding.padded))
    values = {value for value, _ in found.values}
    sources = (*program.arguments, *program.constants)
    rows = [
        row for at, row in zip(sources, plan.sources, strict=True) if program.operations[at].outputs[0].value in values
    ]
    part = 1 - padding.size / padding.padded
    return PaddedDimension(
        rows[0].path if rows else program.values[padding.value].name,
        padding.size,
        padding.padded,
        len(rows),
        part * sum(row.bytes_per_chip for row in rows),
        part * sum(plan.operations[at].flops for at in {at for at, _ in found.factors} if plan.operations[at].matmul),
    )


def rewrite_seconds(row: ArrayPlan, topology: Topology) -> float:
    """Seconds to read an array and write it with another size, if its chips have their shards already."""
    return 2 * row.bytes_per_chip / topology.chip.reached_hbm_bytes_per_second


def _gather_seconds(row: ArrayPlan, topology: Topology) -> float:
    """Seconds to gather an array along its padded dimensions."""
    axes = [axis for dim in sorted({each.dim for each in row.padding}) for axis in row.layout.dims[dim]]
    whole = row.bytes_per_chip * prod(topology.axis_sizes[axis] for axis in axes)
    return float(seconds_on(topology, "all-gather", axes, whole))
