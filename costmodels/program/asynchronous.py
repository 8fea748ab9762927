"""Transfers that no arithmetic waits for: reads and gathers of arguments, and reductions of results that no matmul needs.

A compiler issues such transfers ahead of their use, or leaves them running, while the core does other work. All other
communication is on the chain of dependences: the core waits for it.
"""

from __future__ import annotations

from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program
from costmodels.program.vector_passes import is_streamed


def static_operands(program: Program, op: Operation) -> tuple[int, ...]:
    """The operands of an operation that are arguments, or elementwise work on arguments only, such as casts and scales.

    They are known before the step begins. So their reads from HBM and their gathers may run ahead.
    """
    return tuple(k for k, use in enumerate(op.inputs) if use.value in _static(program))


def is_fetched_ahead(program: Program, operation: Operation) -> bool:
    """Whether an operation is a matmul outside of loops that reads an argument from HBM."""
    read = set(operation.traffic) & set(static_operands(program, operation))
    return operation.op_class == "matmul" and bool(read) and not is_streamed(program, operation)


def is_fused_into_reads(program: Program, op: Operation) -> bool:
    """Whether an operation is elementwise work on arguments alone that is fused into their reads, such as casts of weights."""
    static = len(static_operands(program, op)) == len(op.inputs) > 0
    return static and op.op_class == "fused" and bool(op.flops_per_point) and not op.traffic


@cached_analysis
def _static(program: Program) -> frozenset[int]:
    found = {i for i, value in enumerate(program.values) if value.origin is not None}
    for op in program.operations:  # producers come first
        elementwise = op.op_class == "fused" and op.inputs
        if op.op_class == "source" or (elementwise and all(use.value in found for use in op.inputs)):
            found.update(use.value for use in op.outputs)
    return frozenset(found)


def is_deferred(program: Program, operation: int) -> bool:
    """Whether no matmul waits for a matmul's result, and other matmuls run after it.

    Examples are gradients of weights. A reduction of such a result may run beside the matmuls that follow.
    """
    return operation in _deferred(program)


@cached_analysis
def _deferred(program: Program) -> frozenset[int]:
    matmuls = [i for i, _ in program.matmuls()]
    awaited: set[int] = set()
    waiting = [use.value for i in matmuls for use in program.operations[i].inputs]
    while waiting:
        value = waiting.pop()
        if value in program.producers and (at := program.producers[value][0]) not in awaited:
            awaited.add(at)
            waiting += [use.value for use in program.operations[at].inputs]
    last = {program.operations[i].region: i for i in matmuls}

    def runs_again(i: int) -> bool:
        region = program.operations[i].region
        return program.regions[region].kind == "loop" or last[region] > i

    return frozenset(i for i in matmuls if i not in awaited and runs_again(i))


def lenders(program: Program, operation: int) -> tuple[int, ...]:
    """The matmuls whose results reach weights at this matmul only, such as gate and up of the matmul down.

    They and it are a block between two residual sums. Their weights are read ahead together, so the communication of the
    block's result may run while the weights of any of them are copied.
    """
    return _lenders(program).get(operation, ())


def is_lender(program: Program, operation: int) -> bool:
    """Whether a matmul is among the `lenders` of another."""
    return operation in _lending(program)


@cached_analysis
def _lending(program: Program) -> frozenset[int]:
    return frozenset().union(*_lenders(program).values())


@cached_analysis
def _lenders(program: Program) -> dict[int, tuple[int, ...]]:
    weighted = {i for i, op in program.matmuls() if static_operands(program, op)}
    found: dict[int, list[int]] = {}
    for i in weighted:
        following = _first_reached(program, i, weighted)
        if len(following) == 1 and program.operations[at := following.pop()].region == program.operations[i].region:
            found.setdefault(at, []).append(i)
    return {at: tuple(sorted(each)) for at, each in found.items()}


def _first_reached(program: Program, start: int, targets: set[int]) -> set[int]:
    """The first targets on every path of dependences from an operation; the search ends at the second."""
    found: set[int] = set()
    seen, waiting = {start}, [start]
    while waiting and len(found) < 2:
        for use in program.operations[waiting.pop()].outputs:
            for at, _ in program.consumers.get(use.value, ()):
                if at in targets and at != start:
                    found.add(at)
                elif at not in seen:
                    seen.add(at)
                    waiting.append(at)
    return found
