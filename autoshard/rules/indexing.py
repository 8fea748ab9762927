"""Rules of primitives that address arrays by index."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import prod
from operator import and_, or_
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from autoshard.rules.rule import Factors, Pieces, Rule, local_shape, picked_kind, register, summable
from autoshard.rules.shape import cut_dims, element, shift, single_elements, window_dims
from costmodels.program.program import FactorKind, Output

# --- Slices at a traced start


def _own_starts(rule: Rule, pieces: Pieces, window, starts) -> tuple[list, list]:
    """The starts on this chip's shard, and per dimension with a single element whether this chip holds it.

    XLA clamps a start so that the window fits. A window over a whole dimension starts at 0 for any index, on a shard as on the
    array. The index of a single element is clamped before its chip is found, and so is that of a longer window, whose start
    may then be before or past the shard.
    """
    own, here = list(starts), []
    picked = single_elements(rule, pieces, window)
    cut = cut_dims(rule, pieces, window)
    for i, dim in enumerate(rule.inputs[0]):
        if i in picked:
            last = rule.factors[dim[0]].size - 1
            own[i], inside = element(rule, pieces, i, jnp.clip(_to_signed(starts[i]), 0, last))
            here.append(inside)
        elif i in cut:
            room = rule.factors[dim[0]].size - rule.factors[window[i][0]].size
            own[i] = jnp.clip(_to_signed(starts[i]), 0, room) - pieces.start(dim[0])
        elif any(pieces.is_split(f) for f in dim):
            own[i] = jnp.int32(0)
    return _to_one_dtype(own), here


def _to_signed(index):
    """An index as a signed integer of at least 32 bits, from which the start of a shard can be subtracted."""
    index = jnp.asarray(index)
    if index.dtype == np.uint32:
        index = jnp.minimum(index, np.uint32(np.iinfo(np.int32).max))
    return index if index.dtype.itemsize > 4 else index.astype(np.int32)


def _to_one_dtype(starts) -> list:
    """Starts of one dtype; JAX refuses a mixture."""
    if len({jnp.asarray(start).dtype for start in starts}) < 2:
        return starts
    signed = [_to_signed(start) for start in starts]
    widest = max((start.dtype for start in signed), key=lambda dtype: dtype.itemsize)
    return [start.astype(widest) for start in signed]


def _local_dynamic_slice(eqn, rule: Rule, pieces: Pieces, operand, *starts):
    window = rule.outputs[0]
    own, here = _own_starts(rule, pieces, window, starts)
    for i in cut_dims(rule, pieces, window):
        if window[i]:
            operand = shift(operand, i, own[i], pieces.size(window[i][0]))
            own[i] = jnp.zeros_like(own[i])
    found = lax.dynamic_slice(operand, own, local_shape(window, pieces), allow_negative_indices=False)
    return [jnp.where(reduce(and_, here), found, jnp.zeros_like(found)) if here else found]


@register("dynamic_slice")
def dynamic_slice(inputs, outputs, **_):
    """`[a,b,c],[] -> [a,d,1] sum={b,c}`: as `slice`; a dimension that the window spans may be split."""
    factors = Factors()
    left, right = window_dims(factors, inputs[0].shape, outputs[0].shape, picked_kind(inputs[0]))
    starts = ((),) * (len(inputs) - 1)
    linear = (frozenset({0}),)
    return Rule(factors.done(), (left, *starts), (right,), linear, flops_per_point=0.0, local=_local_dynamic_slice)


def _local_update(eqn, rule: Rule, pieces: Pieces, operand, update, *starts):
    window = rule.inputs[1]
    own, here = _own_starts(rule, pieces, window, starts)
    for i in cut_dims(rule, pieces, window):
        if window[i]:
            update, own[i], inside = _overlap(update, i, own[i], operand.shape[i])
            here.append(inside)
    if here:
        present = lax.dynamic_slice(operand, own, update.shape, allow_negative_indices=False)
        update = jnp.where(reduce(and_, here), update, present)
    return [lax.dynamic_update_slice(operand, _pin_order(pieces.order, update), own, allow_negative_indices=False)]


def _overlap(update, dim: int, start, size: int):
    """The part on a shard of `size` of an update that begins at `start`, which may be before, on or past the shard.

    **Returns:** that part of the update, its start on the shard, and a mask of the elements that belong to the update.
    """
    count = update.shape[dim]
    length = min(count, size)
    begin = jnp.clip(start, 0, size - length)
    offset = begin - start
    place = offset + lax.broadcasted_iota(offset.dtype, [length if i == dim else 1 for i in range(update.ndim)], dim)
    return shift(update, dim, offset, length), begin, (place >= 0) & (place < count)


def _pin_order(order, piece):
    """A shard pinned to an order of dimensions in memory, row-major by default.

    Otherwise the TPU compiler may give the updated array the layout of the few rows that are written (seen with libtpu
    0.0.42, rows sliced just before). It then copies a whole cache into that layout and back, and again in every iteration
    of a loop.
    """
    return with_layout_constraint(piece, Layout(order or tuple(range(piece.ndim)))) if piece.ndim > 1 else piece


@register("dynamic_update_slice")
def dynamic_update_slice(inputs, outputs, **_):
    """`[a,b,c],[a,d,1] -> [a,b,c]`: in place; each chip writes the part on its shard. The traffic is that of the update."""
    factors = Factors()
    left, right = window_dims(factors, inputs[0].shape, inputs[1].shape, "parallel")
    starts = ((),) * (len(inputs) - 2)
    return Rule(
        factors.done(),
        (left, right, *starts),
        (left,),
        linear=(frozenset({0, 1}),),
        op_class="memory",
        traffic=(1, 1),
        flops_per_point=0.0,
        local=_local_update,
        in_place=True,
    )


# --- Gather and scatter


class _Own(NamedTuple):
    """Indices on this chip's shard, with masks of the rows that are on it and of those that this chip answers for."""

    indices: Any
    here: Any
    answered: Any


def _column_factors(rule: Rule, pieces: Pieces, index_map, single) -> Mapping[int, int]:
    """Column of the indices to factor, for the split dimensions in which rows are looked up."""
    factors = {column: rule.inputs[0][dim][0] for column, dim in enumerate(index_map) if dim in single}
    return {column: factor for column, factor in factors.items() if pieces.is_split(factor)}


def _clip(indices, limits):
    """Indices clipped so that the windows fit, as XLA does before it reads."""
    return jnp.clip(indices, 0, np.asarray(limits, indices.dtype))


def _localise(rule: Rule, pieces: Pieces, split: Mapping[int, int], indices) -> _Own:
    """Moves indices to this chip's shard.

    An index of another chip's row becomes out of bounds. An index outside the whole array stays out of bounds, and the first
    chip answers for it.
    """
    columns = [indices[..., i] for i in range(indices.shape[-1])]
    here, outside, first = [], [], []
    for i, factor in split.items():
        start = lax.convert_element_type(pieces.start(factor), indices.dtype)
        local, size = columns[i] - start, pieces.size(factor)
        outside.append((columns[i] < 0) | (columns[i] >= rule.factors[factor].size))
        inside = (local >= 0) & (local < size) & (columns[i] < rule.factors[factor].size)  # a shard may be padded
        here.append(inside)
        first.append(start == 0)
        columns[i] = jnp.where(inside, local, jnp.full_like(local, size))
    answered = jnp.where(reduce(or_, outside), reduce(and_, first), reduce(and_, here))
    return _Own(jnp.stack(columns, axis=-1), reduce(and_, here), answered)


def _single_row_dims(numbers, slice_sizes) -> list[int]:
    """The dimensions in which single rows are looked up."""
    return [i for i in numbers.start_index_map if i in numbers.collapsed_slice_dims and slice_sizes[i] == 1]


@register("gather")
def gather(inputs, outputs, *, dimension_numbers, slice_sizes, mode, **_):
    """`[v,e],[b] -> [b,e] sum={v}`: a looked-up dimension may be split; each chip answers for its own shard.

    Dimensions that the window spans pass through. A dimension in which single rows are looked up is a `sum` factor: chips
    without the row contribute zeros, so the sum over chips is the row. Of booleans it is an `or`.
    """
    operand, indices = inputs
    numbers = dimension_numbers
    factors = Factors()
    rows = {i: (factors.new(n),) for i, n in enumerate(indices.shape[:-1])}
    batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    singly = _single_row_dims(numbers, slice_sizes)
    left: list[tuple[int, ...]] = []
    offsets: list[tuple[int, ...]] = []
    for i, n in enumerate(operand.shape):
        taken_whole = slice_sizes[i] == n
        if i in batching:
            left.append(rows[batching[i]])
        elif i in singly:
            left.append((factors.new(n, picked_kind(operand)),))
        else:
            left.append((factors.new(n, "parallel" if taken_whole else "whole"),))
        if i not in batching and i not in numbers.collapsed_slice_dims:
            offsets.append(left[-1] if taken_whole else (factors.new(slice_sizes[i], "whole"),))
    taken, batch = iter(offsets), iter(rows.values())
    result = tuple(next(taken) if i in numbers.offset_dims else next(batch) for i in range(outputs[0].ndim))
    columns = (*rows.values(), (factors.new(indices.shape[-1], "whole"),))
    return Rule(
        factors.done(),
        (tuple(left), columns),
        (result,),
        (frozenset({0}),) if mode != lax.GatherScatterMode.FILL_OR_DROP and summable(operand) else (),
        op_class="memory",
        traffic=(1, Output(), Output()),
        flops_per_point=0.0,
        local=_local_gather,
    )


def _local_gather(eqn, rule: Rule, pieces: Pieces, operand, indices):
    params, shape = dict(eqn.params), eqn.invars[0].aval.shape
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    window = [k if n == m else n for n, m, k in zip(sizes, shape, operand.shape, strict=True)]
    params["slice_sizes"] = tuple(window)
    split = _column_factors(rule, pieces, numbers.start_index_map, _single_row_dims(numbers, sizes))
    if not split:
        return [pieces.look_up(eqn.primitive, operand, indices, params)]
    indices = _to_signed(indices)
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        indices = _clip(indices, [shape[i] - sizes[i] for i in numbers.start_index_map])
    own = _localise(rule, pieces, split, indices)
    found = pieces.look_up(eqn.primitive, operand, own.indices, {**params, **_UNORDERED})
    rows = [i for i in range(found.ndim) if i not in numbers.offset_dims]
    return [jnp.where(lax.broadcast_in_dim(own.answered, found.shape, rows), found, jnp.zeros_like(found))]


_UNORDERED = {"indices_are_sorted": False, "unique_indices": False}


@register("scatter", "scatter-mul", "scatter-min", "scatter-max")
def scatter(inputs, outputs, *, dimension_numbers, **_):
    """`[v,e],[b],[b,e] -> [v,e]`: in place; each chip has all rows and writes those of its shard."""
    return _scatter(inputs, dimension_numbers, "whole")


@register("scatter-add", "scatter-sub")
def scatter_add(inputs, outputs, *, dimension_numbers, **_):
    """`[v,e],[b],[b,e] -> [v,e] sum={b}`: as `scatter`, and the rows may be split too, which leaves a partial sum."""
    return _scatter(inputs, dimension_numbers, "sum")


def _scatter(inputs, numbers, row_kind: FactorKind) -> Rule:
    operand, indices, updates = inputs
    factors = Factors()
    batching = dict(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    kinds: list[FactorKind] = [
        "parallel" if i in batching.values() else row_kind for i in range(len(indices.shape) - 1)
    ]
    rows = [(factors.new(n, kind),) for n, kind in zip(indices.shape, kinds, strict=False)]
    window = iter(numbers.update_window_dims)
    left: list[tuple[int, ...]] = []
    middle: dict[int, tuple[int, ...]] = {}
    for i, n in enumerate(operand.shape):
        if i in batching:
            left.append(rows[batching[i]])
        elif i in numbers.inserted_window_dims:
            left.append((factors.new(n, "parallel" if i in numbers.scatter_dims_to_operand_dims else "whole"),))
        else:
            j = next(window)
            same = updates.shape[j] == n
            left.append((factors.new(n, "parallel" if same else "whole"),))
            middle[j] = left[-1] if same else (factors.new(updates.shape[j], "whole"),)
    batch = iter(rows)
    written = tuple(middle[j] if j in middle else next(batch) for j in range(updates.ndim))
    columns = (*rows, (factors.new(indices.shape[-1], "whole"),))
    return Rule(
        factors.done(),
        (tuple(left), columns, written),
        (tuple(left),),
        (frozenset({0, 2}),) if row_kind == "sum" else (),
        op_class="memory",
        traffic=(1, 2, 2, 2),
        flops_per_point=0.0,
        local=_local_scatter,
        in_place=True,
    )


def _local_scatter(eqn, rule: Rule, pieces: Pieces, operand, indices, updates):
    params, shape = dict(eqn.params), eqn.invars[0].aval.shape
    numbers, mode = params["dimension_numbers"], params["mode"]
    written = numbers.scatter_dims_to_operand_dims
    split = _column_factors(rule, pieces, written, numbers.inserted_window_dims)
    if split:
        indices = _to_signed(indices)
        if mode == lax.GatherScatterMode.CLIP:
            sizes = _window_sizes(numbers, shape, eqn.invars[2].aval.shape)
            indices = _clip(indices, [shape[i] - sizes[i] for i in written])
        own = _localise(rule, pieces, split, indices)
        params |= {**_UNORDERED, "mode": lax.GatherScatterMode.FILL_OR_DROP}
        indices = own.indices
        if prod(indices.shape[:-1]) == 1:
            indices, updates = _harmless(eqn, operand, own, updates)
    return [eqn.primitive.bind(_on_first_chip(rule, pieces, operand), indices, updates, **params)]


def _harmless(eqn, operand, own: _Own, updates):
    """A single row of another chip rewrites the present values, within bounds.

    XLA turns such a scatter into a dynamic update slice and, as of jaxlib 0.10, reads the wrong place when the index is out of
    bounds and the operand is itself a dynamic slice: `lax.dynamic_slice(x, (s,), (4,)).at[4].set(u, mode="drop")` writes
    `x[4]` to the last row.
    """
    numbers = eqn.params["dimension_numbers"]
    sizes = _window_sizes(numbers, operand.shape, updates.shape)
    limits = [operand.shape[i] - sizes[i] for i in numbers.scatter_dims_to_operand_dims]
    indices = jnp.where(own.here[..., None], own.indices, _clip(own.indices, limits))
    window = lax.GatherDimensionNumbers(
        offset_dims=numbers.update_window_dims,
        collapsed_slice_dims=numbers.inserted_window_dims,
        start_index_map=numbers.scatter_dims_to_operand_dims,
        operand_batching_dims=numbers.operand_batching_dims,
        start_indices_batching_dims=numbers.scatter_indices_batching_dims,
    )
    present = lax.gather(operand, indices, window, tuple(sizes), mode="clip")
    if eqn.primitive.name in ("scatter-add", "scatter-sub"):
        present = jnp.zeros_like(updates)
    if eqn.primitive.name == "scatter-mul":
        present = jnp.ones_like(updates)
    rows = [i for i in range(updates.ndim) if i not in numbers.update_window_dims]
    return indices, jnp.where(lax.broadcast_in_dim(own.here, updates.shape, rows), updates, present)


def _window_sizes(numbers, shape, update_shape) -> list[int]:
    window = iter(numbers.update_window_dims)
    single = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    return [1 if i in single else update_shape[next(window)] for i in range(len(shape))]


def _on_first_chip(rule: Rule, pieces: Pieces, operand):
    """The operand on one of the chips over which the rows are split; zeros on the others."""
    summed = [i for i, factor in enumerate(rule.factors) if factor.kind == "sum" and pieces.is_split(i)]
    if not summed:
        return operand
    first = reduce(and_, [pieces.start(i) == 0 for i in summed])
    return jnp.where(first, operand, jnp.zeros_like(operand))
