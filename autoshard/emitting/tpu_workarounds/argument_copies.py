"""Avoidance of early copies of arguments that a collective reads during a matmul, on TPUs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


def copy_argument(piece: Any) -> Any:
    """An argument's shard as the result of an operation, made directly before its use.

    The TPU compiler (libtpu 0.0.42) copies an argument that a collective reads while a matmul runs. It makes the copies
    of all layers before anything else, and keeps each until its use. An operation's result needs no copy. Therefore the
    shard passes through a `select` whose condition is always true, which the compiler does not simplify.
    """
    true = lax.optimization_barrier(jnp.bool_(True))
    return lax.select(jnp.broadcast_to(true, piece.shape), piece, jnp.zeros_like(piece))
