"""What fits the schema of a job file and makes no sense: every fault with its place in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autoshard.errors import TopologyError
from autoshard.sweep.job import Job, Knob, Location, Phase, number
from autoshard.sweep.points import named_in, read_by, topology_named
from autoshard.sweep.slice_shapes import shapes
from autoshard.target_file import Misuse, factory
from costmodels.machine.chips import UnknownChipError, chip

Fault = tuple[Location, str]


def faults_of(job: Job) -> Iterator[Fault]:
    """The faults of a job, each with the keys that lead to it."""
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
        yield ("chips",), "names no topologies, and no kinds with counts; either would do"
    for i, kind in enumerate(job.kinds):
        try:
            found = chip(kind)
        except UnknownChipError as error:
            yield ("chips", "kinds", i), _clause(error)
            continue
        for j, count in enumerate(job.counts):
            if not shapes(found, count):
                yield ("chips", "counts", j), f"{kind} comes in no slice of {count} chips"
    for i, name in enumerate(job.topologies):
        try:
            topology_named(job, name)
        except (TopologyError, OSError) as error:
            yield ("chips", "topologies", i), _clause(error)


def _price_faults(job: Job) -> Iterator[Fault]:
    """Prices are of the chips of the job, and of all of them: money and chip-seconds cannot be compared."""
    if job.per_chip_hour is None:
        return
    chips = list(dict.fromkeys([*job.kinds, *(topology_named(job, each).chip.name for each in job.topologies)]))
    for name in job.per_chip_hour:
        if name not in chips:
            yield ("price", "per_chip_hour", name), f"the job has no chip {name}; it has {', '.join(chips)}"
    if without := [name for name in chips if name not in job.per_chip_hour]:
        yield (
            ("price", "per_chip_hour"),
            f"has no price of {', '.join(without)}; all chips of the job need one, or none",
        )


# --- Phases


def _phase_faults(job: Job, phase: Phase, sample: Mapping[str, Knob]) -> Iterator[Fault]:
    at: Location = ("phases", phase.name)
    if not phase.tokens:
        yield at, "a phase that is neither prefill nor decode needs tokens, how many a step makes, such as 'batch'"
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
        yield at, f"{phase.target!r} is no FILE.py:NAME"
        return
    if not (job.folder / file).is_file():
        yield at, f"there is no file {job.folder / file}"
        return
    target = f"{(job.folder / file).resolve()}:{name}"
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
        yield ("together", "phases"), f"names {', '.join(phases)}, and only two or more can be laid out together"
    for name in phases:
        if name not in names:
            yield ("together", "phases"), f"there is no phase {name!r}; there are {', '.join(names)}"
        elif fault := _unknown(job.together.repeats[name], sample):
            yield ("together",), f"how often {name} runs is {fault}"
    for name in job.together.repeats:
        if name not in phases:
            yield ("together", "repeats", name), f"is not among the phases, {', '.join(phases)}"


# --- What would be asked for and have no effect


def _unread(job: Job) -> Iterator[Fault]:
    used = named_in(job.together.repeats.values() if job.together else (), job)
    used = used.union(*(read_by(phase, job) for phase in job.phases))
    for key in job.vary:
        if key not in used:
            yield (
                ("vary", key),
                f'nothing depends on it; {{ of = "{key}" }} among the arguments of a phase would make it',
            )


def _limit_faults(job: Job) -> Iterator[Fault]:
    for key in job.per:
        if key not in job.vary:
            yield ("frontier", "per"), f"{key} is not varied; {', '.join(job.vary) or 'nothing'} is"
    kinds = {phase.kind for phase in job.phases}
    for key, kind in (("seconds_per_token", "decode"), ("seconds_to_first_token", "prefill")):
        if getattr(job.constraints, key) is not None and kind not in kinds:
            yield ("constraints", key), f'is a limit of {kind}, and no phase is one; kind = "{kind}" makes it one'


def _unknown(expression: str, sample: Mapping[str, Knob]) -> str:
    if expression in sample:
        return ""
    try:
        number(expression, sample)
    except ValueError as error:
        return f"{expression!r}: {error}"
    return ""


def _clause(error: Exception) -> str:
    """A sentence as a part of one."""
    words = str(error).rstrip(".")
    return words[:1].lower() + words[1:] if words[1:2].islower() or words.startswith("There is") else words
