"""The mapping from solver integers to the program: strategies, layouts, and the collectives in execution order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.formulation.collective_steps import CollectiveStep
from search.formulation.intra_op import closing, payload
from search.formulation.layouts import Axes, Layout
from search.formulation.overlap import LOOPED_KINDS
from search.formulation.problem import Problem
from search.formulation.reshard import reshard_table, step_seconds, wire_seconds
from search.formulation.strategies import Strategy, input_layout, output_layout
from search.formulation.strategy_costs import product_seconds


@dataclass(frozen=True)
class Choice:
    """A plan in the search's terms: one strategy per operation, and one layout per value that has several uses."""

    strategies: tuple[Strategy, ...]
    hubs: Mapping[int, Layout]


@dataclass(frozen=True)
class Move:
    """A reshard of a value from one layout to another, for one use (operation, operand).

    (-1, -1) stands for the value's hub. Operand -1 stands for a result that another phase takes over.
    """

    value: int
    source: Layout
    target: Layout
    region: int
    operation: int
    operand: int


@dataclass(frozen=True)
class Collective:
    """A planned collective: kind, axes, payload bytes per chip, runs per step, and seconds of all runs.

    `operation` and `operand` identify the use that the value is resharded for, as in `Move`. `hidden_seconds` are
    the further seconds of all runs that overlap with the product that the collective is looped with.
    """

    kind: str
    axes: Axes
    bytes: float
    count: float
    seconds: float
    value: int
    operation: int
    operand: int = 0
    hidden_seconds: float = 0.0


def choice_of(problem: Problem, states: np.ndarray) -> Choice:
    """Reads the plan off the chosen states."""
    chosen = [node.states[s] for node, s in zip(problem.nodes, states, strict=True)]
    strategies = tuple(map(chosen.__getitem__, problem.of_operation))
    return Choice(strategies, {value: chosen[node] for value, node in problem.of_hub.items()})


def states_of(problem: Problem, choice: Choice) -> np.ndarray:
    """The chosen state of every node."""
    chosen = [
        choice.strategies[node.operation] if node.operation >= 0 else choice.hubs[node.value] for node in problem.nodes
    ]
    return np.array([node.states.index(state) for node, state in zip(problem.nodes, chosen, strict=True)])


def produced(program: Program, choice: Choice, value: int) -> Layout:
    """The layout in which a value's producer leaves it."""
    operation, position = program.producers[value]
    return output_layout(program.operations[operation].signature, choice.strategies[operation], position)


def kept(program: Program, choice: Choice, value: int) -> Layout:
    """The layout in which a value is kept: its hub's, or its producer's without a hub."""
    return choice.hubs.get(value) or produced(program, choice, value)


def needed(program: Program, choice: Choice, operation: int, operand: int) -> Layout:
    """The layout that an operation requires for an operand."""
    return input_layout(program.operations[operation].signature, choice.strategies[operation], operand)


def moves(program: Program, choice: Choice) -> Iterator[Move]:
    """Every reshard, in program order of the values."""
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


def steps(program: Program, topology: Topology, move: Move) -> tuple[CollectiveStep, ...]:
    """The collectives of one reshard, in order."""
    array = program.values[move.value]
    partial = bool(move.source.partial or move.target.partial)
    return reshard_table(array.shape, array.itemsize, topology, partial).path(move.source, move.target)


def products_behind(
    program: Program, topology: Topology, choice: Choice, move: Move, path: Sequence[CollectiveStep]
) -> tuple[int | None, ...]:
    """Per step of a reshard the product that it is looped with, if any.

    A product's strategy names the looped collective: the reduce-scatter that begins the reshard of its result, or the
    all-gather that ends the reshard of an operand. It is looped only if it runs as often as the product.
    """
    found: list[int | None] = [None] * len(path)
    if not topology.pricing.looped or not path:
        return tuple(found)
    for at, kind, (product, which) in zip((0, -1), LOOPED_KINDS[::-1], _neighbours(program, choice, move), strict=True):
        op = program.operations[product]
        if product < 0 or op.op_class != "matmul" or op.region != move.region:
            continue
        if path[at].kind == kind and choice.strategies[product].looped == which:
            found[at] = product
    return tuple(found)


def _neighbours(program: Program, choice: Choice, move: Move) -> tuple[tuple[int, int], tuple[int, int]]:
    """The operations that produce and consume the array (-1 for none), and the index of the result or operand."""
    handed_over = move.operation >= 0 > move.operand
    kept_first = move.operation >= 0 and move.value in choice.hubs
    made = -1 if handed_over or kept_first else program.producers[move.value][0]
    return (made, -1), (-1 if handed_over else move.operation, move.operand)


def hidden_of(
    program: Program, topology: Topology, choice: Choice, move: Move, step: CollectiveStep, product: int
) -> float:
    """Seconds of all runs of a collective that overlap with the product that it is looped with."""
    sent = step.payload(program.values[move.value].bytes, topology.axis_sizes)
    part = 1 - 1 / prod(topology.axis_sizes[axis] for axis in step.axes)
    wire = float(wire_seconds(step.kind, step.axes, sent, topology))
    pieces = [[prod(topology.axis_sizes[axis] for axis in axes) for axes in choice.strategies[product].splits]]
    done = product_seconds(program, program.operations[product], np.array(pieces, dtype=float), topology)
    return min(wire, part * float(done[0])) * program.multiplicity(move.region)


def looped(program: Program, topology: Topology, choice: Choice) -> Choice:
    """The same layouts, where each product loops the collective that it hides most of, if `topology` prices loops."""
    best: dict[int, tuple[float, int]] = {}
    for which in sorted({-1, *(k for _, op in program.matmuls() for k in range(len(op.inputs)))}):
        each = _all_looping(choice, which)
        hidden: dict[int, float] = {}
        for move in moves(program, each):
            path = steps(program, topology, move)
            behind = products_behind(program, topology, each, move, path)
            for step, product in zip(path, behind, strict=True):
                if product is not None:
                    saved = hidden_of(program, topology, each, move, step, product)
                    hidden[product] = hidden.get(product, 0.0) + saved
        for product, saved in hidden.items():
            best[product] = max(best.get(product, (0.0, -1)), (saved, which))
    strategies = [s._replace(looped=best[i][1] if i in best else None) for i, s in enumerate(choice.strategies)]
    return Choice(tuple(strategies), choice.hubs)


def _all_looping(choice: Choice, which: int) -> Choice:
    return Choice(tuple(strategy._replace(looped=which) for strategy in choice.strategies), choice.hubs)


def collectives(program: Program, topology: Topology, choice: Choice) -> tuple[Collective, ...]:
    """Every planned collective, without local slices."""
    found = []
    for move in moves(program, choice):
        count = program.multiplicity(move.region)
        path = steps(program, topology, move)
        behind = products_behind(program, topology, choice, move, path)
        for step, product in zip(path, behind, strict=True):
            if step.kind == "slice":
                continue
            sent = step.payload(program.values[move.value].bytes, topology.axis_sizes)
            seconds = float(step_seconds(step.kind, step.axes, sent, topology)) * count
            hidden = 0.0 if product is None else hidden_of(program, topology, choice, move, step, product)
            place = (move.value, move.operation, move.operand)
            found.append(Collective(step.kind, step.axes, sent, count, seconds - hidden, *place, hidden))
    return (*found, *_inside(program, topology, choice))


def _inside(program: Program, topology: Topology, choice: Choice) -> Iterator[Collective]:
    """The collectives that run within operations."""
    for i, op in enumerate(program.operations):
        for each in closing(op, choice.strategies[i], topology):
            sent = payload(program, op, choice.strategies[i], each, topology)
            count = program.multiplicity(op.region)
            seconds = float(step_seconds(each.kind, each.axes, sent, topology)) * count
            yield Collective(each.kind, each.axes, sent, count, seconds, op.outputs[each.result].value, i)
