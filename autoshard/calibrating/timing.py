"""Timing of compiled programs on a shared machine.

A piece of work runs in a loop inside one program, so that the start of a program does not count. The number of iterations is
an argument, and the time of the same program with no iteration is subtracted. All programs are timed in turn, several times,
and the shortest time of each counts: other load makes a time longer, never shorter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

_LEAP = 16
"""The maximum factor by which the number of iterations grows at once."""


@dataclass(frozen=True)
class Patience:
    """The duration of timings.

    A program runs enough iterations to take `seconds`, and `times_empty` as long as with no iteration, but at most
    `most_rounds`. This is repeated `repeats` times, interleaved with all other programs. After `total_seconds` the
    repetitions end early, but there are at least `least_repeats`.
    """

    seconds: float = 0.01
    times_empty: float = 1.0
    most_rounds: int = 4096
    repeats: int = 7
    least_repeats: int = 2
    total_seconds: float = 40.0


HASTE = Patience(seconds=1e-3, times_empty=0.5, most_rounds=64, repeats=2, total_seconds=5.0)
"""Enough to see that everything runs; too little for reliable results."""


@dataclass(frozen=True)
class Looped:
    """A program that runs a piece of work a given number of times on every device of a mesh."""

    run: Callable[..., Any]

    def seconds(self, rounds: int) -> float:
        """Wall time of one call, to the end of its work."""
        started = time.perf_counter()
        jax.block_until_ready(self.run(np.int32(rounds)))
        return time.perf_counter() - started


def make_loop(body: Callable[..., Any], start: Callable[[], tuple[Any, ...]], mesh: Mesh) -> Looped:
    """`body(carry, *constants) -> carry` in a loop, on every device of a mesh at once.

    **Arguments:**

    - `start`: returns the initial carry and the constants of one device, inside the program, so that no memory is held
      between calls.
    """

    def run_iterations(count: Any) -> Any:
        carry, *constants = start()
        return lax.fori_loop(0, count, lambda _, state: body(state, *constants), carry)

    spec = PartitionSpec(mesh.axis_names)
    return Looped(
        jax.jit(jax.shard_map(run_iterations, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False))
    )


def shortest(
    programs: Sequence[Looped], patience: Patience, say: Callable[[str], None] = lambda _: None
) -> list[float]:
    """Seconds of one iteration of each program: the shortest of several interleaved timings."""
    started, rounds = time.monotonic(), []
    for i, program in enumerate(programs):
        say(f"compiling and warming up, {i + 1} of {len(programs)}")
        rounds.append(_choose_iterations(program, patience))
    empty, full = np.full(len(programs), np.inf), np.full(len(programs), np.inf)
    for repeat in range(patience.repeats):
        if repeat >= patience.least_repeats and time.monotonic() - started > patience.total_seconds:
            break
        say(f"timing, {repeat + 1} of {patience.repeats} times")
        for i, program in enumerate(programs):
            empty[i] = min(empty[i], program.seconds(0))
            full[i] = min(full[i], program.seconds(rounds[i]))
    # An iteration takes more than 0 seconds; if noise says otherwise, the whole call is an upper bound.
    return [
        float((whole - start) / count if whole > start else whole / count)
        for whole, start, count in zip(full, empty, rounds, strict=True)
    ]


def _choose_iterations(program: Looped, patience: Patience) -> int:
    """The number of iterations for a long enough timing; compiles and warms up."""
    program.seconds(0)
    empty, count = program.seconds(0), 1
    enough = max(patience.seconds, patience.times_empty * empty)
    while count < patience.most_rounds and (took := program.seconds(count) - empty) < enough:
        grow = min(max(enough / max(took, enough / _LEAP), 2.0), _LEAP)
        count = min(int(np.ceil(count * grow)), patience.most_rounds)
    return count
