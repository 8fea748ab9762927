"""The primitives that pin a layout inside a traced function, and their axes per dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from autoshard.errors import OptionError
from costmodels.program.program import Pinned

PIN = "autoshard_pin"
Pins = Mapping[str, PartitionSpec] | Sequence[Any]
"""Patterns over dotted paths with their specs, or one tree of specs (or `None`: free) per argument."""


class PinError(OptionError):
    """Raised for a pin that matches nothing, cannot hold, or contradicts another pin."""


pin_p = Primitive(PIN)
pin_p.def_impl(lambda x, *, dims: x)
pin_p.def_abstract_eval(lambda x, *, dims: x)
mlir.register_lowering(pin_p, lambda ctx, x, *, dims: [x])
ad.deflinear2(pin_p, lambda cotangent, x, *, dims: [pin_p.bind(cotangent, dims=dims)])
batching.primitive_batchers[pin_p] = lambda args, axes, *, dims: (
    pin_p.bind(args[0], dims=(*dims[: axes[0]], None, *dims[axes[0] :])),
    axes[0],
)

shard_map_layout_p = Primitive("shard_map_layout")
shard_map_layout_p.def_impl(lambda x, *, dims: x)
shard_map_layout_p.def_abstract_eval(lambda x, *, dims: x)


def soft_pin(x: Any, dims: Sequence[tuple[str, ...]]) -> Any:
    """Pins `x` on topologies that have these axes, and leaves it free on others, like a sharding constraint."""
    return shard_map_layout_p.bind(x, dims=(*dims, *((),) * (x.ndim - len(dims)))) if any(dims) else x


def pin(x: Any, spec: PartitionSpec) -> Any:
    """Pins the layout of `x` in searched plans; the identity without a plan.

        hidden = autoshard.pin(hidden, P("x", None, ("y", "z")))

    **Arguments:**

    - `x`: an array, or a pytree of arrays of one rank.
    - `spec`: mesh axes of the topology per dimension; omitted dimensions are not split, `P.UNCONSTRAINED` ones are free.
    """
    return jax.tree.map(lambda leaf: pin_p.bind(leaf, dims=dims_of(spec, leaf.ndim, "autoshard.pin")), x)


def dims_of(spec: PartitionSpec, rank: int, what: str) -> Pinned:
    """A `PartitionSpec` as axes per dimension; `None` for a free dimension."""
    if len(spec) > rank:
        raise PinError(f"{what} must pin at most {rank} dimensions, got {len(spec)} in {spec}.")

    def axes(part: Any) -> tuple[str, ...] | None:
        if part is PartitionSpec.UNCONSTRAINED:
            return None
        return () if part is None else (part,) if isinstance(part, str) else tuple(part)

    return (*map(axes, spec), *((),) * (rank - len(spec)))


def spec_of_pin(dims: Pinned) -> PartitionSpec:
    """The inverse of `dims_of`."""
    return PartitionSpec(*(PartitionSpec.UNCONSTRAINED if axes is None else axes or None for axes in dims))


def pinned_by(primitive: str, params: Mapping[str, Any], rank: int) -> Pinned | None:
    """The axes to which an equation pins its result, if it does."""
    if primitive in (PIN, shard_map_layout_p.name):
        return params["dims"]
    if primitive == "sharding_constraint" and isinstance(params.get("sharding"), NamedSharding):
        return dims_of(params["sharding"].spec, rank, "with_sharding_constraint")
    return None
