"""Rules of matmuls over ragged groups of rows: mixtures of experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from autoshard.rules.chains.evaluate import (
    BY_ROW,
    HIDDEN,
    HIDDEN_TABLE,
    INDEX,
    LAST,
    MADE,
    MADE_TABLE,
    MATRIX,
    OFFSET,
    OFFSET_TABLE,
    OFFSETS,
    ROWS,
    SCALAR,
    SIZES,
    TOKENS,
    evaluate,
    mask_after,
    numbers_of,
    rows_within,
)
from autoshard.rules.chains.exchange import Chips, exchange_of, run_exchanged
from autoshard.rules.chains.slabs import run_in_slabs
from autoshard.rules.rule import Dims, Factors, Pieces, Rule, register, whole_rule
from costmodels.program.grouped import CHAIN, OVERFLOW, own_rows
from costmodels.program.program import Output


@register("ragged_dot_general")
def ragged_dot(inputs, outputs, *, ragged_dot_dimension_numbers, group_offset=None, **_):
    """`[m,k],[g,k,n],[g] -> [m,n] sum={g,k}`: rows in consecutive groups, each times the matrix of its group.

    Rows may be split: each chip counts its rows of each group. Groups may be split, which is expert parallelism: each chip
    multiplies the rows of its own groups, has zeros elsewhere, and leaves a partial sum. If the rows are contracted, as in the
    gradient of the matrices, the result has the groups: `[m,k],[m,n],[g] -> [g,k,n] sum={m}`.
    """
    numbers = ragged_dot_dimension_numbers
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    lhs, rhs, sizes = inputs[:3]
    shared = sizes.ndim == 1  # otherwise each row of the batch has its own groups
    outer = not shared and sizes.shape[:-1] != tuple(lhs.shape[i] for i in lhs_batch)
    if ragged in lhs_batch or group_offset is not None or outer:
        return whole_rule(inputs, outputs)
    factors = Factors()
    left = {int(i): factors.new(lhs.shape[i]) for i in lhs_batch}
    right = {int(j): left[int(i)] for i, j in zip(lhs_batch, rhs_batch, strict=True)}
    batch = list(left.values())
    kind = "whole" if not shared else "parallel" if ragged in lhs_sum else "sum"
    groups, counted = factors.new(sizes.shape[-1], kind), factors.new(sizes.shape[-1], "whole")
    right.update({int(j): groups for j in numbers.rhs_group_dimensions})
    for i, j in zip(lhs_sum, rhs_sum, strict=True):
        left[int(i)] = right[int(j)] = factors.new(lhs.shape[i], "sum")
    free = [*_fill(factors, left, lhs), *_fill(factors, right, rhs)]
    result = [groups, *batch, *free] if ragged in lhs_sum else [*batch, *free]
    counts = [counted] if shared else [*batch, counted]
    return Rule(
        factors.done(),
        (_in_order(left), _in_order(right), tuple((i,) for i in counts)),
        (tuple((i,) for i in result),),
        (frozenset({0}), frozenset({1})),
        op_class="matmul",
        traffic=(0, 1, Output()),
        flops_per_point=2.0
        / max(1, sizes.shape[-1]) ** 2,  # each row meets one group's matrix; the counts are not a loop
        local=_local_ragged_dot,
    )


def _fill(factors: Factors, side: dict[int, int], aval) -> list[int]:
    """New factors for the dimensions of an operand that have none yet."""
    made = {i: factors.new(aval.shape[i]) for i in range(aval.ndim) if i not in side}
    side.update(made)
    return list(made.values())


def _in_order(side: dict[int, int]) -> Dims:
    return tuple((side[i],) for i in range(len(side)))


def _local_ragged_dot(eqn, rule: Rule, pieces: Pieces, lhs, rhs, sizes):
    (lhs_sum, rhs_sum), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (ragged,) = map(int, eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions)
    (rows,) = rule.inputs[0][ragged]
    groups = rule.inputs[2][-1][0] - 1  # created just before the factor of the counts
    if pieces.is_split(rows) or pieces.is_split(groups):
        sizes = rows_within(sizes, pieces.start(rows), pieces.size(rows))
    if not pieces.is_split(groups):
        return [eqn.primitive.bind(lhs, rhs, sizes, **eqn.params)]
    ends = jnp.cumsum(sizes, dtype=np.int32)
    own = lax.dynamic_slice_in_dim(sizes, pieces.start(groups), pieces.size(groups))
    count = jnp.sum(own, dtype=np.int32)
    before = lax.dynamic_index_in_dim(ends, pieces.start(groups) + pieces.size(groups) - 1, keepdims=False) - count
    lhs = jnp.roll(lhs, -before, ragged)
    if ragged in lhs_sum:
        at = int(rhs_sum[list(lhs_sum).index(ragged)])
        rhs = mask_after(jnp.roll(rhs, -before, at), count, at)
        return [eqn.primitive.bind(mask_after(lhs, count, ragged), rhs, own, **eqn.params)]
    found = eqn.primitive.bind(lhs, rhs, own, **eqn.params)
    at = rule.outputs[0].index((rows,))
    return [jnp.roll(mask_after(found, count, at), before, at)]


# --- Chains: grouped matmuls with elementwise work between them


def _run_chain(*operands: Any, jaxpr: Any, parts: Sequence[str]) -> Any:
    return evaluate(jaxpr, operands)


chain_p = Primitive(CHAIN)
chain_p.def_impl(_run_chain)
chain_p.def_abstract_eval(lambda *_, jaxpr, parts: jaxpr.outvars[0].aval)
mlir.register_lowering(chain_p, mlir.lower_fun(_run_chain, multiple_results=False))
ad.primitive_jvps[chain_p] = lambda primals, tangents, **params: jax.jvp(
    functools.partial(_run_chain, **params), primals, tuple(map(ad.instantiate_zeros, tangents))
)


@register(CHAIN)
def ragged_chain(inputs, outputs, *, jaxpr, parts, **_):
    """`[m,e],[g,e,f],[g,f,n],[c] -> [m,n] sum={f,g}`: grouped matmuls, elementwise work on `[m,f]`, and a last one.

    The elementwise work may take rows of `[g,f]`, such as the biases of each row's group, by their numbers. With the gather of
    the rows from tokens and their sum by token it is `[t,e],[m,1],... -> [u,n] sum={m,f,g}`, and rows may be added to the
    results before. The rows, the groups and the hidden columns may be split. If the groups are split, which is expert
    parallelism, every chip has all rows or tokens, and computes the rows of its own groups through the whole chain,
    `ceil(R)` at a time (`costmodels.program.grouped`). The result is exact for any sizes of the groups.

    If the results are added to as many tokens as the rows are gathered from, the tokens may be split instead of the rows, and
    the groups over the same chips: each row is sent to the chip of its group, and its result back.
    """
    factors = Factors()
    adds = jaxpr.eqns[-1].primitive.name == "scatter-add"
    rows = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "ragged_dot_general").invars[0].aval.shape[0]
    m = factors.new(rows, "sum" if adds else "parallel")
    g, c = factors.new(inputs[-1].shape[0], "sum"), factors.new(inputs[-1].shape[0], "whole")
    last, first = inputs[parts.index(LAST)], inputs[parts.index(MATRIX)]
    f, e = factors.new(last.shape[1], "sum"), factors.new(first.shape[1], "whole")
    n, t = factors.new(last.shape[2], "whole"), -1
    if TOKENS in parts:
        tokens = inputs[parts.index(TOKENS)].shape[0]
        known = all(numbers_of(jaxpr, each) in jaxpr.invars for each in ("gather", "scatter-add"))
        sends = adds and known and parts.count(TOKENS) == 1 and tokens == outputs[0].shape[0] > 1
        t = factors.new(tokens, "dispatched" if sends else "whole")
    sends = t >= 0 and factors.kind(t) == "dispatched"
    u = t if sends else factors.new(outputs[0].shape[0], "whole") if adds else m
    dims = {ROWS: (m, e), HIDDEN: (m, f), MADE: (m, n), INDEX: (m, m), TOKENS: (t, e)}
    dims |= {OFFSET: (m, n), HIDDEN_TABLE: (c, f), MADE_TABLE: (c, n), OFFSET_TABLE: (c, n)}
    dims |= {MATRIX: (g, e, f), LAST: (g, f, n), SIZES: (c,), SCALAR: ()}
    sizes = [factor.size for factor in factors.done()]
    sides = tuple(
        tuple(() if size == 1 != sizes[i] else (i,) for i, size in zip(dims[part], aval.shape, strict=True))
        for part, aval in zip(parts, inputs, strict=True)
    )
    work = 2.0 * rows * last.shape[1] * (parts.count(MATRIX) * first.shape[1] + last.shape[2])
    return Rule(
        factors.done(),
        sides,
        (((u,), (n,)),),
        op_class="matmul",
        traffic=(*(k for k, part in enumerate(parts) if part not in (INDEX, SIZES, SCALAR)), Output()),
        flops_per_point=work / max(math.prod(sizes), 1),
        local=_local_chain,
    )


def _local_chain(eqn, rule: Rule, pieces: Pieces, *operands):
    parts = eqn.params["parts"]
    rows, ((groups,), (hidden,), _) = 0, rule.inputs[parts.index(LAST)]
    if pieces.axes(hidden):  # only one chip adds what is added to the sum over the hidden columns
        adds = lax.axis_index(pieces.axes(hidden)) == 0
        operands = tuple(
            jnp.where(adds, a, jnp.zeros_like(a)) if part in OFFSETS else a
            for a, part in zip(operands, parts, strict=True)
        )
    *arrays, sizes = operands
    if tokens := [i for i, factor in enumerate(rule.factors) if factor.kind == "dispatched" and pieces.axes(i)]:
        return [_sent(eqn, pieces, tokens[0], groups, tuple(operands))]
    if pieces.is_split(rows) or pieces.is_split(groups):
        sizes = rows_within(sizes, pieces.start(rows), pieces.size(rows))
    if not pieces.is_split(groups):
        return [_run_chain(*arrays, sizes, **eqn.params)]
    own = lax.dynamic_slice_in_dim(sizes, pieces.start(groups), pieces.size(groups))
    ends = jnp.cumsum(sizes, dtype=np.int32)
    count = jnp.sum(own, dtype=np.int32)
    last = lax.dynamic_index_in_dim(ends, pieces.start(groups) + pieces.size(groups) - 1, keepdims=False)
    begin, held, chips = last - count, pieces.size(rows), rule.factors[groups].size // pieces.size(groups)
    if any(part in OFFSETS for part in parts):  # the last chip has the rows of no group
        count = jnp.where(pieces.start(groups) + pieces.size(groups) == rule.factors[groups].size, held - begin, count)
    room = own_rows(held, chips, pieces.expert_load)
    return [_OwnRows(eqn.params["jaxpr"], parts, held, room).run(tuple(arrays), own, begin, count)]


def _sent(eqn: Any, pieces: Pieces, tokens: int, groups: int, operands: tuple[Any, ...]) -> Any:
    """The result for this chip's tokens: rows go to the chips of their groups and back, if all fit into the buffers."""
    (*arrays, sizes), jaxpr, parts = operands, eqn.params["jaxpr"], eqn.params["parts"]
    axes, sharing, held = pieces.axes(tokens), pieces.axes(groups), pieces.size(groups)
    chips = Chips(axes, tuple(map(pieces.along, axes)), sharing, pieces.size(tokens))
    ends = jnp.cumsum(sizes, dtype=np.int32)
    first = pieces.start(groups)
    begins_, ends_ = (lax.dynamic_slice_in_dim(each, first, held) for each in (ends - sizes.astype(np.int32), ends))
    here = lax.axis_index(axes).astype(np.int32)
    parted = ends[held - 1 :: held]
    if any(part in OFFSETS for part in parts):  # the last chip has the rows of no group
        parted = parted.at[-1].set(pieces.size(0))
    exchange = exchange_of(jaxpr, operands, chips, parted, here, pieces.expert_load)

    def sent() -> Any:
        return run_exchanged(exchange, jaxpr, parts, tuple(arrays), begins_, ends_)

    def in_slabs() -> Any:
        with jax.named_scope(OVERFLOW):
            own = lax.dynamic_slice_in_dim(sizes, first, held)
            return run_in_slabs(exchange, jaxpr, parts, tuple(arrays), own)

    return lax.cond(exchange.fits(), sent, in_slabs)


@dataclass(frozen=True)
class _OwnRows:
    """A chain on the consecutive rows of a chip's own groups, in a buffer of `room` of all `rows`: zeros for all others.

    The buffer is filled again until all own rows are done: once, unless the chip has more of them than `room`. Only further
    fillings are a loop. libtpu 0.0.50 copies weights into on-chip memory ahead of work outside of loops: four layers of
    Mixtral 8×7B, decode on v5e:4x4, replay in 1.87 ms, and in 1.95 ms with all fillings in the loop.
    """

    jaxpr: Any
    parts: Sequence[str]
    rows: int
    room: int

    @property
    def _adds(self) -> bool:
        """Whether the result has a row per token, and not the chain's rows."""
        return self.jaxpr.eqns[-1].primitive.name == "scatter-add"

    def run(self, arrays: tuple[Any, ...], own: Any, begin: Any, count: Any) -> Any:
        """The result, differentiated as `_at_once`, because a loop of unknown length has no reverse derivative."""
        run = jax.custom_jvp(self._by_buffers)
        run.defjvp(lambda primals, tangents: jax.jvp(self._at_once, primals, tangents))
        return run(arrays, own, begin, count)

    def _by_buffers(self, arrays: tuple[Any, ...], own: Any, begin: Any, count: Any) -> Any:
        aval = self.jaxpr.outvars[0].aval

        def step(state: tuple[Any, Any]) -> tuple[Any, Any]:
            done, result = state
            start = jnp.minimum(begin + done, self.rows - self.room)
            shift = begin + done - start
            buffered = [self._rows_from(a, part, start, shift) for a, part in zip(arrays, self.parts, strict=False)]
            made = evaluate(self.jaxpr, (*buffered, rows_within(own, done, self.room)), count - done)
            if self._adds:
                return done + self.room, result + made
            made = jnp.roll(mask_after(made, count - done, 0), shift, 0)
            before = lax.dynamic_slice_in_dim(result, start, self.room)
            return done + self.room, lax.dynamic_update_slice_in_dim(result, before + made, start, 0)

        zeros = jnp.zeros((aval.shape[0] if self._adds else self.rows, *aval.shape[1:]), aval.dtype)
        first = step((jnp.int32(0), zeros))
        if self.room == self.rows:
            return first[1]

        def others() -> Any:
            with jax.named_scope(OVERFLOW):
                return lax.while_loop(lambda state: state[0] < count, step, first)[1]

        return lax.cond(count > self.room, others, lambda: first[1])

    def _rows_from(self, array: Any, part: str, start: Any, shift: Any) -> Any:
        """The rows of the buffer: those from `start + shift` on, then those between `start` and there."""
        if part not in BY_ROW or array.shape[0] == 1:
            return array
        return jnp.roll(lax.dynamic_slice_in_dim(array, start, self.room), -shift, 0)

    def _at_once(self, arrays: tuple[Any, ...], own: Any, begin: Any, count: Any) -> Any:
        rolled = [
            jnp.roll(a, -begin, 0) if part in BY_ROW and a.shape[0] > 1 else a
            for a, part in zip(arrays, self.parts, strict=False)
        ]
        made = evaluate(self.jaxpr, (*rolled, own), count)
        return made if self._adds else jnp.roll(mask_after(made, count, 0), begin, 0)
