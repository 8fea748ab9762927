"""The census: the coverage of a function's operations by exact sharding rules, and the cost of missing rules.

An operation is *exact* if its primitive has a rule, autoshard's or the user's. It is *conservative* if it has none and is
replicated on every chip. An exact rule may still keep a dimension whole (a sort keeps the sorted dimension); the census
reports the time of such operations too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from autoshard._util.tables import WIDTH, item, percent, table, time
from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.planning.records import PlanRecord
from autoshard.tracing.trace import trace
from costmodels.machine.chips import Chip
from costmodels.machine.chips import chip as chip_named
from costmodels.operations import price
from costmodels.program.program import Operation, Program

_COUNTED = ("matmul", "memory", "fused")
_QUANTITIES = ("equations", "flops", "bytes", "seconds")


class _Cost(NamedTuple):
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Counted:
    """The exact operations of one primitive, or its conservative ones.

    - `equations`: their number; each counts once, also in a loop.
    - `flops`, `bytes`, `seconds`: all their runs in one step.
    - `whole_seconds`: the seconds of operations that keep a dimension of more than one element whole.
    - `where`: the source line of the first.
    """

    primitive: str
    exact: bool
    equations: int
    flops: float
    bytes: float
    seconds: float
    whole_seconds: float
    where: str


@dataclass(frozen=True)
class Census:
    """The shares of a program under exact rules.

    `basis` is the basis of the seconds: one chip that runs everything, or a plan.
    """

    name: str
    basis: str
    rows: tuple[Counted, ...]
    warnings: tuple[str, ...] = ()

    @property
    def equations(self) -> int:
        """The number of operations."""
        return sum(row.equations for row in self.rows)

    @property
    def exact(self) -> dict[str, float]:
        """The share under exact rules, 0 to 1, of "equations", "flops", "bytes" and "seconds"; 1 if there are none."""
        return {name: self._share(name) for name in _QUANTITIES}

    @property
    def kept_whole(self) -> float:
        """The share of the seconds of operations that keep a dimension whole, conservative ones included."""
        total = sum(row.seconds for row in self.rows)
        return sum(row.whole_seconds for row in self.rows) / total if total else 0.0

    @property
    def conservative(self) -> tuple[Counted, ...]:
        """The conservative operations, the longest first."""
        return tuple(row for row in self.rows if not row.exact)

    def _share(self, name: str) -> float:
        total = sum(getattr(row, name) for row in self.rows)
        return sum(getattr(row, name) for row in self.rows if row.exact) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "name": self.name,
            "basis": self.basis,
            "equations": self.equations,
            "exact": self.exact,
            "kept_whole": self.kept_whole,
            "rows": [asdict(row) for row in self.rows],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = WIDTH) -> str:
        """One line per primitive, the longest first, then the conservative operations and their cost."""
        return "\n".join(_lines(self, width)) + "\n"


def census(fn: Callable[..., Any], *args: Any, chip: str | Chip = "v5e") -> Census:
    """The census of a function, with the times of one chip that runs everything; nothing is searched.

        print(autoshard.census(decode, params, cache, tokens, position))

    **Arguments:**

    - `args`: as for `autoshard.search`.
    - `chip`: the chip whose roofline gives the seconds.

    **Raises:** `TraceError`.
    """
    return census_of(annotate_traffic(trace(fn, *args)).program, chip)


def census_of(program: Program, chip: str | Chip = "v5e") -> Census:
    """The census of a traced program, as `census`."""
    on = chip_named(chip) if isinstance(chip, str) else chip

    def cost(op: Operation) -> _Cost:
        found = price(program, op, np.ones((1, len(op.factors))), on)
        runs = program.multiplicity(op.region)
        return _Cost(*(runs * float(each[0]) for each in (found.flops, found.bytes, found.seconds)))

    listed = ((op, cost(op)) for op in program.operations if op.op_class in _COUNTED)
    return Census(program.name, f"one {on.name} that runs all of it", _rows(listed), program.warnings)


def census_of_plan(plan: PlanRecord) -> Census:
    """The census of a plan: the seconds of every operation as planned, with its reshards.

    **Raises:** `ValueError` for a plan from an older file, which lacks its program.
    """
    if plan.program is None:
        raise ValueError(f"The plan {plan.name!r} does not hold its program: it is from an older file. Search again.")
    pairs = zip(plan.program.operations, plan.operations, strict=True)
    listed = (
        (op, _Cost(row.flops, row.bytes, row.seconds + row.collective_seconds))
        for op, row in pairs
        if op.op_class in _COUNTED
    )
    return Census(plan.name, f"the plan on {plan.topology.name}", _rows(listed), plan.warnings)


def _rows(listed: Iterable[tuple[Operation, _Cost]]) -> tuple[Counted, ...]:
    groups: dict[tuple[str, bool], list[tuple[Operation, _Cost]]] = {}
    for op, cost in listed:
        groups.setdefault((op.primitive, op.exact), []).append((op, cost))
    rows = [_row(primitive, exact, group) for (primitive, exact), group in groups.items()]
    return tuple(sorted(rows, key=lambda row: (-row.seconds, row.primitive)))


def _row(primitive: str, exact: bool, group: list[tuple[Operation, _Cost]]) -> Counted:
    total = _Cost(*(sum(cost[k] for _, cost in group) for k in range(3)))
    whole = sum(cost.seconds for op, cost in group if _keeps_whole(op))
    return Counted(primitive, exact, len(group), *total, whole, group[0][0].source)


def _keeps_whole(op: Operation) -> bool:
    """Whether an array has a dimension of more than one element that cannot be split."""
    dims = (dim for use in (*op.inputs, *op.outputs) for dim in use.dims)
    return any(
        all(factor.kind == "whole" for factor in dim) and prod(factor.size for factor in dim) > 1
        for dim in (tuple(op.factors[i] for i in each) for each in dims)
    )


def summary(found: Census) -> str:
    """A census without its table: the number of operations, the shares, and the warnings of the trace."""
    return "\n".join((*_head(found), *_shares(found), *(line for text in found.warnings for line in item(text)))) + "\n"


def _head(found: Census) -> Iterator[str]:
    yield f"{found.name}: {found.equations} operations; times of {found.basis}"


def _lines(found: Census, width: int) -> Iterator[str]:
    yield from _head(found)
    yield ""
    total = sum(row.seconds for row in found.rows) or 1.0
    headers = ("primitive", "rule", "equations", "time", "share", "kept whole", "first at")
    rows = [
        (
            row.primitive,
            "exact" if row.exact else "none",
            str(row.equations),
            time(row.seconds),
            percent(row.seconds / total),
            percent(row.whole_seconds / row.seconds) if row.whole_seconds else "",
            row.where,
        )
        for row in found.rows
    ]
    yield from table(headers, rows, "<<>>>>~", width)
    yield ""
    yield from _shares(found)


def _shares(found: Census) -> Iterator[str]:
    shares = ", ".join(f"{percent(share)} of {name}" for name, share in found.exact.items())
    yield f"Under exact rules: {shares}. Operations that keep a dimension whole take {percent(found.kept_whole)} of the time."
    if found.conservative:
        names = ", ".join(row.primitive for row in found.conservative)
        yield f"Without a rule, and so replicated on every chip: {names}. Their FLOPs are unknown and count as 0;"
        yield "autoshard.rule registers a rule."
