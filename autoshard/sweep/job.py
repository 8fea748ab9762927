"""The job file of a sweep, in TOML.

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
counts = [8, 16]                                  # every slice of that many chips that the vendor lists
topologies = ["v4:4x4x4"]                         # or named topologies

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

The kind of a phase is its name, or `kind`. A step of `prefill` processes `batch * input_length` tokens, a step of `decode`
`batch`; any other phase states its number with `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoshard.errors import OptionError
from costmodels.symbols import evaluate, parse_expression

Knob = bool | int | float | str
"""One value of a variable of a job."""

LENGTHS = ("input_length", "output_length")
"""Variables that change the work, although the first counts tokens."""


class JobError(OptionError):
    """Raised for an invalid job file; states the file, the line and the key."""


@dataclass(frozen=True)
class Phase:
    """A function to plan: `FILE.py:NAME`, its keyword arguments (numbers, text, or `{"of": expression}`), tokens per step."""

    name: str
    kind: str
    target: str
    arguments: Mapping[str, Any]
    tokens: str

    def values(self, knobs: Mapping[str, Knob]) -> dict[str, Knob]:
        """The keyword arguments at one point.

        **Raises:** `ValueError` if an expression is not a number there.
        """
        return {key: value_of(given, knobs) for key, given in self.arguments.items()}


@dataclass(frozen=True)
class Together:
    """Phases with one layout of the shared argument; `repeats` are their runs per request."""

    phases: tuple[str, ...]
    shared: str
    repeats: Mapping[str, str]


@dataclass(frozen=True)
class Constraints:
    """The limits on answers; None for no limit."""

    seconds_per_token: float | None = None
    seconds_to_first_token: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Job:
    """A sweep as its file declares it.

    Each combination of values of the variables in `per` has a frontier. `any_shape`: slices that no vendor lists, too.
    `padding`: as for `autoshard.search`.
    """

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
    any_shape: bool = False
    padding: bool = True

    def phase(self, name: str) -> Phase:
        """The phase of this name."""
        return next(phase for phase in self.phases if phase.name == name)


# --- Expressions


def value_of(given: Any, knobs: Mapping[str, Knob]) -> Knob:
    """The value of an argument at one point: itself, or `{"of": expression}` evaluated; whole numbers are integers.

    **Raises:** `ValueError`, with the expression, if it is not a whole number or uses an unknown variable.
    """
    if not isinstance(given, Mapping):
        return given
    expression = given["of"]
    if expression in knobs:
        return knobs[expression]
    found = number(expression, knobs)
    if found != int(found):
        raise ValueError(f"{expression} must be a whole number, got {found:g}")
    return int(found)


def number(expression: str, knobs: Mapping[str, Knob]) -> float:
    """The value of an expression in variables.

    **Raises:** `ValueError`.
    """
    numbers = {key: float(value) for key, value in knobs.items() if isinstance(value, int | float)}
    try:
        return evaluate(parse_expression(expression), numbers)
    except KeyError as error:
        missing = error.args[0].partition(" in ")[0]
        raise ValueError(f"{missing} must be a number among the job's variables {', '.join(knobs)}") from error


Location = tuple[str | int, ...]


# --- Lines
