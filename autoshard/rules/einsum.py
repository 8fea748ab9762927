"""Rules as text: `b s (k g) d, b t k d, b t k d -> b s (k g) d` with names of dimensions, and what splitting each does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import get_args

from autoshard.errors import AutoshardError
from autoshard.rules.rule import Dims, Rule
from costmodels.program.program import Factor, FactorKind

Names = tuple[tuple[str, ...], ...]
"""Per dimension its names, major to minor; none for a dimension of size 1 that has none."""


class RuleError(AutoshardError):
    """A rule's text does not parse, or does not fit the arrays that it is to describe; says which, and what would."""


@dataclass(frozen=True)
class Einsum:
    """A rule's text, taken apart.

    - `inputs`, `outputs`: each array's dimensions by name.
    - `kinds`: what splitting a dimension does, where it is not `parallel`.
    """

    inputs: tuple[Names, ...]
    outputs: tuple[Names, ...]
    kinds: tuple[tuple[str, FactorKind], ...]

    def __str__(self) -> str:
        return " -> ".join(", ".join(map(_written, side)) for side in (self.inputs, self.outputs))

    def batched(self, inputs: Sequence[bool]) -> Einsum:
        """With a new leading dimension for those operands that have one, and for every result."""
        known = {name for array in (*self.inputs, *self.outputs) for dim in array for name in dim}
        new = next(name for k in range(len(known) + 1) if (name := f"batch{k}") not in known)
        sides = tuple(((new,), *dims) if has else dims for dims, has in zip(self.inputs, inputs, strict=True))
        return Einsum(sides, tuple(((new,), *dims) for dims in self.outputs), self.kinds)

    def sizes(self, what: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> dict[str, int]:
        """The size of every name, from the arrays' shapes.

        **Raises:** `RuleError` where the shapes have other ranks than the text, or sizes that contradict it.
        """
        found: dict[str, int] = {}
        pairs = [
            (f"{side} {k}", names, shape)
            for side, texts, shapes in (("operand", self.inputs, inputs), ("result", self.outputs, outputs))
            for k, (names, shape) in enumerate(_paired(what, side, texts, shapes))
        ]
        for where, names, shape in pairs:
            if len(names) != len(shape):
                raise RuleError(
                    f"The rule of {what} gives {where} {len(names)} dimensions ({_written(names)}); it has the shape"
                    f" {list(shape)}."
                )
        dims = [(where, dim, n) for where, names, shape in pairs for dim, n in zip(names, shape, strict=True)]
        for _ in dims:  # what one dimension says may be what another one waits for
            for where, dim, n in dims:
                _settle(what, where, dim, n, found)
        unknown = sorted({name for _, dim, _ in dims for name in dim} - set(found))
        if unknown:
            raise RuleError(
                f"The rule of {what} leaves the size of {unknown[0]} open: it always stands beside another name. Name it"
                " alone somewhere."
            )
        return found


def parsed(text: str, kinds: Mapping[FactorKind, str]) -> Einsum:
    """Text such as `b s h d, b t h d -> b s h d` taken apart.

    **Arguments:**

    - `kinds`: names, separated by spaces, per kind of factor, as `{"whole": "t d"}`. A name that no result has is `whole`
      unless it is listed.

    **Raises:** `RuleError`.
    """
    left, arrow, right = text.partition("->")
    if not arrow or "->" in right:
        raise RuleError(f"{text!r} is no rule; operands -> results is, as in 'b s h d, b t h d -> b s h d'.")
    before_it = left.split(",") if left.strip() else []  # no operands; no name on the right is one scalar
    sides = [tuple(_dimensions(array, text) for array in side) for side in (before_it, right.split(","))]
    listed: dict[str, FactorKind] = {}
    for kind, names in kinds.items():
        if kind not in get_args(FactorKind):
            raise RuleError(
                f"The rule {text!r} has dimensions of kind {kind!r}; {', '.join(get_args(FactorKind))} would do."
            )
        listed.update(dict.fromkeys(names.split(), kind))
    before, after = ({name for array in side for dim in array for name in dim} for side in sides)
    strange = sorted(set(listed) - before - after)
    if strange:
        raise RuleError(f"The rule {text!r} has no dimension {strange[0]}, which is said to be {listed[strange[0]]}.")
    kept = sorted(name for name, kind in listed.items() if name in after and kind not in ("whole", "parallel"))
    if kept:
        raise RuleError(
            f"The rule {text!r} keeps {kept[0]} in a result, so it cannot be {listed[kept[0]]}; whole would do."
        )
    unlisted: FactorKind = "whole"
    found: dict[str, FactorKind] = {**dict.fromkeys(before - after, unlisted), **listed}
    return Einsum(sides[0], sides[1], tuple(sorted(found.items())))


def rule_of(einsum: Einsum, what: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Rule:
    """The rule that a text makes for arrays of these shapes; what it costs is for the caller to say.

    **Raises:** `RuleError`.
    """
    sizes, kinds = einsum.sizes(what, inputs, outputs), dict(einsum.kinds)
    place = {name: i for i, name in enumerate(sizes)}
    factors = tuple(Factor(n, kinds.get(name, "parallel")) for name, n in sizes.items())

    def dims(names: Names) -> Dims:
        return tuple(tuple(place[name] for name in dim) for dim in names)

    return Rule(factors, tuple(map(dims, einsum.inputs)), tuple(map(dims, einsum.outputs)))


def _dimensions(text: str, whole: str) -> Names:
    words = re.findall(r"\([^()]*\)|[^\s()]+|[()]", text)
    names = tuple(tuple(word.strip("()").split()) if word != "1" else () for word in words)
    wrong = [name for dim in names for name in dim if not name.isidentifier()]
    if wrong or any(word in "()" for word in words):
        raise RuleError(
            f"{text.strip()!r} in the rule {whole!r} names no dimensions; 'b s (k g) d' would, and 1 is one of 1."
        )
    repeated = [name for dim in names for name in dim]
    if len(set(repeated)) < len(repeated):
        raise RuleError(
            f"{text.strip()!r} in the rule {whole!r} names a dimension twice; each may be named once an array."
        )
    return names


def _written(names: Names) -> str:
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in names)


def _paired(what: str, side: str, texts: Sequence[Names], shapes: Sequence[Sequence[int]]):
    if len(texts) != len(shapes):
        raise RuleError(f"The rule of {what} has {len(texts)} {side}s; it was given {len(shapes)}.")
    return zip(texts, shapes, strict=True)


def _settle(what: str, where: str, dim: Sequence[str], n: int, found: dict[str, int]) -> None:
    """Notes the size of a dimension's only unknown name; refuses a dimension of known names that is not their product."""
    unknown = [name for name in dim if name not in found]
    known = prod(found[name] for name in dim if name in found)
    if len(unknown) == 1 and known and n % known == 0:
        found[unknown[0]] = n // known
    elif (not unknown and known != n) or len(unknown) == 1:
        sizes = ", ".join(f"{name}={found[name]}" for name in dim if name in found)
        raise RuleError(
            f"The rule of {what} says {_written((tuple(dim),))} of {where}, whose size is {n}"
            + (f", with {sizes} from what stands before it." if sizes else "; a dimension without a name has size 1.")
        )
