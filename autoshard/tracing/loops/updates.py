"""In-place updates: the operand that a result of a jaxpr was before parts of it were overwritten."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.extend import core as jex

from autoshard.tracing.jaxprs import CALLS, callee, is_rematerialised, scan_counts
from search.memory.views import IN_PLACE


class Update(NamedTuple):
    """An equation that writes into an operand, or passes it to a loop, branch or call that does, by positions."""

    eqn: Any
    operand: int
    result: int


def updates_of(jaxpr: Any, variable: Any) -> tuple[Any, list[Update]]:
    """The variable or literal that a variable was before any update, and the updates since, in order."""
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    found: list[Update] = []
    while not isinstance(variable, jex.Literal) and (eqn := made_by.get(variable)) is not None:
        result = eqn.outvars.index(variable)
        operand = _updated_operand(eqn, result)
        if operand is None:
            break
        found.append(Update(eqn, operand, result))
        variable = eqn.invars[operand]
    return variable, found[::-1]


def is_updated(jaxpr: Any, operand: int, result: int) -> bool:
    """Whether a result is an operand, possibly with parts overwritten."""
    return updates_of(jaxpr, jaxpr.outvars[result])[0] is jaxpr.invars[operand]


def _updated_operand(eqn: Any, result: int) -> int | None:
    """The position of the operand that an equation's result is an update of."""
    name, params = eqn.primitive.name, eqn.params
    if name in IN_PLACE:
        return 0
    if name == "scan":
        constants, carries = scan_counts(params)
        at = constants + result
        return at if result < carries and is_updated(params["jaxpr"].jaxpr, at, result) else None
    if name == "while":
        tested, constants = params["cond_nconsts"], params["body_nconsts"]
        read = {v for each in params["cond_jaxpr"].jaxpr.eqns for v in each.invars if not isinstance(v, jex.Literal)}
        unread = params["cond_jaxpr"].jaxpr.invars[tested + result] not in read
        inside = params["body_jaxpr"].jaxpr
        return tested + constants + result if unread and is_updated(inside, constants + result, result) else None
    if name == "cond":
        return _common_update([each.jaxpr for each in params["branches"]], result)
    if name in CALLS and not is_rematerialised(eqn):
        inner = callee(eqn)[0]
        first = updates_of(inner, inner.outvars[result])[0]
        return inner.invars.index(first) if first in inner.invars else None
    return None


def _common_update(branches: list[Any], result: int) -> int | None:
    """The operand of a `cond` that every branch updates, if there is one."""
    firsts = [(each, updates_of(each, each.outvars[result])[0]) for each in branches]
    if any(first not in each.invars for each, first in firsts):
        return None
    positions = {each.invars.index(first) for each, first in firsts}
    return 1 + positions.pop() if len(positions) == 1 else None
