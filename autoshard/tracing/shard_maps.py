"""Rewriting of a user's `shard_map` as an equivalent computation on global arrays.

The body of a `shard_map` runs once per block of the arrays, and collectives exchange data between blocks. On global
arrays this is the body under `vmap` over the mesh axes: a `psum` sums over the dimension of blocks, an `all_gather`
concatenates the blocks. In this form the search can shard the blocks over any topology. If the topology has the mesh's
axes, the specs of the `shard_map` are pins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from autoshard.errors import TraceError
from autoshard.rules.pin import soft_pin
from autoshard.tracing.jaxprs import CALLS, INLINED, scan_counts

Sizes = Mapping[str, int]


@lru_cache(maxsize=1024)
def global_form(eqn: Any) -> Any:
    """An equivalent closed jaxpr of a `shard_map` equation, on global arrays.

    **Raises:** `TraceError` for a body that cannot be rewritten; names the collective.
    """
    params = eqn.params
    sizes = {axis: n for axis, n in params["mesh"].shape.items() if axis in _manual(params)}
    mapped = [axis for axis, n in sizes.items() if n > 1]
    body = _Body(params["jaxpr"], sizes)
    before, after = (tuple(_axes_of(spec, mapped) for spec in params[key]) for key in ("in_specs", "out_specs"))

    def run_global(*arrays: Any) -> list[Any]:
        arrays = tuple(soft_pin(array, spec) for array, spec in zip(arrays, before, strict=True))
        blocks = [_split_blocks(array, spec, mapped, sizes) for array, spec in zip(arrays, before, strict=True)]
        found = _map_blocks(body, mapped, before, after, blocks)
        joined = [_join(array, spec, mapped, sizes) for array, spec in zip(found, after, strict=True)]
        return [soft_pin(array, spec) for array, spec in zip(joined, after, strict=True)]

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return jax.make_jaxpr(run_global)(*avals)


def mesh_text(eqn: Any) -> str:
    """The mesh of a `shard_map` as text: `x=4, y=2`."""
    return ", ".join(f"{axis}={n}" for axis, n in eqn.params["mesh"].shape.items() if axis in _manual(eqn.params))


def _manual(params: Any) -> Sequence[str]:
    return params.get("newly_manual_axes", params.get("manual_axes", ()))


def _axes_of(spec: Any, mapped: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A spec's axes per dimension, without axes of size 1."""
    parts = (() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec)
    return tuple(tuple(axis for axis in part if axis in mapped) for part in parts)


# --- blocks


def _axes_in(spec: Sequence[Sequence[str]], mapped: Sequence[str]) -> list[str]:
    used = {axis for part in spec for axis in part}
    return [axis for axis in mapped if axis in used]


def _split_blocks(array: Any, spec: Sequence[Sequence[str]], mapped: Sequence[str], sizes: Sizes) -> Any:
    """The array with a leading dimension of blocks for each mesh axis that splits it, in the mesh's order."""
    shape: list[int] = []
    place: dict[str, int] = {}
    for dim, n in enumerate(array.shape):
        axes = spec[dim] if dim < len(spec) else ()
        for axis in axes:
            place[axis] = len(shape)
            shape.append(sizes[axis])
        shape.append(n // prod(sizes[axis] for axis in axes))
    leading = [place[axis] for axis in _axes_in(spec, mapped)]
    rest = [i for i in range(len(shape)) if i not in leading]
    return jnp.transpose(jnp.reshape(array, shape), (*leading, *rest)) if leading else array


def _join(array: Any, spec: Sequence[Sequence[str]], mapped: Sequence[str], sizes: Sizes) -> Any:
    """Undoes `_split_blocks`."""
    leading = _axes_in(spec, mapped)
    if not leading:
        return array
    local = array.shape[len(leading) :]
    order: list[int] = []
    shape: list[int] = []
    for dim, n in enumerate(local):
        axes = spec[dim] if dim < len(spec) else ()
        order += [*(leading.index(axis) for axis in axes), len(leading) + dim]
        shape.append(n * prod(sizes[axis] for axis in axes))
    return jnp.reshape(jnp.transpose(array, order), shape)


def _map_blocks(
    body: Callable[..., list[Any]], mapped: Sequence[str], before: Any, after: Any, blocks: Any
) -> list[Any]:
    """The body, batched over all blocks.

    All blocks of a result along a mesh axis that does not split it are equal; if JAX cannot infer this, the first is
    taken.
    """

    def run_batched(whole_too: bool) -> Callable[..., list[Any]]:
        run: Callable[..., list[Any]] = body
        for axis in reversed(mapped):
            into = tuple(0 if axis in _axes_in(spec, mapped) else None for spec in before)
            out = [0 if whole_too or axis in _axes_in(spec, mapped) else None for spec in after]
            run = jax.vmap(run, in_axes=into, out_axes=out, axis_name=axis, axis_size=body.sizes[axis])  # pyright: ignore
        return run

    try:
        return run_batched(False)(*blocks)
    except ValueError:
        found = run_batched(True)(*blocks)
    return [
        array[tuple(slice(None) if axis in _axes_in(spec, mapped) else 0 for axis in mapped)]
        for array, spec in zip(found, after, strict=True)
    ]


# --- the body


class _Body:
    """An interpreter of a jaxpr that replaces the primitives that only a `shard_map` may contain."""

    def __init__(self, jaxpr: Any, sizes: Sizes) -> None:
        self.jaxpr, self.sizes = jaxpr, sizes

    def __call__(self, *arrays: Any) -> list[Any]:
        return self.run(self.jaxpr, (), arrays)

    def closed(self, jaxpr: Any) -> Callable[..., list[Any]]:
        """A jaxpr inside the body as a function."""
        inner, consts = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())
        return lambda *arrays: self.run(inner, consts, arrays)

    def run(self, jaxpr: Any, consts: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arrays), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            return self.closed(next(params[key] for key in INLINED if key in params))(*operands)
        if name in _EXCHANGES:
            return self.exchange(name, params, operands)
        if name in _STRUCTURES:
            return getattr(self, f"_{name}")(params, operands)
        if name == "shard_map":
            return jex.jaxpr_as_fun(global_form(eqn))(*operands)
        if name in _STAYS:
            return operands
        placed = {key: None for key in ("out_sharding", "sharding") if params.get(key) is not None}
        found = eqn.primitive.bind(*operands, **{**params, **placed})
        return found if eqn.primitive.multiple_results else [found]

    # --- loops and branches

    def _scan(self, params: Any, operands: list[Any]) -> list[Any]:
        body, (n_const, n_carry) = self.closed(params["jaxpr"]), scan_counts(params)
        held, carry, stacks = operands[:n_const], operands[n_const : n_const + n_carry], operands[n_const + n_carry :]

        def step(carry: Any, slices: Any) -> tuple[list[Any], list[Any]]:
            found = body(*held, *carry, *slices)
            return found[:n_carry], found[n_carry:]

        carry, piled = lax.scan(step, carry, stacks, length=params["length"], reverse=params["reverse"])
        return [*carry, *piled]

    def _while(self, params: Any, operands: list[Any]) -> list[Any]:
        test, body = self.closed(params["cond_jaxpr"]), self.closed(params["body_jaxpr"])
        n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
        ahead, held, carry = operands[:n_test], operands[n_test : n_test + n_body], operands[n_test + n_body :]
        return lax.while_loop(lambda c: test(*ahead, *c)[0], lambda c: body(*held, *c), carry)

    def _cond(self, params: Any, operands: list[Any]) -> list[Any]:
        return lax.switch(operands[0], list(map(self.closed, params["branches"])), *operands[1:])

    # --- collectives

    def exchange(self, name: str, params: Any, operands: list[Any]) -> list[Any]:
        """A collective over its mesh axes of more than one block; over the other axes it is the identity."""
        if params.get("axis_index_groups") is not None:
            raise TraceError(
                f"{name} with axis_index_groups is not supported inside a shard_map; split the mesh axis in two."
            )
        given = params.get("axes", params.get("axis_name", ()))
        axes = (given,) if isinstance(given, str) else tuple(given)
        real = tuple(axis for axis in axes if self.sizes.get(axis, 1) > 1)
        return [_EXCHANGES[name](operand, real, params) for operand in operands] or [_place(real, self.sizes)]


_STRUCTURES = ("scan", "while", "cond")
_STAYS = "pvary pbroadcast sharding_constraint reshard optimization_barrier mesh_cast".split()


def _place(axes: Sequence[str], sizes: Sizes) -> Any:
    """This block's index along several axes, the first axis major."""
    at = jnp.int32(0)
    for axis in axes:
        at = at * sizes[axis] + lax.axis_index(axis)
    return at


def _all_reduce(by: Callable[..., Any], operand: Any, axes: Any, params: Any) -> Any:
    return by(operand, axes) if axes else operand


def _all_gather(operand: Any, axes: Any, params: Any) -> Any:
    at, tiled = params["all_gather_dimension"], params["tiled"]
    if not axes:
        return operand if tiled else jnp.expand_dims(operand, at)
    stacked = jnp.moveaxis(_stack_blocks(operand, axes), 0, at)
    shape = stacked.shape
    return jnp.reshape(stacked, (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])) if tiled else stacked


def _stack_blocks(operand: Any, axes: Sequence[str]) -> Any:
    """All blocks along several axes, stacked, the first axis major; JAX batches a gather over one axis only."""
    found = operand
    for axis in reversed(axes):
        found = lax.all_gather(found, axis, axis=0, tiled=False)
    return jnp.reshape(found, (prod(found.shape[: len(axes)]), *operand.shape))


def _reduce_scatter(operand: Any, axes: Any, params: Any) -> Any:
    at, tiled = params["scatter_dimension"], params["tiled"]
    summed = lax.psum(operand, axes) if axes else operand
    if not axes:
        return operand if tiled else jnp.squeeze(operand, at)
    return _own_block(summed, axes, at, tiled)


def _own_block(array: Any, axes: Any, at: int, tiled: bool) -> Any:
    """This block's part of an array that is equal in all blocks."""
    count, sizes = lax.axis_size(axes), {axis: lax.axis_size(axis) for axis in axes}
    size = array.shape[at] // count
    found = lax.dynamic_slice_in_dim(array, _place(axes, sizes) * size, size, at)
    return found if tiled else jnp.squeeze(found, at)


def _permute(operand: Any, axes: Any, params: Any) -> Any:
    if len(axes) < 2:
        return lax.ppermute(operand, axes[0], params["perm"]) if axes else operand
    sizes = {axis: lax.axis_size(axis) for axis in axes}
    senders = np.full(prod(sizes.values()), -1, np.int32)
    for sender, receiver in params["perm"]:
        senders[receiver] = sender
    sender = jnp.asarray(senders)[_place(axes, sizes)]
    found = lax.dynamic_index_in_dim(_stack_blocks(operand, axes), jnp.maximum(sender, 0), keepdims=False)
    return jnp.where(sender >= 0, found, jnp.zeros_like(found))


def _all_to_all(operand: Any, axes: Any, params: Any) -> Any:
    """An all-to-all, tiled or not: JAX adds and removes the dimensions of an untiled one in separate equations."""
    if not axes:
        return operand
    gathered = _all_gather(operand, axes, {"all_gather_dimension": params["concat_axis"], "tiled": True})
    return _own_block(gathered, axes, params["split_axis"], True)


_EXCHANGES: dict[str, Callable[..., Any]] = {
    "axis_index": lambda *_: None,
    "psum": partial(_all_reduce, lax.psum),
    "psum_invariant": partial(_all_reduce, lax.psum),
    "pmax": partial(_all_reduce, lax.pmax),
    "pmin": partial(_all_reduce, lax.pmin),
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "ppermute": _permute,
    "all_to_all": _all_to_all,
}
