"""The arrays of a plan's arguments by their `/`-joined paths, with renamed mesh axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoshard.errors import UnknownNameError
from autoshard.planning.argument_names import heads, position
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees
from search.formulation.layouts import Layout

Axes = Mapping[str, str] | None
"""Other names for mesh axes; omitted axes keep theirs."""
Spec = tuple[str | tuple[str, ...] | None, ...]
"""The entries of a `PartitionSpec`, without trailing `None`s."""


@dataclass(frozen=True)
class Leaf:
    """One array of an argument: the argument's name, the keys of the array inside it, and the entries of its spec."""

    head: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    spec: Spec

    @property
    def path(self) -> str:
        """Its path, including the argument's name: `params/layers/wq`."""
        return "/".join((self.head, *self.keys))

    @property
    def inner(self) -> tuple[str, ...]:
        """Its path inside its argument; the argument's name if the argument is an array."""
        return self.keys or tuple(self.head.split("/"))

    def entry(self, dimension: int) -> str | tuple[str, ...] | None:
        """The mesh axes of one dimension."""
        return self.spec[dimension] if dimension < len(self.spec) else None


def leaves(plan: PlanRecord, argument: str | int | None = None, axes: Axes = None) -> tuple[Leaf, ...]:
    """The arrays of all arguments, or of one, in order.

    **Raises:** `ExportError` for an unknown argument.
    """
    chosen = None if argument is None else position(plan, argument)
    names, paths = heads(plan), pytrees.paths(plan.in_tree.data)
    return tuple(
        Leaf(names[int(keys[0])], keys[1:], array.shape, entries(array.layout, axes))
        for keys, array in zip(paths, plan.arguments, strict=True)
        if chosen is None or int(keys[0]) == chosen
    )


def mesh_axes(plan: PlanRecord, axes: Axes) -> dict[str, int]:
    """The renamed mesh axes with their sizes.

    **Raises:** `ExportError` for unknown axes and for names that are not unique.
    """
    sizes = plan.topology.axis_sizes
    unknown = [name for name in axes or () if name not in sizes]
    if unknown:
        raise UnknownNameError(f"The plan has no mesh axis {', '.join(unknown)}; it has {', '.join(sizes)}.")
    renamed = {(axes or {}).get(name, name): size for name, size in sizes.items()}
    if len(renamed) != len(sizes):
        raise UnknownNameError(
            f"The names of the mesh axes {', '.join(sizes)} must be unique, got {', '.join(renamed)}."
        )
    return renamed


def entries(layout: Layout, axes: Axes = None) -> Spec:
    """A layout as the entries of a `PartitionSpec`, without trailing `None`s."""
    called = axes or {}
    found: list[str | tuple[str, ...] | None] = []
    for dim in layout.dims:
        names = tuple(called.get(axis, axis) for axis in dim)
        found.append(names[0] if len(names) == 1 else names or None)
    while found and found[-1] is None:
        found.pop()
    return tuple(found)
