"""Look-ups of slabs by one index, so that the TPU compiler copies each slab once.

A look-up may take slabs of several dimensions by an index that is not the array's first dimension: the caches of the chosen
beams, pages of one layer of a stack. The compiler (libtpu 0.0.42) then copies each dimension before the index apart and
joins the parts: `jnp.take_along_axis(cache, parents, axis=2)` of `bfloat16[8,16,4,2,1024,128]` takes 4.7 ms on a v5e, with
the mask of the default mode 6.5. With the first three dimensions as one, it takes the 0.9 ms of HBM's rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

_TILE = 8 * 128
"""Elements of a slab from which it is copied as whole tiles."""


def look_up(primitive: Any, operand: Any, indices: Any, params: Mapping[str, Any]) -> Any:
    """A gather; of slabs that lie behind several dimensions, by one index into all of these together."""
    numbers, filled = params["dimension_numbers"], params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    leading = _leading_dims(operand.shape, numbers, params["slice_sizes"], indices.ndim - 1)
    if leading < 2 or (filled and not jnp.issubdtype(operand.dtype, np.inexact)):
        return primitive.bind(operand, indices, **params)
    at, within = _one_index(operand.shape, leading, numbers, indices)
    slabs = lax.reshape(operand, (prod(operand.shape[:leading]), *operand.shape[leading:]))
    found = slabs.at[at].get(mode="promise_in_bounds")
    if not filled:
        return found
    value = np.nan if params["fill_value"] is None else params["fill_value"]
    mask = lax.broadcast_in_dim(within, found.shape, range(within.ndim))
    return jnp.where(mask, found, jnp.asarray(value, operand.dtype))


def _leading_dims(shape: Sequence[int], numbers: Any, sizes: Sequence[int], batch_rank: int) -> int:
    """The number of first dimensions that one index can replace; 0 if the gather does not take slabs behind them."""
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    single = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if indexed != single or any(sizes[i] != n for i, n in enumerate(shape) if i not in indexed):
        return 0
    leading = max(indexed, default=-1) + 1
    slab = [n for n in shape[leading:] if n > 1]
    rank, behind = len(numbers.offset_dims) + batch_rank, len(shape) - leading
    are_last = list(numbers.offset_dims)[-behind:] == list(range(rank - behind, rank))
    return leading if are_last and len(slab) > 1 and prod(slab) >= _TILE else 0


def _one_index(shape: Sequence[int], leading: int, numbers: Any, indices: Any) -> tuple[Any, Any]:
    """The index of each slab into the first dimensions together, in the order of the result, and whether it is in bounds.

    A start out of bounds is clamped.
    """
    first = [i for i in range(leading) if i not in numbers.collapsed_slice_dims]
    whole = [i for i in first if i not in numbers.operand_batching_dims]
    dims = numbers.offset_dims[: len(whole)]
    batch_rank = indices.ndim - 1
    indices = indices if indices.dtype.itemsize >= 4 else indices.astype(np.int32)  # a byte does not hold every bound
    batch = [i for i in range(len(whole) + batch_rank) if i not in dims]
    result: list[int] = [0] * (len(whole) + batch_rank)
    for at, dim in zip(dims, whole, strict=True):
        result[at] = shape[dim]
    for at, n in zip(batch, indices.shape[:-1], strict=True):
        result[at] = n
    along = dict(zip(whole, dims, strict=True))
    paired = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    along |= {dim: batch[at] for dim, at in paired}
    found, within = jnp.zeros(result, np.int32), jnp.ones(result, bool)
    for i, n in enumerate(shape[:leading]):
        if i in along:
            index = lax.broadcasted_iota(np.int32, result, along[i])
        else:
            start = lax.index_in_dim(indices, numbers.start_index_map.index(i), batch_rank, keepdims=False)
            start = lax.broadcast_in_dim(start, result, batch)
            within = within & (start >= 0) & (start < n)
            index = jnp.clip(start, 0, n - 1).astype(np.int32)
        found = found * n + index
    return found, within
