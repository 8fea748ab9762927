"""A plan's layouts as JAX's `PartitionSpec`s, shardings, abstract arrays and meshes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autoshard.emitting import targets
from autoshard.emitting.meshes import AxisNames, on_mesh
from autoshard.errors import TopologyError
from autoshard.planning.records import ArrayPlan, PlanRecord
from search.formulation.layouts import Layout


def spec_of(layout: Layout) -> PartitionSpec:
    """A layout as a `PartitionSpec`, without trailing `None`s."""
    entries: list[Any] = [None if not dim else dim[0] if len(dim) == 1 else dim for dim in layout.dims]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def in_specs(plan: PlanRecord) -> tuple[Any, ...]:
    """The arguments' `PartitionSpec`s, shaped like the arguments."""
    return plan.in_tree.rebuild([spec_of(array.layout) for array in plan.arguments])


def out_specs(plan: PlanRecord) -> Any:
    """The results' `PartitionSpec`s, shaped like the result."""
    return plan.out_tree.rebuild([spec_of(array.layout) for array in plan.results])


def shardings(plan: PlanRecord, mesh: Mesh, axes: AxisNames | None = None) -> tuple[tuple[Any, ...], Any]:
    """The arguments' and the results' `NamedSharding`s on a mesh, as `on_mesh` fits it.

    **Raises:** `TopologyError`.
    """
    plan = on_mesh(plan, mesh, axes)

    def sharded(arrays: Sequence[ArrayPlan]) -> list[NamedSharding]:
        return [NamedSharding(mesh, spec_of(array.layout)) for array in arrays]

    return plan.in_tree.rebuild(sharded(plan.arguments)), plan.out_tree.rebuild(sharded(plan.results))


# --- meshes


def make_mesh(plan: PlanRecord, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the plan's axes over `devices`, ordered by their torus coordinates; see `Plan.make_mesh`.

    **Raises:** `TopologyError` if the number of devices differs from the plan's number of chips.
    """
    try:
        if devices is None and plan.topology.chip.kind == "cpu":
            devices = targets.host_devices(plan.topology.size)
        return targets.mesh_of(jax.devices() if devices is None else devices, plan.topology.axis_sizes)
    except targets.TargetError as error:
        raise TopologyError(f"The plan is for {plan.topology.name}, {plan.topology.size} chips. {error}") from error


def current_mesh(plan: PlanRecord) -> Mesh:
    """The mesh of `jax.set_mesh` if there is one, else a new one with the plan's axes."""
    return mesh_in_context() or make_mesh(plan)


def mesh_in_context(abstract: bool = False) -> Any:
    """The mesh of `jax.set_mesh`, or its abstract shape; `None` if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return mesh if abstract else jax.sharding.get_mesh()
