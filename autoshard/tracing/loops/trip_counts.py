"""Trip counts of `while` loops with a counter of known start, step and end.

The condition is split into the terms that must all hold for another iteration. Each comparison of a counter with its end
bounds the trip count. The trip count is the least of these bounds; it is exact if no other term can end the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend import core as jex

from autoshard.tracing.jaxprs import CALLS, INLINED
from costmodels.program.views import BROADCASTS, CAST, IDENTITIES, RENAMES

MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
"""Per comparison the one with its sides exchanged."""
NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
"""Per comparison its negation."""
_SAME = RENAMES | BROADCASTS | IDENTITIES | {CAST}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": max,
    "min": min,
}


@dataclass(frozen=True)
class Rounds:
    """A bound on a loop's trip count, with its counter's start, step and end; `exact` if no other term ends the loop."""

    count: int
    start: int
    step: int
    end: int
    exact: bool


@dataclass(frozen=True)
class _Made:
    """The definition of a variable: a primitive and its operands, with calls inlined."""

    primitive: str
    operands: tuple[Any, ...]


class Scalars:
    """Integers computed from literals alone, evaluated lazily."""

    def __init__(self, literal: Callable[[Any], Any]) -> None:
        self.literal, self.made = literal, {}

    def note(self, primitive: str, operands: Sequence[Any], results: Sequence[int]) -> None:
        """Records the definition of a value, if `number` can evaluate it."""
        if len(results) == 1 and (primitive in _SAME or primitive in _ARITHMETIC):
            self.made[results[0]] = _Made(primitive, tuple(operands))

    def number(self, atom: Any) -> int | None:
        """The integer value of a literal or a value; `None` if it depends on an argument."""
        if not isinstance(atom, int):
            return _to_integer(self.literal(atom))
        made = self.made.get(atom)
        if made is None:
            return None
        found = [self.number(each) for each in made.operands]
        if None in found or not found:
            return None
        return found[0] if made.primitive in _SAME else _ARITHMETIC[made.primitive](*found)  # pyright: ignore


def trip_count(
    params: Any, initial: Callable[[int], int | None], constant: Callable[[int], int | None]
) -> Rounds | None:
    """An upper bound on the trip count of a `while`; `None` if no counter ends it.

    **Arguments:**

    - `params`: the parameters of the equation.
    - `initial`: the first value of a carry by position, if it is known.
    - `constant`: the value of a constant of the condition by position, if it is known.
    """
    loop = _While(params, initial, constant)
    result = loop.test.outvars[0]
    if result.aval.shape:
        return None
    terms = list(_terms(_definitions(loop.test), result, True))
    bounds: list[Rounds] = []
    for name, left, right in (each for each in terms if each is not None):
        for how, counter, end in ((name, left, right), (MIRRORED[name], right, left)):
            bound = loop.bound(how, counter, end)
            if bound is not None:
                bounds.append(replace(bound, exact=len(terms) == 1))
    return min(bounds, key=lambda each: each.count, default=None)


class _While:
    """A `while` equation with the known values of its carries and constants."""

    def __init__(
        self, params: Any, initial: Callable[[int], int | None], constant: Callable[[int], int | None]
    ) -> None:
        self.test, self.body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
        self.test_constants, self.body_constants = params["cond_nconsts"], params["body_nconsts"]
        self.initial, self.constant = initial, constant
        self.made = _definitions(self.body)
        self.place = {var: i for i, var in enumerate(self.test.invars)}

    def bound(self, how: str, counter: Any, end: Any) -> Rounds | None:
        """The trip count after which `counter HOW end` no longer holds; None if that is not known."""
        place = None if isinstance(counter, jex.Literal) else self.place.get(counter)
        if place is None or place < self.test_constants:
            return None
        carry = place - self.test_constants
        limit, start, step = self.number(end), self.initial(carry), self.step_of(carry)
        if limit is None or start is None or not step:
            return None
        count = trips_until(how, start, step, limit)
        return None if count is None else Rounds(count, start, step, limit, exact=False)

    def step_of(self, carry: int) -> int | None:
        """The amount that each iteration adds to a carry."""
        before = self.body.invars[self.body_constants + carry]
        after = self.made.get(self.body.outvars[carry], self.body.outvars[carry])
        if after is before:
            return 0
        if not isinstance(after, _Made) or after.primitive not in ("add", "sub"):
            return None
        left, right = (_resolve_alias(self.made, each) for each in after.operands)
        if left is before and (by := _literal(right)) is not None:
            return by if after.primitive == "add" else -by
        return _literal(left) if right is before and after.primitive == "add" else None

    def number(self, atom: Any) -> int | None:
        """The value of a loop-invariant side of a comparison."""
        place = None if isinstance(atom, jex.Literal) else self.place.get(atom)
        if place is None:
            return _literal(atom)
        if place < self.test_constants:
            return self.constant(place)
        carry = place - self.test_constants
        return self.initial(carry) if self.step_of(carry) == 0 else None


def trips_until(how: str, start: int, step: int, end: int) -> int | None:
    """The number of steps until `counter HOW end` no longer holds; `None` if that never happens.

    **Arguments:**

    - `how`: "lt", "le", "gt", "ge", "eq" or "ne".
    - `start`, `step`: the counter's first value, and the amount that each step adds to it.
    """
    if not getattr(operator, how)(start, end):
        return 0
    if step < 0:
        how, start, step, end = MIRRORED[how], -start, -step, -end
    if how in ("lt", "le"):
        return -((start - end) // step) if how == "lt" else (end - start) // step + 1
    if how == "eq":
        return 1
    return (end - start) // step if how == "ne" and end > start and (end - start) % step == 0 else None


def _terms(known: dict[Any, Any], atom: Any, holds: bool) -> Iterator[tuple[str, Any, Any] | None]:
    """The comparisons that must all hold for `atom` to equal `holds`; `None` for each other term."""
    made = known.get(atom) if not isinstance(atom, jex.Literal) else None
    name = made.primitive if isinstance(made, _Made) else ""
    if isinstance(made, _Made) and name == ("and" if holds else "or"):
        for each in made.operands:
            yield from _terms(known, _resolve_alias(known, each), holds)
    elif isinstance(made, _Made) and name == "not":
        yield from _terms(known, _resolve_alias(known, made.operands[0]), not holds)
    elif isinstance(made, _Made) and name in NEGATED:
        left, right = (_resolve_alias(known, each) for each in made.operands)
        yield (name if holds else NEGATED[name]), left, right
    else:
        yield None


def _definitions(jaxpr: Any, env: dict[Any, Any] | None = None) -> dict[Any, Any]:
    """Per variable its definition, or the variable that it is an alias of; calls are inlined."""
    known: dict[Any, Any] = {}
    env = {} if env is None else env

    def outer(atom: Any) -> Any:
        return atom if isinstance(atom, jex.Literal) else env.get(atom, atom)

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in CALLS:
            inner = next(eqn.params[key] for key in INLINED if key in eqn.params)
            inner = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
            inside = dict(zip(inner.invars, map(outer, eqn.invars), strict=True))
            known |= _definitions(inner, inside)
            env.update(
                (var, inside.get(out, out) if not isinstance(out, jex.Literal) else out)
                for var, out in zip(eqn.outvars, inner.outvars, strict=True)
            )
        elif name in _SAME and eqn.invars and not eqn.outvars[0].aval.shape:
            env[eqn.outvars[0]] = outer(eqn.invars[0])
        elif len(eqn.outvars) == 1:
            known[eqn.outvars[0]] = _Made(name, tuple(map(outer, eqn.invars)))
    known |= {
        var: known.get(seen, seen) if not isinstance(seen, jex.Literal) else seen
        for var, seen in env.items()
        if not isinstance(var, jex.Literal)
    }
    return known


def _resolve_alias(known: dict[Any, Any], atom: Any) -> Any:
    """The variable that an alias stands for."""
    if isinstance(atom, jex.Literal):
        return atom
    made = known.get(atom, atom)
    return atom if isinstance(made, _Made) else made


def _literal(atom: Any) -> int | None:
    return _to_integer(atom.val) if isinstance(atom, jex.Literal) else None


def _to_integer(value: Any) -> int | None:
    array = np.asarray(value)
    return int(array) if array.shape == () and np.issubdtype(array.dtype, np.integer) else None
