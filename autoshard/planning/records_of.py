"""Records of a solution: arrays, operations, collectives, and warnings on assumptions and limitations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod

import numpy as np

from autoshard._util.tables import time
from autoshard.annotating.padding import Padding
from autoshard.naming.strategy_names import strategy_name
from autoshard.planning.notes.whole import COSTED, whole_notes
from autoshard.planning.records import ArrayPlan, Estimate, OperationPlan, PlannedCollective
from autoshard.planning.runner_up import Alternatives
from autoshard.tracing.blocks import Literal, Traced
from costmodels.bottlenecks import regime
from costmodels.machine.offered import not_offered
from costmodels.machine.topology import Topology
from costmodels.operations import OperationCost, cost_key, price
from costmodels.overflow import overflow_chance, overflow_seconds
from costmodels.program.grouped import grouped, rows_for_each
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, Collective, collectives, needed_layout, produced_layout, rings, states_of
from search.formulation.layouts import replicated_layout, shards
from search.formulation.problem import Problem
from search.memory.constraints import rows
from search.solve import Solution

_MATTERS = 0.01
"""The fraction of all arguments' bytes from which an argument's indivisible dimension is worth a warning."""
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# --- arrays


Paddings = Mapping[int, tuple[Padding, ...]]
"""Per value the paddings of its dimensions."""


def argument_plans(
    traced: Traced, solution: Solution, weak: Sequence[bool], paddings: Paddings
) -> tuple[ArrayPlan, ...]:
    """The records of the flat arguments."""
    program, donated = traced.program, {argument for argument, _ in traced.program.donated}
    return tuple(
        _source(program, solution, at, path, paddings, i in donated, weak[i])
        for i, (at, path) in enumerate(zip(program.arguments, traced.paths, strict=True))
    )


def constant_plans(traced: Traced, solution: Solution, paddings: Paddings) -> tuple[ArrayPlan, ...]:
    """The records of the arrays that the function closes over."""
    program = traced.program
    return tuple(_source(program, solution, at, program.operations[at].name, paddings) for at in program.constants)


def _source(
    program: Program,
    solution: Solution,
    at: int,
    path: str,
    paddings: Paddings,
    donated: bool = False,
    weak: bool = False,
) -> ArrayPlan:
    index = program.operations[at].outputs[0].value
    value, layout = program.values[index], produced_layout(program, solution.choice, index)
    held = value.bytes / shards(layout, solution.problem.topology.axis_sizes)
    return ArrayPlan(path, value.shape, value.dtype, layout, held, donated, weak, padding=paddings.get(index, ()))


def result_plans(traced: Traced, solution: Solution, paddings: Paddings) -> tuple[ArrayPlan, ...]:
    """The records of the flat results."""
    program, found = traced.program, []
    for path, at, atom in zip(traced.result_paths, program.results, traced.block.outputs, strict=True):
        if isinstance(atom, Literal):
            shape, dtype, size = np.shape(atom.value), str(atom.value.dtype), float(atom.value.nbytes)
            layout, padding = replicated_layout(len(shape)), ()
        else:
            value = program.values[atom]
            shape, dtype, size = value.shape, value.dtype, value.bytes
            layout, padding = needed_layout(program, solution.choice, at, 0), paddings.get(atom, ())
        held = size / shards(layout, solution.problem.topology.axis_sizes)
        found.append(ArrayPlan(path, shape, dtype, layout, held, padding=padding))
    return tuple(found)


# --- the step's cost


def estimate(solution: Solution) -> Estimate:
    """The cost of a step, by the independent checker, with its collectives and local slices in program order."""
    problem, check = solution.problem, solution.check
    return Estimate(
        check.seconds,
        check.compute_seconds,
        check.memory_seconds,
        check.collective_seconds,
        check.peak_bytes,
        problem.program.operations[check.peak_operation].name,
        problem.budget_bytes,
        _planned(problem.program, solution.collectives),
        _planned(problem.program, solution.slices),
    )


def _planned(program: Program, found: Iterable[Collective]) -> tuple[PlannedCollective, ...]:
    return tuple(
        PlannedCollective(
            each.kind,
            each.axes,
            float(each.bytes),
            float(each.count),
            float(each.seconds),
            _location(program, each),
            float(each.hidden_seconds),
        )
        for each in found
    )


def _location(program: Program, collective: Collective) -> str:
    name = program.values[collective.value].name
    if collective.operation is None:
        return f"{name}, where it is made"
    op = program.operations[collective.operation]
    inside = any(use.value == collective.value for use in op.outputs)
    return f"inside {op.name}" if inside else f"{name} for {op.name}"


# --- operations


def operation_plans(solution: Solution) -> tuple[OperationPlan, ...]:
    """The records of all operations, in the program's numbering; boundary operations cost nothing."""
    problem, choice = solution.problem, solution.choice
    wire = _collective_seconds(problem.program, solution.collectives)
    others = Alternatives(problem, rows(problem), states_of(problem, choice))
    copies: dict[tuple, OperationPlan] = {}
    found = []
    for i, op in enumerate(problem.program.operations):
        like = (problem.of_operation[i], cost_key(problem.program, op))
        if like not in copies:
            copies[like] = _operation(problem, choice, i, others)
        found.append(_copy_record(copies[like], op, wire[i]))
    return tuple(found)


def _copy_record(copy: OperationPlan, op: Operation, wire: float) -> OperationPlan:
    """The record of an operation, from that of an identical one."""
    bound = regime(copy.compute_seconds, copy.memory_seconds, copy.vector_seconds, wire, copy.overhead_seconds)
    return replace(copy, name=op.name, source=op.source, collective_seconds=wire, regime=bound)


def _collective_seconds(program: Program, planned: Iterable[Collective]) -> list[float]:
    """Per operation the seconds of the collectives on its operands and inside it, and of a reshard directly after it."""
    found = [0.0] * len(program.operations)
    for each in planned:
        at = program.producers[each.value][0] if each.operation is None else each.operation
        found[at] += float(each.seconds)
    return found


def _operation(problem: Problem, choice: Choice, i: int, others: Alternatives) -> OperationPlan:
    """The record of one operation, without its reshards."""
    program, topology = problem.program, problem.topology
    op, strategy = program.operations[i], choice.strategies[i]
    runs = program.multiplicity(op.region)
    costed = op.op_class in COSTED
    totals = _totals(program, topology, choice, i)
    matmul = op.op_class == "matmul"
    return OperationPlan(
        name=op.name,
        primitive=op.primitive,
        source=op.source,
        einsum=einsum(op),
        splits=strategy.splits,
        strategy=strategy_name(program, topology, choice, i) if costed else "",
        count=float(runs),
        **totals,
        collective_seconds=0.0,
        regime="",
        runner_up=others.runner_up(i) if matmul else "",
        matmul=matmul,
        sizes=tuple(factor.size for factor in op.factors),
    )


def _totals(program: Program, topology: Topology, choice: Choice, i: int) -> dict[str, float]:
    """The quantities of `OperationCost` for all runs of an operation in one step."""
    op, strategy = program.operations[i], choice.strategies[i]
    if op.op_class not in COSTED:
        return {f.name: 0.0 for f in fields(OperationCost)}
    pieces = np.array([[float(prod(topology.axis_sizes[axis] for axis in split)) for split in strategy.splits]])
    shards, pricing = pieces.reshape(1, len(op.factors)), topology.pricing
    cost = price(program, op, shards, topology.chip, pricing.asynchronous, pricing.expert_load)
    return {f.name: program.multiplicity(op.region) * float(getattr(cost, f.name)[0]) for f in fields(OperationCost)}


def reprice_operations(
    program: Program, topology: Topology, choice: Choice, planned: Sequence[OperationPlan]
) -> tuple[OperationPlan, ...]:
    """Planned operations with their costs in another program or on another topology, under the same choice."""
    wire = _collective_seconds(program, collectives(program, topology, choice))
    return tuple(
        replace(op, **_totals(program, topology, choice, i), collective_seconds=wire[i]) for i, op in enumerate(planned)
    )


def einsum(op: Operation) -> str:
    """`ab,bcd->acd`: one letter per factor in order, the factors of a compound dimension in brackets."""

    def dimension(factors: tuple[int, ...]) -> str:
        text = "".join(_LETTERS[i] if i < len(_LETTERS) else f"<{i}>" for i in factors)
        return text if len(factors) == 1 else f"({text})"

    def operand(use) -> str:
        return "".join(map(dimension, use.dims))

    return f"{','.join(map(operand, op.inputs))}->{','.join(map(operand, op.outputs))}"


# --- warnings


def warnings(traced: Traced, solution: Solution) -> tuple[str, ...]:
    """The assumptions and limitations of the plan, as sentences."""
    problem = solution.problem
    return (
        *problem.program.warnings,
        *_indivisible(traced, problem),
        *whole_notes(solution),
        *filter(None, [not_offered(problem.topology)]),
        *_assumptions(problem.topology),
        *_expert_notes(solution),
        *_overlap_notes(traced, solution),
        *proof_warnings(solution),
        *(f"The checker found a fault: {fault}." for fault in solution.check.faults),
    )


def _expert_notes(solution: Solution) -> Iterator[str]:
    """The assumption about the router, if groups of rows are split over chips."""
    program, choice, topology = solution.problem.program, solution.choice, solution.problem.topology
    load, axes = topology.pricing.expert_load, dict[str, None]()
    sending: dict[tuple[str, ...], list[_Buffers]] = {}
    for op, strategy in zip(program.operations, choice.strategies, strict=True):
        if groups := grouped(op):
            tokens = strategy.splits[groups.tokens] if groups.tokens is not None else ()
            if not tokens:
                axes |= dict.fromkeys(strategy.splits[groups.groups])
                continue
            over = strategy.splits[groups.groups]
            sources, chips = (prod(topology.axis_sizes[axis] for axis in each) for each in (tokens, over))
            sizes = op.factors[0].size, sources, chips, load
            later = overflow_seconds(program, op, groups, strategy.splits, topology)
            runs = program.multiplicity(op.region)
            sending.setdefault(over, []).append(
                _Buffers(rows_for_each(*sizes), overflow_chance(*sizes), later, later * runs)
            )
    for over, buffers in sending.items():
        most = prod(topology.axis_sizes[axis] for axis in over)
        way = (
            f"rows are sent to the experts' chips over {''.join(over)}"
            if over
            else "chips compute the rows of their tokens"
        )
        chance, later = max((each.chance, each.later) for each in buffers)
        expected = sum(each.chance * each.later_in_all for each in buffers)
        yield (
            f"{way}, in buffers of {min(load, most):g} times the balanced rows (capacity, expert_load) and what random"
            f" routers vary, at most"
            f" {max(each.room for each in buffers)} rows for each chip. If the router needs more in any of them, that layer"
            f" takes all rows to all chips instead, {time(later)} longer by the cost model; the results are the same. A"
            f" router that chooses evenly at random needs more in at most {100 * chance:.2g} % of a layer's runs, which adds at"
            f" most {time(expected)} to the expected step and is not in the planned time."
        )
    if axes:
        yield (
            f"experts are split over {''.join(axes)}: the costs assume that no chip has more than {load:g} times the mean rows"
            " (expert_load). More take longer, and the results are the same."
        )


@dataclass(frozen=True)
class _Buffers:
    """The rows of a layer's buffer for each chip, the chance of an overflow, and how much longer that takes."""

    room: int
    chance: float
    later: float
    later_in_all: float


def _indivisible(traced: Traced, problem: Problem) -> Iterator[str]:
    """Dimensions of large arguments that are at least as long as an axis which does not divide them."""
    program = problem.program
    sizes = {name: size for name, size in problem.topology.axis_sizes.items() if size > 1}
    sources = [program.operations[at].outputs[0].value for at in program.arguments]
    total = sum(program.values[value].bytes for value in sources)
    for path, value in zip(traced.paths, sources, strict=True):
        array = program.values[value]
        if array.bytes < _MATTERS * total:
            continue
        for i, n in enumerate(array.shape):
            no = {name: size for name, size in sizes.items() if n % size}
            if n >= min(no.values(), default=n + 1) and not _is_replicated(program, value, i):
                if len(no) == len(sizes):
                    yield f"{path} has dimension {i} of {n}, which no mesh axis divides: it stays whole."
                else:
                    axes = " and ".join(f"{name} ({size})" for name, size in no.items())
                    yield f"{path} has dimension {i} of {n}, which {axes} cannot divide."


def _is_replicated(program: Program, value: int, dimension: int) -> bool:
    """Whether every use keeps the dimension whole, such as a loop that takes slices along it."""
    uses = [program.operations[at].inputs[k].dims[dimension] for at, k in program.consumers.get(value, ())]
    at = [at for at, _ in program.consumers.get(value, ())]
    return all(
        any(program.operations[op].factors[f].kind == "whole" for f in factors)
        for op, factors in zip(at, uses, strict=True)
    )


def _assumptions(topology: Topology) -> Iterator[str]:
    used = {name: c for name, c in topology.chip.constants.items() if name not in topology.unused_constants}
    names = [name for name, constant in used.items() if constant.status == "assumed"]
    if names:
        yield f"Of the constants of {topology.chip.name}, {', '.join(names)} {'is' if len(names) == 1 else 'are'} assumed."


def _overlap_notes(traced: Traced, solution: Solution) -> Iterator[str]:
    hidden = sum(each.hidden_seconds for each in solution.collectives)
    if hidden and solution.problem.topology.pricing.looped:
        yield (
            f"{hidden * 1e3:.4g} ms of collectives are costed as hidden by rings of permutes beside their matmuls. If the"
            " compiler does not overlap them, the step takes that much longer; an audit shows it."
        )
    for at, ring in rings(solution.problem.program, solution.problem.topology, solution.choice).items():
        if (at, ring.side) in traced.masks:
            name = solution.problem.program.operations[at].name
            yield f"{name} is costed with a ring, but its padded operand is gathered at once, as padding must be masked."


def proof_warnings(solution: Solution) -> Iterator[str]:
    proof = solution.proof
    if proof.status != "OPTIMAL":
        yield (
            f"The search stopped before the plan was proven best: at most {proof.gap:.2%} of its"
            f" {proof.objective_seconds * 1e3:.4g} ms could be saved."
        )
