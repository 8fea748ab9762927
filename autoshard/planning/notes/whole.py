"""Work that is not shared among the chips because its rule keeps a dimension whole, with its price.

An operation may be replicated, as random numbers of one sequence. Or one of its dimensions stays whole: then what the chips
compute alike, and the collectives that join its shards, are the price (docs/rules.md, "Dimensions that stay whole").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from costmodels.operations import price
from costmodels.program.program import Operation
from search.answer.assignment import Collective, kept_layout
from search.solve import Solution

COSTED = ("matmul", "memory", "fused")
MATTERS = 0.01
"""The fraction of a step, or of a chip's memory, from which work on all chips alike is worth a warning."""
_WHY_WHOLE = dict.fromkeys(
    ("random_bits", "rng_bit_generator"),
    "threefry keys (jax.random.key(seed), with jax_threefry_partitionable) would be split",
)
"""Per primitive that no strategy can split: what would be split in its place."""


def whole_notes(solution: Solution) -> Iterator[str]:
    """The operations that no strategy can split, and those of which one keeps a dimension whole, with their prices."""
    if solution.problem.topology.size > 1:
        yield from _whole_operations(solution)
        yield from _whole_dimensions(solution)


def _whole_operations(solution: Solution) -> Iterator[str]:
    """Operations that no strategy can split, with their share of the step: operations, slices of the results, and bytes."""
    program, topology, check = solution.problem.program, solution.problem.topology, solution.check
    sliced: dict[int, float] = {}
    for each in solution.slices:
        sliced[each.value] = sliced.get(each.value, 0.0) + float(each.seconds)
    for op in program.operations:
        if op.op_class not in COSTED or not _is_whole(op):
            continue
        once = price(program, op, np.ones((1, len(op.factors))), topology.chip)
        seconds = float(once.seconds[0]) * program.multiplicity(op.region)
        seconds += sum(sliced.get(use.value, 0.0) for use in op.outputs)
        made = sum(program.values[use.value].bytes for use in op.outputs)
        if seconds >= MATTERS * check.seconds or made >= MATTERS * solution.problem.budget_bytes:
            hint = f"; {_WHY_WHOLE[op.primitive]}" if op.primitive in _WHY_WHOLE else ""
            yield (
                f"{op.name} is computed whole on every chip: {seconds * 1e3:.4g} ms of the step's {check.seconds * 1e3:.4g},"
                f" {made / 2**20:.4g} MiB of results per chip{hint}."
            )


def _is_whole(op: Operation) -> bool:
    return all(factor.kind == "whole" or factor.size == 1 for factor in op.factors)


def _stays_whole(op: Operation, dim: tuple[int, ...]) -> bool:
    """Whether no part of a dimension may be split; the equal parts of one may, and are exchanged."""
    return bool(dim) and all(op.factors[f].kind == "whole" for f in dim)


def _longest_whole(op: Operation) -> int:
    dims = (dim for use in op.inputs for dim in use.dims if _stays_whole(op, dim))
    return max(prod(op.factors[f].size for f in dim) for dim in dims)


@dataclass
class _Price:
    """Seconds of operations of one line: of what chips compute alike, and of collectives; `size` is that of the dimension."""

    name: str
    size: int
    alike: float = 0.0
    joined: float = 0.0


def _whole_dimensions(solution: Solution) -> Iterator[str]:
    """The dimensions that operations keep whole, of the operations of each line together."""
    total = solution.check.seconds
    found: dict[tuple[str, str], _Price] = {}
    joins: dict[int, float] = {}
    for each in solution.collectives:
        if each.operation is not None and _makes_whole(solution, each):
            joins[each.operation] = joins.get(each.operation, 0.0) + float(each.seconds)
    for i, op in enumerate(solution.problem.program.operations):
        if op.op_class in COSTED and not _is_whole(op):
            size, alike = _computed_alike(solution, i)
            if alike or i in joins:
                line = found.setdefault((op.primitive, op.source), _Price(op.name, size or _longest_whole(op)))
                line.alike, line.joined = line.alike + alike, line.joined + joins.get(i, 0.0)
    for each in found.values():
        if each.alike + each.joined >= MATTERS * total:
            parts = [(each.alike, "of work that chips do alike"), (each.joined, "of collectives that join it")]
            spent = " and ".join(f"{seconds * 1e3:.4g} ms {of}" for seconds, of in parts if seconds)
            yield f"{each.name} keeps a dimension of {each.size} whole: {spent}, of the step's {total * 1e3:.4g} ms."


def _makes_whole(solution: Solution, collective: Collective) -> bool:
    """Whether a collective joins the shards of an operand along a dimension that its operation keeps whole."""
    program = solution.problem.program
    op = program.operations[collective.operation or 0]
    cuts = kept_layout(program, solution.choice, collective.value).dims
    return any(
        set(collective.axes) & set(axes) and _stays_whole(op, dim)
        for use in op.inputs
        if use.value == collective.value
        for axes, dim in zip(cuts, use.dims, strict=True)
    )


def _computed_alike(solution: Solution, i: int) -> tuple[int, float]:
    """The longest dimension that idle axes could have split, and the seconds that they would save; 0 if there is none."""
    program, topology = solution.problem.program, solution.problem.topology
    op, splits, sizes = program.operations[i], solution.choice.strategies[i].splits, topology.axis_sizes
    used = {axis for axes in splits for axis in axes}
    idle = [size for axis, size in sizes.items() if axis not in used and size > 1]
    dims = {dim for use in (*op.inputs[:1], *op.outputs) for dim in use.dims if _stays_whole(op, dim)}
    lengths = [prod(op.factors[f].size for f in dim) for dim in dims]
    kept = [length for length in lengths if any(length % size == 0 for size in idle)]
    if not kept:
        return 0, 0.0
    pieces = np.array([[float(prod(sizes[axis] for axis in axes)) for axes in splits]])
    once = price(program, op, pieces.reshape(1, len(op.factors)), topology.chip, topology.pricing.asynchronous)
    seconds = float(once.seconds[0]) * program.multiplicity(op.region)
    return max(kept), seconds * (1 - 1 / prod(size for size in idle if max(kept) % size == 0))
