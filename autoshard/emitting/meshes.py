"""Plans on the user's mesh: the plan's axes under the names that they have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jax.sharding import AxisType

from autoshard.errors import TopologyError
from autoshard.planning.records import ArrayPlan, PlanRecord
from search.answer.assignment import Choice
from search.formulation.axis_renaming import rename

AxisNames = Mapping[str, str]
"""Per axis of the plan, the name of the mesh axis that it is; omitted axes keep their name."""


@dataclass(frozen=True)
class PlanOnMesh(PlanRecord):
    """A plan with the axis names of a mesh, and the plan as it was searched, in whose names pins are written."""

    planned: PlanRecord | None = None


def as_planned(plan: PlanRecord) -> PlanRecord:
    """The plan in its own axis names."""
    return plan.planned or plan if isinstance(plan, PlanOnMesh) else plan


def on_mesh(plan: PlanRecord, mesh: Any, axes: AxisNames | None = None) -> PlanRecord:
    """The plan in the axis names of a mesh; the plan itself if they are its own.

    **Raises:** `TopologyError` if the mesh does not fit, as `names_on` says.
    """
    names = names_on(plan, mesh, axes)
    if all(axis == name for axis, name in names.items()):
        return plan
    kept = {axis: names.get(axis, f"{axis} of size 1") for axis in plan.topology.axis_sizes}
    content = {each.name: getattr(plan, each.name) for each in fields(PlanRecord)}
    content["topology"] = replace(
        plan.topology, axes=tuple(replace(axis, name=kept[axis.name]) for axis in plan.topology.axes)
    )
    for rows in ("arguments", "constants", "results"):
        content[rows] = _arrays(content[rows], kept)
    content["choice"] = Choice(
        tuple(rename(strategy, kept) for strategy in plan.choice.strategies),
        {value: rename(layout, kept) for value, layout in plan.choice.hubs.items()},
    )
    if plan.carriage:
        renamed = (
            replace(each, layouts=tuple(rename(layout, kept) for layout in each.layouts))
            for each in plan.carriage.constraints
        )
        content["carriage"] = replace(plan.carriage, constraints=tuple(renamed))
    return PlanOnMesh(**content, planned=as_planned(plan))


def _arrays(rows: Sequence[ArrayPlan], names: AxisNames) -> tuple[ArrayPlan, ...]:
    return tuple(replace(row, layout=rename(row.layout, names)) for row in rows)


def names_on(plan: PlanRecord, mesh: Any, axes: AxisNames | None = None) -> dict[str, str]:
    """The mesh axis of each axis of the plan that has more than one chip.

    By default it is the one of the same name and size. If a name or a size differs, axes are paired by size, in order,
    which takes as many axes of each size on the mesh as in the plan.

    **Raises:** `TopologyError` if there is no such axis, or if the mesh is manual, as inside a `shard_map`.
    """
    needed = {axis: n for axis, n in plan.topology.axis_sizes.items() if n > 1}
    there = {name: n for name, n in mesh.shape.items() if n > 1}
    if AxisType.Manual in mesh.axis_types:
        raise TopologyError(
            f"The axes of the mesh must be Auto or Explicit, got the mesh of a shard_map ({_sizes(mesh.shape)}): call the"
            " planned function outside of it."
        )
    if axes is not None:
        names = _given(plan, needed, axes)
    elif needed.items() <= there.items():
        return {axis: axis for axis in needed}
    else:
        names = _paired(needed, there)
    if len(names) < len(needed) or any(there.get(names[axis]) != n for axis, n in needed.items()):
        raise TopologyError(_misfit(plan, mesh, needed, axes))
    return names


def _given(plan: PlanRecord, needed: Mapping[str, int], axes: AxisNames) -> dict[str, str]:
    unknown = [axis for axis in axes if axis not in plan.topology.axis_sizes]
    if unknown:
        raise TopologyError(f"axes must name axes of the plan ({', '.join(needed)}), got {', '.join(unknown)}.")
    names = {axis: axes.get(axis, axis) for axis in needed}
    if len(set(names.values())) < len(names):
        raise TopologyError(f"axes must give each axis of the plan a mesh axis of its own, got {dict(axes)}.")
    return names


def _paired(needed: Mapping[str, int], there: Mapping[str, int]) -> dict[str, str]:
    """Pairs of axes of one size, in order; empty if one has more axes of some size than the other."""
    if sorted(needed.values()) != sorted(there.values()):
        return {}
    free = list(there)
    names = {}
    for axis, n in needed.items():
        names[axis] = next(name for name in free if there[name] == n)
        free.remove(names[axis])
    return names


def _misfit(plan: PlanRecord, mesh: Any, needed: Mapping[str, int], axes: AxisNames | None) -> str:
    as_named = "" if axes is None else f", by the names {dict(axes)}"
    return (
        f"The mesh has the axes {_sizes(mesh.shape)}; the plan for {plan.topology.name} needs {_sizes(needed)}{as_named}."
        ' Use plan.make_mesh(), plan for a topology of the mesh\'s shape, or name the axes: axes={"x": "data"}.'
    )


def _sizes(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={n}" for name, n in shape.items()) or "none"
