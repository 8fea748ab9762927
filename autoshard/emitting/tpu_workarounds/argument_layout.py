"""How arrays lie in the memory of a TPU: in tiles of its registers' rows and lanes, which pad some shapes to a multiple.

The compiler lays arguments out so that they are padded the least (`search.packing`). What goes round a loop it lays out as it
likes, such as a cache of 25 heads of 64 in 2.56 times its bytes, and then reads all of those in every round. So what a round
updates in place is laid out as an argument of its shape would be.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from search.formulation.tpu_tiles import least_padded


def as_an_argument(piece: Any) -> Any:
    """An array as a TPU lays out an argument of its shape; on other devices it stays as it is."""
    order = least_padded(tuple(piece.shape))
    if order == tuple(range(piece.ndim)):
        return piece
    return lax.platform_dependent(
        piece,
        tpu=lambda array: with_layout_constraint(array, Layout(major_to_minor=order)),
        default=lambda array: array,
    )
