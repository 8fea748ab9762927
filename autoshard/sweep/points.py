"""The points of a sweep: one search each, and the key that identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.annotating.attached import topology_of
from autoshard.errors import TopologyError
from autoshard.pipeline import annotated_function
from autoshard.planning.files.plan_cache import key_of
from autoshard.planning.options import Options
from autoshard.sweep.job import Job, JobError, Knob, Phase, number
from autoshard.sweep.slice_shapes import shapes
from autoshard.target_file import find_target
from autoshard.workload import Workload
from costmodels.machine.chips import UnknownChipError, chip
from costmodels.machine.topology import Topology

Pairs = tuple[tuple[str, Knob], ...]
"""A hashable mapping."""


@dataclass(frozen=True)
class Run:
    """One function at one point: `FILE.py:NAME`, its keyword arguments, the tokens of a step, and its number of runs."""

    phase: str
    kind: str
    target: str
    arguments: Pairs
    tokens: float
    repeats: float = 1.0


@dataclass(frozen=True)
class Point:
    """One search: runs with a shared layout (most often one run), on a topology.

    `shared` is the argument whose layout several runs share. `memory_bytes` is the memory limit of a plan per chip, 0 for
    the default.
    """

    runs: tuple[Run, ...]
    topology: Topology
    knobs: Pairs = ()
    shared: str = ""
    memory_bytes: float = 0.0
    time_limit: float | None = None
    padding: bool = True

    @property
    def phase(self) -> str:
        """The name of the phase, or the names of all."""
        return " + ".join(run.phase for run in self.runs)

    @property
    def name(self) -> str:
        """The point as text."""
        knobs = ", ".join(f"{key} {value}" for key, value in self.knobs)
        return f"{self.phase} on {self.topology.name}{f', {knobs}' if knobs else ''}"

    @property
    def reserve_bytes(self) -> float | None:
        """As for `autoshard.search`."""
        if not self.memory_bytes:
            return None
        return max(self.topology.chip.usable_hbm_bytes - self.memory_bytes, 0.0)


@dataclass(frozen=True)
class Unmade:
    """A point that cannot be constructed, with the reason."""

    name: str
    phase: str
    topology: str
    knobs: Pairs
    why: str


def points(job: Job) -> Iterator[Point | Unmade]:
    """Every point of a job, in order: phases, topologies, variables."""
    where = topologies(job)
    groups = [(phase.name,) for phase in job.phases] + ([job.together.phases] if job.together else [])
    for names in groups:
        seen: set[Any] = set()
        for topology, values in product(where, product(*job.vary.values())):
            knobs = dict(zip(job.vary, values, strict=True))
            found = _point(job, names, topology, knobs)
            same = (found.runs, found.topology.name) if isinstance(found, Point) else found.name
            if same not in seen:  # a phase need not depend on all variables
                seen.add(same)
                yield found


def _point(job: Job, names: tuple[str, ...], topology: Topology, knobs: Mapping[str, Knob]) -> Point | Unmade:
    joint = job.together if len(names) > 1 else None
    phases = [job.phase(name) for name in names]
    if joint is None:
        knobs = {key: value for key, value in knobs.items() if key in variables_of(phases[0], job)}
    pairs = tuple(knobs.items())
    try:
        runs = tuple(
            _make_run(job, phase, knobs, number(joint.repeats[phase.name], knobs) if joint else 1.0) for phase in phases
        )
    except ValueError as error:
        words = ", ".join(f"{key} {value}" for key, value in pairs)
        phase = " + ".join(names)
        return Unmade(f"{phase} on {topology.name}, {words}", phase, topology.name, pairs, str(error))
    memory = (job.constraints.memory_gib or 0.0) * 2**30
    return Point(runs, topology, pairs, joint.shared if joint else "", memory, job.time_limit, job.padding)


def target_path(job: Job, file: str) -> Path:
    """The file of a target, relative to the job's; if there is none, the example of the package with that path."""
    path = job.folder / file
    return path if path.is_file() else find_target(Path(file)) if Path(file).parts[:1] == ("examples",) else path


def _make_run(job: Job, phase: Phase, knobs: Mapping[str, Knob], repeats: float) -> Run:
    file, _, name = phase.target.rpartition(":")
    target = f"{target_path(job, file).resolve()}:{name}"
    arguments = tuple(phase.values(knobs).items())
    return Run(phase.name, phase.kind, target, arguments, number(phase.tokens, knobs), repeats)


def variables_of(phase: Phase, job: Job) -> set[str]:
    """The variables that a phase depends on."""
    texts = [given["of"] for given in phase.arguments.values() if isinstance(given, Mapping)]
    return variables_in([*texts, phase.tokens], job)


def variables_in(expressions: Iterable[str], job: Job) -> set[str]:
    """The variables that expressions use."""
    words = set[str]().union(*map(_words, expressions))
    return {key for key in job.vary if key in words}


def _words(text: str) -> set[str]:
    return {text, *"".join(sign if sign.isalnum() or sign == "_" else " " for sign in text).split()}


def find_topology(job: Job, name: str) -> Topology:
    """A topology by its name in a job: `CHIP:AxBxC`, or a TOML file relative to the job's folder.

    **Raises:** `TopologyError`, `OSError`.
    """
    return topology_of(str(job.folder / name) if name.endswith(".toml") else name)


def topologies(job: Job) -> tuple[Topology, ...]:
    """The topologies of a job: the named ones, and each shape of its numbers of chips.

    **Raises:** `JobError` for unknown chips, and for a number of chips that no slice has.
    """
    names: list[str] = list(job.topologies)
    for kind, count in product(job.kinds, job.counts):
        try:
            found = shapes(chip(kind), count, job.any_shape)
        except UnknownChipError as error:
            raise JobError(f"chips.kinds: {error}") from error
        if not found:
            raise JobError(f"chips.counts: {no_slice(kind, count)}.")
        names += [f"{kind}:{'x'.join(map(str, sides))}" for sides in found]
    try:
        return tuple(find_topology(job, name) for name in dict.fromkeys(names))
    except TopologyError as error:
        raise JobError(f"chips.topologies: {error}") from error


def no_slice(kind: str, count: int) -> str:
    """A clause for a number of chips that come in no slice, or in none that a vendor lists."""
    if not shapes(chip(kind), count):
        return f"there is no slice of {count} {kind} chips"
    return f"no vendor lists a slice of {count} {kind} chips; any_shape = true plans for one"


# --- The parts of a point


def workload_of(run: Run) -> Workload:
    """The workload of a run.

    **Raises:** `AutoshardError` if the user's file or function fails.
    """
    from autoshard.target_file import Misuse, workload

    try:
        return workload(run.target, dict(run.arguments))
    except Misuse as error:
        raise JobError(str(error)) from error


def options_of(point: Point) -> Options:
    """The options of a point's search."""
    return Options(reserve_bytes=point.reserve_bytes, time_limit=point.time_limit, padding=point.padding)


def trace_run(run: Run) -> AnnotatedFunction:
    """The run as a program."""
    return _trace(replace(run, phase="", tokens=0.0, repeats=1.0))


@lru_cache(maxsize=256)
def _trace(run: Run) -> AnnotatedFunction:
    work = workload_of(run)
    return annotated_function(work.fn, work.args, Options(work.donate_argnums, work.name, dims=work.dims))


def key(point: Point) -> str:
    """A hash of everything that the result of a point depends on: programs, topology with every constant, options, versions.

    Equal searches of different jobs have the same key.
    """
    each = []
    for run in point.runs:
        target = trace_run(run)
        each.append((key_of(target, point.topology, options_of(point)), run.repeats if len(point.runs) > 1 else 1.0))
    phases = [run.phase for run in point.runs] if len(point.runs) > 1 else []
    everything = (_FORMAT, each, phases, point.shared)
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


_FORMAT = 2
"""The version of the stored format of a result."""
