"""Arrays brought to where a plan wants them: into their shards and formats, once, before the first step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Mesh

from autoshard.emitting import bind
from autoshard.emitting.formats import flat_formats
from autoshard.errors import ExportError, PlanMismatchError
from autoshard.tracing import pytrees

if TYPE_CHECKING:
    from autoshard.plan import ArrayPlan, Plan

Keys = tuple[str, ...]


def place(plan: Plan, tree: Any, mesh: Mesh, argument: str | int | None = None, donate: bool = False) -> Any:
    """The tree with its arrays in their shards and formats; see `Plan.place`."""
    bind.check_mesh(plan, mesh)
    at = under(plan, argument)
    formats, _ = flat_formats(plan, mesh)
    leaves, structure = jax.tree_util.tree_flatten(tree)
    given = pytrees.paths(pytrees.describe(tree))
    _check(plan, at, dict(zip(given, leaves, strict=True)))
    rows = [at[keys] for keys in given]
    typed = [_typed(leaf, plan.arguments[row]) for leaf, row in zip(leaves, rows, strict=True)]
    return jax.tree_util.tree_unflatten(structure, _put(typed, [formats[row] for row in rows], donate))


def _put(leaves: Sequence[Any], formats: Sequence[Format], donate: bool) -> list[Any]:
    """All at once, but that a process of several cuts what it has in its memory itself."""
    found: dict[int, Any] = {}
    for i, (leaf, wanted) in enumerate(zip(leaves, formats, strict=True)):
        whole = wanted.sharding is None or wanted.sharding.is_fully_addressable
        if isinstance(leaf, np.ndarray) and not whole:
            found[i] = jax.make_array_from_callback(leaf.shape, wanted, leaf.__getitem__)  # pyright: ignore
    rest = [i for i in range(len(leaves)) if i not in found]
    moved = jax.device_put([leaves[i] for i in rest], [formats[i] for i in rest], donate=donate)
    found.update(zip(rest, moved, strict=True))
    return [found[i] for i in range(len(leaves))]


def _typed(leaf: Any, array: ArrayPlan) -> Any:
    """A leaf as an array; Python numbers get the planned type."""
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, array.dtype)


def abstract(plan: Plan, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """The flat arguments as shapes and types that know their shardings, and formats where the plan has orders.

    **Raises:** `ExportError` for types that only JAX can make.
    """
    bind.check_mesh(plan, mesh)
    formats, _ = flat_formats(plan, mesh)
    return [
        jax.ShapeDtypeStruct(
            array.shape,
            _dtype(array),
            sharding=each.sharding if each.layout is None else each,
            weak_type=array.weak,
        )
        for array, each in zip(plan.arguments, formats, strict=True)
    ]


def _dtype(array: ArrayPlan) -> Any:
    try:
        return jnp.dtype(array.dtype)
    except TypeError as error:
        raise ExportError(f"{array.path} is of type {array.dtype}, which has no abstract form outside JAX.") from error


# --- which arrays


def under(plan: Plan, argument: str | int | None) -> dict[Keys, int]:
    """The flat arguments that a name, a path or a position means, by their keys from there on.

    **Raises:** `ExportError` when there is none.
    """
    paths = pytrees.paths(plan.in_tree)
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


def _keys(plan: Plan, known: Sequence[Keys], argument: str) -> Keys:
    """The keys of a path: one that the plan writes, such as `params['layers'][0]`, or one with slashes."""
    for array, keys in zip(plan.arguments, known, strict=True):
        if array.path == argument:
            return keys
    return tuple(re.findall(r"[^\[\]'\"/.]+", argument))


def heads(plan: Plan) -> list[str]:
    """The names of the arguments; those of `*args` are numbered, and one without arrays is called by its position."""
    found: dict[int, str] = {}
    for keys, array in zip(pytrees.paths(plan.in_tree), plan.arguments, strict=True):
        name = re.match(r"\w*", array.path)
        found.setdefault(int(keys[0]), name[0] if name and name[0] else "argument")
    count, shared, seen = len(plan.in_tree["tuple"]), Counter(found.values()), Counter[str]()
    names = []
    for at in range(count):
        name = found.get(at, f"argument{at}")
        names.append(f"{name}/{seen[name]}" if shared[name] > 1 else name)
        seen[name] += 1
    return names


def position(plan: Plan, argument: str | int) -> int:
    """The argument that a name or a position means.

    **Raises:** `ExportError`.
    """
    names = heads(plan)
    if isinstance(argument, str) and argument in names:
        return names.index(argument)
    if isinstance(argument, int) and -len(names) <= argument < len(names):
        return argument % len(names)
    raise _unknown(plan, argument)


def _unknown(plan: Plan, argument: str | int) -> ExportError:
    return ExportError(f"The plan {plan.name!r} has no argument {argument!r}; it has {', '.join(heads(plan))}.")


# --- refusals


def _check(plan: Plan, at: Mapping[Keys, int], leaves: Mapping[Keys, Any]) -> None:
    """Refuses a tree with other arrays than planned.

    **Raises:** `PlanMismatchError`, with the paths, shapes and types that differ.
    """
    faults = []
    for keys, row in at.items():
        array = plan.arguments[row]
        wanted = bind.typed(array.shape, array.dtype)
        found = _described(leaves[keys], array) if keys in leaves else "missing"
        if found != wanted:
            faults.append(f"{array.path} is {found}, planned {wanted}")
    faults += [f"{'/'.join(keys) or 'the tree'} is given, planned without it" for keys in leaves if keys not in at]
    if faults:
        raise PlanMismatchError(f"The plan {plan.name!r} is for other arrays:{bind.listed(faults)}")


def _described(leaf: Any, array: ArrayPlan) -> str:
    if hasattr(leaf, "dtype"):
        return bind.typed(leaf.shape, leaf.dtype)
    if np.ndim(leaf) == 0 and isinstance(leaf, int | float | complex):
        return bind.typed((), array.dtype)
    return f"{leaf!r} ({type(leaf).__name__}), which is not an array"
