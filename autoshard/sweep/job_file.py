"""Job files: a TOML file or plain data as a checked `Job`, with all errors reported together by line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from autoshard.sweep.extras import require
from autoshard.sweep.job import LENGTHS, Constraints, Job, JobError, Knob, Location, Phase, Together

_TOKENS = {"prefill": "batch * input_length", "decode": "batch"}


def load_job(path: str | Path) -> Job:
    """Reads and checks a job file.

    **Raises:** `JobError`, with every error by line and key; `OSError` if there is no such file.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        data = tomllib.loads(text)
    except ValueError as error:
        raise JobError(f"{path} is not valid TOML: {error}{_quote_line(path, str(error))}.") from error
    return job_of(data, path.parent, path.stem, str(path), text)


def _quote_line(path: Path, error: str) -> str:
    """The line to which a TOML error refers."""
    if (found := re.search(r"at line (\d+)", error)) is None:
        return ""
    lines = path.read_text("utf-8").splitlines()
    return f": {lines[min(int(found[1]), len(lines)) - 1].strip()}"


def job_of(data: Mapping[str, Any], folder: Path, name: str = "sweep", where: str = "The job", text: str = "") -> Job:
    """The job of plain data, as `load_job` reads it from a file.

    **Raises:** `JobError`.
    """
    require("pydantic")
    from pydantic import ValidationError

    from autoshard.sweep.schema import JobFile

    try:
        read = JobFile.model_validate(data)
    except ValidationError as error:
        faults = [(each["loc"], _fault_text(each)) for each in error.errors()]
        faults += _further_faults(data, [location for location, _ in faults], folder, name)
        raise JobError(_list_faults(where, text, faults)) from error
    from autoshard.sweep.validation import faults_of

    job = _job(read, folder, name)
    if faults := list(faults_of(job)):
        raise JobError(_list_faults(where, text, faults))
    return job


def _further_faults(
    data: Mapping[str, Any], at: Sequence[Location], folder: Path, name: str
) -> list[tuple[Location, str]]:
    """The faults of a job beside those at these places, which are left out; none if no job is left."""
    from pydantic import ValidationError

    from autoshard.sweep.schema import JobFile
    from autoshard.sweep.validation import faults_of

    mended = deepcopy(dict(data))
    places = [tuple(part for part in location if part not in _TAGS) for location in at]
    for place in sorted(places, key=lambda place: [str(part).zfill(4) for part in place], reverse=True):
        _remove(mended, place)
    try:
        job = _job(JobFile.model_validate(mended), folder, name)
    except ValidationError:
        return []
    return [
        (location, fault) for location, fault in faults_of(job) if not any(_is_about(location, each) for each in places)
    ]


def _remove(data: Any, place: Location) -> None:
    """Removes the value at a place; a variable keeps a value, because phases may depend on it."""
    for part in place[:-1]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return
    if place[:1] == ("vary",) and len(place) == 2:
        data[place[-1]] = [1]
    elif isinstance(data, list) and isinstance(place[-1], int) and len(data) > max(place[-1], 1):
        del data[place[-1]]
    elif isinstance(data, dict):
        data.pop(place[-1], None)


def _is_about(location: Location, place: Location) -> bool:
    """Whether a fault is in the table, or of the key, that was left out."""
    return location[: len(place)] == place or place[: len(location)] == location


def _job(read: Any, folder: Path, name: str) -> Job:
    phases = tuple(
        Phase(key, each.kind or key, each.target, each.arguments, each.tokens or _TOKENS.get(each.kind or key, ""))
        for key, each in read.phases.items()
    )
    together = None
    if read.together is not None:
        names = tuple(read.together.phases or read.phases)
        kinds = {phase.name: phase.kind for phase in phases}
        own = {each: "output_length" if kinds.get(each) == "decode" else "1" for each in names}
        together = Together(names, read.together.shared, own | {k: str(v) for k, v in read.together.repeats.items()})
    return Job(
        name=read.name or name,
        phases=phases,
        vary={key: tuple(values) for key, values in read.vary.items()},
        kinds=tuple(read.chips.kinds),
        counts=tuple(read.chips.counts),
        any_shape=read.chips.any_shape,
        topologies=tuple(read.chips.topologies),
        constraints=Constraints(**read.constraints.model_dump()),
        per_chip_hour=read.price.per_chip_hour if read.price else None,
        currency=read.price.currency if read.price else "USD",
        together=together,
        time_limit=read.search.time_limit,
        padding=read.search.padding,
        folder=folder,
        per=_other_work(phases, read.vary) if read.frontier.per is None else tuple(read.frontier.per),
    )


def _other_work(phases: Sequence[Phase], vary: Mapping[str, Sequence[Knob]]) -> tuple[str, ...]:
    """The variables that change the work per token: the lengths, and numbers that no token count uses, such as a width."""
    makes_tokens = set(re.findall(r"\w+", " ".join(phase.tokens for phase in phases))) - set(LENGTHS)
    numbers = (key for key, values in vary.items() if all(type(value) in (int, float) for value in values))
    return tuple(key for key in numbers if key not in makes_tokens)


def _fault_text(fault: Mapping[str, Any]) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    shown = f", got {given!r}" if isinstance(given, Knob) and fault["type"] != "extra_forbidden" else ""
    if fault["type"] == "extra_forbidden":
        return "is not a key of a job; check its spelling"
    if fault["type"] == "too_short":
        return "must have at least one entry, got none"
    return message[0].lower() + message[1:] + shown


def _list_faults(where: str, text: str, faults: Sequence[tuple[Location, str]]) -> str:
    lines = []
    for location, message in faults:
        key = ".".join(str(part) for part in location if part not in _TAGS)
        line = line_of(text, location)
        lines.append(
            f"{where}{f', line {line}' if line else ''}: {key}: {message}{'' if message.endswith('?') else '.'}"
        )
    return "\n".join(dict.fromkeys(lines))


_TAGS = ("list", "str", "int", "float", "bool", "constrained-int", "dict[literal['of'],str]", "[key]")
"""The tags that pydantic adds to the locations of values with several types."""


def line_of(text: str, location: Sequence[str | int]) -> int:
    """The line of a key in a TOML text, or of the table that lacks it; 0 without a text."""
    path = [str(part) for part in location if part not in _TAGS]
    best, found, table = -1, 0, []
    for count, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            table = _keys(stripped.split("]")[0].strip("[ "))
            here = table
        elif "=" in stripped and not stripped.startswith("#"):
            here = [*table, *_keys(stripped.split("=")[0])]
        else:
            continue
        if here == path[: len(here)] and len(here) > best:
            best, found = len(here), count
    return found


def _keys(dotted: str) -> list[str]:
    return [key.strip().strip("\"'") for key in dotted.split(".")]
