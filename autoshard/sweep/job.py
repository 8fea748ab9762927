"""The job file: what a sweep is to find out, in TOML.

```toml
name = "palm-62b"

[phases.decode]
target = "../examples/palm.py:decode"             # from the job file's folder
arguments = { size = "62b", batch = { of = "batch" }, context = { of = "input_length + output_length / 2" } }

[vary]                                            # every combination is a point
batch = [1, 16, 256]
input_length = 2048
output_length = 64

[chips]
kinds = ["v4"]
counts = [8, 16]                                  # every shape of so many chips that the torus allows
topologies = ["v4:4x4x4"]                         # or these

[constraints]                                     # all optional
seconds_per_token = 0.030
seconds_to_first_token = 2.0
memory_gib = 28

[price]
per_chip_hour = { v4 = 3.22 }

[together]                                        # prefill and decode with one layout of the weights
phases = ["prefill", "decode"]
shared = "params"
```

A phase is of a kind, which its name is unless `kind` says otherwise: `prefill` makes `batch * input_length` tokens a step,
`decode` makes `batch`, any other says with `tokens` how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoshard.errors import AutoshardError
from costmodels.symbols import evaluated, parsed

Knob = bool | int | float | str
"""One value of what a job varies."""

LENGTHS = ("input_length", "output_length")
"""What is other work, not another way to do it, although the first counts tokens."""


class JobError(AutoshardError):
    """A job file says something that makes no sense; names the file, the line and the key."""


@dataclass(frozen=True)
class Phase:
    """A function to lay out: `FILE.py:NAME`, its keyword arguments (numbers, text, or `{"of": expression}`), tokens a step."""

    name: str
    kind: str
    target: str
    arguments: Mapping[str, Any]
    tokens: str

    def values(self, knobs: Mapping[str, Knob]) -> dict[str, Knob]:
        """The keyword arguments at one point.

        **Raises:** `ValueError` where an expression is no number there.
        """
        return {key: value_of(given, knobs) for key, given in self.arguments.items()}


@dataclass(frozen=True)
class Together:
    """Phases with one layout of the shared argument; `repeats` says how often each runs in one request."""

    phases: tuple[str, ...]
    shared: str
    repeats: Mapping[str, str]


@dataclass(frozen=True)
class Constraints:
    """What an answer must keep to; None where anything will do."""

    seconds_per_token: float | None = None
    seconds_to_first_token: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Job:
    """A sweep, as its file declares it; there is a frontier for every value of what `per` names."""

    name: str
    phases: tuple[Phase, ...]
    vary: Mapping[str, tuple[Knob, ...]]
    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    topologies: tuple[str, ...]
    constraints: Constraints = Constraints()
    per_chip_hour: Mapping[str, float] | None = None
    currency: str = "USD"
    together: Together | None = None
    time_limit: float | None = None
    folder: Path = Path()
    per: tuple[str, ...] = ()

    def phase(self, name: str) -> Phase:
        """The phase of this name."""
        return next(phase for phase in self.phases if phase.name == name)


# --- Expressions


def value_of(given: Any, knobs: Mapping[str, Knob]) -> Knob:
    """What an argument is at one point: itself, or `{"of": expression}` evaluated; whole numbers are integers.

    **Raises:** `ValueError`, naming the expression, where it is no whole number or names no knob.
    """
    if not isinstance(given, Mapping):
        return given
    expression = given["of"]
    if expression in knobs:
        return knobs[expression]
    found = number(expression, knobs)
    if found != int(found):
        raise ValueError(f"{expression} is {found:g} there, which is no whole number")
    return int(found)


def number(expression: str, knobs: Mapping[str, Knob]) -> float:
    """An expression in knobs as a number.

    **Raises:** `ValueError`.
    """
    numbers = {key: float(value) for key, value in knobs.items() if isinstance(value, int | float)}
    try:
        return evaluated(parsed(expression), numbers)
    except KeyError as error:
        missing = error.args[0].partition(" in ")[0]
        raise ValueError(f"{missing} is no number that the job varies; it varies {', '.join(knobs)}") from error


Location = tuple[str | int, ...]


# --- Lines
