"""The mapping from solver integers to the program: strategies, layouts, and the collectives in execution order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from costmodels.machine.topology import Topology
from costmodels.operations import price
from costmodels.program.program import Program
from search.formulation.collective_steps import CollectiveStep
from search.formulation.intra_op import intra_op_collectives, payload
from search.formulation.layouts import Axes, Layout
from search.formulation.overlap import LOOPED_KINDS
from search.formulation.problem import Problem
from search.formulation.reshard import reshard_table, step_seconds, wire_seconds
from search.formulation.rings import are_rings, may_ring, piece_seconds, ring_of, saved_seconds
from search.formulation.strategies import LoopedSide, Strategy, input_layout, output_layout
from search.formulation.strategy_costs import hiding_seconds, product_seconds


@dataclass(frozen=True)
class Choice:
    """A plan in the search's terms: one strategy per operation, and one layout per value that has several uses."""

    strategies: tuple[Strategy, ...]
    hubs: Mapping[int, Layout]


@dataclass(frozen=True)
class Move:
    """A reshard of a value from one layout to another, for one use (operation, operand).

    Without an operation it leads into the value's hub. Without an operand another phase takes the operation's operand
    over.
    """

    value: int
    source: Layout
    target: Layout
    region: int
    operation: int | None
    operand: int | None


@dataclass(frozen=True)
class Collective:
    """A planned collective: kind, axes, payload bytes per chip, runs per step, and seconds of all runs.

    `operation` and `operand` identify the use that the value is resharded for, as in `Move`. `hidden_seconds` are
    the further seconds of all runs that overlap with the product that the collective is looped with, or runs beside.
    """

    kind: str
    axes: Axes
    bytes: float
    count: float
    seconds: float
    value: int
    operation: int | None
    operand: int | None = 0
    hidden_seconds: float = 0.0


def choice_of(problem: Problem, states: np.ndarray) -> Choice:
    """Reads the plan off the chosen states."""
    chosen = [node.states[s] for node, s in zip(problem.nodes, states, strict=True)]
    strategies = tuple(map(chosen.__getitem__, problem.of_operation))
    return Choice(strategies, {value: chosen[node] for value, node in problem.of_hub.items()})


def states_of(problem: Problem, choice: Choice) -> np.ndarray:
    """The chosen state of every node."""
    chosen = [choice.hubs[node.of] if node.is_hub else choice.strategies[node.of] for node in problem.nodes]
    return np.array([node.states.index(state) for node, state in zip(problem.nodes, chosen, strict=True)])


def produced_layout(program: Program, choice: Choice, value: int) -> Layout:
    """The layout in which a value's producer leaves it."""
    operation, position = program.producers[value]
    return output_layout(program.operations[operation].signature, choice.strategies[operation], position)


def kept_layout(program: Program, choice: Choice, value: int) -> Layout:
    """The layout in which a value is kept: its hub's, or its producer's without a hub."""
    return choice.hubs.get(value) or produced_layout(program, choice, value)


def needed_layout(program: Program, choice: Choice, operation: int, operand: int) -> Layout:
    """The layout that an operation requires for an operand."""
    return input_layout(program.operations[operation].signature, choice.strategies[operation], operand)


def moves(program: Program, choice: Choice) -> Iterator[Move]:
    """Every reshard, in program order of the values."""
    for value, uses in sorted(program.consumers.items()):
        if value not in program.producers:
            continue
        made = produced_layout(program, choice, value)
        home = choice.hubs.get(value) or made
        if made != home:
            yield Move(value, made, home, program.values[value].region, None, None)
        for operation, operand in uses:
            target = needed_layout(program, choice, operation, operand)
            if target != home:
                region = program.operations[operation].inputs[operand].region
                yield Move(value, home, target, region, operation, operand)
    for result, argument in program.handoffs:
        sink = program.results[result]
        use = program.operations[sink].inputs[0]
        given = needed_layout(program, choice, sink, 0)
        taken = output_layout(
            program.operations[program.arguments[argument]].signature,
            choice.strategies[program.arguments[argument]],
            0,
        )
        if given != taken:
            yield Move(use.value, given, taken, use.region, sink, None)


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
        op = None if product is None else program.operations[product]
        if product is None or op is None or not may_ring(op) or op.region != move.region:
            continue
        if path[at].kind == kind and choice.strategies[product].looped == which:
            found[at] = product
    return tuple(found)


def products_at(program: Program, choice: Choice, move: Move) -> Iterator[tuple[int, LoopedSide]]:
    """The matmuls at the ends of a reshard that run as often, and the result or the index of the operand."""
    for product, side in _neighbours(program, choice, move):
        op = None if product is None else program.operations[product]
        if product is None or side is None or op is None:
            continue
        if op.op_class == "matmul" and op.region == move.region:
            yield product, side


def _neighbours(
    program: Program, choice: Choice, move: Move
) -> tuple[tuple[int | None, LoopedSide], tuple[int | None, LoopedSide | None]]:
    """The operations that produce and consume the array, if any, and its place among their results or operands."""
    if move.operation is not None and move.operand is None:
        return (None, "result"), (None, None)
    is_kept_first = move.operation is not None and move.value in choice.hubs
    made = None if is_kept_first else program.producers[move.value][0]
    return (made, "result"), (move.operation, move.operand)


def hidden_seconds_of(
    program: Program, topology: Topology, choice: Choice, move: Move, step: CollectiveStep, product: int
) -> float:
    """Seconds of all runs of a collective that overlap with the product that it is looped with.

    They are 0 if a ring would save nothing; the collective is then none.
    """
    sent = step.payload(program.values[move.value].bytes, topology.axis_sizes)
    part = 1 - 1 / prod(topology.axis_sizes[axis] for axis in step.axes)
    wire = float(wire_seconds(step.kind, step.axes, sent, topology))
    pieces = [[prod(topology.axis_sizes[axis] for axis in axes) for axes in choice.strategies[product].splits]]
    shards, op = np.array(pieces, dtype=float), program.operations[product]
    runs, which = program.multiplicity(move.region), choice.strategies[product].looped
    if which is None or not are_rings(topology.pricing):
        return min(wire, part * float(product_seconds(program, op, shards, topology)[0])) * runs
    ring = ring_of(step.kind, step.axes, sent, program.values[move.value].itemsize, topology)
    dim = step.source_dim if step.kind == "all-gather" else step.target_dim
    work = piece_seconds(program, op, which, dim, ring.chips, shards, topology)
    whole = price(program, op, shards, topology.chip).seconds
    return float(saved_seconds(ring, float(whole[0]), float(work[0]))) * runs


def hidden_beside(program: Program, topology: Topology, choice: Choice, move: Move) -> float:
    """Seconds of one run of a reshard that are hidden by the products at its ends, under asynchronous overlap."""
    found = 0.0
    for product, which in products_at(program, choice, move):
        op = program.operations[product]
        pieces = [[prod(topology.axis_sizes[axis] for axis in axes) for axes in choice.strategies[product].splits]]
        partial = np.array([bool(output_layout(op.signature, choice.strategies[product], 0).partial)])
        found += float(hiding_seconds(program, product, which, np.array(pieces, dtype=float), partial, topology)[0])
    return found


@dataclass(frozen=True)
class Ring:
    """A reshard of which one collective is emitted as a ring with a product.

    The product's `side` is the operand that is gathered by the last step of the `path`, or the result that is scattered by
    the first.
    """

    side: LoopedSide
    move: Move
    path: tuple[CollectiveStep, ...]

    @property
    def step(self) -> CollectiveStep:
        """The collective that becomes a ring."""
        return self.path[0] if self.side == "result" else self.path[-1]

    @property
    def others(self) -> tuple[CollectiveStep, ...]:
        """The steps after the scatter, or before the gather."""
        return self.path[1:] if self.side == "result" else self.path[:-1]


def rings(program: Program, topology: Topology, choice: Choice) -> dict[int, Ring]:
    """Per product the ring that is emitted with it; none where a ring would save no time."""
    found: dict[int, Ring] = {}
    for move in moves(program, choice) if topology.pricing.looped else ():
        path = steps(program, topology, move)
        for step, product in zip(path, products_behind(program, topology, choice, move, path), strict=True):
            side = None if product is None else choice.strategies[product].looped
            if product is None or side is None:
                continue
            if hidden_seconds_of(program, topology, choice, move, step, product) > 0:
                found[product] = Ring(side, move, path)
    return found


def loop_best(program: Program, topology: Topology, choice: Choice) -> Choice:
    """The same layouts, where each product loops the collective that it hides most of, if `topology` prices loops."""
    best: dict[int, tuple[float, LoopedSide]] = {}
    operands = max((len(op.inputs) for _, op in program.matmuls()), default=0)
    for which in ("result", *range(operands)):
        each = _loop_all(choice, which)
        hidden: dict[int, float] = {}
        for move in moves(program, each):
            path = steps(program, topology, move)
            behind = products_behind(program, topology, each, move, path)
            for step, product in zip(path, behind, strict=True):
                if product is not None:
                    saved = hidden_seconds_of(program, topology, each, move, step, product)
                    hidden[product] = hidden.get(product, 0.0) + saved
        for product, saved in hidden.items():
            if saved >= best.get(product, (0.0, which))[0]:
                best[product] = saved, which
    strategies = [s._replace(looped=best[i][1] if i in best else None) for i, s in enumerate(choice.strategies)]
    return Choice(tuple(strategies), choice.hubs)


def _loop_all(choice: Choice, which: LoopedSide) -> Choice:
    return Choice(tuple(strategy._replace(looped=which) for strategy in choice.strategies), choice.hubs)


def collectives(program: Program, topology: Topology, choice: Choice) -> tuple[Collective, ...]:
    """Every planned collective, without local slices."""
    sent = (each for each in _reshards(program, topology, choice) if each.kind != "slice")
    return (*sent, *_intra_op_collectives(program, topology, choice))


def local_slices(program: Program, topology: Topology, choice: Choice) -> tuple[Collective, ...]:
    """The local slices of all reshards: nothing is sent, but each is read from HBM and written."""
    return tuple(each for each in _reshards(program, topology, choice) if each.kind == "slice")


def _reshards(program: Program, topology: Topology, choice: Choice) -> Iterator[Collective]:
    """The steps of all reshards."""
    for move in moves(program, choice):
        count = program.multiplicity(move.region)
        path = steps(program, topology, move)
        behind = products_behind(program, topology, choice, move, path)
        part = _part_beside(program, topology, choice, move, path)
        for step, product in zip(path, behind, strict=True):
            sent = step.payload(program.values[move.value].bytes, topology.axis_sizes)
            seconds = float(step_seconds(step.kind, step.axes, sent, topology)) * count
            hidden = 0.0 if product is None else hidden_seconds_of(program, topology, choice, move, step, product)
            hidden += part * seconds
            place = (move.value, move.operation, move.operand)
            yield Collective(step.kind, step.axes, sent, count, seconds - hidden, *place, hidden)


def _part_beside(
    program: Program, topology: Topology, choice: Choice, move: Move, path: Sequence[CollectiveStep]
) -> float:
    """The part of a reshard's time that asynchronous overlap hides; the same of each step."""
    if not topology.pricing.asynchronous:
        return 0.0
    payloads = [step.payload(program.values[move.value].bytes, topology.axis_sizes) for step in path]
    pairs = zip(path, payloads, strict=True)
    whole = sum(float(step_seconds(step.kind, step.axes, sent, topology)) for step, sent in pairs)
    return min(1.0, hidden_beside(program, topology, choice, move) / whole) if whole else 0.0


def _intra_op_collectives(program: Program, topology: Topology, choice: Choice) -> Iterator[Collective]:
    """The collectives that run within operations."""
    for i, op in enumerate(program.operations):
        for each in intra_op_collectives(op, choice.strategies[i], topology):
            sent = payload(program, op, choice.strategies[i], each, topology)
            count = program.multiplicity(op.region)
            seconds = float(step_seconds(each.kind, each.axes, sent, topology)) * count
            value = op.outputs[each.result].value if each.sent is None else op.use(each.sent).value
            yield Collective(each.kind, each.axes, sent, count, seconds, value, i)
