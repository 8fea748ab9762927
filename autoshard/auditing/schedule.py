"""A compiled TPU program as the steps of its schedule, in order, each with its use of the core, HBM and the links.

The text of a compiled module is in schedule order (`is_scheduled=true`). An operation with separate start and wait
becomes two steps: asynchronous copies (`copy-start`, `slice-start`), collectives (`all-gather-start`, a call handed to
another core), and collectives that are spread over a chain of fusions. Everything else runs on the core for the
compiler's estimated time. An instruction without an estimate takes its bytes at HBM's rate; a matmul of grouped rows takes
its FLOPs at the matrix unit's rate, if that is longer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autoshard.auditing.collective_times import Link, price_collective
from autoshard.auditing.hlo_collectives import (
    COLLECTIVE_KINDS,
    Site,
    chain_of,
    op_name_of,
    read_collective,
    starts_chain,
)
from autoshard.auditing.hlo_costs import estimated_flops, matmuls_in, moved_bytes
from autoshard.auditing.hlo_parser import Instruction, Module, Scope, follow, trip_count, users
from costmodels.machine.topology import Topology

_MOST_REACHED = 32
"""The number of instructions searched for the line that uses an asynchronous copy."""
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
_FRAMES = re.compile(
    r"^(?:p?jit\(.*\)|shard_map|while|body|cond|closed_call|branch_\d+_fun|checkpoint|rematted_computation)$"
)
"""Parts of an operation's name that JAX adds to the user's scopes."""


@dataclass(frozen=True)
class Transfer:
    """A collective as it is sent in one run: kind, axes, bytes, and its time on the links."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Label:
    """An instruction as shown to a reader: its name, its opcode, the user's source line and scopes.

    `transfer` is what it sends, if it is a collective.
    """

    name: str
    opcode: str
    source: str
    scope: str
    matmul: bool = False
    transfer: Transfer | None = None


@dataclass(frozen=True)
class Work:
    """An instruction on the core; of its time, HBM is busy for `hbm_seconds`."""

    label: Label
    seconds: float
    hbm_seconds: float


@dataclass(frozen=True)
class Copy:
    """The start of an asynchronous copy: it keeps HBM busy for `hbm_seconds`, beside the core."""

    label: Label
    hbm_seconds: float


@dataclass(frozen=True)
class Send:
    """The start of a collective; the core waits for it if it is not asynchronous."""

    label: Label
    seconds: float
    links: frozenset[Link]
    asynchronous: bool


@dataclass(frozen=True)
class Wait:
    """A wait of the core until the copy or collective of this name is done."""

    started: str


@dataclass(frozen=True)
class Loop:
    """Steps that are repeated."""

    rounds: int
    body: tuple[Step, ...]


@dataclass(frozen=True)
class Branches:
    """Steps of which one alternative runs: the slowest, as the choice is not known."""

    bodies: tuple[tuple[Step, ...], ...]


Step = Work | Copy | Send | Wait | Loop | Branches


def read_schedule(module: Module, topology: Topology) -> tuple[Step, ...]:
    """The steps of one run of a compiled program on a chip of a topology.

    **Raises:** `ValueError` for a chip whose clock is not known.
    """
    if not topology.chip.clock_hertz:
        raise ValueError(
            f"The clock of {topology.chip.name} is not known, so its cycles cannot be converted to seconds."
        )
    return tuple(_Reader(module, topology).steps(Scope(module.computations[module.entry])))


class _Reader:
    def __init__(self, module: Module, topology: Topology) -> None:
        self.module, self.topology = module, topology
        self.mesh = tuple(topology.axis_sizes.items())
        self.chains: dict[tuple[str, ...], str] = {}

    def steps(self, scope: Scope) -> Iterator[Step]:
        for inst in scope.computation.instructions.values():
            yield from self._steps_of(inst, scope)

    def _steps_of(self, inst: Instruction, scope: Scope) -> Iterator[Step]:
        opcode = inst.opcode
        if opcode == "while":
            rounds, _ = trip_count(inst, scope, self.module)
            bodies = (inst.attribute("condition"), inst.attribute("body"))
            yield Loop(rounds, tuple(step for name in bodies for step in self._inner_steps(name, inst, scope)))
        elif opcode == "conditional":
            yield Branches(tuple(tuple(self._inner_steps(name, inst, scope)) for name in self.module.runs(inst)))
        elif opcode == "call":
            for name in inst.called():
                yield from self._inner_steps(name, inst, scope)
        elif opcode.endswith("-done"):
            yield Wait(inst.operands[0])
        elif opcode in _COPIES or (opcode == "async-start" and not self._collectives(inst, scope)):
            yield Copy(self._label_copy(inst, scope), self._hbm_seconds(inst, scope))
        elif sent := self._collectives(inst, scope):
            yield from self._sends(inst, scope, sent)
        else:
            yield from self._work(inst, scope)

    def _inner_steps(self, name: str, inst: Instruction, scope: Scope) -> Iterator[Step]:
        if name in self.module.computations:
            yield from self.steps(Scope(self.module.computations[name], inst, scope))

    def _collectives(self, inst: Instruction, scope: Scope) -> list[Site]:
        """The collectives that an instruction is or holds."""
        if inst.opcode.removesuffix("-start") in COLLECTIVE_KINDS:
            return [Site(inst, scope, 1, True)]
        inner = [name for name in inst.called() if name in self.module.computations]
        scopes = [Scope(self.module.computations[name], inst, scope) for name in inner]
        return [
            site
            for each in scopes
            for one in each.computation.instructions.values()
            for site in self._collectives(one, each)
        ]

    def _sends(self, inst: Instruction, scope: Scope, sites: list[Site]) -> Iterator[Step]:
        if inst.cycles is not None:  # a fusion with other work; collectives' own bytes do not count
            yield from self._work(inst, scope)
        for site in sites:
            chain = chain_of(site)
            if chain is None:
                yield self._send(inst, scope, site, inst.opcode.endswith("-start"))
            elif starts_chain(site):
                self.chains[chain] = inst.name
                yield self._send(inst, scope, site, True)
            elif chain in self.chains and _ends_chain(site):
                yield Wait(self.chains[chain])
            elif chain not in self.chains:  # no instruction starts it
                self.chains[chain] = inst.name
                yield self._send(inst, scope, site, False)

    def _send(self, inst: Instruction, scope: Scope, site: Site, asynchronous: bool) -> Send:
        found = price_collective(read_collective(site, self.module, self.mesh), self.topology)
        label = self._label(inst, scope)
        name = op_name_of(site.instruction) or found.op_name
        source = label.source or self.module.source(site.instruction)
        transfer = Transfer(found.kind, found.axes, found.bytes, found.seconds)
        shown = Label(inst.name, found.kind, source, label.scope or _scope(name), transfer=transfer)
        return Send(shown, found.seconds, found.links, asynchronous)

    def _work(self, inst: Instruction, scope: Scope) -> Iterator[Work]:
        busy = self._hbm_seconds(inst, scope)
        cycles, clock = inst.cycles, self.topology.chip.clock_hertz
        seconds = cycles / clock if cycles is not None and clock else max(busy, self._matmul_seconds(inst, scope))
        if seconds:
            yield Work(self._label(inst, scope), seconds, min(busy, seconds))

    def _matmul_seconds(self, inst: Instruction, scope: Scope) -> float:
        """Seconds of the matmuls of an instruction without cycles: those of grouped rows, and kernels by their estimates."""
        flops = sum(each for _, each in matmuls_in(inst, scope, self.module)) or estimated_flops(inst)
        return flops / self.topology.chip.reached_matmul_flops_per_second("bfloat16")

    def _hbm_seconds(self, inst: Instruction, scope: Scope) -> float:
        moved = moved_bytes(inst, scope, self.module)
        if inst.opcode == "async-start":
            inner = [Scope(self.module.computations[name], inst, scope) for name in inst.called()]
            moved = sum(moved_bytes(e, at, self.module) for at in inner for e in at.computation.instructions.values())
        return moved / self.topology.chip.reached_hbm_bytes_per_second

    def _label(self, inst: Instruction, scope: Scope) -> Label:
        source, name = self.module.source(inst), op_name_of(inst)
        inner = [one for of in inst.called() if of in self.module.computations for one in self._last_first(of)]
        source = source or next((found for one in inner if (found := self.module.source(one))), "")
        name = name or next((found for one in inner if (found := op_name_of(one))), "")
        matmul = any(True for _ in matmuls_in(inst, scope, self.module))
        return Label(inst.name, inst.opcode, source, _scope(name), matmul)

    def _label_copy(self, inst: Instruction, scope: Scope) -> Label:
        """An asynchronous copy by the array that it copies, and by the line of the first instruction that uses it.

        A copy without a user is of an argument, for the next run of the program; its line is then that of the
        argument's user.
        """
        label = self._label(inst, scope)
        array, _, _ = follow(inst.operands[0], scope, self.module)
        name = op_name_of(array) if array is not None and array.opcode == "parameter" else ""
        reached = [inst.name, inst.operands[0]]
        for name_of in reached:  # grows during the iteration
            for user in users(scope.computation).get(name_of, ()):
                if label.source or len(reached) > _MOST_REACHED:
                    break
                label = replace(label, source=self._label(user, scope).source)
                reached.append(user.name)
        return replace(label, scope=label.scope or name)

    def _last_first(self, name: str) -> list[Instruction]:
        return list(reversed(self.module.computations[name].instructions.values()))


def _ends_chain(site: Site) -> bool:
    """Whether the core waits here for the collective of a chain of fusions."""
    others = site.scope.computation.instructions.values()
    return any('custom_call_target="AsyncCollectiveDone"' in each.attributes for each in others)


def _scope(op_name: str) -> str:
    """The user's scopes and the operation of an `op_name`, without the frames that JAX adds."""
    parts = re.split(r"/(?![^\[(]*[\])])", op_name)
    return "/".join(part for part in parts if part and not _FRAMES.match(part))
