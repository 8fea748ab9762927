"""Loop-invariant code motion, as XLA does it.

XLA moves a loop-invariant equation before the loop unless its result takes more memory than its operands, because the
result is live throughout the loop. A view moves together with an equation that needs it. Loops are planned in that form,
so plans count what the compiled loop keeps live and reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from autoshard.tracing.jaxprs import CALLS, live_equations
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


def hoist(body: Any, fixed: Collection[Any]) -> Split:
    """Moves loop-invariant equations out of a loop's body.

    **Arguments:**

    - `body`: a jaxpr; `fixed`: its loop-invariant variables.
    """
    eqns = live_equations(body)
    moved, invariant = _moved_equations(eqns, fixed)
    if not moved:
        return Split((), (), body)
    rest = body.replace(eqns=[eqn for eqn in body.eqns if eqn not in moved])
    rest = rest.replace(eqns=live_equations(rest))
    results = {v for eqn in moved for v in eqn.outvars}
    entering = tuple(v for v in _variables_read_in_order(rest) if v in results)
    return Split(_with_their_views(eqns, moved, invariant), entering, rest)


def _moved_equations(eqns: Sequence[Any], fixed: Collection[Any]) -> tuple[set[Any], set[Any]]:
    """The equations that move before the loop, without views, and all loop-invariant variables."""
    sources: dict[Any, frozenset[Any]] = {var: frozenset((var,)) for var in fixed}
    moved: set[Any] = set()
    for eqn in eqns:
        operands = _variables(eqn)
        if not operands or any(v not in sources for v in operands) or not _movable(eqn):
            continue
        read = frozenset().union(*(sources[v] for v in operands))
        if eqn.primitive.name in SHOWING:
            sources.update((var, read) for var in eqn.outvars)
        elif 0 < _bytes(eqn.outvars) <= _bytes(read):
            sources.update((var, frozenset((var,))) for var in eqn.outvars)
            moved.add(eqn)
    return moved, set(sources)


def _with_their_views(eqns: Sequence[Any], moved: Collection[Any], invariant: Collection[Any]) -> tuple[Any, ...]:
    """The moved equations in order, with the views that they need."""
    wanted = {v for eqn in moved for v in _variables(eqn)}
    before: list[Any] = []
    for eqn in reversed(eqns):
        is_needed_view = eqn.primitive.name in SHOWING and wanted.intersection(eqn.outvars).intersection(invariant)
        if eqn in moved or is_needed_view:
            before.append(eqn)
            wanted.update(_variables(eqn))
    return tuple(before[::-1])


def _variables(eqn: Any) -> list[Any]:
    """The operands of an equation without literals."""
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


def variables_read(jaxpr: Any) -> set[Any]:
    """The variables that a jaxpr's equations or results read."""
    return set(_variables_read_in_order(jaxpr))


def _variables_read_in_order(jaxpr: Any) -> list[Any]:
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
