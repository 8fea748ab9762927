"""Exports of a plan's array layouts to the formats of other libraries.

| format | contents | for |
|---|---|---|
| `specs` | a pytree of `PartitionSpec`s as Python source | `jax.jit`'s `in_shardings`, `jax.device_put` |
| `rules` | ordered (regex, `PartitionSpec`) pairs as Python source | EasyLM, EasyDeL and the like, optimizer state |
| `flax` | rules for logical axes as Python source | Flax Linen, Flax NNX |
| `maxtext` | the same with the mesh, as YAML | MaxText's `custom_mesh_and_rule` |

An export has the layouts of arrays between steps. Only the plan has the strategies and collectives inside a step: use
`plan.apply(fn)` in the program that places its arrays by an export.
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
"""The formats, each with its renderer."""
_NAMED = ("flax", "maxtext")


def export(
    plan: PlanRecord, format: str, argument: str | int | None = None, names: Any = None, axes: Axes = None
) -> str:
    """A plan's layouts in a format of `FORMATS`, as text; see `Plan.export`.

    **Raises:** `ExportError`.
    """
    if format not in FORMATS:
        raise ExportError(f"The format must be one of {', '.join(FORMATS)}, got {format!r}.")
    mesh_axes(plan, axes)
    if format in _NAMED:
        return FORMATS[format](plan, argument, axes, names)
    if names is not None:
        raise ExportError(f"names apply to the formats {' and '.join(_NAMED)} only, got format {format}.")
    return FORMATS[format](plan, argument, axes)
