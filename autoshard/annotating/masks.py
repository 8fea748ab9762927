"""Masks and cuts of padded arrays: what lies in the padding never reaches a result.

Arguments are padded with zeros. A reduction over padded elements needs a neutral value there (`autoshard.rules.padding`).
Where the analysis cannot show that the value is there already, emission masks the operand. A dimension that an operation has
on every chip as a whole is cut before it and padded with zeros behind it, so the operation itself sees no padding there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoshard.annotating.padding import STRUCTURAL, Occurrences, Padding, occurrences_of, pad_program
from autoshard.rules.padding import KEEPING_ZERO, MULTIPLYING, NEUTRAL, Fill
from autoshard.tracing.blocks import Traced
from costmodels.program.program import Operation, Program, Use

_SELECTORS = {"select_n": 1}
"""The number of leading operands that choose among the others."""
_INDEXED = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
"""Primitives whose operands after the first so many are indices."""


@dataclass(frozen=True)
class Mask:
    """A mask of one operand: along a factor of the operation, the padded elements get a neutral value."""

    factor: int
    size: int
    padded: int
    inner: int
    fill: Fill


@dataclass(frozen=True)
class Cut:
    """A factor that an operation has whole: operands are cut to its size before the operation, and results padded again."""

    factor: int
    size: int
    padded: int
    inner: int


def pad_traced(traced: Traced, paddings: Sequence[Padding]) -> Traced:
    """A traced function with longer dimensions in its program, and the masks that emission needs."""
    if not paddings:
        return traced
    masks, cuts = masks_of(traced.program, paddings), cuts_of(traced.program, paddings)
    program = _with_masks(pad_program(traced.program, paddings), masks, cuts)
    return dataclasses.replace(traced, program=program, masks=masks, cuts=cuts)


def _with_masks(
    program: Program, masks: Mapping[tuple[int, int], Sequence[Mask]], cuts: Mapping[int, Sequence[Cut]]
) -> Program:
    """The program with the masked and the cut operands of each operation, for its cost."""
    masked: dict[int, tuple[int, ...]] = {}
    for (at, operand), each in sorted(masks.items()):
        masked[at] = (*masked.get(at, ()), *[operand] * len(each))
    for at, each in cuts.items():
        factors = {cut.factor for cut in each}
        inputs = enumerate(program.operations[at].inputs)
        masked[at] = (*masked.get(at, ()), *[k for k, use in inputs if any(factors & {*dim} for dim in use.dims)])
    operations = (dataclasses.replace(op, masked=masked.get(i, ())) for i, op in enumerate(program.operations))
    return dataclasses.replace(program, operations=tuple(operations))


def cuts_of(program: Program, paddings: Sequence[Padding]) -> Mapping[int, tuple[Cut, ...]]:
    """Per operation the padded factors that it has whole; `program` is without padding."""
    found: dict[int, tuple[Cut, ...]] = {}
    for padding in paddings:
        for (at, factor), inner in occurrences_of(program, padding).factors.items():
            if _is_cut(program.operations[at], factor):
                found[at] = (*found.get(at, ()), Cut(factor, padding.size, padding.padded, inner))
    return found


def _is_cut(op: Operation, factor: int) -> bool:
    return op.factors[factor].kind == "whole" and op.op_class not in STRUCTURAL


def masks_of(program: Program, paddings: Sequence[Padding]) -> Mapping[tuple[int, int], tuple[Mask, ...]]:
    """Per (operation, operand) the masks that reductions over padded dimensions need; `program` is without padding."""
    found: dict[tuple[int, int], tuple[Mask, ...]] = {}
    for padding in paddings:
        occurrences = occurrences_of(program, padding)
        zeros = _zeros(program, occurrences)
        for (at, factor), inner in occurrences.factors.items():
            op = program.operations[at]
            fill = NEUTRAL.get(op.primitive)
            if fill is None or op.factors[factor].kind in ("parallel", "whole") or op.op_class in STRUCTURAL:
                continue
            for k, use in enumerate(op.inputs):
                has = any(factor in dims for dims in use.dims)
                if has and not (fill == "zero" and zeros.at(use.value)):
                    mask = Mask(factor, padding.size, padding.padded, inner, fill)
                    found[at, k] = (*found.get((at, k), ()), mask)
    return found


def _zeros(program: Program, occurrences: Occurrences) -> _Zeros:
    """The values that are zero in the padding of one dimension.

    Arguments come with zeros. A donated argument comes as the result that replaced it: it is zero in every step if the step
    keeps it zero.
    """
    changed: set[int] = set()
    while True:
        zeros = _Zeros(program, occurrences, changed)
        found = {
            program.operations[program.arguments[argument]].outputs[0].value
            for argument, result in program.donated
            for use in program.operations[program.results[result]].inputs
            if zeros.has(use.value) and not zeros.at(use.value)
        }
        if found <= changed:
            return zeros
        changed |= found


def changed_results(program: Program, padding: Padding) -> frozenset[int]:
    """The results, by position, that are not zero in a padding; `program` is without padding."""
    zeros = _zeros(program, occurrences_of(program, padding))
    uses = ((k, use.value) for k, at in enumerate(program.results) for use in program.operations[at].inputs)
    return frozenset(k for k, value in uses if zeros.has(value) and not zeros.at(value))


class _Zeros:
    """The values that are zero in the padding of one dimension, without the `changed` arguments.

    All are assumed to be zero until an operation contradicts it. So a loop carry is zero if it begins so and each iteration
    keeps it so.
    """

    def __init__(self, program: Program, occurrences: Occurrences, changed: Iterable[int]) -> None:
        self.program = program
        self.factors = frozenset(occurrences.factors)
        self.values = frozenset(value for value, _ in occurrences.values)
        self.zero = set(self.values.difference(changed))
        makers = sorted((*program.producers[value], value) for value in self.zero)
        while dropped := [value for at, k, value in makers if value in self.zero and not self._is_kept(at, k)]:
            self.zero.difference_update(dropped)

    def has(self, value: int) -> bool:
        """Whether a value has the dimension."""
        return value in self.values

    def at(self, value: int) -> bool:
        """Whether a value that has the dimension is zero in its padding."""
        return value in self.zero

    def _is_kept(self, at: int, k: int) -> bool:
        return self._follows(at, self.program.operations[at].outputs[k])

    def _follows(self, at: int, output: Use) -> bool:
        """Whether the operands make the result zero along each factor of it that is padded.

        The dimension may occur in several factors. An operand is zero only in the padding of those that it has: where
        `x[s]` is broadcast to `[s, t]`, the padding of `t` has copies of `x`.
        """
        op = self.program.operations[at]
        if op.op_class == "source":
            return True
        arrays = op.inputs[_SELECTORS.get(op.primitive, 0) : _INDEXED.get(op.primitive)]
        padded = frozenset(factor for factor in self._padded(at, output) if not _is_cut(op, factor))
        if not padded:
            return True
        having = [use for use in arrays if self._padded(at, use)]
        if op.primitive in MULTIPLYING:
            covered = frozenset[int]().union(*(self._padded(at, use) for use in having))
            return padded <= covered and all(self.at(use.value) for use in having)
        keeping = op.primitive in KEEPING_ZERO and len(arrays) >= (2 if op.primitive in _OF_TWO else 1)
        begun = op.primitive != "loop_carry" or len(arrays) == 2 or bool(op.linear)  # an operand may be a literal
        passing = op.op_class == "boundary" and begun and bool(arrays)
        return (keeping or passing) and all(padded <= self._padded(at, use) and self.at(use.value) for use in arrays)

    def _padded(self, at: int, use: Use) -> frozenset[int]:
        """The padded factors of an operand or a result."""
        return frozenset(factor for dim in use.dims for factor in dim if (at, factor) in self.factors)


_OF_TWO = frozenset(("add", "add_any", "max", "min", "sub", "select_n"))
"""Primitives of two arrays, one of which may be a literal: the program leaves it out, and it may not be zero."""
