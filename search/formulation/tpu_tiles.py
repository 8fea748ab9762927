"""The matmul operands that libtpu must re-tile before use, under each strategy; this breaks ties only.

Re-tiling costs time beyond the chip's rates that no roofline contains: libtpu's own estimates for a weight of three
dimensions, sliced out of a stack by a loop, are four times as long if it is re-tiled. The rule follows these estimates
for products of [e, h, d] and of [h, d, e], with shards of 1 to 256 of h and d, on v4 and v5e:

- An array is stored in tiles of 8 rows by 128 lanes of its last two dimensions. If that pads it, another dimension
  than its last may lie along the lanes, if that pads it less.
- Of several dimensions that are summed, or kept, the longest counts as the matrix's. The others are iterated over.
- If the matrix's two dimensions are not those of the tiles, the operand is re-tiled; so it is if a tile's rows, with
  other dimensions around them, are not a multiple of 8.

It separates strategies of equal cost, and changes no price.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import numpy as np

from costmodels.operations import MatrixFactors, matrix_factors
from costmodels.program.program import Operation, Use

_ROWS, _LANES = 8, 128
"""A tile: the sublanes and lanes of a TPU's vector register."""
_PART_TILES = (1, 2, 4)
"""Fewer rows than a tile's that are stored without padding."""
_LANE_BYTES = 4
"""Bytes of a lane, which holds one row or, of a smaller type, several."""


def count_retiled(op: Operation, shards: np.ndarray) -> np.ndarray:
    """Per strategy of a matmul, the number of re-tiled operands, and of factors cut into less than a tile's rows.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.

    **Returns:** `[strategies]`, the sum of both counts.
    """
    sizes = np.array([factor.size for factor in op.factors], dtype=float)
    local = sizes / shards
    found = ((local < _ROWS) & (local < sizes) & (local > 1)).sum(axis=1)
    if groups := matrix_factors(op):
        found = found + sum(_needs_retiling(use, groups, local) for use in op.inputs)
    return found


def _needs_retiling(use: Use, groups: MatrixFactors, local: np.ndarray) -> np.ndarray:
    """Per strategy, whether an operand is re-tiled; unknown, and so false, with batch dimensions."""
    summed = tuple(set(dim) <= set(groups.contracted) for dim in use.dims)
    kept = tuple(set(dim) <= {*groups.rows, *groups.columns} for dim in use.dims)
    if len(use.dims) < 3 or not all(a or b for a, b in zip(summed, kept, strict=True)):
        return np.zeros(len(local), dtype=bool)
    sizes = np.stack([local[:, list(dim)].prod(axis=1) for dim in use.dims], axis=1)
    return np.array([needs_retiling(tuple(row), summed) for row in sizes.tolist()])


@lru_cache(maxsize=65536)
def needs_retiling(sizes: tuple[float, ...], summed: tuple[bool, ...]) -> bool:
    """Whether an operand of a product is re-tiled.

    **Arguments:**

    - `sizes`: one chip's elements along each dimension.
    - `summed`: whether the product sums over each; the others are kept.
    """
    dims = [i for i, size in enumerate(sizes) if size > 1]
    sums, keeps = [i for i in dims if summed[i]], [i for i in dims if not summed[i]]
    if len(dims) < 3 or not sums or not keeps:
        return False
    *_, rows, lanes = _least_padded(sizes)
    matrix = {max(sums, key=lambda i: (sizes[i], -i)), max(keeps, key=lambda i: (sizes[i], i))}
    return {rows, lanes} != matrix or sizes[rows] % _ROWS != 0


def _least_padded(sizes: tuple[float, ...]) -> tuple[int, ...]:
    """The dimensions in their order, or with another one along the lanes: the first order that pads least."""
    dims = [i for i, size in enumerate(sizes) if size > 1]
    if len(dims) < 2:
        return tuple(range(len(sizes)))
    best = min(_orders(dims), key=lambda order: padding(sizes[order[-2]], sizes[order[-1]]))
    return (*(i for i, size in enumerate(sizes) if size <= 1), *best)


def default_order(sizes: tuple[int, ...], itemsize: float) -> tuple[int, ...]:
    """The order in which a TPU stores an argument of this shape by default, major to minor (libtpu 0.0.42).

    A stack of 32 layers of [284, 4544] lies with its layers along the rows, as 32 rows need no padding.
    """
    if len(sizes) < 2:
        return tuple(range(len(sizes)))
    rows, lanes = argument_tile(sizes, itemsize)
    return (*(i for i in range(len(sizes)) if i not in (rows, lanes)), rows, lanes)


def argument_tile(sizes: tuple[int, ...], itemsize: float) -> tuple[int, ...]:
    """The dimensions along the rows and the lanes of an argument's tiles: the last of the pairs that pad it least."""
    backwards = range(len(sizes))[::-1]
    pairs = [(rows, lanes) for lanes in backwards for rows in backwards if rows != lanes]
    return min(pairs, key=lambda pair: _tile_ratio(sizes[pair[0]], sizes[pair[1]], itemsize), default=(*backwards,))


def _tile_ratio(rows: int, lanes: int, itemsize: float) -> float:
    """Bytes of the tiles over those of the array.

    A few rows are stored as a power of 2, small types several to a row.
    """
    if rows <= max(_PART_TILES):
        stored = next((n for n in _PART_TILES if n >= rows and n * itemsize >= _LANE_BYTES), _ROWS)
    else:
        stored = ceil(rows / _ROWS) * _ROWS
    return stored * ceil(lanes / _LANES) * _LANES / max(rows * lanes, 1)


def stack_ratio(sizes: tuple[int, ...], itemsize: float) -> float:
    """Bytes of the tiles of a loop's stack over those of its elements, in the order of its slices that pads it least.

    Its first dimension, over which the loop runs, is in no tile, but for slices of one dimension, whose rows it is. Dimensions
    of one element count for nothing. So bfloat16 [512, 8, 16, 64, 64] takes twice its bytes, float32 [8388608, 8] 16 times
    (libtpu 0.0.50).
    """
    inner = [size for size in sizes[1:] if size > 1]
    if len(inner) < 2:
        return min((_tile_ratio(sizes[0], lanes, itemsize) for lanes in inner), default=1.0)
    places = range(len(inner))
    return min(_tile_ratio(inner[a], inner[b], itemsize) for a in places for b in places if a != b)


def least_ratio(sizes: tuple[int, ...], itemsize: float) -> float:
    """Bytes of the tiles of an array over those of its elements, in the order that pads it least."""
    inner = [size for size in sizes if size > 1]
    if len(inner) < 2:
        return 1.0
    rows, lanes = argument_tile(tuple(inner), itemsize)
    return _tile_ratio(inner[rows], inner[lanes], itemsize)


def _orders(dims: list[int]) -> list[list[int]]:
    """The given order, then each other dimension along the lanes, the later ones first."""
    return [[*(i for i in dims if i != last), last] for last in reversed(dims)]


def padding(rows: float, lanes: float) -> float:
    """Bytes of tiles over those of the rows and lanes in them."""
    stored = rows if rows in _PART_TILES else ceil(rows / _ROWS) * _ROWS
    return stored * ceil(lanes / _LANES) * _LANES / (rows * lanes)
