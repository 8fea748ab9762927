"""A plan's ways of being carried as text: a table of compiled programs, and the constraints as source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import inf, isfinite
from typing import Any

from autoshard._util.tables import WIDTH, item, size, table, time
from autoshard.carrying.written import calls_of, line_of
from autoshard.planning.carriage import Carriage
from autoshard.planning.records import PlanRecord

_UNDER = {"tpu": "the TPU", "gpu": "the GPU", "host": "host devices"}


def carriage_text(plan: PlanRecord, width: int = WIDTH) -> str:
    """The programs of a plan in each way to carry it, the fastest way, and the constraints to add to the source."""
    if plan.carriage is None:
        return (
            f"No way to carry {plan.name} on {plan.topology.name} is compiled yet; `autoshard carry` compiles them.\n"
        )
    found = plan.carriage
    head = f"{plan.name} on {plan.topology.name}, compiled for {_UNDER[found.target]} ({found.compiler})"
    lines = [head, "", *table(_HEADERS, list(_rows(plan, found)), "<>>>>>", width), ""]
    lines += [f"The fastest way: {found.fastest}, the default of plan.jit."]
    lines += [f"{each.way}: {each.why}" for each in found.programs if each.why]
    return "\n".join([*lines, *_constraints(found, width)]) + "\n"


_HEADERS = ("way", "step", "of the manual one", "collectives", "bytes sent", "peak")


def _rows(plan: PlanRecord, found: Carriage) -> Iterator[tuple[str, ...]]:
    manual = found.program("manual")
    for each in found.programs:
        way = f"constraints ({found.count})" if each.way == "constraints" else each.way
        if not isfinite(each.step_seconds):
            yield way, "not compiled", "", "", "", ""
            continue
        part = f"{each.step_seconds / manual.step_seconds:.2f}" if manual else ""
        peak = size(each.peak_bytes) if each.peak_bytes else ""
        yield way, time(each.step_seconds), part, time(each.wire_seconds), size(each.wire_bytes), peak
    yield (
        "planned",
        time(plan.estimate.seconds),
        "",
        time(plan.estimate.collective_seconds),
        "",
        size(plan.estimate.peak_bytes),
    )


def _constraints(found: Carriage, width: int) -> Iterator[str]:
    if not found.constraints:
        yield "No constraint is needed." if found.within else "No constraint was found to help."
        return
    yield ""
    verdict = "within" if found.within else "NOT within"
    yield f"Constraints, with which the program is {verdict} the bounds of the manual one ({found.compilations} compiled):"
    for each in found.constraints:
        value = each.variable or "value"
        yield from item(line_of(each), width)
        yield f"      {calls_of(each, value)}"


def carriage_dict(found: Carriage) -> dict[str, Any]:
    """The carriage as plain data, for JSON: figures of programs that were not compiled are null."""
    programs = [
        {key: None if value == inf else value for key, value in asdict(each).items()} for each in found.programs
    ]
    return {**asdict(found), "programs": programs, "fastest": found.fastest}


def export_note(plan: PlanRecord) -> str:
    """The part of the plan that the specs of an export carry on their own, and the lines to add."""
    add = "To add: `plan.jit(fn)`, or `plan.apply(fn)` in a program of yours, runs the planned collectives."
    if plan.padding:
        return (
            f"The plan pads dimensions, which these specs alone cannot do: search with padding=False for specs. {add}"
        )
    command = "`autoshard carry plan.json FILE.py:NAME`"
    found = plan.carriage
    specs, manual = (found.program("specs"), found.program("manual")) if found else (None, None)
    if found is None or specs is None:
        return f"How much of the plan these specs carry on their own is not measured: {command} compiles it. {add}"
    ordered = any(array.order for array in (*plan.arguments, *plan.results))
    formats = ", with the formats of `plan.formats(mesh)`" if ordered else ""
    where = f"Compiled for {_UNDER[found.target]} ({found.compiler}, {command}){formats}"
    if specs.why:
        return f"{where}, these specs alone cannot carry the plan: {specs.why} {add}"
    if manual is None:
        planned = time(plan.estimate.seconds)
        sent = f"they send {size(specs.wire_bytes)}"
        share = f"{where}, these specs alone take {time(specs.step_seconds)} a step, planned with {planned}; {sent}."
        return f"{share} {_lines_to_add(found) or add}"
    peak = f", the peak {size(specs.peak_bytes)} for {size(manual.peak_bytes)}" if specs.peak_bytes else ""
    share = (
        f"{where}, these specs alone take {time(specs.step_seconds)} a step where the planned program takes"
        f" {time(manual.step_seconds)}; they send {size(specs.wire_bytes)} for {size(manual.wire_bytes)}{peak}."
    )
    return f"{share} {_lines_to_add(found) or add}"


def _lines_to_add(found: Carriage) -> str:
    """The constraints to add to the source, with the step that they give; empty if none is compiled."""
    program = found.program("constraints")
    if program is None or program.why:
        return ""
    if found.constraints:
        lines = "; ".join(f"{line_of(each)}: {calls_of(each, each.variable or 'value')}" for each in found.constraints)
        return f"To add, for {time(program.step_seconds)} a step: {lines}."
    return (
        f'To add: `plan.jit(fn, carry="constraints")` needs no constraint, updates loops in place and keeps memory orders'
        f" in them: {time(program.step_seconds)} a step."
    )
