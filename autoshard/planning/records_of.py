"""Records of a solution: arrays, operations, collectives, and warnings on assumptions and limitations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from math import prod

import numpy as np

from autoshard.naming.strategy_names import strategy_name
from autoshard.planning.records import ArrayPlan, Estimate, OperationPlan, PlannedCollective
from autoshard.planning.runner_up import Alternatives
from autoshard.tracing.blocks import Literal, Traced
from costmodels.bottlenecks import regime
from costmodels.machine.topology import Topology
from costmodels.operations import OperationCost, hbm_traffic, price
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, Collective, collectives, needed, produced, states_of
from search.formulation.layouts import replicated, shards
from search.formulation.problem import Problem
from search.memory.constraints import rows
from search.solve import Solution

_COSTED = ("matmul", "memory", "fused")
_MATTERS = 0.01
"""The fraction of all arguments' bytes from which an argument's indivisible dimension is worth a warning."""
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# --- arrays


def argument_plans(traced: Traced, solution: Solution, weak: Sequence[bool]) -> tuple[ArrayPlan, ...]:
    """The records of the flat arguments."""
    program, donated = traced.program, {argument for argument, _ in traced.program.donated}
    return tuple(
        _source(program, solution, at, path, i in donated, weak[i])
        for i, (at, path) in enumerate(zip(program.arguments, traced.paths, strict=True))
    )


def constant_plans(traced: Traced, solution: Solution) -> tuple[ArrayPlan, ...]:
    """The records of the arrays that the function closes over."""
    program = traced.program
    return tuple(_source(program, solution, at, program.operations[at].name) for at in program.constants)


def _source(
    program: Program, solution: Solution, at: int, path: str, donated: bool = False, weak: bool = False
) -> ArrayPlan:
    index = program.operations[at].outputs[0].value
    value, layout = program.values[index], produced(program, solution.choice, index)
    held = value.bytes / shards(layout, solution.problem.topology.axis_sizes)
    return ArrayPlan(path, value.shape, value.dtype, layout, held, donated, weak)


def result_plans(traced: Traced, solution: Solution) -> tuple[ArrayPlan, ...]:
    """The records of the flat results."""
    program, found = traced.program, []
    for path, at, atom in zip(traced.result_paths, program.results, traced.block.outputs, strict=True):
        if isinstance(atom, Literal):
            shape, dtype, size = np.shape(atom.value), str(atom.value.dtype), float(atom.value.nbytes)
            layout = replicated(len(shape))
        else:
            value = program.values[atom]
            shape, dtype, size = value.shape, value.dtype, value.bytes
            layout = needed(program, solution.choice, at, 0)
        found.append(ArrayPlan(path, shape, dtype, layout, size / shards(layout, solution.problem.topology.axis_sizes)))
    return tuple(found)


# --- the step's cost


def estimate(solution: Solution) -> Estimate:
    """The cost of a step, by the independent checker, with its collectives in program order."""
    problem, check = solution.problem, solution.check
    return Estimate(
        check.seconds,
        check.compute_seconds,
        check.memory_seconds,
        check.collective_seconds,
        check.peak_bytes,
        problem.program.operations[check.peak_operation].name,
        problem.budget_bytes,
        tuple(
            PlannedCollective(
                each.kind,
                each.axes,
                float(each.bytes),
                float(each.count),
                float(each.seconds),
                _where(problem.program, each),
            )
            for each in solution.collectives
        ),
    )


def _where(program: Program, collective: Collective) -> str:
    name = program.values[collective.value].name
    if collective.operation < 0:
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
        like = (problem.of_operation[i], hbm_traffic(problem.program, op))
        if like not in copies:
            copies[like] = _operation(problem, choice, i, others)
        found.append(_of_this(copies[like], op, wire[i], problem.topology))
    return tuple(found)


def _of_this(copy: OperationPlan, op: Operation, wire: float, topology: Topology) -> OperationPlan:
    """The record of an operation, from that of an identical one."""
    overhead = copy.count * topology.chip.op_overhead_seconds if copy.matmul else 0.0
    bound = regime(copy.compute_seconds, copy.memory_seconds, wire, overhead)
    return replace(copy, name=op.name, source=op.source, collective_seconds=wire, regime=bound)


def _collective_seconds(program: Program, planned: Iterable[Collective]) -> list[float]:
    """Per operation the seconds of the collectives on its operands and inside it, and of a reshard directly after it."""
    found = [0.0] * len(program.operations)
    for each in planned:
        at = each.operation if each.operation >= 0 else program.producers[each.value][0]
        found[at] += float(each.seconds)
    return found


def _operation(problem: Problem, choice: Choice, i: int, others: Alternatives) -> OperationPlan:
    """The record of one operation, without its reshards."""
    program, topology = problem.program, problem.topology
    op, strategy = program.operations[i], choice.strategies[i]
    runs = program.multiplicity(op.region)
    costed = op.op_class in _COSTED
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
    if op.op_class not in _COSTED:
        return {f.name: 0.0 for f in fields(OperationCost)}
    pieces = np.array([[float(prod(topology.axis_sizes[axis] for axis in split)) for split in strategy.splits]])
    cost = price(program, op, pieces.reshape(1, len(op.factors)), topology.chip)
    return {f.name: program.multiplicity(op.region) * float(getattr(cost, f.name)[0]) for f in fields(OperationCost)}


def repriced(
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
        *_assumed(problem.topology),
        *_looped(solution),
        *_unproven(solution),
        *(f"The checker found a fault: {fault}." for fault in solution.check.faults),
    )


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
            if n >= min(no.values(), default=n + 1) and not _held_whole(program, value, i):
                if len(no) == len(sizes):
                    yield f"{path} has dimension {i} of {n}, which no mesh axis divides: it stays whole."
                else:
                    axes = " and ".join(f"{name} ({size})" for name, size in no.items())
                    yield f"{path} has dimension {i} of {n}, which {axes} cannot divide."


def _held_whole(program: Program, value: int, dimension: int) -> bool:
    """Whether every use keeps the dimension whole, such as a loop that takes slices along it."""
    uses = [program.operations[at].inputs[k].dims[dimension] for at, k in program.consumers.get(value, ())]
    at = [at for at, _ in program.consumers.get(value, ())]
    return all(
        any(program.operations[op].factors[f].kind == "whole" for f in factors)
        for op, factors in zip(at, uses, strict=True)
    )


def _assumed(topology: Topology) -> Iterator[str]:
    used = {name: c for name, c in topology.chip.constants.items() if name not in topology.unused_constants}
    names = [name for name, constant in used.items() if constant.status == "assumed"]
    if names:
        yield f"Of the constants of {topology.chip.name}, {', '.join(names)} {'is' if len(names) == 1 else 'are'} assumed."


def _looped(solution: Solution) -> Iterator[str]:
    hidden = sum(each.hidden_seconds for each in solution.collectives)
    if hidden:
        yield (
            f"{hidden * 1e3:.4g} ms of collectives are costed as hidden by looped einsums. The emitted program does not"
            " loop; if the compiler does not overlap them, the step takes that much longer."
        )


def _unproven(solution: Solution) -> Iterator[str]:
    proof = solution.proof
    if proof.status != "OPTIMAL":
        yield (
            f"The search stopped before the plan was proven best: at most {proof.gap:.2%} of its"
            f" {proof.objective_seconds * 1e3:.4g} ms could be saved."
        )
