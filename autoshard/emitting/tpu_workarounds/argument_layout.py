"""The memory layout of an argument for loop carries, on TPUs.

A TPU stores arrays in tiles of rows and lanes, which pad some shapes. The compiler gives arguments the order with the
least padding (`search.formulation.tpu_tiles`). It may give a loop carry an order with more, such as 2.56 times the bytes
for a cache of 25 heads of 64, and then reads all of these in every iteration. So a carry that is updated in place gets
the layout of an argument of its shape.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from search.formulation.tpu_tiles import default_order


def with_argument_layout(piece: Any, always: bool = False) -> Any:
    """An array with a TPU's layout of an argument of its shape; unchanged on other devices.

    **Arguments:**

    - `always`: whether to name the order also if it is the row-major one.
    """
    order = default_order(tuple(piece.shape), piece.dtype.itemsize)
    if order == tuple(range(piece.ndim)) and not always:
        return piece
    return lax.platform_dependent(
        piece,
        tpu=lambda array: with_layout_constraint(array, Layout(major_to_minor=order)),
        default=lambda array: array,
    )
