"""Loop-invariant code motion, as XLA does it.

XLA moves a loop-invariant equation before the loop unless its result takes more memory than its operands, because the
result is live throughout the loop. A view moves together with an equation that needs it. Loops are planned in that form,
so plans count what the compiled loop keeps live and reads.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from autoshard.tracing.jaxprs import CALLS, needed
from costmodels.program.views import BROADCASTS, PARTS, RENAMES

SHOWING = RENAMES | BROADCASTS | PARTS | {"copy"}
"""Primitives that only move together with an equation that needs them."""
_STAYING = "cond optimization_barrier scan shard_map sharding_constraint while".split()
"""Primitives that never move: other regions, and the user's placements."""


class Split(NamedTuple):
    """A loop's body in two: the equations before the loop, and the rest, which reads the variables `entering`."""

    before: tuple[Any, ...]
    entering: tuple[Any, ...]
    rest: Any


def split(body: Any, fixed: Collection[Any]) -> Split:
    """Moves loop-invariant equations out of a loop's body.

    **Arguments:**

    - `body`: a jaxpr; `fixed`: its loop-invariant variables.
    """
    made_of: dict[Any, frozenset[Any]] = {var: frozenset((var,)) for var in fixed}
    moved: list[Any] = []
    eqns = needed(body)
    for eqn in eqns:
        operands = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        if not operands or any(v not in made_of for v in operands) or not _movable(eqn):
            continue
        sources = frozenset().union(*(made_of[v] for v in operands))
        if eqn.primitive.name in SHOWING:
            made_of.update((var, sources) for var in eqn.outvars)
        elif 0 < _bytes(eqn.outvars) <= _bytes(sources):
            made_of.update((var, frozenset((var,))) for var in eqn.outvars)
            moved.append(eqn)
    if not moved:
        return Split((), (), body)
    wanted = {v for eqn in moved for v in eqn.invars if not isinstance(v, jex.Literal)}
    results = {v for eqn in moved for v in eqn.outvars}
    before: list[Any] = []
    for eqn in reversed(eqns):
        if any(eqn is each for each in moved) or (
            eqn.primitive.name in SHOWING and wanted & {*eqn.outvars} & {*made_of}
        ):
            before.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    own = {id(eqn) for eqn in moved}
    rest = body.replace(eqns=[eqn for eqn in body.eqns if id(eqn) not in own])
    rest = rest.replace(eqns=needed(rest))
    return Split(tuple(before[::-1]), tuple(v for v in _read(rest) if v in results), rest)


def used(jaxpr: Any) -> set[Any]:
    """The variables that a jaxpr's equations or results read."""
    return set(_read(jaxpr))


def _read(jaxpr: Any) -> list[Any]:
    """The variables that equations or results read, once each, in order."""
    atoms = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, jex.Literal)))


def _movable(eqn: Any) -> bool:
    """Whether an equation may move: it has no effects, and its results are arrays of numbers."""
    name = eqn.primitive.name
    inside = any(
        isinstance(each, jex.Jaxpr | jex.ClosedJaxpr) for each in jax.tree_util.tree_leaves(list(eqn.params.values()))
    )
    numbers = all(v.aval.shape and not jnp.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in eqn.outvars)
    return not eqn.effects and numbers and name not in _STAYING and (name in CALLS or not inside)


def _bytes(variables: Collection[Any]) -> float:
    """Bytes of all variables together; scalars count as 0."""
    return sum(
        prod(v.aval.shape) * v.aval.dtype.itemsize
        for v in variables
        if v.aval.shape and hasattr(v.aval.dtype, "itemsize")
    )
