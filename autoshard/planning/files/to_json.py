"""A plan as plain data for JSON."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from autoshard.planning.emission import BY_DEFAULT
from autoshard.planning.files import program_file
from autoshard.planning.records import ArrayPlan, PlannedCollective, PlanRecord
from search.formulation.layouts import Axes, Layout
from search.formulation.strategies import Strategy

Json = dict[str, Any]

RESULT_SIDE = -1
"""The result of a product as the side that is looped, in plan files."""


def to_json(plan: PlanRecord) -> Json:
    """A plan as plain data, without the version of the format."""
    rows = zip(plan.operations, plan.choice.strategies, strict=True)
    return {
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "jax_version": plan.jax_version,
        "donate_argnums": list(plan.donate_argnums),
        "proof": _plain(plan.proof),
        "warnings": list(plan.warnings),
        "estimate": _plain(plan.estimate),
        "arguments": [_array(array) for array in plan.arguments],
        "constants": [_array(array) for array in plan.constants],
        "results": [_array(array) for array in plan.results],
        "operations": [_plain(row) | _other_fields(strategy) for row, strategy in rows],
        "kept": [{"value": value, "layout": _layout(layout)} for value, layout in sorted(plan.choice.hubs.items())],
        "in_tree": plan.in_tree.data,
        "out_tree": plan.out_tree.data,
        "topology": plan.topology.to_dict(),
        **({"emission": _plain(plan.emission)} if plan.emission != BY_DEFAULT else {}),
        **({"padding": [_plain(each) for each in plan.padding]} if plan.padding else {}),
        **({"handed_results": list(plan.handed_results)} if plan.handed_results else {}),
        **({"carriage": _plain(plan.carriage)} if plan.carriage else {}),
        **({"baselines": [_plain(each) for each in plan.baselines]} if plan.baselines else {}),
        **_program_to_json(plan),
    }


def _other_fields(strategy: Strategy) -> Json:
    looped = (
        {} if strategy.looped is None else {"looped": RESULT_SIDE if strategy.looped == "result" else strategy.looped}
    )
    return {"carried": [list(axes) for axes in strategy.carried], **looped}


def _program_to_json(plan: PlanRecord) -> Json:
    if plan.program is None or plan.dimensions is None:
        return {}
    return {"program": program_file.to_json(plan.program, plan.dimensions)}


def _plain(record: Any) -> Json:
    return {field.name: _value(field.name, getattr(record, field.name)) for field in fields(record)}


def _array(array: ArrayPlan) -> Json:
    row = _plain(array)
    return {key: value for key, value in row.items() if value or key not in ("order", "padding")}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, Layout):
        return _layout(value)
    if name == "splits":
        return [_axes(axes) for axes in value]
    if name == "layouts":
        return [_layout(each) for each in value]
    if name in ("collectives", "slices") and isinstance(value, tuple):
        return [_collective(each) for each in value]
    if name in ("padding", "programs", "constraints") and isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _collective(each: PlannedCollective) -> Json:
    row = _plain(each)
    return row if each.hidden_seconds else {key: value for key, value in row.items() if key != "hidden_seconds"}


def _layout(layout: Layout) -> Any:
    dims = [_axes(axes) for axes in layout.dims]
    return {"dims": dims, "partial": list(layout.partial)} if layout.partial else dims


def _axes(axes: Axes) -> str | list[str] | None:
    return None if not axes else axes[0] if len(axes) == 1 else list(axes)
