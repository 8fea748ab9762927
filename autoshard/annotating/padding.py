"""Padding of dimensions that the mesh axes do not divide: which dimensions belong together, and the padded program.

A *padded dimension* is one dimension of the function, such as the heads, wherever it occurs: in arguments, intermediates,
loop carries and merged dimensions. It is found from one occurrence by following the factors of the sharding rules. All its
occurrences are padded together, to the same size, so that no operation sees two sizes.

What lies in the padding never reaches a result. Arguments are padded with zeros. A reduction over padded elements needs a
neutral value there (`autoshard.rules.padding`). Where the analysis cannot show that the value is there already, emission
masks the operand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.rules.padding import ACCEPTING, KEEPING_ZERO, LOOKED_UP, MULTIPLYING, NEUTRAL, Fill
from autoshard.tracing.blocks import Traced
from costmodels.program.program import Factor, Operation, Program, Use

_STRUCTURAL = ("boundary", "source", "sink")
_SELECTORS = {"select_n": 1}
"""The number of leading operands that choose among the others."""
_INDEXED = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
"""Primitives whose operands after the first so many are indices."""


@dataclass(frozen=True)
class Padding:
    """The padding of one dimension of a program, named by one of its occurrences.

    **Attributes:**

    - `value`, `dim`: a value of the program and a dimension of it.
    - `size`, `padded`: the size without and with padding.
    - `inner`: how many elements of the value's dimension one element of the padded dimension spans: the head size for heads
      in a dimension that merges heads and head size.
    """

    value: int
    dim: int
    size: int
    padded: int
    inner: int = 1


@dataclass(frozen=True)
class Mask:
    """A mask of one operand: along a factor of the operation, the padded elements get a neutral value."""

    factor: int
    size: int
    padded: int
    inner: int
    fill: Fill


@dataclass
class Occurrences:
    """All occurrences of one dimension: in values and in the factors of operations.

    `values` maps (value, dimension) and `factors` maps (operation, factor) to the number of elements that one element spans.
    `refusal` says why the dimension cannot be padded; it is empty if it can.
    """

    size: int
    values: dict[tuple[int, int], int] = field(default_factory=dict)
    factors: dict[tuple[int, int], int] = field(default_factory=dict)
    refusal: str = ""

    def overlaps(self, other: Occurrences) -> bool:
        """Whether both occur in one dimension of a value or in one factor."""
        return not self.values.keys().isdisjoint(other.values) or not self.factors.keys().isdisjoint(other.factors)

    def padding(self, padded: int) -> Padding:
        """The padding of this dimension to a size, named by its first occurrence."""
        (value, dim), inner = min(self.values.items())
        return Padding(value, dim, self.size, padded, inner)


def occurrences_of(program: Program, padding: Padding) -> Occurrences:
    """The occurrences of the dimension that a padding names."""
    found = Occurrences(padding.size)
    _follow(program, found, [(padding.value, padding.dim, padding.inner)])
    return found


def dimensions_of(program: Program, operations: Iterable[int] | None = None) -> list[Occurrences]:
    """The dimensions of some operations, each once, in program order; by default those of the matmuls."""
    found: list[Occurrences] = []
    known: set[tuple[int, int]] = set()
    for at in operations if operations is not None else (at for at, _ in program.matmuls()):
        for k, factor in enumerate(program.operations[at].factors):
            if (at, k) in known or factor.size < 2 or factor.kind not in ("parallel", "sum"):
                continue
            each = Occurrences(factor.size)
            _follow_factor(program, each, at, k)
            found.append(each)
            known |= {
                place for place, inner in each.factors.items() if inner == 1 and _spans(program, place, each.size)
            }
    return found


def _spans(program: Program, place: tuple[int, int], size: int) -> bool:
    operation, factor = place
    return program.operations[operation].factors[factor].size == size


# --- occurrences


def _follow_factor(program: Program, found: Occurrences, operation: int, factor: int) -> None:
    """Adds all occurrences of a factor of an operation."""
    op = program.operations[operation]
    places = [(use.value, dim, inner) for use in _uses(op) for dim, inner in _dims_with(op, use, factor, 1)]
    _follow(program, found, places)


def _follow(program: Program, found: Occurrences, places: Sequence[tuple[int, int, int]]) -> None:
    """Follows a dimension from some occurrences in values through all operations; stops at the first refusal."""
    waiting = list(places)
    while waiting and not found.refusal:
        value, dim, inner = waiting.pop()
        if (value, dim) in found.values:
            if found.values[value, dim] != inner:
                found.refusal = f"it occurs twice in dimension {dim} of {program.values[value].name}"
            continue
        found.values[value, dim] = inner
        for at, use in _uses_of(program, value):
            waiting += _enter(program, found, at, use.dims[dim], inner)


def _enter(
    program: Program, found: Occurrences, at: int, factors: Sequence[int], inner: int
) -> list[tuple[int, int, int]]:
    """Registers the occurrence in a dimension of an operation; the occurrences in values that follow from it."""
    op = program.operations[at]
    part = _factor_at(op, factors, inner, found.size)
    if part is None:
        found.refusal = found.refusal or f"{op.name} cuts through it"
        return []
    factor, span = part
    if (at, factor) in found.factors:
        if found.factors[at, factor] != span:
            found.refusal = found.refusal or f"it occurs twice in one dimension of {op.name}"
        return []
    found.factors[at, factor] = span
    found.refusal = found.refusal or _refusal(op, op.factors[factor])
    return [(use.value, dim, each) for use in _uses(op) for dim, each in _dims_with(op, use, factor, span)]


def _refusal(op: Operation, factor: Factor) -> str:
    """The reason why an operation does not accept padding along a factor; empty if it does."""
    if op.op_class in _STRUCTURAL:
        return "" if factor.kind == "parallel" else f"it is the stack of the loop at {op.name}"
    if op.primitive not in ACCEPTING:
        return f"{op.name} does not accept padding"
    if factor.kind == "parallel" or (factor.kind == "sum" and op.primitive in LOOKED_UP):
        return ""
    neutral = op.primitive in NEUTRAL and factor.kind not in ("gathered", "exchanged", "whole")
    return "" if neutral else f"{op.name} does not accept padding along a dimension of kind {factor.kind}"


def _uses(op: Operation) -> tuple[Use, ...]:
    return (*op.inputs, *op.outputs)


def _uses_of(program: Program, value: int) -> Iterable[tuple[int, Use]]:
    """The operations that make or read a value, with the use."""
    if value in program.producers:
        at, k = program.producers[value]
        yield at, program.operations[at].outputs[k]
    for at, k in program.consumers.get(value, ()):
        yield at, program.operations[at].inputs[k]


def _dims_with(op: Operation, use: Use, factor: int, inner: int) -> Iterable[tuple[int, int]]:
    """The dimensions of a use that contain a factor, and how many elements of each one element of the factor's part spans."""
    for dim, factors in enumerate(use.dims):
        if factor in factors:
            after = factors[factors.index(factor) + 1 :]
            span = inner
            for each in after:
                span *= op.factors[each].size
            yield dim, span


def _factor_at(op: Operation, factors: Sequence[int], inner: int, size: int) -> tuple[int, int] | None:
    """The factor that contains a part of a dimension, and the span of one element there; `None` if the part is cut."""
    for factor in reversed(factors):
        whole = op.factors[factor].size
        if inner >= whole and inner % whole == 0:
            inner //= whole
        elif whole % (inner * size) == 0:
            return factor, inner
        else:
            return None
    return None


# --- the padded program


def pad_program(program: Program, paddings: Sequence[Padding]) -> Program:
    """The program with longer dimensions; the paddings must not overlap."""
    shapes = {value: list(array.shape) for value, array in enumerate(program.values)}
    factors = {at: list(op.factors) for at, op in enumerate(program.operations)}
    for padding in paddings:
        found = occurrences_of(program, padding)
        for value, dim in found.values:
            shapes[value][dim] = shapes[value][dim] // padding.size * padding.padded
        for at, k in found.factors:
            old = factors[at][k]
            factors[at][k] = Factor(old.size // padding.size * padding.padded, old.kind)
    return dataclasses.replace(
        program,
        values=tuple(dataclasses.replace(array, shape=tuple(shapes[v])) for v, array in enumerate(program.values)),
        operations=tuple(dataclasses.replace(op, factors=tuple(factors[i])) for i, op in enumerate(program.operations)),
    )


def unpadded_program(program: Program, paddings: Sequence[Padding]) -> Program:
    """The program without the paddings: the inverse of `pad_program`."""
    return pad_program(program, [dataclasses.replace(each, size=each.padded, padded=each.size) for each in paddings])


def paddings_by_value(program: Program, paddings: Sequence[Padding]) -> dict[int, tuple[Padding, ...]]:
    """The paddings of each value of a padded program, each named by its occurrence there."""
    found: dict[int, tuple[Padding, ...]] = {}
    for padding in paddings:
        occurrences = occurrences_of(program, dataclasses.replace(padding, size=padding.padded))
        for (value, dim), inner in occurrences.values.items():
            here = dataclasses.replace(padding, value=value, dim=dim, inner=inner)
            found[value] = (*found.get(value, ()), here)
    return found


def sizes_of(paddings: Sequence[Padding]) -> list[tuple[int, int, int, int]]:
    """The padded dimensions of an array, with their sizes."""
    return sorted((each.dim, each.inner, each.size, each.padded) for each in paddings)


def unpadded_shape(shape: Sequence[int], paddings: Sequence[Padding]) -> tuple[int, ...]:
    """The shape of an array without its padding."""
    found = list(shape)
    for each in paddings:
        found[each.dim] = found[each.dim] // each.padded * each.size
    return tuple(found)


def pad_traced(traced: Traced, paddings: Sequence[Padding]) -> Traced:
    """A traced function with longer dimensions in its program, and the masks that emission needs."""
    if not paddings:
        return traced
    masks = masks_of(traced.program, paddings)
    program = _with_masks(pad_program(traced.program, paddings), masks)
    return dataclasses.replace(traced, program=program, masks=masks)


def _with_masks(program: Program, masks: Mapping[tuple[int, int], Sequence[Mask]]) -> Program:
    """The program with the masked operands of each operation, for its cost."""
    masked: dict[int, tuple[int, ...]] = {}
    for (at, operand), each in sorted(masks.items()):
        masked[at] = (*masked.get(at, ()), *[operand] * len(each))
    operations = (dataclasses.replace(op, masked=masked.get(i, ())) for i, op in enumerate(program.operations))
    return dataclasses.replace(program, operations=tuple(operations))


# --- masks


def masks_of(program: Program, paddings: Sequence[Padding]) -> Mapping[tuple[int, int], tuple[Mask, ...]]:
    """Per (operation, operand) the masks that reductions over padded dimensions need; `program` is without padding."""
    found: dict[tuple[int, int], tuple[Mask, ...]] = {}
    for padding in paddings:
        occurrences = occurrences_of(program, padding)
        zeros = _zeros(program, occurrences)
        for (at, factor), inner in occurrences.factors.items():
            op = program.operations[at]
            fill = NEUTRAL.get(op.primitive)
            if fill is None or op.factors[factor].kind == "parallel" or op.op_class in _STRUCTURAL:
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
        padded = self._padded(at, output)
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
