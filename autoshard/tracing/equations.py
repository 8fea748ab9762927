"""Construction of jaxpr equations and variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex


def new_variables(avals: Sequence[Any]) -> list[Any]:
    """New variables of these shapes and types."""
    return jax.make_jaxpr(lambda *arrays: arrays)(*map(_abstract, avals)).jaxpr.invars


def _abstract(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def equations(
    fn: Callable[..., Any], atoms: Sequence[Any], source: Any = None, results: Sequence[Any] = ()
) -> tuple[list[Any], list[Any]]:
    """The equations of a function of these variables and literals, and their result variables.

    **Arguments:**

    - `source`: the source information that the equations get.
    - `results`: the result variables; new ones by default.
    """
    jaxpr = jax.make_jaxpr(fn)(*(_abstract(atom.aval) for atom in atoms)).jaxpr
    named = dict(zip(jaxpr.invars, atoms, strict=True))
    named |= dict(zip(jaxpr.outvars, results, strict=True)) if results else {}
    found = [rename_equation(eqn, named) for eqn in jaxpr.eqns]
    found = [eqn.replace(source_info=source) for eqn in found] if source is not None else found
    return found, [named.get(v, v) for v in jaxpr.outvars]


def rename_equation(eqn: Any, named: dict[Any, Any]) -> Any:
    """An equation with other variables."""
    return eqn.replace(invars=rename_atoms(eqn.invars, named), outvars=rename_atoms(eqn.outvars, named))


def rename_atoms(atoms: Sequence[Any], named: dict[Any, Any]) -> list[Any]:
    """Renamed variables; literals and other variables are unchanged."""
    return [atom if isinstance(atom, jex.Literal) else named.get(atom, atom) for atom in atoms]


def rebuild_jaxpr(jaxpr: Any, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any]) -> Any:
    """A jaxpr with other operands, results and equations."""
    unnamed = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(invars=list(invars), outvars=list(outvars), eqns=list(eqns), debug_info=unnamed)


def variables(eqn: Any) -> set[Any]:
    """The variables that an equation reads."""
    return {v for v in eqn.invars if not isinstance(v, jex.Literal)}


# --- Indexing into stacks


def stacked_type(aval: Any, lead: Sequence[int]) -> jax.ShapeDtypeStruct:
    """The shape and type of an array with leading dimensions before its own."""
    return jax.ShapeDtypeStruct((*lead, *aval.shape), aval.dtype)


def window(index: Sequence[Any], sizes: Sequence[int], starts: Sequence[Any] = ()) -> Callable[[Any], Any]:
    """A function that reads a window of the slice at `index` from a stack."""

    def slice_at(stack: Any) -> Any:
        first, own = _to_one_dtype(index, starts or [0] * len(sizes))
        found = lax.dynamic_slice(stack, [*first, *own], (*[1] * len(index), *sizes), allow_negative_indices=False)
        return lax.squeeze(found, range(len(index)))

    return slice_at


def write_slice(stack: Any, update: Any, index: Sequence[Any], starts: Sequence[Any] = ()) -> Any:
    """The stack with an update written into the slice at `index`."""
    first, own = _to_one_dtype(index, starts or [0] * update.ndim)
    update = lax.expand_dims(update, range(len(index)))
    return lax.dynamic_update_slice(stack, update, [*first, *own], allow_negative_indices=False)


def gather_slice(eqn: Any, stack: Any, indices: Any, index: Sequence[Any]) -> Any:
    """The result of a `gather` equation on the slice at `index`."""
    numbers, n = eqn.params["dimension_numbers"], len(index)
    deeper = lax.GatherDimensionNumbers(
        offset_dims=numbers.offset_dims,
        collapsed_slice_dims=_deeper(numbers.collapsed_slice_dims, n),
        start_index_map=_deeper(numbers.start_index_map, n),
        operand_batching_dims=tuple(i + n for i in numbers.operand_batching_dims),
        start_indices_batching_dims=numbers.start_indices_batching_dims,
    )
    sizes = (*[1] * n, *eqn.params["slice_sizes"])
    params = {**eqn.params, "dimension_numbers": deeper, "slice_sizes": sizes}
    return eqn.primitive.bind(stack, _prepend_index(indices, index), **params)


def scatter_slice(eqn: Any, stack: Any, indices: Any, updates: Any, index: Sequence[Any]) -> Any:
    """The stack after a `scatter` equation on the slice at `index`."""
    numbers, n = eqn.params["dimension_numbers"], len(index)
    deeper = lax.ScatterDimensionNumbers(
        update_window_dims=numbers.update_window_dims,
        inserted_window_dims=_deeper(numbers.inserted_window_dims, n),
        scatter_dims_to_operand_dims=_deeper(numbers.scatter_dims_to_operand_dims, n),
        operand_batching_dims=tuple(i + n for i in numbers.operand_batching_dims),
        scatter_indices_batching_dims=numbers.scatter_indices_batching_dims,
    )
    params = {**eqn.params, "dimension_numbers": deeper}
    return eqn.primitive.bind(stack, _prepend_index(indices, index), updates, **params)


def _deeper(dims: Sequence[int], n: int) -> tuple[int, ...]:
    return (*range(n), *(i + n for i in dims))


def _to_one_dtype(index: Sequence[Any], starts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The indices and starts in one type, as JAX requires: the starts' own, if it surely holds the indices."""
    own = {start.dtype for start in starts if not isinstance(start, int)}
    dtype = own.pop() if len(own) == 1 else jnp.dtype(jnp.int32)
    dtype = dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.int32)
    first, rest = ([_to_dtype(each, dtype) for each in side] for side in (index, starts))
    return first, rest


def _to_dtype(number: Any, dtype: Any) -> Any:
    return np.asarray(number, dtype) if isinstance(number, int) else lax.convert_element_type(number, dtype)


def _prepend_index(indices: Any, index: Sequence[Any]) -> Any:
    """The indices of a gather or scatter, each with `index` in front."""
    if indices.dtype.itemsize < 4:
        indices = lax.convert_element_type(indices, jnp.int32)
    shape = (*indices.shape[:-1], 1)
    columns = [lax.broadcast_in_dim(lax.convert_element_type(each, indices.dtype), shape, ()) for each in index]
    return lax.concatenate([*columns, indices], indices.ndim - 1)
