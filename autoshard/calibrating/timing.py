"""Timing compiled programs on a machine that others use too.

A piece of work runs in a loop inside one program, so that what is timed is the work and not the start of a program; the
number of rounds is an argument, and the same program with no round is taken off. Everything is timed in turn, several times
over, and the shortest time of each counts: whatever else the machine does makes a time longer, never shorter.
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
"""By how much the number of rounds grows at once, at most."""


@dataclass(frozen=True)
class Patience:
    """How long to time.

    A program runs its loop until that takes `seconds`, and `times_empty` as long as a program with no round; that is
    repeated `repeats` times, in turn with all others. `most_rounds` is a hard stop. On a machine so busy that `total_seconds`
    pass before that, it is repeated less often, but at least `least_repeats` times.
    """

    seconds: float = 0.01
    times_empty: float = 1.0
    most_rounds: int = 4096
    repeats: int = 7
    least_repeats: int = 2
    total_seconds: float = 40.0


HASTE = Patience(seconds=1e-3, times_empty=0.5, most_rounds=64, repeats=2, total_seconds=5.0)
"""Enough to see that everything runs, not to trust what comes out."""


@dataclass(frozen=True)
class Looped:
    """A program that runs a piece of work any number of times on every device of a mesh."""

    run: Callable[..., Any]

    def seconds(self, rounds: int) -> float:
        """Wall time of one call, to the end of all its work."""
        started = time.perf_counter()
        jax.block_until_ready(self.run(np.int32(rounds)))
        return time.perf_counter() - started


def looped(body: Callable[..., Any], start: Callable[[], tuple[Any, ...]], mesh: Mesh) -> Looped:
    """`body(carry, *constants) -> carry` in a loop, on every device of a mesh at once.

    **Arguments:**

    - `start`: makes the first carry and the constants of one device, inside the program, so that nothing is held in
      between.
    """

    def rounds(count: Any) -> Any:
        carry, *constants = start()
        return lax.fori_loop(0, count, lambda _, state: body(state, *constants), carry)

    spec = PartitionSpec(mesh.axis_names)
    return Looped(jax.jit(jax.shard_map(rounds, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False)))


def shortest(
    programs: Sequence[Looped], patience: Patience, say: Callable[[str], None] = lambda _: None
) -> list[float]:
    """Seconds of one round of each program: the shortest of several, timed in turn."""
    started, rounds = time.monotonic(), []
    for i, program in enumerate(programs):
        say(f"compiling and warming up, {i + 1} of {len(programs)}")
        rounds.append(_rounds(program, patience))
    empty, full = np.full(len(programs), np.inf), np.full(len(programs), np.inf)
    for repeat in range(patience.repeats):
        if repeat >= patience.least_repeats and time.monotonic() - started > patience.total_seconds:
            break
        say(f"timing, {repeat + 1} of {patience.repeats} times")
        for i, program in enumerate(programs):
            empty[i] = min(empty[i], program.seconds(0))
            full[i] = min(full[i], program.seconds(rounds[i]))
    # A round cannot take no time; where noise says so, the whole call is an upper bound.
    return [
        float((whole - start) / count if whole > start else whole / count)
        for whole, start, count in zip(full, empty, rounds, strict=True)
    ]


def _rounds(program: Looped, patience: Patience) -> int:
    """How many rounds take the time that is worth measuring; compiles and warms up."""
    program.seconds(0)
    empty, count = program.seconds(0), 1
    enough = max(patience.seconds, patience.times_empty * empty)
    while count < patience.most_rounds and (took := program.seconds(count) - empty) < enough:
        grow = min(max(enough / max(took, enough / _LEAP), 2.0), _LEAP)
        count = min(int(np.ceil(count * grow)), patience.most_rounds)
    return count
