"""Rules as text, such as `b s (k g) d, b t k d, b t k d -> b s (k g) d`, and their dimensions' kinds."""

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
"""Per dimension its names, major to minor; empty for a dimension of size 1 without a name."""


class RuleError(AutoshardError):
    """Raised for a rule whose text does not parse, or does not fit its arrays."""


@dataclass(frozen=True)
class Einsum:
    """A parsed rule.

    - `inputs`, `outputs`: each array's dimensions by name.
    - `kinds`: the kind of every dimension that is not `parallel`.
    """

    inputs: tuple[Names, ...]
    outputs: tuple[Names, ...]
    kinds: tuple[tuple[str, FactorKind], ...]

    def __str__(self) -> str:
        return " -> ".join(", ".join(map(_names_text, side)) for side in (self.inputs, self.outputs))

    def batch(self, inputs: Sequence[bool]) -> Einsum:
        """The rule with a new leading dimension for the marked operands and for every result."""
        known = {name for array in (*self.inputs, *self.outputs) for dim in array for name in dim}
        new = next(name for k in range(len(known) + 1) if (name := f"batch{k}") not in known)
        sides = tuple(((new,), *dims) if has else dims for dims, has in zip(self.inputs, inputs, strict=True))
        return Einsum(sides, tuple(((new,), *dims) for dims in self.outputs), self.kinds)

    def sizes(self, what: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> dict[str, int]:
        """The size of every name, from the arrays' shapes.

        **Raises:** `RuleError` if the ranks or the sizes of the shapes contradict the text.
        """
        found: dict[str, int] = {}
        pairs = [
            (f"{side} {k}", names, shape)
            for side, texts, shapes in (("operand", self.inputs, inputs), ("result", self.outputs, outputs))
            for k, (names, shape) in enumerate(_pair(what, side, texts, shapes))
        ]
        for where, names, shape in pairs:
            if len(names) != len(shape):
                raise RuleError(
                    f"The rule of {what} gives {where} {len(names)} dimensions ({_names_text(names)}); it has the shape"
                    f" {list(shape)}."
                )
        dims = [(where, dim, n) for where, names, shape in pairs for dim, n in zip(names, shape, strict=True)]
        for _ in dims:  # a size from one dimension may determine another one
            for where, dim, n in dims:
                _settle(what, where, dim, n, found)
        unknown = sorted({name for _, dim, _ in dims for name in dim} - set(found))
        if unknown:
            raise RuleError(
                f"The rule of {what} does not determine the size of {unknown[0]}: it always appears with another name."
                " Let it appear alone once."
            )
        return found


def parse_rule(text: str, kinds: Mapping[FactorKind, str]) -> Einsum:
    """Parses a rule such as `b s h d, b t h d -> b s h d`.

    **Arguments:**

    - `kinds`: per kind of factor its names, separated by spaces, such as `{"whole": "t d"}`. A name that no result has
      is `whole` unless it is listed.

    **Raises:** `RuleError`.
    """
    left, arrow, right = text.partition("->")
    if not arrow or "->" in right:
        raise RuleError(f"Invalid rule {text!r}: expected operands -> results, such as 'b s h d, b t h d -> b s h d'.")
    before_it = left.split(",") if left.strip() else []  # no operands; an empty right side is one scalar
    sides = [tuple(_dimensions(array, text) for array in side) for side in (before_it, right.split(","))]
    listed: dict[str, FactorKind] = {}
    for kind, names in kinds.items():
        if kind not in get_args(FactorKind):
            raise RuleError(
                f"The kinds of the rule {text!r} must be among {', '.join(get_args(FactorKind))}, got {kind!r}."
            )
        listed.update(dict.fromkeys(names.split(), kind))
    before, after = ({name for array in side for dim in array for name in dim} for side in sides)
    strange = sorted(set(listed) - before - after)
    if strange:
        raise RuleError(f"The rule {text!r} has no dimension {strange[0]}, but lists it as {listed[strange[0]]}.")
    kept = sorted(name for name, kind in listed.items() if name in after and kind not in ("whole", "parallel"))
    if kept:
        raise RuleError(f"The rule {text!r} keeps {kept[0]} in a result, so it must be whole, got {listed[kept[0]]}.")
    unlisted: FactorKind = "whole"
    found: dict[str, FactorKind] = {**dict.fromkeys(before - after, unlisted), **listed}
    return Einsum(sides[0], sides[1], tuple(sorted(found.items())))


def rule_of(einsum: Einsum, what: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Rule:
    """The rule of a parsed text for arrays of these shapes, without costs.

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
            f"{text.strip()!r} in the rule {whole!r} must name dimensions, as in 'b s (k g) d'; 1 is a dimension of"
            " size 1."
        )
    repeated = [name for dim in names for name in dim]
    if len(set(repeated)) < len(repeated):
        raise RuleError(
            f"{text.strip()!r} in the rule {whole!r} names a dimension twice; an array may have each name once."
        )
    return names


def _names_text(names: Names) -> str:
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in names)


def _pair(what: str, side: str, texts: Sequence[Names], shapes: Sequence[Sequence[int]]):
    if len(texts) != len(shapes):
        raise RuleError(f"The rule of {what} has {len(texts)} {side}s, got {len(shapes)}.")
    return zip(texts, shapes, strict=True)


def _settle(what: str, where: str, dim: Sequence[str], n: int, found: dict[str, int]) -> None:
    """Sets the size of a dimension's only unknown name; refuses a size that is not the product of known names."""
    unknown = [name for name in dim if name not in found]
    known = prod(found[name] for name in dim if name in found)
    if len(unknown) == 1 and known and n % known == 0:
        found[unknown[0]] = n // known
    elif (not unknown and known != n) or len(unknown) == 1:
        sizes = ", ".join(f"{name}={found[name]}" for name in dim if name in found)
        raise RuleError(
            f"The rule of {what} has {_names_text((tuple(dim),))} for {where}, whose size is {n}"
            + (
                f", with {sizes} from the dimensions before it."
                if sizes
                else "; a dimension without a name has size 1."
            )
        )
