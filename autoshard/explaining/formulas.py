"""The cost of a plan in closed form: per operation, per kind of operation, per region, and for the whole step.

The formulas are those of the search (`costmodels.operations`, `costmodels.machine.collectives`), with named dimensions
for factor sizes, products of axis sizes for shard counts, and symbols for the rates of the chip and its links. At the plan's
own numbers they are its estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from costmodels.dimensions import Dimensions
from costmodels.machine.lazy_sympy import sympy
from costmodels.machine.topology import Topology
from costmodels.operations import flops, hbm_bytes, on_chip_symbol, padded_flops, shards_symbol, size_symbol
from costmodels.program.program import Operation, Program
from costmodels.symbols import (
    Expr,
    collective_seconds,
    evaluated,
    operation_seconds,
    pieces,
    rate,
    rates,
    replaced,
    volume,
)
from search.answer.assignment import Choice, moves, products_behind, steps
from search.formulation.intra_op import closing
from search.formulation.layouts import Axes

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

    `operation` is the consumer, or -1 for a reshard right after the producer; it runs in `region`.
    """

    kind: str
    axes: Axes
    value: int
    operation: int
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
        return evaluated(expression, {**self.numbers, **other})

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
        mine = [s for s in self.steps if s.operation == i or (s.operation < 0 and s.value in made)]
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
    keeps = bool(topology.chip.on_chip_bytes)
    operations = tuple(_operation(program, dimensions, choice, i, keeps) for i in range(len(program.operations)))
    dtypes = dict.fromkeys(op.dtype for _, op in program.matmuls())
    numbers = {**{name: float(n) for name, n in dimensions.sizes.items()}, **rates(topology, dtypes)}
    found = tuple(_steps(program, dimensions, topology, choice, operations))
    return Formulas(program, dimensions, operations, found, numbers)


def _operation(program: Program, dimensions: Dimensions, choice: Choice, i: int, keeps: bool) -> Cost:
    op = program.operations[i]
    if not op.flops_per_point and not op.traffic:
        return Cost()
    table: dict[Expr, Expr] = {}
    for factor, axes in enumerate(choice.strategies[i].splits):
        table[size_symbol(factor)] = dimensions.factor(i, factor)
        table[shards_symbol(factor)] = pieces(axes)
    on_chip = {on_chip_symbol(): rate("m_chip")} if keeps else {}
    work, moved = flops(op).xreplace(table), replaced(hbm_bytes(program, op, keeps), table | on_chip)
    matmul, done = op.op_class == "matmul", work
    if matmul:
        padded = padded_flops(op)
        tile = {symbol: rate("t_tile") for symbol in padded.free_symbols - table.keys()}
        done = replaced(padded, table | tile)
    return Cost(work, moved, local_seconds=operation_seconds(done, moved, matmul, op.dtype))


def _steps(
    program: Program, dimensions: Dimensions, topology: Topology, choice: Choice, operations: Sequence[Cost]
) -> Iterator[StepFormula]:
    """Every step of every reshard, and the collectives within operations."""

    def formula(kind: str, axes: Axes, value: int, part: Expr, operation: int, region: int, product: int | None = None):
        payload = array_bytes(program, dimensions, value) * part
        sent, seconds = volume(kind, axes, payload), collective_seconds(kind, axes, payload, topology)
        if product is not None:
            seconds -= _hidden(kind, axes, payload, topology, operations[product])
        cost = Cost(wire_bytes=sent, collective_seconds=seconds)
        return StepFormula(kind, axes, value, operation, region, payload, cost)

    for move in moves(program, choice):
        path = steps(program, topology, move)
        for step, product in zip(path, products_behind(program, topology, choice, move, path), strict=True):
            part = 1 / pieces(step.payload_layout.axes)
            yield formula(step.kind, step.axes, move.value, part, move.operation, move.region, product)
    for i, op in enumerate(program.operations):
        for each in closing(op, choice.strategies[i], topology):
            part = pieces(each.copies) / pieces(each.layout.axes) / each.parts
            if each.thinned:
                part *= pieces(choice.strategies[i].splits[each.factor]) / dimensions.factor(i, each.factor)
            yield formula(each.kind, each.axes, op.outputs[each.result].value, part, i, op.region)


def _hidden(kind: str, axes: Axes, payload: Expr, topology: Topology, product: Cost) -> Expr:
    """The time of a looped collective that its matmul hides: at most the matmul's time without one piece."""
    wire = collective_seconds(kind, axes, payload, topology) - collective_seconds(kind, axes, _ZERO, topology)
    return sympy.Min(wire, (1 - 1 / pieces(axes)) * (product.local_seconds - rate("o_op")), evaluate=False)


def array_bytes(program: Program, dimensions: Dimensions, value: int) -> Expr:
    """The bytes of a whole array."""
    size = program.values[value].itemsize
    return (sympy.Integer(int(size)) if size.is_integer() else sympy.Rational(size)) * dimensions.elements(value)
