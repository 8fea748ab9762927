"""All-reduces other than sums: maxima, minima, conjunctions and disjunctions of shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from search.formulation.layouts import Axes


def reduce_over_chips(kind: str, piece: Any, axes: Axes) -> Any:
    """The "max", "min", "and" or "or" of all chips' shards, elementwise."""
    if kind in ("max", "min"):
        return _extreme(piece, kind, axes)
    as_integers = piece.astype(np.int32)
    reduced = lax.pmin(as_integers, axes) if kind == "and" else lax.pmax(as_integers, axes)
    return reduced.astype(piece.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _extreme(piece: Any, kind: str, axes: Axes) -> Any:
    """The maximum or minimum over chips, with a derivative, which JAX's `pmax` lacks."""
    combined = partial(lax.pmax if kind == "max" else lax.pmin, axis_name=axes)
    if not jnp.issubdtype(piece.dtype, np.floating):
        return combined(piece)
    with_nans = partial(_reduce_with_nans, kind, combined)
    other = combined if piece.dtype.itemsize < 4 else with_nans
    return lax.platform_dependent(piece, tpu=combined, cpu=with_nans, default=other)


def _reduce_with_nans(kind: str, combined: Callable[..., Any], piece: Any) -> Any:
    """A float max or min as an integer max or min with the same ordering, with NaN mapped to the extreme value.

    JAX's own reductions keep NaN. The all-reduces of hosts (jaxlib 0.10: the first chip's number stays unless another's
    compares greater) and of GPUs (fmax) lose it. 16-bit floats are widened to 32 bits, which hosts send for them anyway.
    GPUs do not, so they may lose a NaN of a 16-bit type.
    """
    wide = piece if piece.dtype.itemsize >= 4 else piece.astype(np.float32)
    integer = np.dtype(f"int{8 * wide.dtype.itemsize}")
    least, most = (np.asarray(bound, integer) for bound in (np.iinfo(integer).min, np.iinfo(integer).max))
    zero = np.zeros((), integer)

    def flip_negatives(bits: Any) -> Any:
        return jnp.where(bits < zero, bits ^ most, bits)  # negative floats sort in the reverse order of their bits

    place = flip_negatives(lax.bitcast_convert_type(wide, integer))
    found = combined(jnp.where(jnp.isnan(wide), most if kind == "max" else least, place))
    return lax.bitcast_convert_type(flip_negatives(found), wide.dtype).astype(piece.dtype)


@_extreme.defjvp
def _extreme_jvp(kind: str, axes: Axes, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    """The tangent: the mean over the chips that have the extreme."""
    (piece,), (tangent,) = primals, tangents
    whole = _extreme(piece, kind, axes)
    held = (piece == whole).astype(tangent.dtype)
    return whole, lax.psum(tangent * held, axes) / lax.psum(held, axes)
