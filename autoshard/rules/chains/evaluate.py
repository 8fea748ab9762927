"""The equations of a chain of grouped matmuls on rows, columns and groups of any number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

ROWS, HIDDEN, MADE, INDEX = "rows", "hidden", "made", "index"
"""Parts of operands with rows: `[m,e]`; `[m,f]` and `[m,n]` of elementwise work; `[m,1]`, numbers of tokens."""
TOKENS, MATRIX, LAST, SIZES, SCALAR = "tokens", "matrix", "last", "sizes", "scalar"
"""Parts of the other operands: `[t,e]`, `[g,e,f]`, `[g,f,n]`, `[g]`, `[]`."""
OFFSET = "offset"
"""The part of arrays `[m,n]` that are added to results."""
HIDDEN_TABLE, MADE_TABLE, OFFSET_TABLE = "hidden table", "made table", "offset table"
"""Arrays `[g,f]`, `[g,n]` and `[g,n]` from whose rows those of `HIDDEN`, `MADE` and `OFFSET` are gathered, by an `INDEX`."""
BY_ROW = (ROWS, HIDDEN, MADE, OFFSET, INDEX)
OFFSETS = (OFFSET, OFFSET_TABLE)
"""Parts that a chain adds to its results: once, if the hidden columns are split, and to rows of no group, too."""


def evaluate(jaxpr: Any, operands: Sequence[Any], count: Any = None, gathered: Any = None) -> Any:
    """The result of a chain's equations.

    **Arguments:**

    - `count`: the number of rows, from the first one on, that belong to the groups; all by default. The others make zeros.
    - `gathered`: the rows that the chain gathers from those of tokens. With them the result is the rows that it would add.
    """
    known = dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    takes = equation_of(jaxpr, "gather")
    for eqn in jaxpr.eqns:
        if gathered is not None and eqn is takes:
            known[eqn.outvars[0]] = gathered
            continue
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "gather":  # columns may be split
            known[eqn.outvars[0]] = eqn.primitive.bind(*values, **eqn.params | {"slice_sizes": (1, values[0].shape[1])})
            continue
        if eqn.primitive.name == "scatter-add":
            if gathered is not None:
                return values[2]
            values[2] = values[2] if count is None else mask_after(values[2], count, 0)
        inner = next(
            (eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if key in eqn.params), None
        )
        if inner is None:
            made = eqn.primitive.bind(*values, **eqn.params)
        else:
            made = evaluate(getattr(inner, "jaxpr", inner), values)
        known[eqn.outvars[0]] = made
    return read(jaxpr.outvars[0])


def equation_of(jaxpr: Any, primitive: str) -> Any:
    """A chain's only gather of the rows that it multiplies, or their sum by token; None without one."""
    multiplied = {eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "ragged_dot_general"}
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == primitive]
    if primitive == "gather":
        found = [eqn for eqn in found if eqn.outvars[0] in multiplied]
    return found[0] if len(found) == 1 else None


def numbers_of(jaxpr: Any, primitive: str) -> Any:
    """The variable with the numbers of tokens of a chain's only gather of rows, or of their sum by token; None without one."""
    found = equation_of(jaxpr, primitive)
    return None if found is None else found.invars[1]


def rows_within(sizes: Any, start: Any, count: int) -> Any:
    """The number of rows of each group among the `count` rows from `start` on."""
    ends = jnp.cumsum(sizes, axis=-1, dtype=np.int32)
    begins = ends - sizes.astype(np.int32)
    inside = jnp.clip(ends - start, 0, count) - jnp.clip(begins - start, 0, count)
    return inside.astype(sizes.dtype)


def mask_after(array: Any, count: Any, dim: int) -> Any:
    """The first `count` elements along a dimension, followed by zeros."""
    place = lax.broadcasted_iota(np.int32, array.shape, dim)
    return jnp.where(place < count, array, jnp.zeros_like(array))
