"""A matmul beside its all-gather or reduce-scatter: pieces of the matmul, and permutes between neighbours, unrolled.

The model and the forms are those of `costmodels.machine.rings`: the ring runs over the most major axis of the collective,
from four chips on both ways around. The other axes are gathered before it, or scattered after it, at once.

- A piece of a gathered operand is multiplied as it arrives, and its result written to its place in the whole. Several
  matmuls share the pieces. If the gathered dimension is summed over, the results of the pieces are added up. No barrier
  keeps the order of these sums: it would keep them out of the matmuls, which costs more than one exposed hop (a gather
  beside 4096 x 8192 x 4096 on v5e: 1.56 ms without, 1.95 ms with barriers).
- The pieces of a scattered result are computed in the order in which they are sent, the own piece last. Behind a barrier the
  last sum is an operation of its own: libtpu 0.0.42 fuses it with the last matmul, which then waits for the last hop
  (a scatter beside 4096 x 8192 x 8192 on v4: 2.78 ms fused, 2.49 ms apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from autoshard.emitting.collectives.reshard_steps import run_step
from costmodels.machine.rings import TWO_WAYS
from costmodels.program.program import Operation
from search.formulation.collective_steps import CollectiveStep
from search.formulation.rings import piece_factor

Multiply = Callable[[Any, Any], Any]
"""A matmul on shards: of the left and the right operand."""


@dataclass(frozen=True)
class Arrived:
    """The pieces of a gathered array: piece `k` of the list is that of the chip `ahead[k]` further along the axis."""

    axis: str
    dim: int
    chips: int
    ahead: tuple[int, ...]
    pieces: tuple[Any, ...]

    def start(self, k: int) -> Any:
        """The first element of piece `k` along the dimension, in the whole array."""
        return _place(self.axis, self.ahead[k], self.chips) * self.pieces[k].shape[self.dim]


def gather_in_ring(step: CollectiveStep, piece: Any, sizes: Mapping[str, int]) -> Arrived:
    """Sends a shard around the ring of an all-gather."""
    axis, chips = step.axes[0], sizes[step.axes[0]]
    if step.axes[1:]:
        piece = run_step(_over_rest(step), piece, sizes)
    ahead, pieces = [0], [piece]
    before = after = piece
    for k in range(1, chips):
        if chips >= TWO_WAYS and k % 2 == 0:
            after = _hop(after, axis, chips, -1)
            ahead, pieces = [*ahead, k // 2], [*pieces, after]
        else:
            before = _hop(before, axis, chips, 1)
            ahead, pieces = [*ahead, -((k + 1) // 2 if chips >= TWO_WAYS else k)], [*pieces, before]
    return Arrived(axis, step.source_dim, chips, tuple(ahead), tuple(pieces))


def join(found: Arrived) -> Any:
    """The whole array, for an operation that does not run piece by piece."""
    return _written(found, found.dim, found.pieces)


def multiply_pieces(op: Operation, side: int, found: Arrived, other: Any, multiply: Multiply) -> Any:
    """The product of a gathered operand, piece by piece as it arrives.

    **Arguments:**

    - `side`: 0 if the gathered operand is the left one, 1 if it is the right one.
    - `other`: the other operand's shard.
    """
    factor = piece_factor(op, side, found.dim)
    at, to = _dim_of(op.inputs[1 - side].dims, factor), _dim_of(op.outputs[0].dims, factor)
    results = []
    for k, piece in enumerate(found.pieces):
        match = other if at is None else lax.dynamic_slice_in_dim(other, found.start(k), piece.shape[found.dim], at)
        results.append(multiply(piece, match) if side == 0 else multiply(match, piece))
        if to is None and k:
            results = [results[0] + results[1]]
    return results[0] if to is None else _written(found, to, results)


def scatter_in_ring(
    op: Operation, step: CollectiveStep, operands: Sequence[Any], sizes: Mapping[str, int], multiply: Multiply
) -> Any:
    """The reduce-scattered product: each piece of other chips is computed, added to the sum that arrives, and sent on."""
    axis, chips = step.axes[0], sizes[step.axes[0]]
    factor = piece_factor(op, "result", step.target_dim)
    places = [_dim_of(use.dims, factor) for use in op.inputs]

    def piece(ahead: int) -> Any:
        start = _place(axis, ahead, chips)
        return multiply(*(_part(each, at, start, chips) for each, at in zip(operands, places, strict=True)))

    found = _sum_both_ways(axis, chips, piece) if chips >= TWO_WAYS else _sum_one_way(axis, chips, piece)
    return run_step(_over_rest(step), found, sizes) if step.axes[1:] else found


def _sum_one_way(axis: str, chips: int, piece: Callable[[int], Any]) -> Any:
    total = piece(chips - 1)
    for ahead in range(chips - 2, -1, -1):
        total = _sum_apart(piece(ahead), _hop(total, axis, chips, 1))
    return total


def _sum_both_ways(axis: str, chips: int, piece: Callable[[int], Any]) -> Any:
    far = chips // 2
    near = chips - 1 - far
    onward, back = piece(far), piece(-near)
    for k in range(1, far):
        onward = piece(far - k) + _hop(onward, axis, chips, 1)
        if k < near:
            back = piece(k - near) + _hop(back, axis, chips, -1)
    return _sum_apart(piece(0), _hop(onward, axis, chips, 1), _hop(back, axis, chips, -1))


def _sum_apart(*summands: Any) -> Any:
    """The sum of a piece and what arrives, as an operation of its own."""
    first, *others = lax.optimization_barrier(summands)
    for each in others:
        first = first + each
    return first


def _hop(piece: Any, axis: str, chips: int, way: int) -> Any:
    return lax.ppermute(piece, axis, [(chip, (chip + way) % chips) for chip in range(chips)])


def _place(axis: str, ahead: int, chips: int) -> Any:
    """The number of the chip that is so many further along the ring."""
    return (lax.axis_index(axis) + ahead % chips) % chips


def _over_rest(step: CollectiveStep) -> CollectiveStep:
    """The collective over all axes but that of the ring; its layouts, which do not matter here, are those of the whole."""
    return step._replace(axes=step.axes[1:])


def _part(operand: Any, dim: int | None, place: Any, chips: int) -> Any:
    if dim is None:
        return operand
    size = operand.shape[dim] // chips
    return lax.dynamic_slice_in_dim(operand, place * size, size, dim)


def _written(found: Arrived, dim: int, pieces: Sequence[Any]) -> Any:
    """Pieces written to their places in a new array, which need not be initialized: they cover it."""
    shape = list(pieces[0].shape)
    size, shape[dim] = shape[dim], shape[dim] * found.chips
    whole = lax.empty(tuple(shape), pieces[0].dtype)
    for ahead, piece in zip(found.ahead, pieces, strict=True):
        whole = lax.dynamic_update_slice_in_dim(whole, piece, _place(found.axis, ahead, found.chips) * size, dim)
    return whole


def _dim_of(dims: Sequence[Sequence[int]], factor: int) -> int | None:
    """The dimension of a factor, if there is one."""
    return next((i for i, dim in enumerate(dims) if factor in dim), None)
