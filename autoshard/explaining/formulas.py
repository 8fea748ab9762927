"""The cost of a plan in closed form: per operation, per kind of operation, per region, and for the whole step.

The formulas are those of the search (`costmodels.operations`, `costmodels.machine.collectives`), with named dimensions
for factor sizes, products of axis sizes for shard counts, and symbols for rates. At the plan's numbers they are its estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from costmodels.dimensions import Dimensions
from costmodels.grouped_costs import between_elements, sent_rows
from costmodels.machine.chips import Chip
from costmodels.machine.lazy_sympy import sympy
from costmodels.machine.rings import has_two_ways, piece_slowdown, summands, waiting_times
from costmodels.machine.topology import Topology
from costmodels.operations import (
    arriving_bytes,
    converted_elements,
    flops,
    hbm_bytes,
    is_free,
    on_chip_symbol,
    padded_flops,
    prefetched_bytes,
    reads_while_starting,
    shards_symbol,
    size_symbol,
    vector_elements,
)
from costmodels.program.asynchronous import is_deferred, is_fused_into_reads, is_lender, lenders, static_operands
from costmodels.program.grouped import grouped
from costmodels.program.program import Operation, Program
from costmodels.program.vector_passes import REGISTER, ends_pass, is_streamed, waits_for_reads
from costmodels.symbols import (
    Expr,
    asynchronous_seconds,
    collective_seconds,
    evaluate,
    hop_seconds,
    operation_seconds,
    pieces,
    rate,
    rates,
    spare_seconds,
    substitute,
    volume,
)
from search.answer.assignment import Choice, Move, moves, products_at, products_behind, steps
from search.formulation.collective_steps import CollectiveStep
from search.formulation.intra_op import intra_op_collectives
from search.formulation.layouts import Axes
from search.formulation.rings import are_rings, is_summed, piece_factor
from search.formulation.strategies import output_layout

_ZERO = sympy.Integer(0)


class Cost(NamedTuple):
    """Closed forms of one chip's work.

    - `flops`: floating-point operations; `hbm_bytes`: the traffic between HBM and the compute units.
    - `wire_bytes`: the bytes that it sends in collectives.
    - `local_seconds`: operations; `collective_seconds`: collectives, and the local slices of reshards.
    """

    flops: Expr = _ZERO
    hbm_bytes: Expr = _ZERO
    wire_bytes: Expr = _ZERO
    local_seconds: Expr = _ZERO
    collective_seconds: Expr = _ZERO

    @property
    def seconds(self) -> Expr:
        """The whole time; overlap is already subtracted from the collectives."""
        return self.local_seconds + self.collective_seconds

    def times(self, count: Expr) -> Cost:
        """The cost of `count` runs."""
        return Cost(*(count * each for each in self))


def sum_costs(costs: Iterator[Cost] | Sequence[Cost]) -> Cost:
    """The sum of costs."""
    columns = zip(*costs, strict=True)
    return Cost(*(sympy.Add(*column) for column in columns)) if (costs := list(costs)) else Cost()


@dataclass(frozen=True)
class StepFormula:
    """One collective (or local slice) of the plan: its payload in bytes by the collectives' convention, and one run's cost.

    `operation` is the consumer, or `None` for a reshard right after the producer; it runs in `region`.
    """

    kind: str
    axes: Axes
    value: int
    operation: int | None
    region: int
    payload: Expr
    cost: Cost


@dataclass(frozen=True)
class Formulas:
    """A plan's cost in closed form; made by `formulas_of`.

    - `operations`: per operation of the program its cost in one run, without collectives; `steps`: the collectives.
    - `numbers`: the value of every symbol, by name: dimensions, axis sizes, rates.
    """

    program: Program
    dimensions: Dimensions
    operations: tuple[Cost, ...]
    steps: tuple[StepFormula, ...]
    numbers: Mapping[str, float]

    def at(self, expression: Expr, **other: float) -> float:
        """The value of an expression at the plan's numbers, with `other` values for some symbols."""
        return evaluate(expression, {**self.numbers, **other})

    def runs(self, region: int) -> Expr:
        """The number of runs of a region in one step of the program."""
        return self.dimensions.runs(self.program, region)

    @cached_property
    def total(self) -> Cost:
        """The whole step."""
        return sum_costs([*self._operations_in_step(), *self._steps_in_step()])

    def of_operation(self, i: int) -> Cost:
        """One operation with its collectives, in one step of the program."""
        own = self.operations[i].times(self.runs(self.program.operations[i].region))
        made = {use.value for use in self.program.operations[i].outputs}
        mine = [s for s in self.steps if s.operation == i or (s.operation is None and s.value in made)]
        return sum_costs([own, *(step.cost.times(self.runs(step.region)) for step in mine)])

    def by_kind(self, kind: Callable[[int, Operation], str] = lambda i, op: op.op_class) -> dict[str, Cost]:
        """The step by kind of operation and kind of collective; by default by `op_class`."""
        groups: dict[str, list[Cost]] = {}
        for i, cost in enumerate(self._operations_in_step()):
            groups.setdefault(kind(i, self.program.operations[i]), []).append(cost)
        for step, cost in zip(self.steps, self._steps_in_step(), strict=True):
            groups.setdefault(step.kind, []).append(cost)
        return {name: cost for name, costs in groups.items() if any(cost := sum_costs(costs))}

    def by_region(self) -> dict[int, Cost]:
        """Per region the cost of one run, without inner regions; for a loop over layers, one layer."""
        groups: dict[int, list[Cost]] = {}
        for op, cost in zip(self.program.operations, self.operations, strict=True):
            groups.setdefault(op.region, []).append(cost)
        for step in self.steps:
            groups.setdefault(step.region, []).append(step.cost)
        return {region: sum_costs(costs) for region, costs in sorted(groups.items())}

    def _operations_in_step(self) -> Iterator[Cost]:
        pairs = zip(self.program.operations, self.operations, strict=True)
        return (cost.times(self.runs(op.region)) for op, cost in pairs)

    def _steps_in_step(self) -> Iterator[Cost]:
        return (step.cost.times(self.runs(step.region)) for step in self.steps)


def formulas_of(program: Program, dimensions: Dimensions, topology: Topology, choice: Choice) -> Formulas:
    """The closed forms of a plan.

    **Arguments:**

    - `dimensions`: the sizes of `program` by name.
    - `choice`: the plan's strategies and layouts.
    """
    operations = tuple(_operation(program, dimensions, topology, choice, i) for i in range(len(program.operations)))
    dtypes = dict.fromkeys(op.dtype for _, op in program.matmuls())
    numbers = {**{name: float(n) for name, n in dimensions.sizes.items()}, **rates(topology, dtypes)}
    found = tuple(_steps(program, dimensions, topology, choice, operations))
    return Formulas(program, dimensions, operations, found, numbers)


def _operation(program: Program, dimensions: Dimensions, topology: Topology, choice: Choice, i: int) -> Cost:
    op = program.operations[i]
    if is_free(program, op):
        return Cost()
    table = _table(dimensions, choice, i)
    moved = _moved(program, topology, i, table)
    done, matmul, chip = _done(op, table, topology), op.op_class == "matmul", topology.chip
    work = flops(op, topology.pricing.expert_load).xreplace(table)
    if topology.pricing.asynchronous:
        seconds = asynchronous_seconds(done, moved, matmul, op.dtype, bool(static_operands(program, op)))
        if is_fused_into_reads(program, op):
            arrives = substitute(arriving_bytes(program, op), table) / rate("W_hbm")
            seconds = sympy.Max(seconds - arrives, 0, evaluate=False)
    elif matmul:
        seconds = _matmul_seconds(program, dimensions, topology, i, table)
    else:
        elements = substitute(vector_elements(program, op), table) if chip.vector_elements_per_second else _ZERO
        running = operation_seconds(done, moved, elements, _ZERO, False, op.dtype, waits=waits_for_reads(program, op))
        seconds = running + _start(program, dimensions, i, chip)
    return Cost(work, moved, local_seconds=seconds + _between(program, op, table, topology))


def _between(program: Program, op: Operation, table: dict[Expr, Expr], topology: Topology) -> Expr:
    """`costmodels.operations.between_seconds` as a formula."""
    groups, chip = grouped(op), topology.chip
    if groups is None or groups.hidden is None:
        return _ZERO
    slowest = program.values[op.outputs[0].value].itemsize / rate("W_hbm")
    slowest = sympy.Max(slowest, 1 / rate("E_vector"), evaluate=False) if chip.vector_elements_per_second else slowest
    passed = slowest * substitute(between_elements(op, topology.pricing.expert_load), table)
    return passed + (groups.hidden_arrays - 1) * rate("o_op") + rate("o_vector")


def _table(dimensions: Dimensions, choice: Choice, i: int) -> dict[Expr, Expr]:
    """The named sizes and shard counts of an operation's factors."""
    splits = choice.strategies[i].splits
    table: dict[Expr, Expr] = {size_symbol(f): dimensions.factor(i, f) for f in range(len(splits))}
    return table | {shards_symbol(f): pieces(axes) for f, axes in enumerate(splits)}


def _moved(program: Program, topology: Topology, i: int, table: dict[Expr, Expr]) -> Expr:
    keeps = bool(topology.chip.on_chip_bytes)
    on_chip = {on_chip_symbol(): rate("m_chip")} if keeps else {}
    return substitute(hbm_bytes(program, program.operations[i], keeps, topology.pricing.expert_load), table | on_chip)


def _done(op: Operation, table: dict[Expr, Expr], topology: Topology) -> Expr:
    """The FLOPs of an operation, in whole tiles on the matrix unit."""
    if op.op_class != "matmul":
        return flops(op).xreplace(table)
    padded = padded_flops(op, topology.chip.weight_load_rows, topology.pricing.expert_load)
    tile = {symbol: rate("t_tile") for symbol in padded.free_symbols - table.keys()}
    return substitute(padded, table | tile)


def _start(program: Program, dimensions: Dimensions, i: int, chip: Chip) -> Expr:
    """The start of an operation: `costmodels.operations.start_seconds` as a formula."""
    op = program.operations[i]
    if op.op_class != "matmul":
        if not chip.vector_overhead_seconds or not ends_pass(program, op):
            return _ZERO
        points = sympy.Mul(*(dimensions.factor(i, factor) for factor in range(len(op.factors))))
        return sympy.Piecewise((rate("o_vector"), points >= REGISTER), (_ZERO, True))
    streamed = chip.stream_overhead_seconds and is_streamed(program, op)
    return rate("o_op") + (rate("o_stream") if streamed else 0)


def _steps(
    program: Program, dimensions: Dimensions, topology: Topology, choice: Choice, operations: Sequence[Cost]
) -> Iterator[StepFormula]:
    """Every step of every reshard, and the collectives within operations."""

    def formula(
        kind: str,
        axes: Axes,
        value: int,
        part: Expr,
        operation: int | None,
        region: int,
        product: int | None = None,
        ringed: CollectiveStep | None = None,
    ):
        payload = array_bytes(program, dimensions, value) * part
        sent, seconds = volume(kind, axes, payload), collective_seconds(kind, axes, payload, topology)
        if product is not None and ringed is not None:
            dim = ringed.source_dim if kind == "all-gather" else ringed.target_dim
            size = program.values[value].itemsize
            seconds -= _saved_seconds(program, dimensions, topology, choice, product, dim, (kind, axes, payload, size))
        elif product is not None:
            running = _running(program, topology, product, _table(dimensions, choice, product))
            seconds -= _hidden_seconds(kind, axes, payload, topology, running)
        cost = Cost(wire_bytes=sent, collective_seconds=seconds)
        return StepFormula(kind, axes, value, operation, region, payload, cost)

    for move in moves(program, choice):
        path, found = steps(program, topology, move), []
        for step, product in zip(path, products_behind(program, topology, choice, move, path), strict=True):
            part = 1 / pieces(step.payload_layout.axes)
            ringed = step if are_rings(topology.pricing) else None
            found.append(formula(step.kind, step.axes, move.value, part, move.operation, move.region, product, ringed))
        window = _window(program, dimensions, topology, choice, move, operations)
        yield from found if window == 0 else _exposed(found, window)
    for i, op in enumerate(program.operations):
        for each in intra_op_collectives(op, choice.strategies[i], topology):
            value, part = op.outputs[each.result].value, pieces(each.copies) / pieces(each.layout.axes) / each.parts
            if each.thinned:
                part *= pieces(choice.strategies[i].splits[each.factor]) / dimensions.factor(i, each.factor)
            if each.sent is not None and (groups := grouped(op)):
                value, part = op.use(each.sent).value, sent_rows(groups, topology.pricing.expert_load)
                part = substitute(part, _table(dimensions, choice, i)) / dimensions.factor(i, each.factor)
            yield formula(each.kind, each.axes, value, part, i, op.region)


def _window(
    program: Program,
    dimensions: Dimensions,
    topology: Topology,
    choice: Choice,
    move: Move,
    operations: Sequence[Cost],
) -> Expr:
    """The seconds of the matmuls at the ends of a reshard that hide it asynchronously."""
    found = []
    for i, which in products_at(program, choice, move) if topology.pricing.asynchronous else ():
        op, table = program.operations[i], _table(dimensions, choice, i)
        static, deferred = static_operands(program, op), is_deferred(program, i)
        ahead = substitute(prefetched_bytes(program, op, topology.pricing.expert_load), table)
        own = spare_seconds(_done(op, table, topology), _moved(program, topology, i, table), ahead, op.dtype)
        if which in static or (which == "result" and deferred):
            found.append((operations[i].local_seconds - own) / (len(static) + deferred))
        elif bool(output_layout(op.signature, choice.strategies[i], 0).partial) == (which == "result"):
            lent = _lent(program, dimensions, topology, i) if is_lender(program, i) else _ZERO
            borrowed = sympy.Add(*(_lent(program, dimensions, topology, k) for k in lenders(program, i)))
            spare = sympy.Max(own - lent, 0, evaluate=False) + borrowed
            spare = sympy.Min(spare, rate("m_ahead") / rate("W_hbm"), evaluate=False)
            found.append(spare if which == "result" else spare / (len(op.inputs) - len(static)))
    return sympy.Add(*found)


def _lent(program: Program, dimensions: Dimensions, topology: Topology, i: int) -> Expr:
    """`costmodels.operations.lent_seconds` as a formula."""
    op, chips = program.operations[i], pieces(topology.axis_sizes)
    table: dict[Expr, Expr] = {size_symbol(f): dimensions.factor(i, f) for f in range(len(op.factors))}
    table |= {shards_symbol(f): sympy.Integer(1) for f in range(len(op.factors))}
    read = substitute(prefetched_bytes(program, op), table) / chips
    return spare_seconds(_done(op, table, topology) / chips, read, read, op.dtype)


def _exposed(steps: Sequence[StepFormula], window: Expr) -> Iterator[StepFormula]:
    """The steps of a reshard without the seconds that are hidden, the same part of each."""
    whole = sympy.Add(*(step.cost.collective_seconds for step in steps))
    exposed = sympy.Max(whole - window, 0, evaluate=False)
    for step in steps:
        seconds = exposed if len(steps) == 1 else exposed * step.cost.collective_seconds / whole
        yield replace(step, cost=step.cost._replace(collective_seconds=seconds))


def _hidden_seconds(kind: str, axes: Axes, payload: Expr, topology: Topology, running: Expr) -> Expr:
    """The time of a looped collective that its matmul hides: at most the matmul's time without one piece.

    `running` is the matmul's time without its start.
    """
    wire = collective_seconds(kind, axes, payload, topology) - collective_seconds(kind, axes, _ZERO, topology)
    return sympy.Min(wire, (1 - 1 / pieces(axes)) * running, evaluate=False)


def _saved_seconds(
    program: Program,
    dimensions: Dimensions,
    topology: Topology,
    choice: Choice,
    product: int,
    dim: int,
    sent: tuple[str, Axes, Expr, float],
) -> Expr:
    """The time that a looped collective and its product save as a ring (`search.formulation.rings`)."""
    kind, axes, payload, itemsize = sent
    side, op = choice.strategies[product].looped, program.operations[product]
    axis, chips = topology.axis(axes[0]), pieces(axes[:1])
    table = _table(dimensions, choice, product)
    whole = _matmul_seconds(program, dimensions, topology, product, table)
    cut = shards_symbol(factor := piece_factor(op, 0 if side is None else side, dim))
    work = _matmul_seconds(program, dimensions, topology, product, table | {cut: table[cut] * chips})
    work *= chips * piece_slowdown(topology.chip, side != "result", is_summed(op, factor))
    hop = hop_seconds(axis.name, payload / chips, topology)
    taken = sympy.Max(*waiting_times(chips, has_two_ways(axis), work, hop), evaluate=False)
    taken += collective_seconds(kind, axes[1:], payload / chips, topology) if axes[1:] else _ZERO
    if kind == "reduce-scatter":
        count, piece = summands(axis.size), payload / chips
        passes = [(count + 1) * piece / rate("W_hbm")]
        passes += [count * piece / itemsize / rate("E_vector")] if topology.chip.vector_elements_per_second else []
        taken += sympy.Max(*passes, evaluate=False) if len(passes) > 1 else passes[0]
    return sympy.Max(collective_seconds(kind, axes, payload, topology) + whole - taken, 0, evaluate=False)


def _matmul_seconds(
    program: Program, dimensions: Dimensions, topology: Topology, i: int, table: dict[Expr, Expr]
) -> Expr:
    """Seconds of a matmul with these sizes and shard counts."""
    start = _start(program, dimensions, i, topology.chip)
    hidden = start if reads_while_starting(program, program.operations[i], topology.chip) else _ZERO
    return _running(program, topology, i, table, hidden) + start - hidden


def _running(program: Program, topology: Topology, i: int, table: dict[Expr, Expr], beside: Expr = _ZERO) -> Expr:
    """Seconds of a matmul without its start, or with a start while which its operands are read."""
    op, chip = program.operations[i], topology.chip
    stored = vector_elements(program, op, topology.pricing.expert_load)
    elements = substitute(stored, table) if chip.vector_elements_per_second else _ZERO
    converted = substitute(converted_elements(program, op), table) if chip.converted_elements_per_second else _ZERO
    done, moved = _done(op, table, topology), _moved(program, topology, i, table)
    return operation_seconds(done, moved, elements, converted, True, op.dtype, beside)


def array_bytes(program: Program, dimensions: Dimensions, value: int) -> Expr:
    """The bytes of a whole array."""
    size = program.values[value].itemsize
    return (sympy.Integer(int(size)) if size.is_integer() else sympy.Rational(size)) * dimensions.elements(value)
