"""Arguments that a collective takes while a matmul runs, which a TPU's compiler copies before anything else."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


def as_a_result(piece: Any) -> Any:
    """An argument's piece as the result of an operation, right where it is needed.

    Of an argument that a collective takes while a matmul runs, the TPU compiler (libtpu 0.0.42) makes a copy. It makes those of
    all layers before anything else, and keeps each until it is used. A result needs no copy. So the piece is selected by a
    condition that is true, which the compiler does not look through.
    """
    true = lax.optimization_barrier(jnp.bool_(True))
    return lax.select(jnp.broadcast_to(true, piece.shape), piece, jnp.zeros_like(piece))
