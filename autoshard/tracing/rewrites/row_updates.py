"""Writes of small windows at clipped indices, as scatters of single rows.

`jax.vmap` of `lax.dynamic_update_slice`, such as a cache that each sequence writes at its own position, is a scatter of windows
with the mode "clip". The TPU compiler (libtpu 0.0.50) makes a loop over the windows of it, with five to seven kernels for each:
473 µs for 64 rows of a cache of [64, 2048, 8, 128] on v5e. A scatter whose indices name every element of the windows along the
indexed dimensions is one kernel, which writes these rows in place. The indexed dimension may then be split, too.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SCATTERS = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
_MOST_ROWS = 8
"""The most rows of a window: about as many as the kernels of one iteration of the compiler's loop."""


def writes_windows(eqn: Any) -> bool:
    """Whether an equation writes several small windows at indices that are clipped."""
    if eqn.primitive.name not in _SCATTERS or eqn.params["mode"] != lax.GatherScatterMode.CLIP:
        return False
    operand, indices, updates = (v.aval for v in eqn.invars)
    if 0 in (*operand.shape, *indices.shape, *updates.shape) or prod(indices.shape[:-1]) < 2:
        return False
    cut = _cut_dims(eqn)
    return bool(cut) and prod(cut.values()) <= _MOST_ROWS


def row_form(eqn: Any) -> Any:
    """A closed jaxpr of the same function as such an equation: clipped indices of all rows, and a scatter of them."""
    numbers, cut = eqn.params["dimension_numbers"], _cut_dims(eqn)
    shape, windows = eqn.invars[0].aval.shape, _windows(eqn)
    batch = [i for i in range(eqn.invars[2].aval.ndim) if i not in numbers.update_window_dims]
    whole = [i for dim, i in windows.items() if dim not in cut]
    rows = (*(windows[dim] for dim in cut),)
    inserted = tuple(sorted((*numbers.inserted_window_dims, *cut)))
    written = numbers.scatter_dims_to_operand_dims
    named = [(column, dim) for column, dim in enumerate(written) if dim in inserted]  # a whole window begins at 0

    def write(operand: Any, indices: Any, updates: Any) -> Any:
        starts = indices if indices.dtype.itemsize >= 4 else lax.convert_element_type(indices, np.int32)
        around, sizes = starts.shape[:-1], tuple(cut.values())
        columns = []
        for column, dim in named:
            last = shape[dim] - cut.get(dim, 1)
            start = jnp.clip(starts[..., column], 0, last)
            start = lax.expand_dims(start, range(len(around), len(around) + len(sizes)))
            place = [n if each == dim else 1 for each, n in cut.items()]
            steps = lax.broadcasted_iota(starts.dtype, place, list(cut).index(dim)) if dim in cut else 0
            columns.append(jnp.broadcast_to(start + steps, (*around, *sizes)))
        new = lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(len(batch) + len(rows), updates.ndim)),
            inserted_window_dims=inserted,
            scatter_dims_to_operand_dims=tuple(dim for _, dim in named),
            operand_batching_dims=numbers.operand_batching_dims,
            scatter_indices_batching_dims=numbers.scatter_indices_batching_dims,
        )
        params = {
            **eqn.params,
            "dimension_numbers": new,
            "mode": lax.GatherScatterMode.PROMISE_IN_BOUNDS,
            "indices_are_sorted": False,
            "unique_indices": False,
        }
        ordered = lax.transpose(updates, (*batch, *rows, *whole))
        return eqn.primitive.bind(operand, jnp.stack(columns, axis=-1), ordered, **params)

    return jax.make_jaxpr(write)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars))


def _windows(eqn: Any) -> dict[int, int]:
    """Per dimension of the operand that updates have as a window, its place in the updates."""
    numbers = eqn.params["dimension_numbers"]
    single = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = (dim for dim in range(eqn.invars[0].aval.ndim) if dim not in single)
    return dict(zip(kept, map(int, numbers.update_window_dims), strict=True))


def _cut_dims(eqn: Any) -> dict[int, int]:
    """The dimensions of which a window is a part that an index names, each with the window's size."""
    operand, _, updates = (v.aval for v in eqn.invars)
    written = eqn.params["dimension_numbers"].scatter_dims_to_operand_dims
    sizes = {dim: updates.shape[i] for dim, i in _windows(eqn).items() if dim in written}
    return {dim: n for dim, n in sizes.items() if n != operand.shape[dim]}
