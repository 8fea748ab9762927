"""Padding of dimensions that the mesh axes do not divide: which dimensions belong together, and the padded program.

A *padded dimension* is one dimension of the function, such as the heads, wherever it occurs: in arguments, intermediates,
loop carries and merged dimensions. It is found from one occurrence by following the factors of the sharding rules. All its
occurrences are padded together, to the same size, so that no operation sees two sizes.

`autoshard.annotating.masks` keeps what lies in the padding from every result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autoshard.rules.padding import ACCEPTING, BY_POSITION, LOOKED_UP, NEUTRAL
from costmodels.program.program import Factor, Operation, Program, Use

STRUCTURAL = ("boundary", "source", "sink")
"""Classes of operations that pass arrays on, and compute nothing."""


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
        if program.values[value].dtype.startswith("key<"):
            found.refusal = f"{program.values[value].name} has random keys"
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
    found.refusal = found.refusal or _refusal(op, factor, found.size * span)
    return [(use.value, dim, each) for use in _uses(op) for dim, each in _dims_with(op, use, factor, span)]


def _refusal(op: Operation, at: int, extent: int) -> str:
    """The reason why an operation does not accept padding along a factor; empty if it does.

    `extent`: the elements of the factor that the whole dimension spans.
    """
    factor = op.factors[at]
    if op.op_class in STRUCTURAL:
        return "" if factor.kind == "parallel" else f"it is the stack of the loop at {op.name}"
    if factor.kind == "whole":
        alone = all(dim == (at,) for use in _uses(op) for dim in use.dims if at in dim)
        return "" if alone else f"{op.name} merges it with others and cannot be split along it"
    if op.primitive in BY_POSITION and factor.size != extent:
        return f"{op.name} counts positions in a dimension that would have padding inside"
    if op.primitive not in ACCEPTING:
        return f"{op.name} does not accept padding"
    if factor.kind == "parallel" or (factor.kind in ("sum", "or") and op.primitive in LOOKED_UP):
        return ""
    if factor.kind == "exchanged":
        return ""
    neutral = op.primitive in NEUTRAL and factor.kind != "gathered"
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
            factors = _in_memory(op, factors)
            after = factors[factors.index(factor) + 1 :]
            span = inner
            for each in after:
                span *= op.factors[each].size
            yield dim, span


def _factor_at(op: Operation, factors: Sequence[int], inner: int, size: int) -> tuple[int, int] | None:
    """The factor that contains a part of a dimension, and the span of one element there; `None` if the part is cut."""
    for factor in reversed(_in_memory(op, factors)):
        whole = op.factors[factor].size
        if inner >= whole and inner % whole == 0:
            inner //= whole
        elif whole % (inner * size) == 0:
            return factor, inner
        else:
            return None
    return None


def _in_memory(op: Operation, factors: Sequence[int]) -> Sequence[int]:
    """The factors of a dimension, major to minor; a dimension of equal parts has the number of parts last."""
    return sorted(factors, key=lambda each: op.factors[each].kind == "exchanged")


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
