"""The body of a Pallas kernel: its uses of the grid's steps, the state it keeps between them, and its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
from jax.extend import core as jex

from autoshard.rules.kernels.references import Lookup, Source, is_whole, lookup

_INLINED = ("jit", "pjit", "closed_call", "core_call")
_BETWEEN_CHIPS = ("get_barrier_semaphore", "axis_index", "psum", "ppermute", "all_gather")
_ELEMENTWISE = frozenset(
    """
    add sub mul div max min exp exp2 log log1p expm1 tanh logistic pow integer_pow sqrt rsqrt erf sin cos neg abs select_n
    reduce_sum reduce_max reduce_min cumsum
    """.split()
)
"""Primitives that count one FLOP for each element of their largest array."""


Firsts = frozenset[tuple[int, int]]
"""Conditions on a step, all of which hold: a grid dimension is at the first step of each group of so many; 0 for all steps."""


@dataclass
class Body:
    """The use that a kernel's body makes of the steps of its grid.

    - `uses`: per grid dimension, the primitive that computes with its step.
    - `periods`: per grid dimension, the numbers by which its step is divided for a remainder; these uses are not in `uses`.
    - `resets`: per reference, the steps at which all of it is overwritten before it is read.
    """

    uses: dict[int, str] = field(default_factory=dict)
    periods: dict[int, set[int]] = field(default_factory=dict)
    lookups: list[Lookup] = field(default_factory=list)
    resets: dict[int, Firsts] = field(default_factory=dict)
    blocker: str = ""


def read_body(jaxpr: Any, axes: Sequence[int], tables: int) -> Body:
    """The reading of a kernel's body.

    **Arguments:**

    - `axes`: the grid dimension of each `program_id` axis; dimensions that `vmap` has added have none.
    - `tables`: the number of tables, which are the first operands of the body.
    """
    found = Body()
    _read(jaxpr, {}, {v: i for i, v in enumerate(jaxpr.invars[:tables])}, axes, found)
    found.resets = _find_resets(jaxpr, axes)
    return found


def _read(jaxpr: Any, steps: Mapping[Any, int], tables: Mapping[Any, int], axes: Sequence[int], found: Body) -> None:
    """Reads a jaxpr in which `steps` are steps of the grid and `tables` are tables."""
    steps = dict(steps)
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "program_id":
            steps[eqn.outvars[0]] = axes[eqn.params["axis"]]
        elif name == "num_programs":
            found.uses.setdefault(axes[eqn.params["axis"]], name)
        elif (period := _remainder(eqn, steps)) is not None:
            found.periods.setdefault(period[0], set()).add(period[1])
        elif name == "get" and eqn.invars[0] in tables:
            table, rank = tables[eqn.invars[0]], len(eqn.invars[0].aval.shape)
            read, source = lookup(eqn, table, rank, lambda atom: _source(steps, atom))
            found.lookups.append(read)
            found.uses |= {step: "an index" for step in source.direct if step not in found.uses}
        else:
            _read_other(eqn, steps, tables, axes, found)


def _remainder(eqn: Any, steps: Mapping[Any, int]) -> tuple[int, int] | None:
    """The grid dimension and the number of an equation that divides a step by a number for the remainder."""
    if eqn.primitive.name != "rem":
        return None
    step, number = eqn.invars
    if isinstance(step, jex.Literal) or step not in steps or not isinstance(number, jex.Literal):
        return None
    return steps[step], int(number.val)


def _source(steps: Mapping[Any, int], atom: Any) -> Source:
    if isinstance(atom, jex.Literal) or atom not in steps:
        return Source()
    return Source(steps[atom], frozenset({steps[atom]}))


def _read_other(
    eqn: Any, steps: Mapping[Any, int], tables: Mapping[Any, int], axes: Sequence[int], found: Body
) -> None:
    name = eqn.primitive.name
    if name in _BETWEEN_CHIPS or (
        name == "dma_start" and jax.tree.unflatten(eqn.params["tree"], eqn.invars)[-1] is not None
    ):
        found.blocker = f"it communicates between chips ({name})"
    if name.startswith("prng_"):
        found.blocker = f"it draws random numbers ({name})"
    inner = list(inner_jaxprs(eqn))
    passed: Sequence[Any] = ()
    if inner and name in _INLINED:
        passed = eqn.invars
    if inner and name == "cond":
        passed = eqn.invars[1:]
    for atom in eqn.invars[: len(eqn.invars) - len(passed)]:
        if isinstance(atom, jex.Literal):
            continue
        if atom in steps:
            found.uses.setdefault(steps[atom], f"`{name}`")
        if atom in tables:  # read in a way that is not followed
            found.lookups.append(Lookup(tables[atom], (None,) * len(atom.aval.shape)))
    for jaxpr in inner:
        pairs = [(v, a) for v, a in zip(jaxpr.invars, passed, strict=False) if not isinstance(a, jex.Literal)]
        within = {v: steps[a] for v, a in pairs if a in steps}
        _read(jaxpr, within, {v: tables[a] for v, a in pairs if a in tables}, axes, found)


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    yield from (each.jaxpr if isinstance(each, jex.ClosedJaxpr) else each for each in leaves if _is_jaxpr(each))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)


# --- state between steps


def _find_resets(jaxpr: Any, axes: Sequence[int]) -> dict[int, Firsts]:
    """Per reference of the body that is reset, the steps at which it is.

    The first access of the reference overwrites all of it, at every step or under the condition that steps are the first.
    """
    place = {v: i for i, v in enumerate(jaxpr.invars)}
    conditions = _Conditions(axes)
    seen: set[int] = set()
    found: dict[int, Firsts] = {}
    for eqn in jaxpr.eqns:
        conditions.note(eqn)
        for ref in dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal) and v in place):
            if place[ref] not in seen and (when := _reset_of(jaxpr, eqn, ref, conditions.known)) is not None:
                found[place[ref]] = when
            seen.add(place[ref])
    return found


class _Conditions:
    """The booleans of a body that hold if and only if steps are the first ones."""

    def __init__(self, axes: Sequence[int]) -> None:
        self.axes = axes
        self.steps: dict[Any, tuple[int, int]] = {}
        self.known: dict[Any, Firsts] = {}

    def note(self, eqn: Any) -> None:
        """Takes in an equation."""
        name = eqn.primitive.name
        if name == "program_id":
            self.steps[eqn.outvars[0]] = self.axes[eqn.params["axis"]], 0
        elif (period := _remainder(eqn, {v: g for v, (g, n) in self.steps.items() if not n})) is not None:
            self.steps[eqn.outvars[0]] = period
        elif (found := self._condition(eqn)) is not None:
            self.known[eqn.outvars[0]] = found

    def _condition(self, eqn: Any) -> Firsts | None:
        name = eqn.primitive.name
        variables = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        if name == "eq" and len(variables) == 1:
            zero = all(v.val == 0 for v in eqn.invars if isinstance(v, jex.Literal))
            return frozenset({self.steps[variables[0]]}) if zero and variables[0] in self.steps else None
        if name not in ("convert_element_type", "and") or len(variables) < len(eqn.invars):
            return None
        known = [self.known[v] for v in variables if v in self.known]
        return frozenset().union(*known) if len(known) == len(variables) else None


def _reset_of(jaxpr: Any, eqn: Any, ref: Any, first: Mapping[Any, Firsts]) -> Firsts | None:
    """The steps at which an equation overwrites all of a reference without reading it, if it does."""
    if _overwrites(jaxpr, eqn, ref):
        return frozenset()
    if eqn.primitive.name != "cond" or isinstance(eqn.invars[0], jex.Literal):
        return None
    when = first.get(eqn.invars[0])
    branches = [each.jaxpr for each in eqn.params["branches"]]
    if when is None or len(branches) != 2:
        return None
    at = list(eqn.invars[1:]).index(ref)
    idle, acting = (_accesses(branch, branch.invars[at]) for branch in branches)
    return when if not idle and acting and _overwrites(branches[1], acting[0], branches[1].invars[at]) else None


def _accesses(jaxpr: Any, ref: Any) -> list[Any]:
    return [eqn for eqn in jaxpr.eqns if any(v is ref for v in eqn.invars)]


def _overwrites(jaxpr: Any, eqn: Any, ref: Any) -> bool:
    """Whether an equation of a jaxpr writes all of a reference, and nothing reads what was there."""
    if eqn.primitive.name != "swap" or eqn.invars[0] is not ref or not is_whole(eqn, 2):
        return False
    (before,) = eqn.outvars
    return not any(v is before for each in (*jaxpr.eqns, jaxpr) for v in _reads(each))


def _reads(each: Any) -> Sequence[Any]:
    """The atoms that an equation reads, or that a jaxpr returns."""
    return each.outvars if isinstance(each, jex.Jaxpr) else each.invars


def is_unused(variable: Any) -> bool:
    """Whether a result is marked as one that no equation reads."""
    return type(variable).__name__ == "DropVar"


# --- FLOPs


def count_flops(jaxpr: Any) -> float:
    """The FLOPs of one step of a kernel: of a condition the branch with most, of a `while` one iteration."""
    return sum(map(_flops_of, jaxpr.eqns))


def _flops_of(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(shape[i] for i in summed)
    if name in _ELEMENTWISE:
        return float(max(prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars)))
    inner = [count_flops(each) for each in inner_jaxprs(eqn)]
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    return max(inner, default=0.0) if name == "cond" else sum(inner)


def has_matmul(jaxpr: Any) -> bool:
    """Whether a kernel runs on the matrix unit."""
    return any(eqn.primitive.name == "dot_general" or any(map(has_matmul, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
