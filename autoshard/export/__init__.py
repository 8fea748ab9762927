"""A plan's layouts of arrays in other people's formats.

| format | what it is | for |
|---|---|---|
| `specs` | a pytree of `PartitionSpec`s as Python source | `jax.jit`'s `in_shardings`, `jax.device_put` |
| `rules` | ordered (regex, `PartitionSpec`) pairs as Python source | EasyLM, EasyDeL and the like, optimizer state |
| `flax` | rules for logical axes as Python source | Flax Linen, Flax NNX |
| `maxtext` | the same with the mesh, as YAML | MaxText's `custom_mesh_and_rule` |

They say where arrays lie between steps. What happens inside a step (operations' strategies, collectives) is in the plan
alone: give `plan.apply(fn)` to whatever places arrays by an export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autoshard.errors import ExportError
from autoshard.export import logical, rules, specs
from autoshard.export.arrays import Axes, mesh_axes
from autoshard.planning.records import PlanRecord

FORMATS: Mapping[str, Callable[..., str]] = {
    "specs": specs.render,
    "rules": rules.render,
    "flax": logical.render_flax,
    "maxtext": logical.render_maxtext,
}
"""The formats, each with the function that writes it."""
_NAMED = ("flax", "maxtext")


def export(
    plan: PlanRecord, format: str, argument: str | int | None = None, names: Any = None, axes: Axes = None
) -> str:
    """A plan's layouts in a format of `FORMATS`, as text; see `Plan.export`.

    **Raises:** `ExportError`.
    """
    if format not in FORMATS:
        raise ExportError(f"There is no format {format!r}; there are {', '.join(FORMATS)}.")
    mesh_axes(plan, axes)
    if format in _NAMED:
        return FORMATS[format](plan, argument, axes, names)
    if names is not None:
        raise ExportError(f"The format {format} has no logical names; {' and '.join(_NAMED)} have.")
    return FORMATS[format](plan, argument, axes)
