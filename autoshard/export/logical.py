"""Exports as rules for logical axes: each dimension of an array has a name, and each name has mesh axes.

Names are unique, since some libraries take the first rule of a name that fits (Flax Linen, MaxText) and others have one rule
per name (Flax NNX). Logical axes are less expressive than a plan: if two dimensions of the same name are split differently,
the export is refused and lists the arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.errors import ExportError
from autoshard.export import python
from autoshard.export.arrays import Axes, Leaf, leaves, mesh_axes
from autoshard.export.python import literal, sequence
from autoshard.export.specs import carriage_note, module, nest, padding_note
from autoshard.planning.argument_names import heads, position
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees

Name = str | None
Entry = str | tuple[str, ...] | None
_LISTED = 8
_BATCH = "activation_batch"
"""MaxText's name of the batch."""


@dataclass(frozen=True)
class _Named:
    """An array with the names of its dimensions; `None` for one that is never split."""

    leaf: Leaf
    names: tuple[Name, ...]


def render_flax(plan: PlanRecord, argument: str | int | None = None, axes: Axes = None, names: Any = None) -> str:
    """`MESH_SHAPE`, `LOGICAL_AXIS_RULES` and `LOGICAL_AXES`, the names of all dimensions, for Flax Linen and NNX.

    **Raises:** `ExportError`.
    """
    arrays = _logical_names(plan, argument, axes, names)
    found = [sequence([literal(name), python.axes(entry)]) for name, entry in _rules(arrays).items()]
    imports: set[str] = set()
    at = None if argument is None else position(plan, argument)
    tree = plan.in_tree.data if at is None else plan.in_tree.data["tuple"][at]
    what = "The arguments" if at is None else f"The arrays of {heads(plan)[at]}"
    labels = nest(tree, [python.spec(each.names) for each in arrays], imports, what)
    doc = (
        f"The layouts of {plan.name}, planned for {plan.topology.name}, by logical axes.\n\n"
        "LOGICAL_AXIS_RULES are for flax.linen.logical_axis_rules and flax.nnx.logical_axis_rules; each name has one rule.\n"
        "LOGICAL_AXES are the names of the arrays' dimensions."
    )
    return module(plan, doc, axes, imports, {"LOGICAL_AXIS_RULES": sequence(found), "LOGICAL_AXES": labels})


def render_maxtext(plan: PlanRecord, argument: str | int | None = None, axes: Axes = None, names: Any = None) -> str:
    """The YAML of a `custom_mesh_and_rule`: `mesh_axes`, `data_sharding`, `logical_axis_rules`.

    **Raises:** `ExportError`, also without names: MaxText's models have their own names and ignore others.
    """
    if names is None:
        raise ExportError(
            "MaxText's models have their own names of dimensions (embed, mlp, heads, ...) and ignore others. Pass names, a"
            " mapping of regular expressions over paths to the names of the dimensions."
        )
    rules = _rules(_logical_names(plan, argument, axes, names))
    mesh = mesh_axes(plan, axes)
    batch = _axes_list(rules[_BATCH]) if _BATCH in rules else list(mesh)
    sizes = " ".join(f"ici_{name}_parallelism={size}" for name, size in mesh.items())
    assumed = (
        ""
        if _BATCH in rules
        else f"# No array has the name {_BATCH}: the batch is split over all mesh axes, the default.\n"
    )
    note = "\n".join(f"# {line}".rstrip() for line in (carriage_note(plan) + padding_note(plan)).strip().splitlines())
    lines = [f"  [{_quote(name)}, {_quote_list(_axes_list(entry))}]," for name, entry in rules.items()]
    return (
        f"# The layouts of {_line(plan.name)}, planned for {_line(plan.topology.name)}.\n"
        f"{note}\n"
        f"# Sizes of the mesh: {_line(sizes)}\n{assumed}"
        f"mesh_axes: {_quote_list(list(mesh))}\n"
        f"data_sharding: [{_quote_list(batch)}]\n"
        "logical_axis_rules: [\n" + "\n".join(lines) + "\n]\n"
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _axes_list(entry: Entry) -> list[str]:
    return [] if entry is None else [entry] if isinstance(entry, str) else list(entry)


def _quote_list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(_quote, names))}]"


def _quote(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"


# --- names of dimensions


def _logical_names(plan: PlanRecord, argument: str | int | None, axes: Axes, names: Any) -> list[_Named]:
    """The arrays with the user's names, or with names by the sizes of the dimensions.

    **Raises:** `ExportError` for an array without names, or with another number of names than dimensions.
    """
    arrays = leaves(plan, argument, axes)
    if isinstance(names, Mapping) and any(_invalid(pattern) for pattern in names if _is_names(names[pattern])):
        bad = next(pattern for pattern in names if _invalid(pattern))
        raise ExportError(f"Invalid regular expression {bad!r} in names.")
    if names is None:
        given: list[Any] = [_by_size(leaf) for leaf in arrays]
    elif isinstance(names, Mapping) and names and all(_is_names(value) for value in names.values()):
        given = [_by_rule(names, leaf, argument is not None) for leaf in arrays]
    else:
        given = _by_tree(plan, argument, names)
    given = [tuple(found) if isinstance(found, jax.sharding.PartitionSpec) else found for found in given]
    faults = [
        f"{leaf.path} has {_fault_text(found, leaf)}"
        for leaf, found in zip(arrays, given, strict=True)
        if _bad(found, leaf)
    ]
    if faults:
        raise ExportError(f"Each dimension needs a name, or None for one that stays whole:{_join_faults(faults)}")
    return [_Named(leaf, tuple(found)) for leaf, found in zip(arrays, given, strict=True)]


def _invalid(pattern: Any) -> bool:
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        return True
    return False


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(n is None or type(n) is str for n in value)
    )


def _bad(found: Any, leaf: Leaf) -> bool:
    return found is None or not _is_names(found) or len(found) != len(leaf.shape)


def _fault_text(found: Any, leaf: Leaf) -> str:
    size = f"{len(leaf.shape)} dimensions"
    return f"{size} and no names" if found is None else f"{size}, and the names {found!r}"


def _by_size(leaf: Leaf) -> tuple[Name, ...]:
    """Names by size; an array with two dimensions of one size numbers them."""
    names = [f"dim_{size}" for size in leaf.shape]
    return tuple(name if names.count(name) == 1 else f"{name}_{names[:k].count(name)}" for k, name in enumerate(names))


def _by_rule(names: Mapping[str, Sequence[Name]], leaf: Leaf, inside: bool) -> Sequence[Name] | None:
    path = "/".join(leaf.inner) if inside else leaf.path
    found = next((value for pattern, value in names.items() if re.search(pattern, path)), None)
    return () if found is None and not leaf.shape else found


def _by_tree(plan: PlanRecord, argument: str | int | None, names: Any) -> list[Any]:
    """Names as a pytree shaped like the arguments, or like one of them.

    **Raises:** `ExportError` if the nesting differs.
    """
    tree = plan.in_tree.data if argument is None else plan.in_tree.data["tuple"][position(plan, argument)]
    found = jax.tree_util.tree_flatten_with_path(names, is_leaf=_is_leaf)[0]
    given = [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in found]
    planned = pytrees.paths(tree)
    if given != planned:
        missing = ["/".join(path) for path in planned if path not in given]
        extra = ["/".join(path) for path in given if path not in planned]
        faults = [f"{path} has no names" for path in missing] + [f"{path} is not an array" for path in extra]
        raise ExportError(f"names must be nested like the planned arguments:{_join_faults(faults)}")
    return [value for _, value in found]


def _is_leaf(value: Any) -> bool:
    """Whether a value is names of dimensions: a `PartitionSpec` or a tuple of names, not a tuple of arguments."""
    return isinstance(value, jax.sharding.PartitionSpec) or (isinstance(value, tuple) and _is_names(value))


# --- rules


def _rules(arrays: Iterable[_Named]) -> dict[str, Entry]:
    """Every name's mesh axes.

    **Raises:** `ExportError` if a name has several, with the arrays.
    """
    found: dict[str, dict[Entry, str]] = {}
    faults = []
    for each in arrays:
        for dimension, name in enumerate(each.names):
            entry, where = each.leaf.entry(dimension), f"dimension {dimension} of {each.leaf.path}"
            if name is not None:
                found.setdefault(name, {}).setdefault(entry, where)
            elif entry is not None:
                faults.append(f"{where} has no name, and is {_entry_text(entry)}")
    for name, seen in found.items():
        if len(seen) > 1:
            faults.append(
                f"{name} is " + ", and ".join(f"{_entry_text(entry)} in {where}" for entry, where in seen.items())
            )
    if faults:
        raise ExportError(
            "Logical axes with these names cannot express the plan. Give these dimensions different names, or export rules or"
            f" specs:{_join_faults(faults)}"
        )
    return {name: next(iter(seen)) for name, seen in sorted(found.items())}


def _entry_text(entry: Entry) -> str:
    return "whole" if entry is None else f"split over {' '.join(_axes_list(entry))}"


def _join_faults(faults: Sequence[str]) -> str:
    more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return "".join(f"\n  {fault}" for fault in faults[:_LISTED]) + more
