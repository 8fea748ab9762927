"""Checks of a job beyond its schema, each error with its place in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autoshard.errors import TopologyError
from autoshard.sweep.job import Job, Knob, Location, Phase, number
from autoshard.sweep.points import find_topology, no_slice, target_path, variables_in, variables_of
from autoshard.sweep.slice_shapes import shapes
from autoshard.target_file import Misuse, factory
from costmodels.machine.chips import UnknownChipError, chip

Fault = tuple[Location, str]


def faults_of(job: Job) -> Iterator[Fault]:
    """The errors of a job, each with its keys."""
    sample = {key: values[0] for key, values in job.vary.items()}
    chips = list(_chip_faults(job))
    yield from chips
    for phase in job.phases:
        yield from _phase_faults(job, phase, sample)
    yield from _together_faults(job, sample)
    yield from _unread(job)
    yield from _limit_faults(job)
    if not chips:
        yield from _price_faults(job)


# --- Chips and prices


def _chip_faults(job: Job) -> Iterator[Fault]:
    if not job.topologies and not (job.kinds and job.counts):
        yield ("chips",), "must have topologies, or kinds and counts"
    for i, kind in enumerate(job.kinds):
        try:
            found = chip(kind)
        except UnknownChipError as error:
            yield ("chips", "kinds", i), _clause(error)
            continue
        for j, count in enumerate(job.counts):
            if not shapes(found, count, job.any_shape):
                yield ("chips", "counts", j), no_slice(kind, count)
    for i, name in enumerate(job.topologies):
        try:
            find_topology(job, name)
        except (TopologyError, OSError) as error:
            yield ("chips", "topologies", i), _clause(error)


def _price_faults(job: Job) -> Iterator[Fault]:
    """Errors in the prices: either all chips of the job have a price or none, since money and chip-seconds do not compare."""
    if job.per_chip_hour is None:
        return
    chips = list(dict.fromkeys([*job.kinds, *(find_topology(job, each).chip.name for each in job.topologies)]))
    for name in job.per_chip_hour:
        if name not in chips:
            yield ("price", "per_chip_hour", name), f"the job has no chip {name}; it has {', '.join(chips)}"
    if without := [name for name in chips if name not in job.per_chip_hour]:
        yield (
            ("price", "per_chip_hour"),
            f"lacks a price of {', '.join(without)}; give prices of all chips of the job, or of none",
        )


# --- Phases


def _phase_faults(job: Job, phase: Phase, sample: Mapping[str, Knob]) -> Iterator[Fault]:
    at: Location = ("phases", phase.name)
    if not phase.tokens:
        yield at, "a phase that is neither prefill nor decode needs tokens, the number per step, such as 'batch'"
    elif fault := _unknown(phase.tokens, sample):
        yield (*at, "tokens"), f"the tokens of a step are {fault}"
    for key, given in phase.arguments.items():
        if isinstance(given, Mapping) and (fault := _unknown(given["of"], sample)):
            yield (*at, "arguments", key), fault
    yield from _target_faults(job, phase)


def _target_faults(job: Job, phase: Phase) -> Iterator[Fault]:
    at: Location = ("phases", phase.name, "target")
    file, _, name = phase.target.rpartition(":")
    if not name.isidentifier() or not file.endswith(".py"):
        yield at, f"target must be FILE.py:NAME, got {phase.target!r}"
        return
    if not (path := target_path(job, file)).is_file():
        yield at, f"there is no file {path}"
        return
    target = f"{path.resolve()}:{name}"
    try:
        factory(target)
    except Misuse as error:
        yield at, _clause(error)
        return
    try:
        factory(target, phase.arguments)
    except Misuse as error:
        yield ("phases", phase.name, "arguments"), _clause(error)


def _together_faults(job: Job, sample: Mapping[str, Knob]) -> Iterator[Fault]:
    if job.together is None:
        return
    phases, names = job.together.phases, [phase.name for phase in job.phases]
    if len(set(phases)) < 2:
        yield ("together", "phases"), f"must name two or more phases, got {', '.join(phases)}"
    for name in phases:
        if name not in names:
            yield ("together", "phases"), f"unknown phase {name!r}; the phases are {', '.join(names)}"
        elif fault := _unknown(job.together.repeats[name], sample):
            yield ("together",), f"the number of runs of {name} is {fault}"
    for name in job.together.repeats:
        if name not in phases:
            yield ("together", "repeats", name), f"must be one of the phases {', '.join(phases)}"


# --- Settings without effect


def _unread(job: Job) -> Iterator[Fault]:
    used = variables_in(job.together.repeats.values() if job.together else (), job)
    used = used.union(*(variables_of(phase, job) for phase in job.phases))
    for key in job.vary:
        if key not in used:
            yield (
                ("vary", key),
                f'nothing depends on it; use it in an argument of a phase with {{ of = "{key}" }}',
            )


def _limit_faults(job: Job) -> Iterator[Fault]:
    for key in job.per:
        if key not in job.vary:
            yield ("frontier", "per"), f"{key} is not a variable; the variables are {', '.join(job.vary) or 'none'}"
    kinds = {phase.kind for phase in job.phases}
    for key, kind in (("seconds_per_token", "decode"), ("seconds_to_first_token", "prefill")):
        if getattr(job.constraints, key) is not None and kind not in kinds:
            yield (
                ("constraints", key),
                f'applies to {kind} phases only, and there are none; mark one with kind = "{kind}"',
            )


def _unknown(expression: str, sample: Mapping[str, Knob]) -> str:
    if expression in sample:
        return ""
    try:
        number(expression, sample)
    except ValueError as error:
        return f"{expression!r}: {error}"
    return ""


def _clause(error: Exception) -> str:
    """A sentence as a clause of another."""
    words = str(error).rstrip(".")
    return words[:1].lower() + words[1:] if words[1:2].islower() or words.startswith("There is") else words
