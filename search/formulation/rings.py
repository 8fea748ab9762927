"""Looped collectives as they are emitted: rings of permutes over one axis (`costmodels.machine.rings`).

A ring runs over the most major axis of an all-gather or a reduce-scatter. All other axes are gathered before the ring, or
scattered after it, at once: a part of $1/n$ of the bytes for a ring of $n$ chips. The search chooses the order of axes.

A ring saves the time of the collective and its matmul one after another, less that of both together. Only a collective
whose ring saves time becomes one, so a plan is never slower for it.

A ring needs no more memory than its collective. The pieces of a gathered operand are together as large as the operand. Of
a result that is scattered, at most $n + 1$ pieces exist at once, as many as result and scattered result have together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from costmodels.machine.collectives import seconds_on
from costmodels.machine.conventions import Pricing
from costmodels.machine.rings import has_two_ways, hop_seconds, piece_slowdown, summands, waiting_times
from costmodels.machine.topology import Topology
from costmodels.operations import price
from costmodels.program.program import Operation, Program
from search.formulation.layouts import Axes
from search.formulation.strategies import LoopedSide

RINGED = "dot_general"
"""The primitive whose pieces the emitted program runs beside a ring, unless it has batch dimensions.

Compilers fuse the batched products of attention with their softmax, which pieces would undo: rings of keys and values
added 1.2 ms to the 3.4 ms on the chip of two layers of Llama 70B's prefill on v5e 4x4 (libtpu 0.0.42).
"""
_LEAST = 1e-9
"""The least part of a collective's time that a ring must save."""


def are_rings(pricing: Pricing) -> bool:
    """Whether looped collectives are costed as the rings that are emitted.

    Under the bandwidth "total" they are costed as in the paper that it is from (`costmodels.machine.conventions`).
    """
    return pricing.looped and pricing.bandwidth == "per-axis"


def may_ring(op: Operation) -> bool:
    """Whether an operation may run in pieces beside a ring."""
    if op.primitive != RINGED or len(op.inputs) != 2:
        return False
    left, right, made = ({i for dim in use.dims for i in dim} for use in (*op.inputs, op.outputs[0]))
    return not left & right & made


class Ring(NamedTuple):
    """The times of a collective with a payload of one or several numbers of bytes, whole and as a ring.

    - `chips`: of the ring, one number or an array; `two_ways`: whether its two ways use links of their own.
    - `whole_seconds`: of the collective without a ring; `hop_seconds`: of one hop.
    - `apart_seconds`: of what nothing hides: the collective over the other axes, and the last sum.
    """

    chips: Any
    two_ways: bool
    whole_seconds: np.ndarray | float
    hop_seconds: np.ndarray | float
    apart_seconds: np.ndarray | float


def ring_of(kind: str, axes: Axes, payload: np.ndarray | float, itemsize: float, topology: Topology) -> Ring:
    """The ring of an all-gather or a reduce-scatter, whose axes are major to minor."""
    axis, rest = topology.axis(axes[0]), axes[1:]
    piece = payload / axis.size
    apart = seconds_on(topology, kind, rest, piece)
    if kind == "reduce-scatter":
        apart = apart + sum_seconds(axis.size, piece, itemsize, topology)
    whole = seconds_on(topology, kind, axes, payload)
    return Ring(axis.size, has_two_ways(axis), whole, hop_seconds(axis, piece), apart)


def sum_seconds(chips: int, piece: np.ndarray | float, itemsize: float, topology: Topology) -> np.ndarray | float:
    """Seconds of the separate sums of a reduce-scatter, over pieces of so many bytes.

    Each array that is read takes one pass of the vector unit: libtpu 0.0.42 estimates 110 µs for the sum of three pieces
    of 16 MiB in bfloat16 on v4, and 191 µs on v5e; three passes are 108 µs and 151 µs.
    """
    chip, count = topology.chip, summands(chips)
    moved = (count + 1) * piece / chip.reached_hbm_bytes_per_second
    rate = chip.vector_elements_per_second
    return np.maximum(moved, count * (piece / itemsize) / rate) if rate else moved


def ring_seconds(ring: Ring, work: np.ndarray | float) -> np.ndarray | float:
    """Seconds of a matmul with its ring, where its pieces take `work` seconds together."""
    return ring.apart_seconds + reduce(np.maximum, waiting_times(ring.chips, ring.two_ways, work, ring.hop_seconds))


def saved_seconds(ring: Ring, product: np.ndarray | float, work: np.ndarray | float) -> np.ndarray | float:
    """Seconds that a ring saves against the collective and the product one after another; 0 where it saves none."""
    found = ring.whole_seconds + product - ring_seconds(ring, work)
    return np.where(found > _LEAST * ring.whole_seconds, found, 0.0)


def piece_factor(op: Operation, side: LoopedSide, dim: int) -> int:
    """The factor of a product that a ring cuts: that of a dimension of an operand or of the result."""
    (factor,) = (op.outputs[0] if side == "result" else op.inputs[side]).dims[dim]
    return factor


def piece_seconds(
    program: Program, op: Operation, side: LoopedSide, dim: int, chips: int, shards: np.ndarray, topology: Topology
) -> np.ndarray:
    """Seconds of all pieces of a product: each is a run of its own, with a start, tiles and reads of its own.

    Those of a gathered operand take longer than that by a loss of the chip (`costmodels.machine.rings`).

    **Arguments:**

    - `dim`: the dimension of the operand or result in which the ring gathers or scatters.
    - `shards`: `[strategies, factors]`, the number of shards of each factor without the ring.
    """
    cut = np.array(shards, dtype=float)
    factor = piece_factor(op, side, dim)
    cut[:, factor] *= chips
    slowdown = piece_slowdown(topology.chip, side != "result", is_summed(op, factor))
    return chips * price(program, op, cut, topology.chip).seconds * slowdown


def is_summed(op: Operation, factor: int) -> bool:
    """Whether a product sums over a factor."""
    return all(factor not in dim for dim in op.outputs[0].dims)


class StepRings(NamedTuple):
    """Per step of a table the numbers of its `Ring`, and the column of `work_columns` that has its pieces."""

    chips: np.ndarray
    two_ways: np.ndarray
    whole_seconds: np.ndarray
    hop_seconds: np.ndarray
    apart_seconds: np.ndarray
    column: np.ndarray

    def saved(self, steps: np.ndarray, work: np.ndarray) -> np.ndarray:
        """Seconds saved per pair of states, whose step is -1 if nothing is looped.

        **Arguments:**

        - `steps`: `[before, after]`; `work`: `[before, after, columns]` or one that broadcasts to it, as `work_columns`.
        """
        at = np.maximum(steps, 0)
        work = np.broadcast_to(work, (*steps.shape, work.shape[-1]))
        product = work[..., 0]
        pieces = np.take_along_axis(work, self.column[at][..., None], axis=-1)[..., 0]
        found = np.zeros(steps.shape)
        for two_ways in (False, True):
            times = (each[at] for each in (self.whole_seconds, self.hop_seconds, self.apart_seconds))
            ring = Ring(self.chips[at], two_ways, *times)
            chosen = (steps >= 0) & (product > 0) & (self.two_ways[at] == two_ways)
            found = np.where(chosen, saved_seconds(ring, product, pieces), found)
        return found

    def rank(self, wire_seconds: np.ndarray) -> np.ndarray:
        """Per step a number that is larger where more can be hidden; equal only for rings of equal cost."""
        rows = np.stack([wire_seconds, -self.apart_seconds, -self.hop_seconds, -self.column], axis=1)
        return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1).astype(float)


def no_rings(steps: int) -> StepRings:
    """The rings of that many steps, none of which is one."""
    whole, hop, apart = np.zeros((3, steps))
    chips, two_ways, column = np.ones(steps, np.intp), np.zeros(steps, bool), np.zeros(steps, np.intp)
    return StepRings(chips, two_ways, whole, hop, apart, column)


def column_of(dim: int, chips: int, topology: Topology) -> int:
    """The column of `work_columns` for pieces of a dimension over that many chips."""
    sizes = _sizes(topology)
    return 1 + dim * len(sizes) + sizes.index(chips)


def work_columns(
    program: Program, op: Operation, side: LoopedSide, shards: np.ndarray, topology: Topology
) -> np.ndarray:
    """Seconds of a product with its start, and of its pieces for every dimension and number of chips.

    The shape is `[strategies, columns]`.
    """
    use = op.outputs[0] if side == "result" else op.inputs[side]
    cuts = [(dim, chips) for dim in range(len(use.dims)) for chips in _sizes(topology)]
    found = [piece_seconds(program, op, side, dim, chips, shards, topology) for dim, chips in cuts]
    return np.stack([price(program, op, shards, topology.chip).seconds, *found], axis=1)


def _sizes(topology: Topology) -> Sequence[int]:
    return sorted({axis.size for axis in topology.axes if axis.size > 1})
