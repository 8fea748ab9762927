"""The time of a matmul with its all-gather or reduce-scatter as a ring of permutes beside the pieces of the matmul.

The ring runs over one axis of $n$ chips. Each chip multiplies its own piece of a gathered operand, and then the pieces of
its neighbours as they arrive. Of a reduce-scattered result it computes the pieces of other chips first, and sends each sum
to the next chip. From `TWO_WAYS` chips on, sums travel both ways around, and gathered pieces where the axis is closed, so
there are $\\lfloor n/2 \\rfloor$ rounds of two hops.

With $t$ seconds for all $n$ pieces of the matmul and $h$ for a hop, the pair takes

$$\\max\\Bigl(t,\\; h + \\tfrac{n-1}{n} t,\\; \\lfloor \\tfrac n2 \\rfloor h + \\tfrac{m}{n} t\\Bigr)$$

where both ways use links of their own, with $m = 1$ if $n$ is even and 2 if not: the pieces of a round wait for its hops.
On a line or a switch the $n - 1$ hops share links, and it takes $\\max(t, (n-1) h + t/n)$: on a line, the hop that closes
the ring uses all links the other way.

The last sum of a reduce-scatter is not fused into a matmul, because a fusion would wait for the last hop.
"""

from __future__ import annotations

from typing import Any

from costmodels.machine.chips import Chip
from costmodels.machine.topology import Axis

TWO_WAYS = 4
"""The number of chips from which pieces travel both ways.

With three chips the sums of both ways take more memory than the whole product. Measured with libtpu 0.0.42 on bf16
products of 4096 rows over rings of 4: a gather beside 8192 x 4096 on v4 takes 1.41 ms one way and 1.30 both ways (1.64
without a ring), a scatter beside 8192 x 8192 takes 2.59 and 2.40 ms (2.81), on v5e 3.54 and 3.18 ms (4.11).
"""


def has_two_ways(axis: Axis) -> bool:
    """Whether the two ways around a ring of an axis use links of their own."""
    return axis.ring and axis.size >= TWO_WAYS


def hop_seconds(axis: Axis, bytes: Any) -> Any:
    """Seconds in which every chip sends `bytes` to the next one around an axis, as one collective-permute."""
    return bytes / axis.bytes_per_second + axis.hop_seconds * longest_way(axis, axis.size) + axis.launch_seconds


def longest_way(axis: Axis, chips: Any) -> Any:
    """Links of the longest hop of a ring over an axis of `chips` chips: that from the end of a line to its start."""
    return 1 if axis.ring or axis.kind == "switch" else chips - 1


def waiting_times(chips: Any, two_ways: bool, work: Any, hop: Any) -> tuple[Any, ...]:
    """The times whose maximum a matmul takes with its ring.

    The arguments are numbers, arrays or expressions.

    **Arguments:**

    - `chips`: of the ring.
    - `two_ways`: as `has_two_ways`.
    - `work`: seconds of all pieces of the matmul; `hop`: seconds of one hop.
    """
    if not two_ways:
        return work, (chips - 1) * hop + work / chips
    rounds = chips // 2
    last = chips - 2 * rounds + 1
    return work, hop + work * (chips - 1) / chips, rounds * hop + work * last / chips


def piece_slowdown(chip: Chip, is_gathered: bool, is_summed: bool) -> float:
    """The time of a ring's pieces over that of matmuls of their size alone.

    The TPU compiler chooses other tiles for a matmul that adds to the sum of the pieces before it, or whose result is
    written to its place in the whole (`benchmarks/ring_pieces.py`). The pieces of a reduce-scattered result take 1.01 to 1.03
    times as long on v4 and v5e, and 1.06 times on v5p (libtpu 0.0.42), which is not costed.

    **Arguments:**

    - `is_gathered`: whether the ring gathers an operand.
    - `is_summed`: whether what is gathered is summed over, so that the results of the pieces are added up.
    """
    if not is_gathered:
        return 1.0
    return 1.0 + (chip.summed_piece_loss if is_summed else chip.piece_loss)


def summands(chips: int) -> int:
    """Arrays that the separate sums of a reduce-scatter read.

    They are the own piece and the last sum to arrive. With both ways around an odd number of chips two sums arrive last;
    one way around each sum is separate.
    """
    return 2 + chips % 2 if chips >= TWO_WAYS else 2 * (chips - 1)
