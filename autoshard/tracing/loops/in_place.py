"""In-place updates of stacks in scans: the stack becomes a loop carry.

A `scan` that reads a stack slice by slice and returns the updated slices has two stacks. Compilers copy every slice from
one to the other, and finally the result to the buffer of a donated argument. As a loop carry the stack is one array, of
which each iteration reads and writes its own part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from autoshard.tracing.equations import equations, rebuild_jaxpr, variables
from autoshard.tracing.jaxprs import CALLS, INLINED, live_equations, scan_counts
from autoshard.tracing.loops.invariants import SHOWING
from autoshard.tracing.loops.updates import updates_of
from autoshard.tracing.loops.whole_stacks import write_whole_stacks


def carry_in_place(closed: Any, donated: Collection[int] = ()) -> Any:
    """An equivalent closed jaxpr whose scans update their stacks in place.

    **Arguments:**

    - `donated`: positions of the operands that may be overwritten.
    """
    jaxpr = _carry_in_place(closed.jaxpr, {closed.jaxpr.invars[at] for at in donated})
    return closed if jaxpr is closed.jaxpr else jex.ClosedJaxpr(jaxpr, closed.consts)


def _carry_in_place(jaxpr: Any, free: Collection[Any]) -> Any:
    """The jaxpr with its scans in place; `free` are the operands that are not used after it."""
    eqns = live_equations(jaxpr)
    if not any(_has_blocks(eqn) for eqn in eqns):
        return jaxpr
    found: list[Any] = []
    dying = _Dying(jaxpr, eqns, free)
    for eqn in eqns:
        ends = [k for k, v in enumerate(eqn.invars) if dying.at(v)]
        inside = _with_blocks_in_place(eqn, ends)
        found += _scan_in_place(inside, ends) if eqn.primitive.name == "scan" else [inside]
    same = len(found) == len(eqns) and all(a is b for a, b in zip(found, eqns, strict=True))
    return jaxpr if same else rebuild_jaxpr(jaxpr, jaxpr.invars, jaxpr.outvars, found)


def _has_blocks(eqn: Any) -> bool:
    return eqn.primitive.name in (*CALLS, "scan", "while", "cond")


class _Dying:
    """Lookup of variables whose only use may overwrite them: made in this jaxpr, or free."""

    def __init__(self, jaxpr: Any, eqns: Sequence[Any], free: Collection[Any]) -> None:
        atoms = [*(v for eqn in eqns for v in eqn.invars), *jaxpr.outvars]
        self.uses = Counter(v for v in atoms if not isinstance(v, jex.Literal))
        self.free = free
        self.made_by = {v: eqn for eqn in eqns for v in eqn.outvars}

    def at(self, atom: Any) -> bool:
        if isinstance(atom, jex.Literal) or self.uses[atom] != 1:
            return False
        eqn = self.made_by.get(atom)
        if eqn is None:
            return atom in self.free
        return self.at(eqn.invars[0]) if eqn.primitive.name in SHOWING and eqn.invars else True


def _with_blocks_in_place(eqn: Any, ends: Sequence[int]) -> Any:
    """An equation with its inner jaxprs in place; the operands at `ends` are not used after it."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        key = next(key for key in INLINED if key in params)
        return _with_params(eqn, {key: _block(params[key], ends)})
    if name == "scan":
        constants, _ = scan_counts(params)
        return _with_params(eqn, {"jaxpr": _block(params["jaxpr"], range(constants, len(eqn.invars)))})
    if name == "while":
        tested, constants = params["cond_nconsts"], params["body_nconsts"]
        return _with_params(
            eqn, {"body_jaxpr": _block(params["body_jaxpr"], range(constants, len(eqn.invars) - tested))}
        )
    if name == "cond":
        inside = [k - 1 for k in ends if k]
        branches = tuple(_block(each, inside) for each in params["branches"])
        same = all(a is b for a, b in zip(branches, params["branches"], strict=True))
        return eqn if same else _with_params(eqn, {"branches": branches})
    return eqn


def _block(inner: Any, free: Collection[int]) -> Any:
    if isinstance(inner, jex.ClosedJaxpr):
        return carry_in_place(inner, free)
    return _carry_in_place(inner, {inner.invars[at] for at in free}) if isinstance(inner, jex.Jaxpr) else inner


def _with_params(eqn: Any, params: dict[str, Any]) -> Any:
    same = all(eqn.params[key] is value for key, value in params.items())
    return eqn if same else eqn.replace(params={**eqn.params, **params})


def _scan_in_place(eqn: Any, ends: Sequence[int]) -> list[Any]:
    """A scan with the stacks that it updates among its carries, after the equations that make its iteration numbers."""
    constants, carries = scan_counts(eqn.params)
    pairs = _pairs(eqn, ends)
    if not pairs:
        return [eqn]
    length = eqn.params["length"]
    closed = write_whole_stacks(eqn.params["jaxpr"], pairs, (length,))
    body, first = closed.jaxpr, constants + carries
    taken, given = ([each[side] for each in pairs] for side in (0, 1))
    slices = [k for k in range(first, len(eqn.invars)) if k not in taken]
    piles = [k for k in range(carries, len(eqn.outvars)) if k not in given]
    order, back = [*range(first), *taken, *slices], [*range(carries), *given, *piles]
    inner = rebuild_jaxpr(
        body, [*(body.invars[k] for k in order), body.invars[-1]], [body.outvars[k] for k in back], body.eqns
    )
    rounds, (numbers,) = equations(lambda: lax.iota(jnp.int32, length), [], eqn.source_info)
    params = {
        **eqn.params,
        "jaxpr": jex.ClosedJaxpr(inner, closed.consts),
        "num_consts": constants,
        "num_carry": carries + len(pairs),
    }
    scan = eqn.replace(
        invars=[*(eqn.invars[k] for k in order), numbers], outvars=[eqn.outvars[k] for k in back], params=params
    )
    return [*rounds, scan]


def _pairs(eqn: Any, ends: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of positions: a stacked operand, and the stacked result that takes its buffer.

    A result of partial updates takes its operand's buffer; this costs one copy if the operand is used afterwards. A
    result whose slices are written whole takes the buffer of an operand that it is computed from and that ends here.
    """
    closed, (constants, carries) = eqn.params["jaxpr"], scan_counts(eqn.params)
    body = closed.jaxpr
    operands = {body.invars[k]: k for k in range(constants + carries, len(eqn.invars))}
    pairs: dict[int, int] = {}
    results = [k for k in range(carries, len(eqn.outvars)) if not isinstance(body.outvars[k], jex.Literal)]
    for result in results:
        first, chain = updates_of(body, body.outvars[result])
        operand = operands.get(first) if not isinstance(first, jex.Literal) else None
        if chain and operand is not None and operand not in pairs and _is_stack(eqn, operand):
            pairs[operand] = result
    for result in results:
        if result not in pairs.values():
            sources = _sources(body, body.outvars[result])
            operand = next(
                (operands[v] for v in operands if v in sources and _replaces(eqn, operands[v], result)), None
            )
            if operand is not None and operand in ends and operand not in pairs:
                pairs[operand] = result
    return list(pairs.items())


def _is_stack(eqn: Any, operand: int) -> bool:
    """Whether an operand has numeric elements, in slices that are not scalars."""
    aval = eqn.params["jaxpr"].jaxpr.invars[operand].aval
    return bool(aval.shape) and prod(aval.shape) > 0 and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _replaces(eqn: Any, operand: int, result: int) -> bool:
    """Whether a result may take an operand's buffer."""
    body = eqn.params["jaxpr"].jaxpr
    given, made = body.invars[operand], body.outvars[result]
    same = (given.aval.shape, given.aval.dtype) == (made.aval.shape, made.aval.dtype)
    return same and made is not given and _is_stack(eqn, operand)


def _sources(jaxpr: Any, variable: Any) -> set[Any]:
    """A variable and everything that it depends on, directly or indirectly."""
    found = {variable}
    for eqn in reversed(jaxpr.eqns):
        if not found.isdisjoint(eqn.outvars):
            found |= variables(eqn)
    return found
