"""The independent checker: recomputes the cost and the memory of a plan from the program alone.

It shares the definition of a plan (strategies, layouts, steps, looped collectives) and the physical prices with the
solver, but none of its arrays. Costs are plain arithmetic over factors.
The modules beside it named `check_*` count the seconds of operations and the collectives within them
(`check_operations`), reshards (`check_reshards`) and what hides them (`check_overlap`), and the memory (`check_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from costmodels.machine.topology import Topology
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, Move, Strategy, moves, needed_layout, produced_layout
from search.answer.check_grouped import own_splits
from search.answer.check_memory import alive_bytes
from search.answer.check_operations import inside_seconds, operation_seconds
from search.answer.check_overlap import looped_seconds, seconds_beside
from search.answer.check_reshards import CheapestReshard
from search.formulation.layouts import divides


@dataclass(frozen=True)
class Check:
    """The recomputed cost of a plan: seconds of one step, peak bytes per chip and their place, and the faults found."""

    seconds: float
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    peak_bytes: float
    peak_operation: int
    faults: tuple[str, ...]


def check(program: Program, topology: Topology, choice: Choice) -> Check:
    """Recomputes a plan's cost and memory.

    **Returns:** a `Check`; `faults` names operations that do not divide, layouts that use an axis twice, and reshards
    that no sequence of collectives makes.
    """
    faults = [*_faults(program, topology, choice)]
    total = compute = memory = 0.0
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        runs = program.multiplicity(op.region)
        cost = operation_seconds(program, topology, op, strategy.splits)
        total += runs * (cost.running + cost.start)
        compute, memory = compute + runs * cost.compute, memory + runs * cost.memory
    wire = 0.0
    cheapest = CheapestReshard(program, topology)
    moved = tuple(moves(program, choice))
    for move in moved:
        price = cheapest(move)
        if price is None:
            faults.append(f"{program.values[move.value].name}: no collectives lead from {move.source} to {move.target}")
            continue
        hidden = min(price, seconds_beside(program, topology, choice, move)) + looped_seconds(
            program, topology, choice, move
        )
        wire += (price - hidden) * program.multiplicity(move.region)
    wire += sum(inside_seconds(program, topology, choice, i) for i in range(len(program.operations)))
    peak, at = _peak(program, topology, choice, moved)
    return Check(total + wire, compute, memory, wire, peak, at, tuple(faults))


def _faults(program: Program, topology: Topology, choice: Choice) -> Iterator[str]:
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        yield from _strategy_faults(topology, op, strategy)
    for value, layout in choice.hubs.items():
        if not divides(program.values[value].shape, layout, topology.axis_sizes):
            yield f"{program.values[value].name}: {layout} does not divide {program.values[value].shape}"
    for argument, result in program.donated:
        given = produced_layout(program, choice, program.operations[program.arguments[argument]].outputs[0].value)
        taken = needed_layout(program, choice, program.results[result], 0)
        if given != taken:
            yield f"donated argument {argument} has {given}, its result {taken}"


def _strategy_faults(topology: Topology, op: Operation, strategy: Strategy) -> Iterator[str]:
    """Axes that are used twice, and factors that cannot be split as the strategy says."""
    used = [axis for split in (*own_splits(op, strategy.splits), *strategy.carried) for axis in split]
    if len(set(used)) != len(used):
        yield f"{op.name}: an axis is used twice in {strategy}"
    for factor, split in zip(op.factors, strategy.splits, strict=True):
        pieces = prod(topology.axis_sizes[axis] for axis in split)
        if factor.size % pieces or (split and factor.kind == "whole"):
            yield f"{op.name}: a factor of size {factor.size} ({factor.kind}) cannot be split over {split}"
        if factor.kind == "gathered" and split and factor.size < _new_elements(op) * pieces:
            yield (
                f"{op.name}: a piece of {factor.size} over {split} has fewer elements"
                f" than the {_new_elements(op)} of the result"
            )


def _new_elements(op: Operation) -> int:
    """The number of elements that the results have along factors that no operand has."""
    given = {i for use in op.inputs for dim in use.dims for i in dim}
    return prod(op.factors[i].size for i in {i for use in op.outputs for dim in use.dims for i in dim} - given)


def _peak(program: Program, topology: Topology, choice: Choice, moved: Sequence[Move]) -> tuple[float, int]:
    """The most bytes alive at any point, and that point."""
    alive = alive_bytes(program, topology, choice, moved)
    peak = max(alive, default=0.0)
    return peak, alive.index(peak) if alive else 0
