"""The Pareto frontier of a sweep, and the answers that can be read off its points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from autoshard.sweep.analysis.rows import REQUEST, Row, family
from autoshard.sweep.job import Knob

Cost = Callable[[Row], float]
"""What is to be small, such as `Row.chip_seconds_per_token` or minus the MFU."""


def chip_seconds(row: Row) -> float:
    """Chip-seconds per token."""
    return row.chip_seconds_per_token


def money(row: Row) -> float:
    """Money per million tokens, infinite where there is no price."""
    return inf if row.price is None else row.price


def cost_among(rows: Iterable[Row]) -> Cost:
    """What rows are compared by: money where all have a price (chips of two kinds have two), chip-seconds otherwise."""
    return money if all(row.price is not None for row in rows) else chip_seconds


def wasted(row: Row) -> float:
    """Minus the MFU."""
    return -row.mfu


def frontier(rows: Iterable[Row], cost: Cost | None = None) -> tuple[Row, ...]:
    """The rows that no other row beats in both latency and cost, the fastest first; of equal ones the first.

    `cost` is `cost_among` the rows unless it is given.
    """
    rows = list(rows)
    cost = cost or cost_among(rows)
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.latency_seconds, cost(row))):
        if not found or cost(row) < cost(found[-1]):
            found.append(row)
    return tuple(found)


@dataclass(frozen=True)
class Switch:
    """Where the layout changes along a frontier: the two neighbours, and what changes, product by product."""

    before: Row
    after: Row
    changes: tuple[str, ...]


def switches(rows: Sequence[Row]) -> tuple[Switch, ...]:
    """The places along a frontier where a matrix product's family of strategies changes.

    "WS-1D: output over xyz" and "WS-1D: output over yz" are one family; the axes are named by what they are called on each
    topology, and mean nothing across topologies.
    """
    found = []
    for before, after in pairwise(rows):
        changes = tuple(_changes(before, after))
        if changes:
            found.append(Switch(before, after, changes))
    return tuple(found)


def _changes(before: Row, after: Row) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for phase, layout in before.layout.items():
        for name, strategy in layout.items():
            old, new = family(strategy), family(after.layout.get(phase, {}).get(name, strategy))
            if old != new:
                groups.setdefault((old, new), []).append(name)
    for (old, new), names in groups.items():
        yield f"{_some(names)}: {old} → {new}"


def _some(names: Sequence[str]) -> str:
    each = list(dict.fromkeys(map(_last_keys, names)))
    more = f" and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    return ", ".join(each[:_NAMED]) + more


_NAMED = 3


def _last_keys(name: str) -> str:
    """`params['layers']['wq']['q']` is wq.q."""
    keys = re.findall(r"\['([^']+)'\]", name)
    return ".".join(keys[1:] if len(keys) > 1 else keys) or name


# --- Answers


def cheapest(
    rows: Iterable[Row],
    latency_seconds: float | None = None,
    first_token_seconds: float | None = None,
    cost: Cost | None = None,
) -> Row | None:
    """The cheapest row at a latency or less.

    **Arguments:**

    - `latency_seconds`: of a step; where phases are laid out together, of a step of decode, a token.
    - `first_token_seconds`: of a step of prefill; rows without one keep to any.
    """
    rows = list(rows)
    fitting = (row for row in rows if keeps(row, latency_seconds, first_token_seconds))
    return min(fitting, key=cost or cost_among(rows), default=None)


def keeps(row: Row, latency_seconds: float | None, first_token_seconds: float | None) -> bool:
    """Whether a row keeps to limits, as `cheapest` means them."""
    return excess(row, latency_seconds, first_token_seconds) <= 1.0


def excess(row: Row, latency_seconds: float | None, first_token_seconds: float | None) -> float:
    """What a row takes over what it may, by the limit that is worst for it; 0 without limits."""
    each = (token_seconds(row), latency_seconds), (row.seconds_of("prefill"), first_token_seconds)
    return max((taken / limit for taken, limit in each if taken is not None and limit is not None), default=0.0)


def token_seconds(row: Row) -> float:
    """A step; where phases are laid out together, the one of decode, if there is one: what a token takes."""
    decode = row.seconds_of("decode") if row.kind == REQUEST else None
    return row.latency_seconds if decode is None else decode


def fastest(rows: Iterable[Row], chips: int) -> Row | None:
    """The row with the least latency on exactly so many chips, of equal ones the cheapest."""
    fitting = (row for row in rows if row.chips == chips)
    return min(fitting, key=lambda row: (row.latency_seconds, row.chip_seconds_per_token), default=None)


def longest(rows: Iterable[Row], knob: str, latency_seconds: float | None = None) -> Row | None:
    """The row with the largest value of a knob, such as the context, that has a plan; of equal ones the cheapest."""
    fitting = [row for row in rows if is_number(row.knobs.get(knob))]
    fitting = [row for row in fitting if latency_seconds is None or row.latency_seconds <= latency_seconds]
    return max(fitting, key=lambda row: (row.knobs[knob], -row.chip_seconds_per_token), default=None)


def is_number(value: Knob | None) -> bool:
    """Whether a knob's value has an order."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Gain:
    """Two rows that differ in one knob only."""

    first: Row
    second: Row

    @property
    def latency(self) -> float:
        """How many times less the second's latency is."""
        return self.first.latency_seconds / self.second.latency_seconds

    @property
    def cost(self) -> float:
        """How many times less a token of the second costs."""
        return self.first.chip_seconds_per_token / self.second.chip_seconds_per_token


def gains(rows: Iterable[Row], knob: str, first: Knob, second: Knob) -> tuple[Gain, ...]:
    """What one value of a knob gains over another, for every pair of rows that agree in all else."""
    table: dict[tuple, dict[Knob, Row]] = {}
    for row in rows:
        if knob in row.knobs:
            rest = tuple((key, value) for key, value in row.knobs.items() if key != knob)
            table.setdefault((row.phase, row.topology, rest), {})[row.knobs[knob]] = row
    return tuple(Gain(each[first], each[second]) for each in table.values() if first in each and second in each)
