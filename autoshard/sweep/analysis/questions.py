"""Several questions about a sweep at once, each asked of every phase to which it applies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard._util.tables import WIDTH
from autoshard.sweep.analysis.answers import (
    Answer,
    Most,
    answer_cheapest,
    answer_fastest,
    answer_gain,
    answer_longest,
    answer_most,
    limits_of,
)
from autoshard.sweep.analysis.rows import SweepResult


@dataclass(frozen=True)
class Questions:
    """The questions of one call; those that are None are not asked.

    - `per_token`, `first_token`: at most these seconds. Alone they ask for the cheapest plan; they limit the other answers.
    - `chips`: the fastest plan on this number of chips. `most`: the highest throughput.
    - `longest`: the largest value of this variable. `gain`: a variable, and the texts of two of its values.
    """

    per_token: float | None = None
    first_token: float | None = None
    chips: int | None = None
    most: Most | None = None
    longest: str | None = None
    gain: tuple[str, str, str] | None = None

    @property
    def has_limits(self) -> bool:
        """Whether a time is limited."""
        return bool(self.per_token or self.first_token)


def answer_all(sweep: SweepResult, phases: Sequence[str], questions: Questions, width: int = WIDTH) -> list[Answer]:
    """The answers, phase by phase; empty if no question applies to these phases."""
    return [answer for phase in phases for answer in _answers_of(sweep, phase, questions, width)]


def _answers_of(sweep: SweepResult, phase: str, asked: Questions, width: int) -> Iterator[Answer]:
    limits = limits_of(sweep, phase, asked.per_token, asked.first_token)
    if any(limits) and asked.most is None:
        yield from answer_cheapest(sweep, phase, *limits)
    if asked.chips is not None:
        yield from answer_fastest(sweep, phase, asked.chips, *limits)
    if asked.most is not None:
        yield from answer_most(sweep, phase, asked.most, *limits)
    if asked.longest is not None:
        yield answer_longest(sweep, phase, asked.longest, *limits)
    if asked.gain is not None:
        knob, *texts = asked.gain
        first, second = (_value_of(sweep, knob, text) for text in texts)
        yield answer_gain(sweep, phase, knob, first, second, width=width)


def _value_of(sweep: SweepResult, knob: str, text: str) -> Any:
    """The value of a variable with this text; the text itself if there is none."""
    return next((row.knobs[knob] for row in sweep.rows if str(row.knobs.get(knob)) == text), text)
