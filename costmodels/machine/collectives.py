"""The cost of collectives on a torus of links or a switch.

One symbolic expression per kind of collective and set of axes, with the symbols

| symbol | meaning | unit |
|---|---|---|
| $V$ | bytes on one chip, by the convention below | bytes |
| $n_x$ | size of axis x | chips |
| $W_x$ | one-way bandwidth: of each link of a torus axis, out of each chip on a switch axis | bytes/s |
| $α_x$ | latency of one hop | s |
| $o$ | launch of the collective | s |
| $B$ | bandwidth of all links of a chip together, under the convention "total" | bytes/s |
| $f$ | the part of the bandwidth time that computation hides | 1 |

and the conventions for $V$: of an all-gather, the gathered *result* on one chip; of a reduce-scatter and an all-reduce,
the unreduced *operand*; of an all-to-all and a collective-permute, the chip's own *operand*.

With $N = \\prod n_i$ chips and the bandwidth of an axis $B_i = 2W_i$ on a ring (both directions carry), $W_i$ on a line
or a switch:

$$T_{AG} = T_{RS} = V \\max_{S} \\frac{N_S - 1}{N B_S} + \\sum_i α_i h_i + o, \\qquad T_{AR} = T_{RS} + T_{AG} - o,$$
$$T_{A2A} = V \\max_i \\frac{m_i}{B_i} + \\sum_i α_i h_i + o,$$

where $S$ runs over sets of axes, $N_S$ and $B_S$ are their chips and their bandwidth together, $h_i$ is the longest way
along an axis in hops, and $m_i = \\lfloor n_i^2/4 \\rfloor / n_i$ (on a switch $(n_i - 1)/n_i$). On a torus the
costliest collective-permute occupies the links as long as two all-to-alls. The derivations are below. If all links are
equal, the maximum is at $S$ = all axes, and the first term is $V (N-1) / (N \\sum B_i)$.

This is the convention "per-axis". Under "total" (`costmodels.machine.conventions`) the torus axes of a collective are one
switch of bandwidth $B$ with all their chips; latency is unchanged. Overlap multiplies the first term by $1 - f$. The overlap of
looped einsums depends on their matmul and is not part of these expressions.

The formulas are those of "How To Scale Your Model", part 3 (tori) and part 12 (switches), with the factor $(N-1)/N$
that the book drops, and latency added rather than maximised over; and of Pope et al. 2022, appendix A.1, if all axes of
a torus take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cache
from itertools import combinations
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from costmodels.machine.conventions import PHYSICAL, Pricing
from costmodels.machine.lazy_sympy import sympy
from costmodels.machine.topology import Axis, Topology

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
Axes = tuple[Axis, ...]
Wires = tuple["_Wire", ...]
Bytes = float | np.ndarray


@cache
def bytes_symbol() -> sympy.Symbol:
    """$V$: bytes on one chip."""
    return sympy.Symbol("V", nonnegative=True)


@cache
def launch_symbol() -> sympy.Symbol:
    """$o$: the launch time of the collective in seconds."""
    return sympy.Symbol("o", nonnegative=True)


@cache
def total_symbol() -> sympy.Symbol:
    """$B$: bytes per second over all links of a chip, under the convention "total"."""
    return sympy.Symbol("B", positive=True)


@cache
def overlap_symbol() -> sympy.Symbol:
    """$f$: the part of the bandwidth time that computation hides."""
    return sympy.Symbol("f", nonnegative=True)


def size_symbol(axis: Axis) -> sympy.Symbol:
    """$n$ of an axis: its size in chips."""
    return sympy.Symbol(f"n_{axis.name}", positive=True, integer=True)


def bandwidth_symbol(axis: Axis) -> sympy.Symbol:
    """$W$ of an axis: its one-way bandwidth in bytes per second."""
    return sympy.Symbol(f"W_{axis.name}", positive=True)


def hop_symbol(axis: Axis) -> sympy.Symbol:
    """$α$ of an axis: the latency of one hop in seconds."""
    return sympy.Symbol(f"alpha_{axis.name}", nonnegative=True)


def values(
    axes: Sequence[Axis], pricing: Pricing = PHYSICAL, total_bytes_per_second: float = 0.0
) -> dict[sympy.Symbol, float]:
    """The values of the symbols of `expression` on these axes, without the bytes."""
    launches = (axis.launch_seconds for axis in axes if axis.size > 1)
    found: dict[sympy.Symbol, float] = {
        launch_symbol(): max(launches, default=0.0),
        overlap_symbol(): pricing.hidden_part,
    }
    for axis in axes:
        found |= {size_symbol(axis): axis.size, bandwidth_symbol(axis): axis.bytes_per_second}
        found[hop_symbol(axis)] = axis.hop_seconds
    return found if pricing.bandwidth == "per-axis" else found | {total_symbol(): total_bytes_per_second}


def expression(kind: str, axes: Sequence[Axis], pricing: Pricing = PHYSICAL) -> sympy.Expr:
    """Seconds of a collective over these axes, in the symbols of this module.

    Axes of size 1 are ignored; over no axes every collective is free. The kind of an axis (ring, line or switch), the
    bandwidth convention and the presence of overlap determine the form of the expression and are not symbols in it.

    **Raises:** `ValueError` for an unknown kind.
    """
    if kind not in _SECONDS:
        raise ValueError(f"A collective must be one of {', '.join(_SECONDS)}, got {kind!r}.")
    taking_part = tuple(axis for axis in axes if axis.size > 1)
    if not taking_part:
        return sympy.Integer(0)
    rounds, load = _SECONDS[kind]
    wire = bytes_symbol() * load(_wires(taking_part, pricing))
    exposed = (1 - overlap_symbol()) * wire if pricing.hidden_part else wire
    return rounds * (exposed + _latency(taking_part)) + launch_symbol()


def seconds(
    kind: str,
    axes: Sequence[Axis],
    bytes: Bytes,
    pricing: Pricing = PHYSICAL,
    total_bytes_per_second: float = 0.0,
) -> Bytes:
    """Seconds of a collective for a number of bytes per chip, or an array of them.

    `expression`, compiled once per kind and axes. Axes that differ only in name share the compiled function, so symmetric
    layouts cost the same to the last bit.

    ```python
    topology = parse_topology("v5e:8x4")
    seconds("all-gather", [topology.axis("y")], 2 * 2048 * 8192)     # 5.6e-4
    ```

    **Arguments:**

    - `kind`: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "collective-permute" (the costliest
      permutation).
    - `axes`: its axes, in any order.
    - `bytes`: per chip; the result of an all-gather, the operand of the others.
    - `pricing`, `total_bytes_per_second`: the conventions, and the bandwidth of all links of a chip, which only
      "total" needs; `seconds_on` takes both from a topology.
    """
    return _compile(kind, tuple(axes), pricing, total_bytes_per_second)(bytes)


def seconds_on(topology: Topology, kind: str, axes: Iterable[str], bytes: Bytes) -> Bytes:
    """`seconds` over the named axes, under the conventions of their topology."""
    along = tuple(topology.axis(name) for name in axes)
    return seconds(kind, along, bytes, topology.pricing, topology.total_bytes_per_second)


def wire_bytes(kind: str, axes: Sequence[Axis], bytes: Bytes) -> Bytes:
    """Bytes that one chip sends on any network, without the bytes that it forwards.

    $V(N-1)/N$, with $V$ by the convention of this module; twice that for an all-reduce; $V$ for a collective-permute.
    """
    chips = prod(axis.size for axis in axes)
    if chips == 1:
        return bytes * 0.0
    if kind == "collective-permute":
        return bytes * 1.0
    return bytes * ((2.0 if kind == "all-reduce" else 1.0) * (chips - 1) / chips)


def _largest(terms: Iterable[sympy.Expr]) -> sympy.Expr:
    first, *others = terms
    # Unevaluated: SymPy would compare all pairs of terms symbolically, which takes seconds for four axes.
    return sympy.Max(first, *others, evaluate=False) if others else first


# Latency: the last byte travels the longest way along each axis: floor(n/2) hops on a ring of n chips, which has two
# directions; n - 1 on a line; 1 through a switch.


def _hops(axis: Axis) -> sympy.Expr:
    if axis.kind == "switch":
        return sympy.Integer(1)
    return sympy.floor(size_symbol(axis) / 2) if axis.ring else size_symbol(axis) - 1


def _latency(axes: Axes) -> sympy.Expr:
    return sympy.Add(*(hop_symbol(axis) * _hops(axis) for axis in axes))


# Bandwidth of an axis. A chip on a ring receives 2W, W from either side. So does an inner chip of a line. The chip at the
# end of a line has one link but must receive as much as the others, so a gather along a line runs at W. Two chips have
# one link between them and are a line. A chip on a switch receives W. Under "total", the torus axes that take part are
# one switch.


class _Wire(NamedTuple):
    """An axis, or several that act as one: number of chips, bandwidth, and `speed`, the bandwidth of its links."""

    chips: sympy.Expr
    bandwidth: sympy.Expr
    switch: bool
    speed: float


def _wires(axes: Axes, pricing: Pricing) -> tuple[_Wire, ...]:
    together = tuple(axis for axis in axes if axis.kind == "torus" and pricing.bandwidth == "total")
    apart = (_wire(axis) for axis in axes if axis not in together)
    return (*apart, _Wire(sympy.Mul(*map(size_symbol, together)), total_symbol(), True, 0.0)) if together else (*apart,)


def _wire(axis: Axis) -> _Wire:
    bandwidth = 2 * bandwidth_symbol(axis) if axis.ring else bandwidth_symbol(axis)
    return _Wire(size_symbol(axis), bandwidth, axis.kind == "switch", axis.bytes_per_second)


# All-gather. A chip starts with V/N of the result and receives the rest, V (N-1)/N, over its axes. Along one axis every
# link of the ring always carries a shard that the neighbour lacks, which takes (N-1)/(N B) seconds a byte.
#
# Over several axes it runs axis by axis, and each stage multiplies the data: the axis that comes after a set S of others
# carries V N_S (n-1)/N. If the array is cut into parts that take the axes in different orders, all axes are busy at
# once. For any cut, the axes of a set S carry at least what they carry when they come first, which is V (N_S - 1)/N.
# Mixed orders reach all shares that respect this for every S (they are the base of a supermodular function: Edmonds
# 1970). The best cut therefore takes
#
#     max over S of V (N_S - 1) / (N B_S).
#
# S = all axes is the familiar V (N-1) / (N sum B). It is the maximum whenever all axes are links of equal bandwidth W:
# adding an axis to S multiplies by (N_S n - 1)/(N_S - 1) > n and divides by (B_S + B)/B_S <= 1 + B/W, where B = 2W only
# on a ring, of n >= 3, and B = W otherwise, of n >= 2: never a loss.
#
# On M nodes of G GPUs the nodes' network is the slow tier, and S = {nodes} gives V (M-1) / (M G W), G W being the
# node's egress: the formula of "How To Scale Your Model", part 12. In-network reduction (SHARP) is not modelled.
#
# A reduce-scatter is an all-gather backwards in time.


def _gather_load(wires: Wires) -> sympy.Expr:
    return _largest(
        (_chips(some) - 1) / (_chips(wires) * sympy.Add(*(wire.bandwidth for wire in some)))
        for some in _deciding_subsets(wires)
    )


def _chips(wires: Wires) -> sympy.Expr:
    return sympy.Mul(*(wire.chips for wire in wires))


def _deciding_subsets(wires: Wires) -> Iterator[Wires]:
    alike = not any(wire.switch for wire in wires) and len({wire.speed for wire in wires}) == 1
    for count in range(len(wires) if alike else 1, len(wires) + 1):
        yield from combinations(wires, count)


# All-reduce: a reduce-scatter, then an all-gather, launched as one.
#
# All-to-all. A chip sends V/N to each chip, axis by axis. On axis i this is a uniform exchange in every row, in which
# the pairs (a, b) of coordinates are equally frequent: V/n_i from each chip to each coordinate.
#
#   line    the middle link parts floor(n/2) chips from ceil(n/2), so one way it carries floor(n/2) ceil(n/2) V/n,
#           and floor(n/2) ceil(n/2) = floor(n^2/4): V floor(n^2/4)/n at W bytes a second;
#   ring    the distances from a chip add up to floor(n^2/4), half of them to either side, as many as go through each of
#           its two links: V floor(n^2/4)/n at 2W (for even n, V n / 8W = nV / (4 * 2W), the book's all-gather / 4);
#   switch  everything except the chip's own part: V (n-1)/n at W.
#
# So V m / B with m = floor(n^2/4)/n (a switch: (n-1)/n). The axes work at the same time, and the slowest
# determines the time. A cut of the torus across that axis shows that no other routing is faster.


def _exchange_load(wires: Wires) -> sympy.Expr:
    return _largest(map(_exchange, wires))


def _exchange(wire: _Wire) -> sympy.Expr:
    n = wire.chips
    return ((n - 1) / n if wire.switch else sympy.floor(n**2 / 4) / n) / wire.bandwidth


# Collective-permute: each chip sends V to one other, and receives from one. The permutation is not known here, so this
# is the costliest. Routing everything through a uniformly random chip turns any permutation into two uniform exchanges
# (Valiant and Brebner 1981): at most 2 V m / B. Two permutations reach this bound: a shift by half an even ring, V (n/2)
# over two links, n V / 4W, and a swap of the halves of an even line, V (n/2) over its middle link, n V / 2W. On a switch
# a chip sends V once. A shift to the neighbour is far cheaper than all this.


def _permute_load(wires: Wires) -> sympy.Expr:
    return _largest(1 / wire.bandwidth if wire.switch else 2 * _exchange(wire) for wire in wires)


_SECONDS: Mapping[str, tuple[int, Callable[[Wires], sympy.Expr]]] = {
    "all-gather": (1, _gather_load),
    "reduce-scatter": (1, _gather_load),
    "all-reduce": (2, _gather_load),
    "all-to-all": (1, _exchange_load),
    "collective-permute": (1, _permute_load),
}
"""Kind to its number of rounds, and the bandwidth time of one round for one byte, in seconds."""


@cache
def _compile(kind: str, axes: Axes, pricing: Pricing, total: float) -> Callable[[Bytes], Bytes]:
    nameless = (replace(axis, name="", wraparound=axis.ring) for axis in axes if axis.size > 1)
    alike = sorted(nameless, key=astuple)
    named = tuple(replace(axis, name=str(i)) for i, axis in enumerate(alike))
    return _compile_nameless(kind, named, pricing, total)


@cache
def _compile_nameless(kind: str, axes: Axes, pricing: Pricing, total: float) -> Callable[[Bytes], Bytes]:
    """Seconds as a function of the bytes alone, with the axes' numbers substituted before compilation."""
    numbers = {symbol: sympy.sympify(value) for symbol, value in values(axes, pricing, total).items()}
    cost = expression(kind, axes, pricing).xreplace(numbers)
    return sympy.lambdify(bytes_symbol(), cost, "numpy") if axes else lambda bytes: bytes * 0.0
