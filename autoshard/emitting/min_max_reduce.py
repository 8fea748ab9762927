"""Reductions over chips that are no sum: maxima, minima, conjunctions and disjunctions of pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from search.formulation.layouts import Axes


def over_chips(kind: str, piece: Any, axes: Axes) -> Any:
    """A split "max", "min", "and" or "or": every chip's piece to that of all of them."""
    if kind in ("max", "min"):
        return _extreme(piece, kind, axes)
    as_integers = piece.astype(np.int32)
    reduced = lax.pmin(as_integers, axes) if kind == "and" else lax.pmax(as_integers, axes)
    return reduced.astype(piece.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _extreme(piece: Any, kind: str, axes: Axes) -> Any:
    """The maximum or minimum over chips; JAX has no derivative of `pmax`, so it is given here."""
    combined = partial(lax.pmax if kind == "max" else lax.pmin, axis_name=axes)
    if not jnp.issubdtype(piece.dtype, np.floating):
        return combined(piece)
    with_nans = partial(_with_nans, kind, combined)
    other = combined if piece.dtype.itemsize < 4 else with_nans
    return lax.platform_dependent(piece, tpu=combined, cpu=with_nans, default=other)


def _with_nans(kind: str, combined: Callable[..., Any], piece: Any) -> Any:
    """The extreme of floats as that of integers in the same order, beyond which lies what is no number.

    The all-reduces of hosts (jaxlib 0.10: the first chip's number stays unless another's compares greater) and of GPUs (fmax)
    lose a NaN, which JAX's own reductions keep. 16-bit floats take 32 bits, which hosts send of them anyway; GPUs do not, and
    may lose a NaN there.
    """
    wide = piece if piece.dtype.itemsize >= 4 else piece.astype(np.float32)
    integer = np.dtype(f"int{8 * wide.dtype.itemsize}")
    least, most = (np.asarray(bound, integer) for bound in (np.iinfo(integer).min, np.iinfo(integer).max))
    zero = np.zeros((), integer)

    def turned(bits: Any) -> Any:
        return jnp.where(bits < zero, bits ^ most, bits)  # of negative floats the greater bits are the smaller number

    place = turned(lax.bitcast_convert_type(wide, integer))
    found = combined(jnp.where(jnp.isnan(wide), most if kind == "max" else least, place))
    return lax.bitcast_convert_type(turned(found), wide.dtype).astype(piece.dtype)


@_extreme.defjvp
def _extreme_jvp(kind: str, axes: Axes, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    """The tangent is that of the chips that hold the extreme, shared among them."""
    (piece,), (tangent,) = primals, tangents
    whole = _extreme(piece, kind, axes)
    held = (piece == whole).astype(tangent.dtype)
    return whole, lax.psum(tangent * held, axes) / lax.psum(held, axes)
