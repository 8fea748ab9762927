"""Trip counts of `while` loops with a counter of known start, step and end.

The condition is split into the terms that must all hold for another iteration. Each comparison of a counter with its end
bounds the trip count. The trip count is the least of these bounds; it is exact if no other term can end the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
            return _whole(self.literal(atom))
        made = self.made.get(atom)
        if made is None:
            return None
        found = [self.number(each) for each in made.operands]
        if None in found or not found:
            return None
        return found[0] if made.primitive in _SAME else _ARITHMETIC[made.primitive](*found)  # pyright: ignore


def rounds(params: Any, initial: Callable[[int], int | None], constant: Callable[[int], int | None]) -> Rounds | None:
    """An upper bound on the trip count of a `while`; `None` if no counter ends it.

    **Arguments:**

    - `params`: the parameters of the equation.
    - `initial`: the first value of a carry by position, if it is known.
    - `constant`: the value of a constant of the condition by position, if it is known.
    """
    test, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    known, steps = _definitions(test), _definitions(body)
    if test.outvars[0].aval.shape:
        return None
    place = {var: i for i, var in enumerate(test.invars)}

    def step_of(carry: int) -> int | None:
        """The amount that each iteration adds to a carry."""
        before, after = body.invars[n_body + carry], steps.get(body.outvars[carry], body.outvars[carry])
        if after is before:
            return 0
        if not isinstance(after, _Made) or after.primitive not in ("add", "sub"):
            return None
        left, right = (_seen(steps, each) for each in after.operands)
        if left is before and (by := _literal(right)) is not None:
            return by if after.primitive == "add" else -by
        return _literal(left) if right is before and after.primitive == "add" else None

    def number(atom: Any) -> int | None:
        """The value of a loop-invariant side of a comparison."""
        at = place.get(atom) if not isinstance(atom, jex.Literal) else None
        if at is None:
            return _literal(atom)
        return constant(at) if at < n_test else initial(at - n_test) if step_of(at - n_test) == 0 else None

    terms = list(_terms(known, test.outvars[0], True))
    found: list[Rounds] = []
    for name, left, right in (each for each in terms if each is not None):
        for how, counter, end in ((name, left, right), (MIRRORED[name], right, left)):
            at = place.get(counter, -1) - n_test if not isinstance(counter, jex.Literal) else -1
            if at < 0 or (limit := number(end)) is None or (start := initial(at)) is None:
                continue
            step = step_of(at)
            count = rounds_until(how, start, step, limit) if step else None
            if count is not None and step:
                found.append(Rounds(count, start, step, limit, len(terms) == 1))
    return min(found, key=lambda each: each.count, default=None)


def rounds_until(how: str, start: int, step: int, end: int) -> int | None:
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
            yield from _terms(known, _seen(known, each), holds)
    elif isinstance(made, _Made) and name == "not":
        yield from _terms(known, _seen(known, made.operands[0]), not holds)
    elif isinstance(made, _Made) and name in NEGATED:
        left, right = (_seen(known, each) for each in made.operands)
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


def _seen(known: dict[Any, Any], atom: Any) -> Any:
    """The variable that an alias stands for."""
    if isinstance(atom, jex.Literal):
        return atom
    made = known.get(atom, atom)
    return atom if isinstance(made, _Made) else made


def _literal(atom: Any) -> int | None:
    return _whole(atom.val) if isinstance(atom, jex.Literal) else None


def _whole(value: Any) -> int | None:
    array = np.asarray(value)
    return int(array) if array.shape == () and np.issubdtype(array.dtype, np.integer) else None
