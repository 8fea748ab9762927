"""A chain on the rows of all chips in turn, a slab of them at a time: the path for rows that do not fit into their buffers."""

from __future__ import annotations

from math import ceil
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.chains.evaluate import BY_ROW, TOKENS, equation_of, evaluate, mask_after, rows_within
from autoshard.rules.chains.exchange import Exchange
from costmodels.program.grouped import slab_rows


def run_in_slabs(exchange: Exchange, jaxpr: Any, parts: tuple[str, ...], arrays: tuple[Any, ...], own: Any) -> Any:
    """The result `[tokens, n]` of a chain for this chip's tokens, exact for any router and any numbers of tokens.

    Each slab has the same rows on all chips. Their tokens are summed over the chips: one has each token. Each chip computes
    the rows of its own groups. Their results are summed over the chips with groups, and each chip adds those of its own
    tokens. So a chip never has more than a slab of the rows of others.

    **Arguments:**

    - `arrays`: the operands but the last, the sizes; tokens and matrices are those of this chip.
    - `own`: the sizes of this chip's groups.
    """
    chips, count = exchange.chips, exchange.numbers.shape[0]
    tokens = next(a for a, part in zip(arrays, parts, strict=False) if part == TOKENS)
    take, add = equation_of(jaxpr, "gather"), equation_of(jaxpr, "scatter-add")
    part, _ = chips.placed(exchange.here)
    begin, end = jnp.where(part > 0, exchange.ends[part - 1], 0), exchange.ends[part]
    slab = slab_rows(exchange.room)

    def step(k: Any, result: Any) -> Any:
        rows = k * slab + jnp.arange(slab, dtype=np.int32)
        known, rows = rows < count, jnp.minimum(rows, count - 1)
        mine, at = _own_tokens(exchange, exchange.numbers[rows])
        gathered = jnp.where((mine & known)[:, None], take.primitive.bind(tokens, at, **take.params), 0)
        gathered = lax.psum(gathered, chips.axes)
        first, last = (jnp.clip(edge - k * slab, 0, slab) for edge in (begin, end))
        taken = [
            jnp.roll(a[rows], -first, 0) if part in BY_ROW and a.shape[0] > 1 else a
            for a, part in zip(arrays, parts, strict=False)
        ]
        inside = rows_within(own, k * slab - begin, slab)
        made = evaluate(jaxpr, (*taken, inside), gathered=jnp.roll(gathered, -first, 0))
        made = jnp.roll(mask_after(made, last - first, 0), first, 0)
        made = lax.psum(made, chips.sharing) if chips.sharing else made
        mine, at = _own_tokens(exchange, exchange.targets[rows])
        made = jnp.where((mine & known)[:, None], made, 0)
        return add.primitive.bind(result, at, made, **add.params)

    aval = jaxpr.outvars[0].aval
    zeros = jnp.zeros((chips.tokens, *aval.shape[1:]), aval.dtype)
    return lax.fori_loop(0, ceil(count / slab), step, zeros)


def _own_tokens(exchange: Exchange, numbers: Any) -> tuple[Any, Any]:
    """Whether tokens are this chip's, and their numbers among its own; a number of no token stays one, of the nearest chip."""
    chips = exchange.chips
    mine = jnp.clip(numbers // chips.tokens, 0, chips.sources - 1) == exchange.here
    return mine, jnp.where(mine, numbers - exchange.here * chips.tokens, 0)[:, None]
