"""A plan as text: strategies, layouts, costs, runners-up and assumed constants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite

from autoshard._util.tables import WIDTH, item, percent, size, table, table_blocks, time, wrap_text
from autoshard.emitting.sharding import spec_of
from autoshard.explaining.layer_groups import group_arrays, group_collectives, group_operations, type_of
from autoshard.explaining.memory_orders import orders_section
from autoshard.explaining.padding_section import copies_section, padding_section
from autoshard.naming.parallelism import parallelism
from autoshard.planning.records import NOISE_PART, ArrayPlan, Baseline, OperationPlan, PlannedCollective, PlanRecord
from costmodels.machine.conventions import ASYNC, LOOPED, Pricing
from costmodels.machine.topology import Axis
from search.answer.solution import Proof
from search.formulation.layouts import Layout

_STOPPED = {"time limit": "the time limit", "interrupted": "an interruption"}
_MENTIONED = 0.005
"""The share of the step above which an operation other than a matmul is listed."""
_EQUAL = 1e-4
"""The relative difference within which a baseline equals this plan."""
_FULL = 0.98
"""The part of the memory that a plan may use, above which more memory could make the step faster."""
_TITLES = 15
"""The columns of the header's titles."""


def render(plan: PlanRecord, symbolic: bool = False, width: int = WIDTH) -> str:
    """The whole plan as plain text tables.

    Layers of an unrolled model with the same plan are one row, with a star for their numbers.

    **Arguments:**

    - `symbolic`: adds every cost as a formula in named dimensions, axis sizes and rates, and crossovers between layouts.
      A plan whose file does not hold the program has each matmul's FLOPs in the letters of its einsum only.
    - `width`: columns to fill at most. Paths and source lines are shortened to fit; below 120 columns strategies are wrapped
      and einsums left out.
    """
    named = symbolic and plan.program is not None
    sections = (
        (line for text in _header(plan) for line in wrap_text(text, width, _TITLES)),
        _matmuls(plan, symbolic and not named, width),
        _baselines(plan),
        _other_operations(plan, width),
        _collectives(plan, width),
        _slices(plan, width),
        _arrays("Arguments", (*plan.arguments, *plan.constants), width),
        _arrays("Results", plan.results, width),
        copies_section(plan, width),
        padding_section(plan, width),
        orders_section(plan, width),
        _constants(plan, width),
        _warnings(plan, width),
        *(_formulas(plan, width) if named else ()),
    )
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"


def _formulas(plan: PlanRecord, width: int) -> Iterator[Iterator[str]]:
    from autoshard.explaining.formula_sections import sections

    return sections(plan, width)


# --- The plan as a whole


def _header(plan: PlanRecord) -> Iterator[str]:
    estimate, proof, topology = plan.estimate, plan.proof, plan.topology
    local = estimate.seconds - estimate.collective_seconds
    room = estimate.budget_bytes
    yield f"{plan.name} on {topology.name}"
    yield f"  chips        {topology.size} × {topology.chip.name}; {'; '.join(map(_axis, topology.axes))}"
    yield f"  collectives  {_pricing(topology.pricing)}"
    if plan.program is not None:
        yield f"  parallelism  {parallelism(plan.program, topology, plan.choice)}"
    wire = time(estimate.collective_seconds - estimate.slice_seconds)
    slices = f" + {time(estimate.slice_seconds)} of local slices" if estimate.slices else ""
    yield f"  step time    {time(estimate.seconds)} = {time(local)} on the chip + {wire} of collectives{slices}"
    yield (
        f"               (the operations alone: {time(estimate.memory_seconds)} at HBM's rate,"
        f" {time(estimate.compute_seconds)} at the compute units')"
    )
    yield (
        f"  peak memory  {size(estimate.peak_bytes)} of {size(room)} per chip ({percent(estimate.peak_bytes / room)}),"
        f" at {estimate.peak_where}"
    )
    if words := plan.emission.words():
        yield f"  emission     {words}"
    if proof.status == "OPTIMAL":
        yield "  proof        OPTIMAL: under this cost model no plan that fits is faster (gap 0)"
    else:
        bound = f"no plan is faster than {time(proof.bound_seconds)}"
        yield f"  proof        {proof.status}: {bound} (gap {percent(proof.gap)})"
    yield from _deciders(proof)
    if proof.memory_seconds_per_byte and estimate.peak_bytes >= _FULL * room:
        saved = time(proof.memory_seconds_per_byte * 2**30)
        yield f"  memory       is full: by the bound, each GiB more per chip saves about {saved}"


def _deciders(proof: Proof) -> Iterator[str]:
    """The work of presolve and of the solver; a plan from an older file has only the totals."""
    parts = f", {proof.branches} branches" if proof.branches else ""
    stopped = f", ended by {_STOPPED.get(proof.stopped, proof.stopped)}" if proof.stopped else ""
    if not proof.solver:
        yield f"               {proof.states:,} strategies and layouts{parts}, {proof.wall_seconds:.1f} s{stopped}"
        return
    below = 1 - proof.presolve_bound_seconds / proof.objective_seconds if proof.objective_seconds else 0.0
    left = f"{proof.states - proof.fixed_by_presolve:,} of {proof.states:,} strategies and layouts"
    size = f"{proof.booleans:,} booleans, {proof.constraints:,} constraints"
    bound = f"a bound {percent(max(below, 0.0))} below the plan"
    yield f"  presolve     left {left}, and {bound}, in {proof.presolve_seconds:.1f} s"
    yield f"  solver       {proof.solver}: {proof.solver_status}, {size}{parts}, {proof.solver_seconds:.1f} s{stopped}"


def _pricing(pricing: Pricing) -> str:
    """The conventions for the cost of collectives."""
    links = {"per-axis": "the links of their axes", "total": "all links of a chip"}[pricing.bandwidth]
    named = {LOOPED: "looped with their matmuls as planned", ASYNC: "asynchronous beside matmuls and reads of weights"}
    hidden = (
        named[str(pricing.overlap)] if pricing.hides else f"{percent(pricing.hidden_part)} hidden behind computation"
    )
    return f"{pricing.bandwidth} bandwidth ({links}); {hidden}"


def _axis(axis: Axis) -> str:
    """Such as `x: ring of 4, 2 × 45 GB/s`: links are counted per direction."""
    rate = f"{axis.bytes_per_second / 1e9:g} GB/s"
    if axis.size == 1:
        return f"{axis.name}: 1"
    if axis.kind == "switch":
        return f"{axis.name}: {axis.size} on a switch, {rate} out of each"
    return f"{axis.name}: ring of {axis.size}, 2 × {rate}" if axis.ring else f"{axis.name}: line of {axis.size}, {rate}"


# --- Operations


def _matmuls(plan: PlanRecord, symbolic: bool, width: int) -> Iterator[str]:
    found = group_operations(op for op in plan.operations if op.matmul)
    if not found:
        return
    head, blocks = _operation_table(found, width)
    yield "Matmuls"
    yield from _indent(head)
    for op, lines in zip(found, blocks, strict=True):
        yield from _indent(lines)
        if symbolic:
            yield from wrap_text(f"      FLOPs per chip and run: {_formula(op)}", width, 8)
        if op.runner_up:
            yield from wrap_text(f"      next: {op.runner_up}", width, 12)


_OPERATION_HEADERS = ("operation", "einsum", "strategy", "runs", "time", "bound by", "collectives")
_OPERATION_ALIGNMENT = "/<~>><>"
_EINSUM = 1


def _operation_table(found: Sequence[OperationPlan], width: int) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table of operations; below the full width it has no einsums."""
    every = (_OPERATION_HEADERS, _OPERATION_ALIGNMENT, *map(_operation_row, found))
    if width < WIDTH:
        every = tuple(_without_einsum(each) for each in every)
    headers, align, *rows = every
    return table_blocks(headers, rows, "".join(align), width - 2)  # pyright: ignore[reportArgumentType]


def _without_einsum(cells: Sequence[str]) -> tuple[str, ...]:
    return (*cells[:_EINSUM], *cells[_EINSUM + 1 :])


def _operation_row(op: OperationPlan) -> tuple[str, ...]:
    wire = time(op.collective_seconds) if op.collective_seconds else "-"
    return (short_name(op), op.einsum, op.strategy, f"{op.count:g}", time(op.seconds), op.regime, wire)


def short_name(op: OperationPlan) -> str:
    """The argument path of a matmul's weight, or else its source line."""
    if not op.matmul:
        return op.name
    name = op.name.removeprefix(f"{op.primitive} ")
    return name.removesuffix(f"({op.source})").strip() or op.source


def _formula(op: OperationPlan) -> str:
    """`2 · a · b/xy · c`: every factor, and the mesh axes that it is divided over."""
    letters = sorted(set(re.findall("[a-zA-Z]", op.einsum)))
    cut = [f"{letter}/{''.join(split)}" if split else letter for letter, split in zip(letters, op.splits, strict=True)]
    sizes = ", ".join(f"{letter} = {count}" for letter, count in zip(letters, op.sizes, strict=True))
    return f"2 · {' · '.join(cut)} = {op.flops / op.count:.4g} where {sizes}"


def _other_operations(plan: PlanRecord, width: int) -> Iterator[str]:
    fused = (op for op in plan.operations if not op.matmul)
    spent = group_operations(op for op in fused if op.seconds + op.collective_seconds > 0)
    if not spent:
        return
    listed = [op for op in spent if op.seconds + op.collective_seconds > _MENTIONED * plan.estimate.seconds]
    rest = [op for op in spent if op not in listed]
    yield "Other operations"
    if listed:
        head, blocks = _operation_table(listed, width)
        yield from _indent([*head, *(line for block in blocks for line in block)])
    if rest:
        seconds, wire = sum(op.seconds for op in rest), sum(op.collective_seconds for op in rest)
        each = f"each below {percent(_MENTIONED)} of the step"
        yield f"  {len(rest)} more, {each}: {time(seconds)}, collectives {time(wire)}"


# --- Baselines


def _baselines(plan: PlanRecord) -> Iterator[str]:
    if not plan.baselines:
        return
    yield "Baselines, each the best of its kind"
    rows = [(each.name, *margin(plan, each)) for each in plan.baselines]
    yield from _indent(table(("layout", "step", "against this plan"), rows, "<><"))
    best = min(plan.baselines, key=lambda each: each.seconds)
    if best.seconds <= plan.estimate.seconds * (1 + NOISE_PART):
        yield f"  Margins below {percent(NOISE_PART)} are within the model's error: {best.name} is good enough."


def margin(plan: PlanRecord, found: Baseline) -> tuple[str, str]:
    """The step time of a baseline, and its comparison with the plan: `1.59 ms`, `12.0 % slower`."""
    if not isfinite(found.seconds):
        return "-", found.why
    ours = plan.estimate.seconds
    if found.seconds <= ours * (1 + _EQUAL):
        return time(found.seconds), "as fast as this plan"
    text = (
        f"{found.seconds / ours:.2f} times"
        if found.seconds >= 2 * ours
        else f"{percent(found.seconds / ours - 1)} slower"
    )
    open_ = found.bound_seconds < found.seconds * (1 - _EQUAL)
    return time(
        found.seconds
    ), f"{text}{f' at most ({percent(found.bound_seconds / ours - 1)} at least)' if open_ else ''}"


# --- Collectives


def _collectives(plan: PlanRecord, width: int) -> Iterator[str]:
    yield "Collectives"
    found = plan.estimate.collectives
    if not found:
        yield "  none"
        return
    rows = [
        (each.kind, _mesh_order(each.axes, plan), size(each.bytes), f"{each.count:g}", time(each.seconds), each.where)
        for each in group_collectives(found)
    ]
    headers = ("kind", "axes", "payload", "runs", "time", "array, for operation")
    yield from _indent(table(headers, rows, "<<>>>~", width - 2))
    yield from wrap_text("  in all: " + "; ".join(_totals(found)), width, 4)


def _slices(plan: PlanRecord, width: int) -> Iterator[str]:
    found = group_collectives(plan.estimate.slices)
    if not found:
        return
    yield f"Local slices ({time(plan.estimate.slice_seconds)}: read and written in HBM, nothing is sent)"
    rows = [
        (_mesh_order(each.axes, plan), size(each.bytes), f"{each.count:g}", time(each.seconds), each.where)
        for each in sorted(found, key=lambda each: -each.seconds)
    ]
    yield from _indent(table(("axes", "shard", "runs", "time", "array, for operation"), rows, "<>>>~", width - 2))


def _totals(found: Sequence[PlannedCollective]) -> Iterator[str]:
    kinds = sorted({each.kind for each in found}, key=lambda kind: -sum(c.seconds for c in found if c.kind == kind))
    for kind in kinds:
        alike = [each for each in found if each.kind == kind]
        runs, seconds = sum(each.count for each in alike), sum(each.seconds for each in alike)
        payload = sum(each.bytes * each.count for each in alike)
        yield f"{runs:g} {kind}{'s' if runs > 1 else ''}, {size(payload)}, {time(seconds)}"


def _mesh_order(axes: Sequence[str], plan: PlanRecord) -> str:
    return "".join(axis.name for axis in plan.topology.axes if axis.name in axes)


# --- Arrays


def spec_text(layout: Layout) -> str:
    """A layout as Python source: `P(None, ('y', 'z'))`."""
    return f"P({', '.join(map(repr, spec_of(layout)))})"


def _arrays(title: str, arrays: Sequence[ArrayPlan], width: int) -> Iterator[str]:
    if not arrays:
        return
    rows = [
        (array.path, type_of(array, count), spec_text(array.layout), size(array.bytes_per_chip))
        for array, count in group_arrays(arrays)
    ]
    total = sum(array.bytes_per_chip for array in arrays)
    headers = ("path", "array", "PartitionSpec", "per chip")
    yield f"{title} ({size(total)} per chip)"
    yield from _indent(table(headers, rows, "/~<>", width - 2))


# --- Constants and warnings


def _constants(plan: PlanRecord, width: int) -> Iterator[str]:
    unused = plan.topology.unused_constants
    constants = [(name, c) for name, c in plan.topology.chip.constants.items() if name not in unused]
    rows = [(name, f"{c.value:g}", c.status, c.source) for name, c in constants if c.status in ("assumed", "given")]
    if rows:
        yield f"Constants of {plan.topology.chip.name} without a published or measured source"
        yield from _indent(table(("constant", "value", "status", "why"), rows, "<><~", width - 2))


def _warnings(plan: PlanRecord, width: int) -> Iterator[str]:
    if plan.warnings:
        yield "Warnings"
        yield from (line for warning in plan.warnings for line in item(warning, width))


def _indent(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
