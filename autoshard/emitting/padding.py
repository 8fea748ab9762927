"""Padding of arrays at the edge of a planned program, and masks of padded elements inside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.annotating.masks import Cut, Mask
from autoshard.annotating.padding import Padding, sizes_of
from autoshard.planning.records import ArrayPlan, PlanRecord
from autoshard.rules.padding import Fill
from autoshard.rules.rule import Dims, Pieces
from costmodels.program.program import Program


def padded(array: Any, paddings: Sequence[Padding]) -> Any:
    """An array with zeros in the padding of its dimensions."""
    return _resized_at_once(array, tuple(paddings), True) if paddings else array


def unpadded(array: Any, paddings: Sequence[Padding]) -> Any:
    """The inverse of `padded`."""
    return _resized_at_once(array, tuple(paddings), False) if paddings else array


def padded_as(array: Any, row: ArrayPlan) -> Any:
    """An array with the padding of its plan, unless it has that already."""
    return padded(array, row.padding) if array.shape != row.shape else array


def has_padding_inside(row: ArrayPlan) -> bool:
    """Whether an array has padding at other places than the ends of its dimensions."""
    return any(row.shape[each.dim] != each.padded * each.inner for each in row.padding)


def unpadded_like(plan: PlanRecord, program: Program, given: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The results without padding, except those that replace a donated argument given with its padding, or are handed over."""
    kept = set(plan.handed_results) | {
        result
        for at, result in program.donated
        if given[at].shape == plan.arguments[at].shape
        and sizes_of(plan.arguments[at].padding) == sizes_of(plan.results[result].padding)
    }
    rows = enumerate(zip(results, plan.results, strict=True))
    return [array if k in kept else unpadded(array, row.padding) for k, (array, row) in rows]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _resized_at_once(array: Any, paddings: tuple[Padding, ...], longer: bool) -> Any:
    """An array with or without its paddings, in one compilation."""
    for each in paddings:
        array = _resized(array, each, *((each.size, each.padded) if longer else (each.padded, each.size)))
    return array


def _resized(array: Any, padding: Padding, before: int, after: int) -> Any:
    """An array whose dimension, of blocks of `before` parts, gets blocks of `after` parts: cut, or filled with zeros."""
    dim, shape = padding.dim, array.shape
    apart = lax.reshape(
        array, (*shape[:dim], shape[dim] // (before * padding.inner), before, padding.inner, *shape[dim + 1 :])
    )
    if after < before:
        changed = lax.slice_in_dim(apart, 0, after, axis=dim + 1)
    else:
        config = [(0, after - before if k == dim + 1 else 0, 0) for k in range(apart.ndim)]
        changed = lax.pad(apart, jnp.zeros((), array.dtype), config)
    return lax.reshape(changed, (*shape[:dim], shape[dim] // before * after, *shape[dim + 1 :]))


def masked(piece: Any, dims: Dims, masks: Sequence[Mask], pieces: Pieces) -> Any:
    """One chip's shard of an operand, with neutral values in the padding."""
    for mask in masks:
        dim, factors = next((dim, factors) for dim, factors in enumerate(dims) if mask.factor in factors)
        after = prod(pieces.size(each) for each in factors[factors.index(mask.factor) + 1 :])
        counts = lax.broadcasted_iota(np.int32, [n if k == dim else 1 for k, n in enumerate(piece.shape)], dim)
        within = (counts // after) % pieces.size(mask.factor) + pieces.start(mask.factor)
        real = (within // mask.inner) % mask.padded < mask.size
        piece = jnp.where(real, piece, _neutral(mask.fill, piece.dtype))
    return piece


def resize_cut(array: Any, dims: Dims, cuts: Sequence[Cut], longer: bool) -> Any:
    """One chip's shard of an operand without the padding of what is cut, or with `longer` of a result with it again."""
    for cut in cuts:
        for dim in (dim for dim, factors in enumerate(dims) if factors == (cut.factor,)):
            padding = Padding(0, dim, cut.size, cut.padded, cut.inner)
            array = _resized(array, padding, *((cut.size, cut.padded) if longer else (cut.padded, cut.size)))
    return array


def _neutral(fill: Fill, dtype: Any) -> Any:
    if fill in ("zero", "false"):
        return jnp.zeros((), dtype)
    if fill == "true":
        return jnp.ones((), dtype)
    sign = 1 if fill == "highest" else -1
    if jnp.issubdtype(dtype, np.inexact):
        return jnp.full((), sign * np.inf, dtype)
    limits = jnp.iinfo(dtype)
    return jnp.full((), limits.max if sign > 0 else limits.min, dtype)
