"""The parallelism of a whole plan in the terms of the literature, derived from its layouts alone.

The use of a mesh axis for most of the work of the matmuls by a weight; without such matmuls, of the others; without any, of
all operations:

| name | the axis splits | source |
|---|---|---|
| data parallel | the tokens, by their batch | |
| ... with sharded optimizer state (ZeRO-1) | the optimizer's state as well | Rajbhandari et al. 2020, §5.1 |
| ... and gradients (ZeRO-2) | gradients as well: they are reduce-scattered, not all-reduced | §5.2 |
| fully sharded data parallel (ZeRO-3) | the weights as well; each is gathered where it is used, and then freed | §5.3 |
| sequence parallel | the tokens, by their positions | Li et al. 2023, arXiv 2105.13120 |
| tensor parallel | the weights where they are used | Shoeybi et al. 2019, arXiv 1909.08053 |
| ... with sharded activations | the activations between these matmuls as well | Korthikanti et al. 2022, arXiv 2205.05198 |
| expert parallel | the experts of a mixture | Lepikhin et al. 2020, arXiv 2006.16668 |
| split | any dimension, in a program without matmuls | |
| repeated | nothing: its chips repeat each other's work | |

Weights that are stored sharded but gathered once for the whole step count as replicated, which is ZeRO-2 at most. Names of
models and parameters are not used. Attention determines whether an axis splits tokens by batch or by position; without
attention, the first dimension of the tokens is the batch. A matmul of two activations whose result has only dimensions of
weights is a weight's gradient. A program with a gradient is a training step, and arguments of a weight's shape that no matmul
uses are its optimizer state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from autoshard.naming.strategy_names import product_roles
from autoshard.naming.weights import is_product, weight_sources
from costmodels.machine.topology import Topology
from costmodels.program.grouped import grouped
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, kept_layout, moves, needed_layout, produced_layout
from search.formulation.layouts import Layout

MINOR_PART = 0.1
"""The part of the matmuls' work above which a second use of an axis is named."""
MOST_PART = 0.5
"""The part of the bytes above which arrays of a kind count as split."""
_TOKENS = ("data", "sequence")


@dataclass(frozen=True)
class AxisUse:
    """A use of mesh axes: a name of this module's table, and its share of the matmuls' work.

    `others` are further uses with a share of at least `MINOR_PART`.
    """

    name: str
    axes: tuple[str, ...]
    ways: int
    share: float
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        also = f" (also {', '.join(self.others)})" if self.others else ""
        return f"{self.name} over {''.join(self.axes)}, {self.ways} ways{also}"


@dataclass(frozen=True)
class Parallelism:
    """The kinds of parallelism of a plan, one entry per kind; `str` joins them. `training`: whether weights have gradients."""

    uses: tuple[AxisUse, ...]
    training: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds without their axes."""
        return tuple(use.name for use in self.uses)

    def __str__(self) -> str:
        return "; ".join(map(str, self.uses)) or "none: nothing is split"


def parallelism(program: Program, topology: Topology, choice: Choice) -> Parallelism:
    """The kinds of parallelism of a searched program."""
    plan = _Layouts(program, topology, choice)
    named = [(axis.name, axis.size, *plan.use_of(axis.name)) for axis in topology.axes if axis.size > 1]
    found = []
    for name in dict.fromkeys(name for _, _, name, _, _ in named):
        alike = [row for row in named if row[2] == name]
        others = tuple(dict.fromkeys(text for row in alike for text in row[4]))
        ways = prod(size for _, size, *_ in alike)
        found.append(AxisUse(name, tuple(row[0] for row in alike), ways, min(row[3] for row in alike), others))
    return Parallelism(tuple(found), bool(plan.gradients))


class _Layouts:
    """The matmuls of a plan with the roles of their factors, and the layouts of weights and optimizer state."""

    def __init__(self, program: Program, topology: Topology, choice: Choice) -> None:
        self.program, self.topology, self.choice = program, topology, choice
        self.by_weight: dict[int, tuple[int, list[str]]] = {}
        self.attention: dict[int, list[str]] = {}
        self.parameters: dict[int, list[str]] = {}
        self.gradients: list[int] = []
        for i, (kind, weight, roles) in self._products():
            if weight is not None:
                self.by_weight[i] = weight, roles
            elif kind == "gradient":
                self.gradients.append(i)
            elif kind == "attention":
                self.attention[i] = roles
            else:
                self.parameters[i] = roles

    def _products(self) -> Iterator[tuple[int, tuple[str, int | None, list[str]]]]:
        """Every matmul with its roles."""
        for i, op in self.program.matmuls():
            if is_product(op) or grouped(op):
                yield i, product_roles(self.program, i)

    def _work(self, i: int) -> float:
        op = self.program.operations[i]
        points = prod(factor.size for factor in op.factors)
        return op.flops_per_point * points * self.program.multiplicity(op.region)

    # --- one axis

    def use_of(self, axis: str) -> tuple[str, float, list[str]]:
        """The name of an axis' main use, its share of the work, and other uses with their shares."""
        work = self._work_by_kind(axis)
        total = sum(work.values())
        if not total:
            return "repeated", 1.0, []
        tokens = self._tokens_of(axis)
        merged: defaultdict[str, float] = defaultdict(float)
        for role, part in work.items():
            merged[(tokens or role) if role in _TOKENS else role] += part
        (best, part), *rest = sorted(merged.items(), key=lambda each: -each[1])
        others = [f"{_PLAIN[role]} in {100 * more / total:.0f} %" for role, more in rest if more >= MINOR_PART * total]
        return self._name(best, axis), part / total, others

    def _work_by_kind(self, axis: str) -> dict[str, float]:
        """The work of the matmuls by weights, by the kind of what the axis splits; if there are none, of other operations."""
        by_weight = {i: roles for i, (_, roles) in self.by_weight.items()}
        every = {i: ["any"] * len(op.factors) for i, op in enumerate(self.program.operations) if op.flops_per_point}
        work: defaultdict[str, float] = defaultdict(float)
        for i, roles in (by_weight or {**self.attention, **self.parameters} or every).items():
            work[self._role(i, roles, axis)] += self._work(i)
        return work

    def _role(self, i: int, roles: Sequence[str], axis: str) -> str:
        pairs = zip(roles, self.choice.strategies[i].splits, strict=True)
        return _KINDS[next((role for role, axes in pairs if axis in axes), "")]

    def _tokens_of(self, axis: str) -> str:
        """The kind of an axis that splits tokens, by batch or by position, as attention uses it."""
        found: defaultdict[str, float] = defaultdict(float)
        for i, roles in self.attention.items():
            for role, axes in zip(roles, self.choice.strategies[i].splits, strict=True):
                if axis in axes and role in _OF_ATTENTION:
                    found[_OF_ATTENTION[role]] += self._work(i)
        return max(found, key=lambda kind: found[kind], default="")

    def _name(self, role: str, axis: str) -> str:
        if role == "tensor":
            return f"tensor parallel{' with sharded activations' if self._has_scattered_activations(axis) else ''}"
        if role not in _TOKENS:
            return _PLAIN[role]
        gathered = self._is_stored_split(self._weights, axis)
        if gathered and self._is_gathered_late(axis):
            return f"fully sharded {_PLAIN[role]}" + (" (ZeRO-3)" if self.gradients else ": weights gathered")
        if gathered and not self.gradients:
            return f"{_PLAIN[role]}: weights gathered once"
        if not self._is_stored_split(self._state, axis):
            return _PLAIN[role]
        if self._has_scattered_gradients(axis):
            return f"{_PLAIN[role]} with sharded optimizer state and gradients (ZeRO-2)"
        return f"{_PLAIN[role]} with sharded optimizer state (ZeRO-1)"

    # --- the layouts of arrays

    @cached_property
    def _sources(self) -> tuple[int, ...]:
        """The values of arguments and constants."""
        sources = (*self.program.arguments, *self.program.constants)
        return tuple(self.program.operations[i].outputs[0].value for i in sources)

    @cached_property
    def _weights(self) -> tuple[int, ...]:
        operands = {self._operand(i, weight) for i, (weight, _) in self.by_weight.items()}
        sources = sorted({at for value in operands for at in weight_sources(self.program, value)})
        return tuple(self.program.operations[at].outputs[0].value for at in sources)

    @cached_property
    def _state(self) -> tuple[int, ...]:
        """The arguments of a training step that have a weight's shape but are not weights."""
        if not self.gradients:
            return ()
        shapes = {self.program.values[value].shape for value in self._weights}
        others = (value for value in self._sources if value not in self._weights)
        return tuple(value for value in others if self.program.values[value].shape in shapes)

    def _operand(self, i: int, k: int) -> int:
        return self.program.operations[i].inputs[k].value

    def _is_stored_split(self, values: Sequence[int], axis: str) -> bool:
        """Whether most bytes of these arguments are split over the axis."""
        total = sum(self.program.values[value].bytes for value in values)
        split = (v for v in values if axis in produced_layout(self.program, self.choice, v).axes)
        return sum(self.program.values[value].bytes for value in split) > MOST_PART * total > 0

    def _is_gathered_late(self, axis: str) -> bool:
        """Whether most weights are gathered where they are used, and not once for the whole step.

        Where they are used means for one use alone, or for the uses in one iteration of a loop.
        """
        late = total = 0.0
        for i, (weight, _) in self.by_weight.items():
            value = self._operand(i, weight)
            if axis in needed_layout(self.program, self.choice, i, weight).axes:
                continue
            total += self._work(i)
            if axis in kept_layout(self.program, self.choice, value).axes:
                late += self._work(i)
            elif axis in produced_layout(self.program, self.choice, value).axes:
                looped = self.program.multiplicity(self.program.values[value].region) > 1
                late += self._work(i) if looped else 0.0
        return late > MOST_PART * total > 0

    def _has_scattered_gradients(self, axis: str) -> bool:
        """Whether partial sums over the axis are mostly reduce-scattered; if tokens are split, these are gradients."""
        scattered = whole = 0.0
        for move in self._moves:
            if axis in move.source.partial and axis not in move.target.partial:
                sent = self.program.values[move.value].bytes * self.program.multiplicity(move.region)
                scattered, whole = (scattered + sent, whole) if axis in move.target.axes else (scattered, whole + sent)
        return scattered > whole

    @cached_property
    def _moves(self):
        return tuple(moves(self.program, self.choice))

    def _has_scattered_activations(self, axis: str) -> bool:
        """Whether the activations of matmuls that are split over the axis are split by tokens over it before."""
        gathered = total = 0.0
        moved = {(move.operation, move.operand): move.source for move in self._moves}
        for i, (weight, roles) in self.by_weight.items():
            op = self.program.operations[i]
            if self._role(i, roles, axis) != "tensor" or self._is_contracted(op, roles, i, axis):
                continue
            other = 1 - weight if is_product(op) else 0
            source = moved.get((i, other), needed_layout(self.program, self.choice, i, other))
            total += self._work(i)
            gathered += self._work(i) if self._is_split_by_tokens(op, roles, other, source, axis) else 0.0
        return gathered > MOST_PART * total > 0

    def _is_contracted(self, op: Operation, roles: Sequence[str], i: int, axis: str) -> bool:
        pairs = zip(roles, self.choice.strategies[i].splits, strict=True)
        return any(axis in axes and role == "contracted" for role, axes in pairs)

    def _is_split_by_tokens(self, op: Operation, roles: Sequence[str], operand: int, layout: Layout, axis: str) -> bool:
        dims = zip(op.inputs[operand].dims, layout.dims, strict=True)
        return any(axis in axes and any(roles[f] in ("batch", "sequence") for f in dim) for dim, axes in dims)


# The kinds of use of a plan, by the roles of `strategy_names`; an axis that splits nothing has the role "".
_KINDS = {
    "batch": "data",
    "sequence": "sequence",
    "contracted": "tensor",
    "output": "tensor",
    "experts": "experts",
    "batch-sharded": "data",
    "query-sharded": "sequence",
    "sequence-sharded": "sequence",
    "head-sharded": "tensor",
    "head-size-sharded": "tensor",
    "any": "split",
    "": "repeated",
}
_OF_ATTENTION = {"batch-sharded": "data", "query-sharded": "sequence", "sequence-sharded": "sequence"}
_PLAIN = {
    "data": "data parallel",
    "sequence": "sequence parallel",
    "tensor": "tensor parallel",
    "experts": "expert parallel",
    "split": "split",
    "repeated": "repeated",
}
