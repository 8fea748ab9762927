"""The replay of a compiled program's schedule: the time of one step, with copies and collectives beside the core.

The core runs its instructions in order. Asynchronous copies queue for HBM and take the bandwidth that the running
instruction leaves; while the core waits, they have all of it. Collectives take the links of their axes, and those that
share a link are serial. A `-done` makes the core wait. Loops are replayed iteration by iteration until an iteration
leaves the queues unchanged; the others take as long. No step is shorter than the floor: the bytes that it must read
or write once, over HBM's nominal rate.

So removing an instruction never lengthens a step, and more bandwidth never costs more.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from autoshard.auditing.hlo_collectives import estimated_cycles
from autoshard.auditing.hlo_interface import floor_bytes
from autoshard.auditing.hlo_parser import parse
from autoshard.auditing.schedule import Branches, Copy, Label, Link, Loop, Send, Step, Wait, Work, read_schedule
from costmodels.machine.topology import Topology

MOST_COSTLY = 10
"""The number of instructions that a replay lists."""


@dataclass(frozen=True)
class Costly:
    """An instruction of the program and the core's time for it in one step, running it or waiting for it.

    `matmul` says whether it is or holds a matrix multiplication.
    """

    name: str
    opcode: str
    source: str
    scope: str
    seconds: float
    runs: int
    matmul: bool


@dataclass(frozen=True)
class Transferred:
    """A collective: its seconds on the links in one step, and those of them that the core waits for; bytes of one run."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True)
class Replay:
    """The time of one step by its schedule, in seconds.

    - `seconds`: the whole step, at least `floor_seconds`.
    - `floor_seconds`: the bytes that the step must read or write once, over HBM's nominal rate.
    - `core_seconds`: instructions on the core.
    - `exposed_seconds`: communication that the core waits for.
    - `copy_seconds`: asynchronous copies that the core waits for.
    - `costly`: all instructions by their time, the costliest first.
    - `transfers`: the collectives, by instruction.
    """

    seconds: float
    floor_seconds: float
    core_seconds: float
    exposed_seconds: float
    copy_seconds: float
    costly: tuple[Costly, ...]
    transfers: tuple[Transferred, ...] = ()

    @property
    def costliest(self) -> tuple[Costly, ...]:
        """The ten costliest instructions."""
        return self.costly[:MOST_COSTLY]


def replay(text: str, topology: Topology) -> Replay | None:
    """Replays a compiled TPU program; None where the text carries no estimated cycles.

    **Arguments:**

    - `text`: `compiled.as_text()`.
    - `topology`: what it is compiled for; device numbers in the text count its chips row-major.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    if estimated_cycles(text) is None or not topology.chip.clock_hertz:
        return None
    module = parse(text)
    floor = floor_bytes(text, module) / topology.chip.hbm_bytes_per_second
    return replay_steps(read_schedule(module, topology), floor)


def replay_steps(steps: Sequence[Step], floor_seconds: float = 0.0) -> Replay:
    """Replays the steps of a schedule."""
    clock = _Clock()
    clock.run(steps)
    costly = [
        Costly(label.name, label.opcode, label.source, label.scope, seconds, clock.spent.runs[label], label.matmul)
        for label, seconds in clock.spent.seconds.items()
        if seconds > 0
    ]
    return Replay(
        seconds=max(clock.now, floor_seconds),
        floor_seconds=floor_seconds,
        core_seconds=clock.spent.core,
        exposed_seconds=clock.spent.exposed,
        copy_seconds=clock.spent.copies,
        costly=tuple(sorted(costly, key=lambda each: -each.seconds)),
        transfers=tuple(
            Transferred(sent.kind, sent.axes, sent.bytes, sent.seconds * clock.spent.runs[label], seconds)
            for label, seconds in clock.spent.seconds.items()
            if (sent := label.transfer) is not None
        ),
    )


@dataclass
class _Spent:
    """The core's time, by its use."""

    core: float = 0.0
    exposed: float = 0.0
    copies: float = 0.0
    seconds: Counter[Label] = field(default_factory=Counter)
    runs: Counter[Label] = field(default_factory=Counter)

    def add(self, other: _Spent, times: int) -> None:
        self.core += times * other.core
        self.exposed += times * other.exposed
        self.copies += times * other.copies
        for label, seconds in other.seconds.items():
            self.seconds[label] += times * seconds  # pyright: ignore[reportArgumentType]
        for label, runs in other.runs.items():
            self.runs[label] += times * runs


class _Clock:
    """The core's time, the queue of copies for HBM, and the time at which each link is free again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.copies: deque[tuple[str, float]] = deque()
        self.free: dict[Link, float] = {}
        self.arrives: dict[str, tuple[float, Label]] = {}
        self.started: dict[str, Label] = {}
        self.spent = _Spent()

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            match step:
                case Work():
                    self._work(step)
                case Copy():
                    self.copies.append((step.label.name, step.hbm_seconds))
                    self.started[step.label.name] = step.label
                    self._count(step.label)
                case Send():
                    self._send(step)
                case Wait():
                    self._wait(step.started)
                case Loop():
                    self._loop(step)
                case Branches():
                    self._branches(step)

    def _work(self, step: Work) -> None:
        self._pass(step.seconds, step.seconds - step.hbm_seconds)
        self.spent.core += step.seconds
        self._count(step.label, step.seconds)

    def _send(self, step: Send) -> None:
        begins = max([self.now, *(self.free.get(link, 0.0) for link in step.links)])
        ends = begins + step.seconds
        self.free |= dict.fromkeys(step.links, ends)
        self.arrives[step.label.name] = (ends, step.label)
        self._count(step.label)
        if not step.asynchronous:
            self._wait(step.label.name)

    def _wait(self, name: str) -> None:
        if name in self.arrives:
            ends, label = self.arrives.pop(name)
            exposed = max(ends - self.now, 0.0)
            self._pass(exposed, exposed)
            self.spent.exposed += exposed
            self._count(label, exposed, 0)
        elif name in self.started:
            seconds = self._copy_end(name)
            self._pass(seconds, seconds)
            self.spent.copies += seconds
            self._count(self.started.pop(name), seconds, 0)

    def _copy_end(self, name: str) -> float:
        total = 0.0
        for waiting, seconds in self.copies:
            total += seconds
            if waiting == name:
                return total
        return 0.0

    def _pass(self, seconds: float, for_copies: float) -> None:
        """Advances time, of which HBM is free for copies for a part."""
        self.now += seconds
        while self.copies and for_copies >= self.copies[0][1]:
            for_copies -= self.copies.popleft()[1]
        if self.copies and for_copies > 0:
            name, left = self.copies[0]
            self.copies[0] = (name, left - for_copies)

    def _count(self, label: Label, seconds: float = 0.0, runs: int = 1) -> None:
        self.spent.seconds[label] += seconds  # pyright: ignore[reportArgumentType]
        self.spent.runs[label] += runs

    def _queues(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The remaining seconds of everything in flight."""
        links = sorted(left for ends in self.free.values() if (left := ends - self.now) > 0)
        return tuple(seconds for _, seconds in self.copies), tuple(links)

    def _loop(self, step: Loop) -> None:
        outer, done = self.spent, 0
        while done < step.rounds:
            before, began = self._queues(), self.now
            self.spent = _Spent()
            self.run(step.body)
            done += 1
            rest = step.rounds - done if self._queues() == before else 0
            outer.add(self.spent, 1 + rest)
            self._skip(rest * (self.now - began))
            done += rest
        self.spent = outer

    def _skip(self, seconds: float) -> None:
        """Advances by iterations that leave the queues unchanged."""
        self.now += seconds
        self.free = {link: ends + seconds for link, ends in self.free.items()}
        self.arrives = {name: (ends + seconds, label) for name, (ends, label) in self.arrives.items()}

    def _branches(self, step: Branches) -> None:
        """Continues from the slowest alternative, with the most that any of them leaves in flight."""
        ways = [copy.deepcopy(self) for _ in step.bodies]
        for way, body in zip(ways, step.bodies, strict=True):
            way.run(body)
        if not ways:
            return
        slowest = max(ways, key=lambda way: way.now)
        for way in ways:  # queued copies go on while a shorter alternative would wait for the slowest
            way._pass(slowest.now - way.now, slowest.now - way.now)
        self.now, self.spent = slowest.now, slowest.spent
        self.copies = max((way.copies for way in ways), key=lambda copies: sum(seconds for _, seconds in copies))
        self.free = {link: max(way.free.get(link, 0.0) for way in ways) for way in ways for link in way.free}
