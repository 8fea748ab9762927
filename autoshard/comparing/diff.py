"""The difference of two plans: operations and arrays that differ, and the cost of each difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autoshard._util.paths import shared_name, star_numbers
from autoshard._util.tables import WIDTH, percent, size, table, time
from autoshard.emitting.sharding import spec_of
from autoshard.explaining.explain import short_name
from autoshard.plan import Plan
from autoshard.planning.records import ArrayPlan, OperationPlan

_LISTED = 0.002
"""The part of a step above which an operation's difference is listed."""


@dataclass(frozen=True)
class OperationDifference:
    """Corresponding operations of two plans: their strategies, and their seconds with their collectives.

    A strategy is empty if a plan has no such operation.
    """

    name: str
    count: int
    before: str
    after: str
    before_seconds: float
    after_seconds: float
    matmul: bool = False

    @property
    def seconds(self) -> float:
        """The additional seconds in the second plan."""
        return self.after_seconds - self.before_seconds


@dataclass(frozen=True)
class ArrayDifference:
    """Arrays with different layouts in two plans; a layout is empty if a plan has no such array."""

    path: str
    count: int
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """The differences of two plans, `before` and `after`; the costliest operations first."""

    before: Plan
    after: Plan
    operations: tuple[OperationDifference, ...]
    arrays: tuple[ArrayDifference, ...]

    @property
    def seconds(self) -> float:
        """The additional seconds of a step in the second plan."""
        return self.after.estimate.seconds - self.before.estimate.seconds

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain data."""
        return {
            "before": _summary(self.before),
            "after": _summary(self.after),
            "operations": [asdict(each) for each in self.operations],
            "arrays": [asdict(each) for each in self.arrays],
        }

    def render(self, width: int = WIDTH) -> str:
        """The difference as tables."""
        sections = (self._totals(), self._operations(width), self._arrays(width))
        return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"

    def render_operations(self, width: int = WIDTH) -> str:
        """The table of operations alone."""
        return "\n".join(self._operations(width)) + "\n"

    def __str__(self) -> str:
        return self.render()

    def _totals(self) -> Iterator[str]:
        before, after = self.before.estimate, self.after.estimate
        yield f"before: {self.before.name} on {self.before.topology.name}"
        yield f"after:  {self.after.name} on {self.after.topology.name}"
        yield ""
        pairs = (
            ("step", before.seconds, after.seconds),
            ("on the chip", before.seconds - before.collective_seconds, after.seconds - after.collective_seconds),
            ("collectives", before.collective_seconds, after.collective_seconds),
        )
        rows = [(name, time(a), time(b), _change_text(a, b)) for name, a, b in pairs]
        peaks = before.peak_bytes, after.peak_bytes
        rows.append(("peak memory", size(peaks[0]), size(peaks[1]), _percent_more(*peaks)))
        proved, proves = (f"{plan.proof.status}, gap {percent(plan.proof.gap)}" for plan in (self.before, self.after))
        rows.append(("proof", proved, proves, ""))
        yield from _indent(table(("", "before", "after", "after - before"), rows, "<>>>"))

    def _operations(self, width: int) -> Iterator[str]:
        least = _LISTED * self.before.estimate.seconds
        rows = [
            (
                each.name,
                str(each.count),
                each.before or "-",
                each.after or "-",
                _change_text(each.before_seconds, each.after_seconds),
            )
            for each in self.operations
            if abs(each.seconds) >= least or (each.matmul and each.before != each.after)
        ]
        if rows:
            yield "Operations, with their collectives"
            yield from _indent(table(("operation", "alike", "before", "after", "difference"), rows, "<>~~>", width - 2))

    def _arrays(self, width: int) -> Iterator[str]:
        if self.arrays:
            yield "Arrays"
            rows = [(each.path, str(each.count), each.before or "-", each.after or "-") for each in self.arrays]
            yield from _indent(table(("array", "alike", "before", "after"), rows, "/>~~", width - 2))


def diff(before: Plan, after: Plan) -> Difference:
    """Compares two plans of one function or of similar functions, operation by operation and array by array.

    print(autoshard.diff(autoshard.load("a.json"), autoshard.load("b.json")))
    """
    return Difference(before, after, tuple(_operations(before, after)), tuple(_arrays(before, after)))


def _operations(before: Plan, after: Plan) -> list[OperationDifference]:
    groups: dict[tuple[str, bool, str, str], list[tuple[str, float, float]]] = {}
    for a, b in _pair_names(
        [_operation_name(op) for op in before.operations], [_operation_name(op) for op in after.operations]
    ):
        one, other = (plan.operations[i] if i is not None else None for plan, i in ((before, a), (after, b)))
        named = one or other
        if named is None or not (_seconds(one) or _seconds(other)):
            continue
        name = short_name(named)
        key = (star_numbers(name), named.matmul, one.strategy if one else "", other.strategy if other else "")
        groups.setdefault(key, []).append((name, _seconds(one), _seconds(other)))
    found = [
        OperationDifference(
            shared_name(name for name, *_ in alike),
            len(alike),
            a,
            b,
            sum(x for _, x, _ in alike),
            sum(y for *_, y in alike),
            matmul,
        )
        for (_, matmul, a, b), alike in groups.items()
    ]
    found = [each for each in found if each.before != each.after or each.before_seconds != each.after_seconds]
    return sorted(found, key=lambda each: -abs(each.seconds))


def _arrays(before: Plan, after: Plan) -> list[ArrayDifference]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for kind in ("arguments", "constants", "results"):
        ones, others = getattr(before, kind), getattr(after, kind)
        for a, b in _pair_names([array.path for array in ones], [array.path for array in others]):
            one, other = (ones[a] if a is not None else None), (others[b] if b is not None else None)
            if _spec(one) != _spec(other):
                named = one or other
                path = named.path if named else ""
                groups.setdefault((star_numbers(path), _spec(one), _spec(other)), []).append(path)
    return [ArrayDifference(shared_name(paths), len(paths), one, other) for (_, one, other), paths in groups.items()]


def _pair_names(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
    """Pairs of positions of equal names, in order; `None` for a name without a partner."""
    left: dict[tuple[str, int], int] = dict(_number_repeats(after))
    for key, at in _number_repeats(before):
        yield at, left.pop(key, None)
    for at in left.values():
        yield None, at


def _number_repeats(names: Sequence[str]) -> Iterator[tuple[tuple[str, int], int]]:
    seen: Counter[str] = Counter()
    for at, name in enumerate(names):
        yield (name, seen[name]), at
        seen[name] += 1


def _operation_name(op: OperationPlan) -> str:
    return f"{op.primitive} {op.name}"


def _seconds(op: OperationPlan | None) -> float:
    return op.seconds + op.collective_seconds if op else 0.0


def _spec(array: ArrayPlan | None) -> str:
    return str(spec_of(array.layout)).removeprefix("PartitionSpec") if array else ""


def _change_text(before: float, after: float) -> str:
    more = after - before
    if abs(more) <= 1e-9 * max(before, after):
        return "the same"
    share = f" ({_percent_more(before, after)})" if before else ""
    return f"{'+' if more > 0 else '-'}{time(abs(more))}{share}"


def _percent_more(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def _summary(plan: Plan) -> dict[str, Any]:
    estimate = plan.estimate
    return {
        "name": plan.name,
        "topology": plan.topology.name,
        "seconds": estimate.seconds,
        "collective_seconds": estimate.collective_seconds,
        "peak_bytes": estimate.peak_bytes,
        "status": plan.proof.status,
        "gap": plan.proof.gap,
    }


def _indent(lines: Sequence[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)
