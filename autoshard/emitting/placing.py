"""Placement of arrays in their planned shardings and formats, once, before the first step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh

from autoshard.emitting import bind
from autoshard.emitting.formats import flat_formats
from autoshard.emitting.meshes import AxisNames, on_mesh
from autoshard.emitting.padding import has_padding_inside, padded_as, unpadded
from autoshard.errors import ExportError, PlanMismatchError, UnknownNameError
from autoshard.planning.argument_names import heads, position
from autoshard.planning.records import ArrayPlan, PlanRecord
from autoshard.tracing import pytrees

Keys = tuple[str, ...]


def place(
    plan: PlanRecord,
    tree: Any,
    mesh: Mesh,
    argument: str | int | None = None,
    donate: bool = False,
    axes: AxisNames | None = None,
) -> Any:
    """The tree with its arrays in their shardings and formats; see `Plan.place`."""
    plan = on_mesh(plan, mesh, axes)
    at = arguments_under(plan, argument)
    formats, _ = flat_formats(plan, mesh)
    leaves, structure = jax.tree_util.tree_flatten(tree)
    given = pytrees.paths(pytrees.describe(tree))
    _check(plan, at, dict(zip(given, leaves, strict=True)))
    rows = [at[keys] for keys in given]
    arrays = [plan.arguments[row] for row in rows]
    typed = [padded_as(_to_planned_type(leaf, array), array) for leaf, array in zip(leaves, arrays, strict=True)]
    return jax.tree_util.tree_unflatten(structure, _put(typed, [formats[row] for row in rows], donate))


def unpad(plan: PlanRecord, tree: Any, argument: str | int | None = None) -> Any:
    """The tree with its arrays as the function has them; see `Plan.unpad`."""
    at = arguments_under(plan, argument)
    leaves, structure = jax.tree_util.tree_flatten(tree)
    given = pytrees.paths(pytrees.describe(tree))
    _check(plan, at, dict(zip(given, leaves, strict=True)))
    rows = [plan.arguments[at[keys]] for keys in given]
    cut = [
        unpadded(leaf, row.padding) if row.padding and leaf.shape == row.shape else leaf
        for leaf, row in zip(leaves, rows, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, cut)


def _put(leaves: Sequence[Any], formats: Sequence[Format], donate: bool) -> list[Any]:
    """Puts all arrays at once, except that one of several processes shards its own NumPy arrays."""
    found: dict[int, Any] = {}
    for i, (leaf, wanted) in enumerate(zip(leaves, formats, strict=True)):
        whole = wanted.sharding is None or wanted.sharding.is_fully_addressable
        if isinstance(leaf, np.ndarray) and not whole:
            found[i] = jax.make_array_from_callback(leaf.shape, wanted, leaf.__getitem__)  # pyright: ignore
    rest = [i for i in range(len(leaves)) if i not in found]
    flat, wanted = [leaves[i] for i in rest], [formats[i] for i in rest]
    # JAX cannot move arrays between devices and change their order in one step.
    near = [leaf.sharding if _is_on(leaf, each) else each.sharding for leaf, each in zip(flat, wanted, strict=True)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # shards of another size
        relaid = jax.device_put(jax.device_put(flat, near), wanted, donate=donate)
    found.update(zip(rest, relaid, strict=True))
    return [found[i] for i in range(len(leaves))]


def _is_on(leaf: Any, wanted: Format) -> bool:
    """Whether an array is on the devices already."""
    if not isinstance(leaf, jax.Array) or wanted.sharding is None:
        return False
    return leaf.sharding.device_set == wanted.sharding.device_set


def _to_planned_type(leaf: Any, array: ArrayPlan) -> Any:
    """A leaf as an array; Python numbers get the planned type."""
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, array.dtype)


def abstract_args(
    plan: PlanRecord, mesh: Mesh, argument: str | int | None = None, axes: AxisNames | None = None
) -> Any:
    """The arguments as `jax.ShapeDtypeStruct`s with shardings, or formats if they have orders; see `Plan.abstract_args`."""
    plan = on_mesh(plan, mesh, axes)
    _warn_of_padding_inside(plan)
    formats, _ = flat_formats(plan, mesh)
    structs = plan.in_tree.rebuild(
        [
            jax.ShapeDtypeStruct(
                array.shape,
                _dtype(array),
                sharding=each.sharding if each.layout is None else each,
                weak_type=array.weak,
            )
            for array, each in zip(plan.arguments, formats, strict=True)
        ]
    )
    return structs if argument is None else structs[position(plan, argument)]


def _warn_of_padding_inside(plan: PlanRecord) -> None:
    """Warns of arrays that a checkpoint library would pad at the wrong place: it only appends."""
    inside = [array.path for array in plan.arguments if has_padding_inside(array)]
    if inside:
        warnings.warn(
            f"{', '.join(inside)}: the padding lies inside a dimension that merges several. Restore"
            " without it, and call plan.place(...).",
            stacklevel=4,
        )


def _dtype(array: ArrayPlan) -> Any:
    try:
        return jnp.dtype(array.dtype)
    except TypeError as error:
        raise ExportError(f"{array.path} has type {array.dtype}, which has no `jax.ShapeDtypeStruct`.") from error


# --- selection of arrays


def arguments_under(plan: PlanRecord, argument: str | int | None) -> dict[Keys, int]:
    """The flat arguments below a name, a path or a position, by the rest of their keys.

    **Raises:** `ExportError` if there is none.
    """
    paths = pytrees.paths(plan.in_tree.data)
    if argument is None:
        return {keys: at for at, keys in enumerate(paths)}
    if isinstance(argument, int):
        chosen = (str(position(plan, argument)),)
        return {keys[1:]: at for at, keys in enumerate(paths) if keys[:1] == chosen}
    names = heads(plan)
    known: list[Keys] = [(*names[int(keys[0])].split("/"), *keys[1:]) for keys in paths]
    wanted = _keys(plan, known, argument)
    found = {keys[len(wanted) :]: at for at, keys in enumerate(known) if keys[: len(wanted)] == wanted}
    if not found:
        raise _unknown(plan, argument)
    return found


def _keys(plan: PlanRecord, known: Sequence[Keys], argument: str) -> Keys:
    """The keys of a path, in the plan's form, such as `params['layers'][0]`, or with slashes."""
    for array, keys in zip(plan.arguments, known, strict=True):
        if array.path == argument:
            return keys
    return tuple(re.findall(r"[^\[\]'\"/.]+", argument))


def _unknown(plan: PlanRecord, argument: str | int) -> UnknownNameError:
    return UnknownNameError(f"The plan {plan.name!r} has no argument {argument!r}; it has {', '.join(heads(plan))}.")


# --- checks


def _check(plan: PlanRecord, at: Mapping[Keys, int], leaves: Mapping[Keys, Any]) -> None:
    """Checks the arrays of a tree against the plan.

    **Raises:** `PlanMismatchError`, with the paths, shapes and types that differ.
    """
    faults = []
    for keys, row in at.items():
        array = plan.arguments[row]
        wanted = [bind.type_text(shape, array.dtype) for shape in (array.unpadded_shape, array.shape)]
        found = _describe_leaf(leaves[keys], array) if keys in leaves else "missing"
        if found not in wanted:
            faults.append(f"{array.path} is {found}, planned {wanted[0]}")
    faults += [f"{'/'.join(keys) or 'the tree'} is given, planned without it" for keys in leaves if keys not in at]
    if faults:
        raise PlanMismatchError(f"The plan {plan.name!r} is for other arrays:{bind.list_faults(faults)}")


def _describe_leaf(leaf: Any, array: ArrayPlan) -> str:
    if hasattr(leaf, "dtype"):
        return bind.type_text(leaf.shape, leaf.dtype)
    if np.ndim(leaf) == 0 and isinstance(leaf, int | float | complex):
        return bind.type_text((), array.dtype)
    return f"{leaf!r} ({type(leaf).__name__}), which is not an array"
