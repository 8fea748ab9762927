"""Microbenchmarks for calibration: matmuls, elementwise work, and every collective, over ranges of sizes.

Sizes are those for which the catalogue predicts given times. Every third size of a series, from the second on, is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from autoshard.calibrating.timing import Looped, make_loop
from costmodels.fitting import COLLECTIVES, Timing
from costmodels.machine.chips import Chip
from costmodels.machine.topology import Topology

_STEPS = 256
"""Multiplications and additions per element of "vector" work: enough to hide its reads and writes."""


@dataclass(frozen=True)
class Ranges:
    """The sizes of each series: their number (`memory_count` for memory) and their range.

    `matmul_seconds`, `vector_seconds` and `memory_seconds` are the catalogue's predictions for the smallest and the largest
    size. Arrays of the memory series have at least `memory_bytes`, more than caches hold. Collectives range over
    `collective_bytes` per chip, or up to the bytes of `collective_seconds` if that is more.
    """

    count: int = 9
    matmul_seconds: tuple[float, float] = (5e-6, 5e-3)
    vector_seconds: tuple[float, float] = (5e-5, 5e-3)
    memory_seconds: tuple[float, float] = (1e-4, 4e-4)
    memory_bytes: tuple[float, float] = (24 * 2**20, 48 * 2**20)
    memory_count: int = 6
    collective_bytes: tuple[float, float] = (4 * 2**10, 4 * 2**20)
    collective_seconds: float = 5e-4


QUICK = Ranges(3, (5e-6, 5e-5), (5e-5, 5e-4), (1e-6, 4e-6), (2**16, 2**18), 3, (2**10, 2**14), collective_seconds=0.0)
"""Few and small sizes, for a trial; those of memory fit into caches."""


@dataclass(frozen=True)
class Case:
    """A piece of work with its program, and its timing without seconds."""

    timing: Timing
    make: Callable[[Mesh], Looped]


def cases(topology: Topology, ranges: Ranges, dtypes: Sequence[str]) -> list[Case]:
    """All microbenchmarks of a topology; all chips run on-chip work at the same time, as in a step."""
    chip, axes = topology.chip, [axis for axis in topology.axes if axis.size > 1]
    found = [case for dtype in dtypes for case in _matmuls(chip, ranges, dtype)]
    found += [*_vector(chip, ranges), *_memory(chip, ranges), *_single_row_cases(chip, ranges, dtypes[0])]
    together = [tuple(axis.name for axis in axes)] if len(axes) > 1 else []
    for names in [*((axis.name,) for axis in axes), *together]:
        found += [case for kind in COLLECTIVES for case in _collective(topology, ranges, kind, names)]
    return found


def _series(sizes: Iterable[int]) -> Iterator[tuple[int, bool]]:
    """Each size, and whether it is fitted: all except a fixed third."""
    return ((size, i % 3 != 1) for i, size in enumerate(dict.fromkeys(sizes)))


def _geometric_sequence(least: float, most: float, count: int) -> list[float]:
    return [float(each) for each in np.geomspace(least, most, count)]


def _round_to(number: float, step: float) -> int:
    return int(max(round(number / step), 1) * step)


# --- on the chip


def _matmuls(chip: Chip, ranges: Ranges, dtype: str) -> Iterator[Case]:
    rate = chip.matmul_flops_per_second(dtype)
    sides = [(seconds * rate / 2) ** (1 / 3) for seconds in _geometric_sequence(*ranges.matmul_seconds, ranges.count)]
    for n, fitted in _series(_round_to(side, chip.matrix_tile) for side in sides):
        yield Case(Timing("matmul", (n, n, n), 0.0, dtype, fitted=fitted), _product(n, n, dtype))


def _single_row_cases(chip: Chip, ranges: Ranges, dtype: str) -> Iterator[Case]:
    width = jnp.dtype(dtype).itemsize
    sides = [(size / width) ** 0.5 for size in _array_bytes(chip, ranges)]
    for n, fitted in _series(_round_to(side, chip.matrix_tile) for side in sides):
        yield Case(Timing("one row", (1, n, n), 0.0, dtype, fitted=fitted), _product(1, n, dtype))


def _product(rows: int, n: int, dtype: str) -> Callable[[Mesh], Looped]:
    """Repeated `x @ w`, where the columns of `w` add up to about 1, so that `x` keeps its magnitude."""

    def start() -> tuple[Any, Any]:
        weight = (1 + _numbers(n * n)) / np.float32(1.5 * n)
        return _numbers(rows * n).reshape(rows, n).astype(dtype), weight.reshape(n, n).astype(dtype)

    return lambda mesh: make_loop(lambda x, w: x @ w, start, mesh)


def _numbers(n: int) -> Any:
    """`n` unordered numbers between 0 and 1: the low bits of multiples of an odd number (Knuth's 2^32 / golden ratio)."""
    scattered = lax.iota(jnp.uint32, n) * np.uint32(2654435761)
    return (scattered >> 16).astype(jnp.float32) * np.float32(2**-16)


def _vector(chip: Chip, ranges: Ranges) -> Iterator[Case]:
    flops = 2.0 * _STEPS
    counts = [
        seconds * chip.vector_flops_per_second / flops
        for seconds in _geometric_sequence(*ranges.vector_seconds, ranges.count)
    ]
    for n, fitted in _series(_round_to(count, 1) for count in counts):
        yield Case(Timing("vector", (n,), 0.0, flops_per_element=flops, fitted=fitted), _elementwise(n, _STEPS))


def _memory(chip: Chip, ranges: Ranges) -> Iterator[Case]:
    for n, fitted in _series(_round_to(size / 4, 1) for size in _array_bytes(chip, ranges)):
        yield Case(Timing("memory", (n,), 0.0, fitted=fitted), _elementwise(n, 1))


def _array_bytes(chip: Chip, ranges: Ranges) -> list[float]:
    """Bytes of arrays that take the times of `memory_seconds` to read and write, at least `memory_bytes`."""
    limits = zip(ranges.memory_seconds, ranges.memory_bytes, strict=True)
    least, most = (max(seconds * chip.hbm_bytes_per_second, size) for seconds, size in limits)
    return _geometric_sequence(least, most, ranges.memory_count)


def _elementwise(n: int, steps: int) -> Callable[[Mesh], Looped]:
    def body(x: Any) -> Any:
        for _ in range(steps):
            x = x * np.float32(0.999) + np.float32(0.001)
        return x

    return lambda mesh: make_loop(body, lambda: (_numbers(n),), mesh)


# --- between chips


def _collective(topology: Topology, ranges: Ranges, kind: str, names: tuple[str, ...]) -> Iterator[Case]:
    chips = prod(topology.axis(name).size for name in names)
    speed = min(topology.axis(name).bytes_per_second for name in names)
    least, most = ranges.collective_bytes
    sizes = _geometric_sequence(least, max(most, ranges.collective_seconds * speed), ranges.count)
    for size, fitted in _series(_round_to(size, 4 * chips) for size in sizes):
        timing = Timing(kind, (size,), 0.0, axes=names, fitted=fitted)
        yield Case(timing, _exchange(kind, names, chips, size // 4))


def _exchange(kind: str, names: tuple[str, ...], chips: int, n: int) -> Callable[[Mesh], Looped]:
    """A collective in a loop, with minimal work between its result and its next operand."""
    across = [(i, (i + chips // 2) % chips) for i in range(chips)]

    def scatter(x: Any) -> Any:
        piece = lax.psum_scatter(x, names, scatter_dimension=0, tiled=True)
        return lax.dynamic_update_slice_in_dim(x, piece, 0, 0)

    bodies: dict[str, Callable[[Any], Any]] = {
        "all-gather": lambda x: lax.all_gather(x, names, axis=0, tiled=True)[: n // chips],
        "reduce-scatter": scatter,
        "all-reduce": lambda x: lax.psum(x, names),
        "all-to-all": lambda x: lax.all_to_all(x, names, 0, 0, tiled=True),
        "collective-permute": lambda x: lax.ppermute(x, names, across),
    }
    held = n // chips if kind == "all-gather" else n
    return lambda mesh: make_loop(bodies[kind], lambda: (jnp.zeros(held, jnp.float32),), mesh)
