"""A matmul beside its all-gather or reduce-scatter: pieces of the matmul, and permutes between neighbours, unrolled.

The model and the forms are those of `costmodels.machine.rings`: the ring runs over the most major axis of the collective,
both ways around where the two ways use links of their own. The other axes are gathered before it, or scattered after it, at
once. Measured with libtpu 0.0.42, schedules replayed:

- A piece of a gathered operand is multiplied as it arrives, and its result written to its place in the whole. Several
  matmuls share the pieces. If the gathered dimension is summed over, each result is added to the sum before it, which passes
  a barrier. Without barriers the compiler may begin with a piece that has yet to arrive: two layers of PaLM 540B's prefill
  on v4 4x4x4 take 4.79 ms without and 4.40 ms with them. The sum must be the second operand of the addition, or the
  compiler does not fuse all additions into the matmuls (a gather beside 4096 x 8192 x 4096 on v5e: 1.95 instead of 1.58 ms).
- Sums of more than two dimensions have the order in memory of an argument. Otherwise the compiler may compute them in an order
  for which it copies the stacked weights before a loop: two layers of Llama 3 405B's prefill on v5e 4x4 take 15.0
  instead of 13.0 ms.
- On a line, where every hop takes the links of both ways, gathered pieces go one way, so that they arrive in turn: the same
  layers take 13.0 ms both ways and 12.0 ms one way.
- The pieces of a scattered result are computed in the order in which they are sent, the own piece last. From four chips
  on sums travel both ways around, also on lines, because the sums of one way wait for each other (2048 x 7168 x 8192 on v5e:
  1,390 µs on the core both ways, 1,577 µs one way). With an even number of chips the shorter way's sum is fused into the own
  piece, so that the compiler computes all other pieces before it: otherwise it leaves the first hop exposed (2048 x 7168 x
  8192 on v4: 1,141 instead of 1,330 µs).
- Behind a barrier the last sum is an operation of its own: the compiler fuses it with the last matmul, which then waits for
  the last hop (a scatter beside 4096 x 8192 x 8192 on v4: 2.78 ms fused, 2.49 ms apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from autoshard.emitting.collectives.reshard_steps import run_step
from autoshard.emitting.tpu_workarounds.argument_layout import with_argument_layout
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


def gather_in_ring(step: CollectiveStep, piece: Any, sizes: Mapping[str, int], two_ways: bool) -> Arrived:
    """Sends a shard around the ring of an all-gather, `two_ways` around or one."""
    axis, chips = step.axes[0], sizes[step.axes[0]]
    if step.axes[1:]:
        piece = run_step(_over_rest(step), piece, sizes)
    ahead, pieces = [0], [piece]
    before = after = piece
    for k in range(1, chips):
        if two_ways and k % 2 == 0:
            after = _hop(after, axis, chips, -1)
            ahead, pieces = [*ahead, k // 2], [*pieces, after]
        else:
            before = _hop(before, axis, chips, 1)
            ahead, pieces = [*ahead, -((k + 1) // 2 if two_ways else k)], [*pieces, before]
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
        result = multiply(piece, match) if side == 0 else multiply(match, piece)
        results.append(result if at is None or _is_matrix(result) else with_argument_layout(result, always=True))
        if to is None and k:
            results = [results[1] + lax.optimization_barrier(results[0])]
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
    own, last = piece(0), _hop(back, axis, chips, -1)
    if near < far:  # the way back is a hop shorter, so its sum arrives before the last one
        own, last = own + last, None
    return _sum_apart(own, _hop(onward, axis, chips, 1), *([] if last is None else [last]))


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


def _is_matrix(piece: Any) -> bool:
    """Whether an array has at most two dimensions of more than one element."""
    return sum(size > 1 for size in piece.shape) <= 2


def _dim_of(dims: Sequence[Sequence[int]], factor: int) -> int | None:
    """The dimension of a factor, if there is one."""
    return next((i for i, dim in enumerate(dims) if factor in dim), None)
