"""From solver integers back to the program: strategies, layouts, and the collectives in the order they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from costmodels.program import Program
from costmodels.topology import Topology
from search.layouts import Axes, Layout, shards
from search.problem import Problem
from search.reshard import Step, reshard_table, step_seconds
from search.strategies import Strategy, input_layout, output_layout


@dataclass(frozen=True)
class Choice:
    """A plan as the search sees it: one strategy per operation, and the layout each value with several uses is kept in."""

    strategies: tuple[Strategy, ...]
    hubs: Mapping[int, Layout]


@dataclass(frozen=True)
class Move:
    """A change of layout: of which value, between which layouts, for which use (operation, operand).

    (-1, -1) stands for the value's hub, and the operand -1 of a result for the phase that takes it over.
    """

    value: int
    source: Layout
    target: Layout
    region: int
    operation: int
    operand: int


@dataclass(frozen=True)
class Collective:
    """A planned collective: kind, axes, payload bytes per chip, executions in one step, seconds of all of them.

    `operation` and `operand` say for which use a value changes layout, as a `Move` does.
    """

    kind: str
    axes: Axes
    bytes: float
    count: float
    seconds: float
    value: int
    operation: int
    operand: int = 0


def choice_of(problem: Problem, states: np.ndarray) -> Choice:
    """Reads the plan off the chosen states."""
    chosen = [node.states[s] for node, s in zip(problem.nodes, states, strict=True)]
    strategies = tuple(chosen[node] for node in problem.of_operation)
    return Choice(strategies, {value: chosen[node] for value, node in problem.of_hub.items()})


def states_of(problem: Problem, choice: Choice) -> np.ndarray:
    """The chosen state of every node."""
    chosen = [
        choice.strategies[node.operation] if node.operation >= 0 else choice.hubs[node.value] for node in problem.nodes
    ]
    return np.array([node.states.index(state) for node, state in zip(problem.nodes, chosen, strict=True)])


def produced(program: Program, choice: Choice, value: int) -> Layout:
    """The layout that a value's producer leaves it in."""
    operation, position = program.producers[value]
    return output_layout(program.operations[operation].signature, choice.strategies[operation], position)


def kept(program: Program, choice: Choice, value: int) -> Layout:
    """The layout that a value is kept in: its hub's, or its producer's."""
    return choice.hubs.get(value) or produced(program, choice, value)


def needed(program: Program, choice: Choice, operation: int, operand: int) -> Layout:
    """The layout that an operation needs an operand in."""
    return input_layout(program.operations[operation].signature, choice.strategies[operation], operand)


def moves(program: Program, choice: Choice) -> Iterator[Move]:
    """Every change of layout, in program order of the values."""
    for value, uses in sorted(program.consumers.items()):
        if value not in program.producers:
            continue
        home = kept(program, choice, value)
        made = produced(program, choice, value)
        if made != home:
            yield Move(value, made, home, program.values[value].region, -1, -1)
        for operation, operand in uses:
            target = needed(program, choice, operation, operand)
            if target != home:
                region = program.operations[operation].inputs[operand].region
                yield Move(value, home, target, region, operation, operand)
    for result, argument in program.handoffs:
        sink = program.results[result]
        use = program.operations[sink].inputs[0]
        given = needed(program, choice, sink, 0)
        taken = output_layout(
            program.operations[program.arguments[argument]].signature,
            choice.strategies[program.arguments[argument]],
            0,
        )
        if given != taken:
            yield Move(use.value, given, taken, use.region, sink, -1)


def steps(program: Program, topology: Topology, move: Move) -> tuple[Step, ...]:
    """The collectives of one change of layout, in order."""
    array = program.values[move.value]
    partial = bool(move.source.partial or move.target.partial)
    return reshard_table(array.shape, array.itemsize, topology, partial).path(move.source, move.target)


def collectives(program: Program, topology: Topology, choice: Choice) -> tuple[Collective, ...]:
    """Every planned collective, local slices left out."""
    found = []
    for move in moves(program, choice):
        count = program.multiplicity(move.region)
        for step in steps(program, topology, move):
            if step.kind == "slice":
                continue
            payload = step.payload(program.values[move.value].bytes, topology.axis_sizes)
            seconds = float(step_seconds(step.kind, step.axes, payload, topology)) * count
            found.append(
                Collective(step.kind, step.axes, payload, count, seconds, move.value, move.operation, move.operand)
            )
    return (*found, *_inside(program, topology, choice))


def _inside(program: Program, topology: Topology, choice: Choice) -> Iterator[Collective]:
    """The all-reduces that run within operations."""
    for i, op in enumerate(program.operations):
        for factor, axes in zip(op.factors, choice.strategies[i].splits, strict=True):
            if factor.kind in ("max", "min", "and", "or") and axes:
                value = op.outputs[0].value
                layout = output_layout(op.signature, choice.strategies[i], 0)
                payload = program.values[value].bytes / shards(layout, topology.axis_sizes)
                count = program.multiplicity(op.region)
                seconds = float(step_seconds("all-reduce", axes, payload, topology)) * count
                yield Collective("all-reduce", axes, payload, count, seconds, value, i)
