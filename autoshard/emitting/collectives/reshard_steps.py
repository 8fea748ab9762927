"""Reshard steps as explicit JAX collectives, inside a fully manual `shard_map`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint

from search.formulation.collective_steps import CollectiveStep
from search.formulation.layouts import Axes, Layout

_TILED = 2
"""The number of trailing dimensions that are tiled in a TPU's memory."""
_TILE_ROWS = 8
"""Rows of a tile."""
_BLOCK = (2**16, 2**18)
"""Elements of the blocks of rows in which the TPU compiler (libtpu 0.0.42, v5e, v5p, v4) scatters columns: more than the
first number (on two chips; four chips take exactly as many, too), and at most the second, which is safe."""
_TILE_COLUMNS = 128
"""Columns of a tile; the compiler does not scatter fewer than two whole tiles."""
FEW_ROWS = 0.004
"""The fraction by which rows may be padded: below the tolerance of audits."""


def run_step(step: CollectiveStep, piece: Any, sizes: Mapping[str, int]) -> Any:
    """Runs one step of a reshard on one chip's shard."""
    match step.kind:
        case "all-gather":
            return _gather(piece, step.axes, step.source_dim or 0)
        case "reduce-scatter":
            chips = prod(sizes[axis] for axis in step.axes)
            return _scatter(piece, step.axes, step.target_dim, chips)
        case "all-reduce":
            return lax.psum(piece, step.axes)
        case "all-to-all":
            chips = prod(sizes[axis] for axis in step.axes)
            return _exchange(piece, step.axes, step.target_dim, step.source_dim, chips)
        case "collective-permute":
            axes = tuple(axis for axis in sizes if axis in step.axes)
            return lax.ppermute(piece, axes, permutation(step.source, step.target, axes, sizes))
        case "slice":
            return _own_slice(piece, step.axes, step.target_dim, sizes)
    raise ValueError(f"unknown collective {step.kind!r}")


def _gather(piece: Any, axes: Axes, dim: int) -> Any:
    """An all-gather that concatenates one dimension; of vectors of no whole tiles, as matrices of a few rows.

    The TPU compiler (libtpu 0.0.42, v5e and v4) replaces the concatenation of such vectors by an all-reduce of zeros with
    each chip's part in them: twice the bytes, and 1.3 to 2.5 times the cycles for bf16[1, 64] to bf16[1, 4800].
    """
    rows = next((n for n in (_TILE_ROWS, 4, 2) if piece.size % n == 0), 1)
    is_key = jnp.issubdtype(piece.dtype, jax.dtypes.prng_key)
    if is_key or piece.size > piece.shape[dim] or piece.size % _TILE_COLUMNS == 0 or rows == 1:
        return lax.all_gather(piece, axes, axis=dim, tiled=True)
    parts = lax.all_gather(lax.reshape(piece, (rows, piece.size // rows)), axes, axis=0, tiled=False)
    return lax.reshape(parts, tuple(parts.size if i == dim else 1 for i in range(piece.ndim)))


def _exchange(piece: Any, axes: Axes, split: int, joined: int, chips: int) -> Any:
    """An all-to-all that splits one dimension and concatenates another, over the leading dimension of a view.

    The view is `[chips, ...]` without dimensions of one element. The TPU compiler (libtpu 0.0.42) writes an array with such
    a dimension in tiles of 2 rows, and reduces over that dimension: 227 µs of copies for bf16[1, 32, 16384] on v5p instead
    of 8 µs. Of arrays without such a dimension a view costs as much as a tiled all-to-all, or less.
    """
    shape = [*piece.shape[:split], chips, piece.shape[split] // chips, *piece.shape[split + 1 :]]
    blocks = jnp.moveaxis(lax.reshape(piece, shape), split, 0)
    squeezed = lax.reshape(blocks, [chips, *(n for n in blocks.shape[1:] if n > 1)])
    received = lax.reshape(lax.all_to_all(squeezed, axes, 0, 0), blocks.shape)
    sizes = list(blocks.shape[1:])
    sizes[joined] *= chips
    return lax.reshape(jnp.moveaxis(received, 0, joined), sizes)


def _scatter(piece: Any, axes: Axes, dim: int, chips: int) -> Any:
    """A reduce-scatter in a form that the TPU compiler keeps (measured with libtpu 0.0.42).

    The compiler turns a reduce-scatter into an all-reduce if the array has dimensions of size 1. The same happens if the
    scattered dimension is neither the first nor one of the two tiled ones; such a dimension is moved to the front in
    memory. Rows of a matrix are scattered as the leading dimension of a view `[chips, rows / chips, columns]`: otherwise
    the compiler pads them and realigns them by permutations.
    """
    kept = [i for i, n in enumerate(piece.shape) if n > 1 or i == dim]
    at = kept.index(dim)
    squeezed = lax.reshape(piece, [piece.shape[i] for i in kept])
    if squeezed.ndim == 2 and at == 0:
        rows, columns = squeezed.shape
        view = lax.reshape(squeezed, (chips, rows // chips, columns))
        scattered = lax.psum_scatter(view, axes, scatter_dimension=0, tiled=False)
    elif 0 < at < squeezed.ndim - _TILED:
        first = with_layout_constraint(jnp.moveaxis(squeezed, at, 0), MemoryLayout(tuple(range(squeezed.ndim))))
        scattered = jnp.moveaxis(lax.psum_scatter(first, axes, scatter_dimension=0, tiled=True), 0, at)
    elif squeezed.ndim == 2:
        rows, columns = squeezed.shape
        if more := _odd_rows(rows, columns // chips):
            squeezed = lax.pad(squeezed, np.zeros((), squeezed.dtype), ((0, more, 0), (0, 0, 0)))
        scattered = lax.slice_in_dim(lax.psum_scatter(squeezed, axes, scatter_dimension=1, tiled=True), 0, rows)
    else:
        scattered = lax.psum_scatter(squeezed, axes, scatter_dimension=at, tiled=True)
    sizes = dict(zip(kept, scattered.shape, strict=True))
    return lax.reshape(scattered, [sizes.get(i, 1) for i in range(piece.ndim)])


def _odd_rows(rows: int, columns: int) -> int:
    """The number of rows of padding with which the TPU compiler scatters columns, in blocks of rows.

    `columns` is the number of columns after the scatter. The compiler splits the rows, in tiles of 8, into equal blocks.
    If no division gives blocks of a valid size, such as for 6283 = 61 · 103 tiles, it emits an all-reduce, which sends
    twice as much. The result is 0 if too much padding is needed.
    """
    tiles = -(-rows // _TILE_ROWS)
    least, most = _BLOCK[0] // (_TILE_ROWS * columns) + 1, _BLOCK[1] // (_TILE_ROWS * columns)
    if tiles <= most or columns % _TILE_COLUMNS or columns < 2 * _TILE_COLUMNS:
        return 0
    blocks = range(least, most + 1)
    more = next((n for n in range(int(tiles * FEW_ROWS) + 1) if any((tiles + n) % block == 0 for block in blocks)), 0)
    return (tiles + more) * _TILE_ROWS - rows if more else 0


def _own_slice(piece: Any, axes: Axes, dim: int, sizes: Mapping[str, int]) -> Any:
    size = piece.shape[dim] // prod(sizes[axis] for axis in axes)
    if prod(piece.shape) == piece.shape[dim] and size == 1 and jnp.issubdtype(piece.dtype, np.integer):
        piece = lax.optimization_barrier(piece)  # XLA (jaxlib 0.10.2) loses the 2 in slice(2 * slice(integers)) of one
    return lax.dynamic_slice_in_dim(piece, lax.axis_index(axes) * size, size, dim)


def permutation(source: Layout, target: Layout, axes: Axes, sizes: Mapping[str, int]) -> list[tuple[int, int]]:
    """Pairs of sender and receiver of a collective permute, as positions along `axes` (row-major).

    A chip's coordinates along `axes` consist of those of its block and those of its copy of that block. Block $b$,
    copy $c$ under the source sends to block $b$, copy $c$ under the target, which is a bijection.
    """
    counts = tuple(sizes[axis] for axis in axes)
    coordinates = np.indices(counts).reshape(len(axes), -1)
    place = dict(zip(axes, coordinates, strict=True))
    senders = np.argsort(_block(source, axes, place, sizes), kind="stable")
    receivers = np.argsort(_block(target, axes, place, sizes), kind="stable")
    return [(int(a), int(b)) for a, b in zip(senders, receivers, strict=True) if a != b] + [
        (int(a), int(a)) for a, b in zip(senders, receivers, strict=True) if a == b
    ]


def _block(layout: Layout, axes: Axes, place: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
    """Each position's block and copy as one number: blocks by the layout's axes in order, copies by the rest."""
    used = [axis for dim in layout.dims for axis in dim if axis in axes]
    rest = [axis for axis in axes if axis not in used]
    number = np.zeros(prod(sizes[axis] for axis in axes), dtype=np.int64)
    for axis in (*used, *rest):
        number = number * sizes[axis] + place[axis]
    return number
