"""The Pareto frontier of a sweep, and the answers from its points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from autoshard.sweep.analysis.rows import REQUEST, Row, family
from autoshard.sweep.job import Knob

Cost = Callable[[Row], float]
"""A quantity to minimise, such as `Row.chip_seconds_per_token` or minus the MFU."""


def chip_seconds(row: Row) -> float:
    """Chip-seconds per token."""
    return row.chip_seconds_per_token


def money(row: Row) -> float:
    """Money per million tokens; infinite without a price."""
    return inf if row.price is None else row.price


def cost_among(rows: Iterable[Row]) -> Cost:
    """The cost by which rows are compared: money if all have a price, chip-seconds otherwise."""
    return money if all(row.price is not None for row in rows) else chip_seconds


def negative_mfu(row: Row) -> float:
    """Minus the MFU."""
    return -row.mfu


def frontier(rows: Iterable[Row], cost: Cost | None = None) -> tuple[Row, ...]:
    """The rows that no other row beats in both latency and cost, the fastest first; the first of equal ones.

    By default `cost` is `cost_among` the rows.
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
    """A change of the layout along a frontier: the two neighbours, and the changes by matmul."""

    before: Row
    after: Row
    changes: tuple[str, ...]


def switches(rows: Sequence[Row]) -> tuple[Switch, ...]:
    """The places along a frontier where a matmul's family of strategies changes.

    "WS-1D: output over xyz" and "WS-1D: output over yz" are one family, since names of axes do not compare across topologies.
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
        yield f"{_list_some(names)}: {old} → {new}"


def _list_some(names: Sequence[str]) -> str:
    each = list(dict.fromkeys(map(_last_keys, names)))
    more = f" and {len(each) - _NAMED} more" if len(each) > _NAMED else ""
    return ", ".join(each[:_NAMED]) + more


_NAMED = 3


def _last_keys(name: str) -> str:
    """The last keys of a path: `params['layers']['wq']['q']` is wq.q."""
    keys = re.findall(r"\['([^']+)'\]", name)
    return ".".join(keys[1:] if len(keys) > 1 else keys) or name


# --- Answers


def cheapest(
    rows: Iterable[Row],
    latency_seconds: float | None = None,
    first_token_seconds: float | None = None,
    cost: Cost | None = None,
) -> Row | None:
    """The cheapest row within latency limits.

    **Arguments:**

    - `latency_seconds`: of a step; for phases with a shared layout, of a step of decode, which is a token.
    - `first_token_seconds`: of a step of prefill; rows without a prefill meet any limit.
    """
    rows = list(rows)
    fitting = (row for row in rows if keeps(row, latency_seconds, first_token_seconds))
    return min(fitting, key=cost or cost_among(rows), default=None)


def keeps(row: Row, latency_seconds: float | None, first_token_seconds: float | None) -> bool:
    """Whether a row meets the limits of `cheapest`."""
    return excess(row, latency_seconds, first_token_seconds) <= 1.0


def excess(row: Row, latency_seconds: float | None, first_token_seconds: float | None) -> float:
    """The largest ratio of a row's latency to its limit; 0 without limits."""
    each = (token_seconds(row), latency_seconds), (row.seconds_of("prefill"), first_token_seconds)
    return max((taken / limit for taken, limit in each if taken is not None and limit is not None), default=0.0)


def token_seconds(row: Row) -> float:
    """The seconds per token: of a step or, for phases with a shared layout, of the decode step if there is one."""
    decode = row.seconds_of("decode") if row.kind == REQUEST else None
    return row.latency_seconds if decode is None else decode


def fastest(rows: Iterable[Row], chips: int) -> Row | None:
    """The row with the least latency on exactly this number of chips; the cheapest of equal ones."""
    fitting = (row for row in rows if row.chips == chips)
    return min(fitting, key=lambda row: (row.latency_seconds, row.chip_seconds_per_token), default=None)


def longest(rows: Iterable[Row], knob: str, latency_seconds: float | None = None) -> Row | None:
    """The row with the largest value of a variable, such as the context; the cheapest of equal ones."""
    fitting = [row for row in rows if is_number(row.knobs.get(knob))]
    fitting = [row for row in fitting if latency_seconds is None or row.latency_seconds <= latency_seconds]
    return max(fitting, key=lambda row: (row.knobs[knob], -row.chip_seconds_per_token), default=None)


def is_number(value: Knob | None) -> bool:
    """Whether a variable's value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Gain:
    """Two rows that differ in one variable only."""

    first: Row
    second: Row

    @property
    def latency(self) -> float:
        """The ratio of the first row's latency to the second's."""
        return self.first.latency_seconds / self.second.latency_seconds

    @property
    def cost(self) -> float:
        """The ratio of the first row's cost per token to the second's."""
        return self.first.chip_seconds_per_token / self.second.chip_seconds_per_token


def gains(rows: Iterable[Row], knob: str, first: Knob, second: Knob) -> tuple[Gain, ...]:
    """The gains of one value of a variable over another, for every pair of rows that agree in everything else."""
    table: dict[tuple, dict[Knob, Row]] = {}
    for row in rows:
        if knob in row.knobs:
            rest = tuple((key, value) for key, value in row.knobs.items() if key != knob)
            table.setdefault((row.phase, row.topology, rest), {})[row.knobs[knob]] = row
    return tuple(Gain(each[first], each[second]) for each in table.values() if first in each and second in each)
