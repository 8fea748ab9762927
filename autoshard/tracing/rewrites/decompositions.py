"""Decompositions of equations into several that can be split where the whole cannot, and compositions of several into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from autoshard.rules.chains.evaluate import (
    HIDDEN,
    HIDDEN_TABLE,
    INDEX,
    LAST,
    MADE,
    MADE_TABLE,
    MATRIX,
    OFFSET,
    OFFSET_TABLE,
    ROWS,
    SCALAR,
    SIZES,
    TOKENS,
)
from autoshard.rules.elementwise import LINEAR, NONLINEAR
from autoshard.rules.ragged import chain_p
from autoshard.rules.rule import inexact
from autoshard.tracing.equations import rebuild_jaxpr
from autoshard.tracing.jaxprs import CALLS, callee


def decompose(eqn: Any) -> Any:
    """A closed jaxpr of the same function as an equation that `can_decompose`, from operations that may be split."""
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return jax.make_jaxpr(_EXPANSIONS[eqn.primitive.name](eqn))(*avals)


def can_decompose(eqn: Any) -> bool:
    """Whether `decompose` supports an equation and the types of its operands."""
    if eqn.primitive.name not in ("argmax", "argmin"):
        return eqn.primitive.name in _EXPANSIONS
    (aval,), (axis, *more), dtype = [v.aval for v in eqn.invars], eqn.params["axes"], eqn.params["index_dtype"]
    counts = not more and jnp.issubdtype(dtype, np.integer) and aval.shape[axis] <= jnp.iinfo(dtype).max
    return bool(counts) and not jnp.issubdtype(aval.dtype, np.complexfloating)


def _place(eqn: Any) -> Callable[..., Any]:
    """An `argmax` is the first index at which the maximum stands: a maximum, and a minimum over indices.

    Where the dimension is split, each needs an all-reduce of the result's size. A single operation would have to gather the
    dimension, such as all logits for one token. Booleans are compared as numbers, because they have no maximum over chips.
    """
    (axis,), dtype = eqn.params["axes"], eqn.params["index_dtype"]
    reduced = lax.reduce_max if eqn.primitive.name == "argmax" else lax.reduce_min

    def places(x: Any) -> Any:
        x = lax.convert_element_type(x, np.int8) if x.dtype == bool else x
        others = [i for i in range(x.ndim) if i != axis]
        extreme = lax.broadcast_in_dim(reduced(x, axes=(axis,)), x.shape, others)
        here = lax.eq(x, extreme)
        if inexact(x):
            here = lax.bitwise_or(here, lax.ne(x, x))  # a NaN counts as the extreme
        place = lax.broadcasted_iota(dtype, x.shape, axis)
        past = lax.full(x.shape, x.shape[axis], dtype)
        return lax.reduce_min(lax.select_n(here, past, place), axes=(axis,))

    return places


def _solution(eqn: Any) -> Callable[..., Any]:
    """A `custom_linear_solve`, such as `jnp.linalg.solve`, is the function that solves; the others are for gradients."""
    lengths, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
    begin, end = lengths.matvec + lengths.vecmat, sum(lengths)
    return lambda *operands: jex.jaxpr_as_fun(solve)(*operands[begin : begin + lengths.solve], *operands[end:])


def _scaled_product(eqn: Any) -> Callable[..., Any]:
    """A `scaled_dot` of blocks with scales, as XLA computes it without a kernel of its own: in bfloat16, the scales applied."""
    numbers, dtype = eqn.params["dimension_numbers"], eqn.params["preferred_element_type"]

    def scaled(x: Any, scale: Any) -> Any:
        for i, (n, m) in enumerate(zip(x.shape, scale.shape, strict=True)):
            scale = jnp.repeat(scale, n // m, axis=i) if n != m else scale
        return x.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)

    return lambda a, b, a_scale, b_scale: lax.dot_general(
        scaled(a, a_scale), scaled(b, b_scale), numbers, preferred_element_type=dtype
    )


_EXPANSIONS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "argmax": _place,
    "argmin": _place,
    "custom_linear_solve": _solution,
    "scaled_dot": _scaled_product,
}


# --- Compositions

_ELEMENTWISE = frozenset((*NONLINEAR, *LINEAR, *"add add_any sub mul div select_n convert_element_type".split()))


def compose_chains(jaxpr: Any, eqns: Sequence[Any]) -> list[Any]:
    """The equations of a jaxpr, where chains of grouped matmuls are one equation each (`autoshard.rules.ragged`).

    A chain ends with a `ragged_dot` whose rows are elementwise work on the results of others with the same sizes of the
    groups, and nothing else uses these results. It can be split by groups as a whole. Its parts cannot: elementwise work
    needs the sum of what the chips have. If the rows are gathered from tokens for the chain alone, and only added to those of
    tokens after it, with linear elementwise work or sums before, these steps are part of the chain. So are gathers of rows
    for its elementwise work, such as the biases of each row's group.
    """
    found = list(eqns)
    for last in reversed([eqn for eqn in eqns if _is_grouped(eqn)]):
        members = _Members(jaxpr, found, last) if last in found else None
        composed = members.compose() if members else None
        if members and composed is not None:
            *inside, end = map(id, members.inside)
            found = [composed if id(eqn) == end else eqn for eqn in found if id(eqn) not in inside]
    return found


def _is_grouped(eqn: Any) -> bool:
    """Whether an equation multiplies the rows of a matrix by the matrices of their groups."""
    if eqn.primitive.name != "ragged_dot_general" or len(eqn.invars) != 3 or eqn.params.get("group_offset") is not None:
        return False
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = (((1,), (1,)), ((), ())), (0,), (0,)
    (summed, batch), ragged = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    given = tuple(tuple(map(tuple, pair)) for pair in (summed, batch))
    return (given, tuple(ragged), tuple(numbers.rhs_group_dimensions)) == plain


def _is_elementwise(eqn: Any) -> bool:
    """Whether an equation is elementwise work, or a call of nothing else."""
    if eqn.effects or len(eqn.outvars) != 1:
        return False
    if eqn.primitive.name in CALLS:
        inner, consts = callee(eqn)
        return not consts and not inner.constvars and bool(inner.eqns) and all(map(_is_elementwise, inner.eqns))
    return eqn.primitive.name in _ELEMENTWISE


def _is_linear_in(eqn: Any, operand: Any) -> bool:
    """Whether an elementwise equation is linear in one operand: partial sums pass, and zeros stay zeros."""
    places = [k for k, v in enumerate(eqn.invars) if v is operand]
    if len(places) != 1 or not _is_elementwise(eqn):
        return False
    name, (place,) = eqn.primitive.name, places
    if name in CALLS:
        inner, _ = callee(eqn)
        passed = inner.invars[place]
        while users := [each for each in inner.eqns if any(v is passed for v in each.invars)]:
            if len(users) != 1 or not _is_linear_in(users[0], passed):
                return False
            passed = users[0].outvars[0]
        return inner.outvars[0] is passed
    if name == "convert_element_type":
        return inexact(eqn.outvars[0].aval)
    return name in LINEAR or name == "mul" or (name == "div" and place == 0)


def _offset_of(eqn: Any, operand: Any) -> Any:
    """The array of rows that an equation adds to an operand, or takes from it or it from; None for any other equation."""
    others = [v for v in eqn.invars if v is not operand]
    if eqn.primitive.name not in ("add", "add_any", "sub") or len(others) != 1 or isinstance(others[0], jex.Literal):
        return None
    return others[0] if others[0].aval.ndim == 2 else None


def _variables(eqn: Any) -> list[Any]:
    """The operands of an equation; None for each literal."""
    return [None if isinstance(v, jex.Literal) else v for v in eqn.invars]


def _takes_rows(eqn: Any) -> bool:
    """Whether an equation gathers rows of a matrix by their numbers."""
    if eqn.primitive.name != "gather" or eqn.invars[0].aval.ndim != 2 or eqn.invars[1].aval.ndim != 2:
        return False
    numbers, width = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape[1]
    plain = (numbers.offset_dims, numbers.collapsed_slice_dims, numbers.start_index_map) == ((1,), (0,), (0,))
    return plain and not numbers.operand_batching_dims and tuple(eqn.params["slice_sizes"]) == (1, width)


def _adds_rows(eqn: Any) -> bool:
    """Whether an equation adds rows to those of a matrix by their numbers."""
    if eqn.primitive.name != "scatter-add" or any(v.aval.ndim != 2 for v in eqn.invars):
        return False
    numbers = eqn.params["dimension_numbers"]
    plain = numbers.update_window_dims, numbers.inserted_window_dims, numbers.scatter_dims_to_operand_dims
    return plain == ((1,), (0,), (0,)) and not numbers.operand_batching_dims


class _Members:
    """The equations of the chain that ends with an equation, with the gather of its rows and their sum by token around it."""

    def __init__(self, jaxpr: Any, eqns: Sequence[Any], last: Any) -> None:
        self.jaxpr, self.eqns, self.last = jaxpr, eqns, last
        self.sizes, self.hidden = last.invars[2], tuple(last.invars[0].aval.shape)
        self.makers = {v: eqn for eqn in eqns for v in eqn.outvars}
        self.users: dict[Any, list[Any]] = {}
        for eqn in eqns:
            for v in {v for v in eqn.invars if not isinstance(v, jex.Literal)}:
                self.users.setdefault(v, []).append(eqn)
        self.depends: dict[Any, bool] = {}
        reached = list(self._reached())[::-1]
        self.takes = list(self._gathers(reached)) if reached else []
        self.offsets: set[Any] = set()
        before = {v for eqn in (*self.takes, *reached) for v in (*_variables(eqn), *eqn.outvars)}
        self.after = list(self._followers(before))
        self.tables: dict[Any, str] = {}
        self.inside = [*self.takes, *self._lookups(reached), *reached, last, *self.after] if reached else []

    def _reached(self) -> Iterator[Any]:
        """The equations between the first matmuls and the last, backwards."""
        wanted = {self.last.invars[0]}
        for eqn in reversed(self.eqns[: self.eqns.index(self.last)]):
            if eqn.outvars[0] in wanted and self._depends(eqn.outvars[0]):
                wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal) and not self._is_first(eqn))
                yield eqn

    def _gathers(self, reached: Sequence[Any]) -> Iterator[Any]:
        """The gathers of rows that only the first matmuls use."""
        first = [eqn for eqn in reached if self._is_first(eqn)]
        for rows in dict.fromkeys(eqn.invars[0] for eqn in first):
            maker = self.makers.get(rows)
            mine = all(any(user is eqn for eqn in first) for user in self.users[rows])
            if maker is not None and _takes_rows(maker) and mine and rows not in self.jaxpr.outvars:
                yield maker

    def _followers(self, before: set[Any]) -> Iterator[Any]:
        """Linear elementwise work on the rows of the last matmul, zeros, and their sum into them; nothing without the sum.

        Arrays of rows may be added, such as biases, unless they are among those of the work `before`. Other work needs the
        whole sum over split hidden columns.
        """
        found, rows, offsets = [], self.last.outvars[0], set()
        while len(users := self.users.get(rows, [])) == 1 and rows not in self.jaxpr.outvars:
            (user,) = users
            if _adds_rows(user) and user.invars[2] is rows and (zeros := self._zeros(user.invars[0])) is not None:
                self.offsets = offsets
                yield from (*found, zeros, user)
                return
            if user.outvars[0].aval.shape != rows.aval.shape:
                return
            if (offset := _offset_of(user, rows)) is not None and offset not in before | offsets:
                offsets.add(offset)
            elif not _is_linear_in(user, rows):
                return
            found.append(user)
            rows = user.outvars[0]

    def _lookups(self, reached: Sequence[Any]) -> Iterator[Any]:
        """The gathers of rows, one for each group, that only the elementwise work of one side uses."""
        sides = {HIDDEN_TABLE: [eqn for eqn in reached if not self._is_first(eqn)], MADE_TABLE: self.after[:-2]}
        for part, eqns in sides.items():
            for v in dict.fromkeys(v for eqn in eqns for v in _variables(eqn)):
                maker = self.makers.get(v)
                if maker is None or not _takes_rows(maker) or v in self.jaxpr.outvars:
                    continue
                mine = all(any(user is eqn for eqn in eqns) for user in self.users[v])
                if mine and maker.invars[0].aval.shape[0] == self.sizes.aval.shape[0]:
                    self.tables[v] = OFFSET_TABLE if v in self.offsets else part
                    yield maker

    def _zeros(self, atom: Any) -> Any:
        """The equation that makes an array of zeros; None for any other array."""
        maker = None if isinstance(atom, jex.Literal) else self.makers.get(atom)
        if maker is None or maker.primitive.name != "broadcast_in_dim" or not isinstance(maker.invars[0], jex.Literal):
            return None
        return maker if not np.any(maker.invars[0].val) else None

    def _is_first(self, eqn: Any) -> bool:
        return _is_grouped(eqn) and eqn.invars[2] is self.sizes

    def _depends(self, atom: Any) -> bool:
        """Whether an array is elementwise work on the result of one of the first matmuls."""
        if isinstance(atom, jex.Literal) or atom not in self.makers or atom.aval.shape != self.hidden:
            return False
        if atom not in self.depends:
            eqn = self.makers[atom]
            inner = _is_elementwise(eqn) and any(self._depends(v) for v in eqn.invars)
            self.depends[atom] = self._is_first(eqn) or inner
        return self.depends[atom]

    def compose(self) -> Any:
        """The chain as one equation; None if there is none, or if something else uses its inside."""
        if not self.inside:
            return None
        end, zeros = self.inside[-1], self.after[-2] if self.after else None
        made = {v for eqn in self.inside if eqn is not end for v in eqn.outvars}
        shown = {v for v in made if zeros is None or v is not zeros.outvars[0]}
        mine = {id(eqn) for eqn in self.inside}
        others = (v for eqn in self.eqns if id(eqn) not in mine for v in eqn.invars)
        used = {v for v in (*others, *self.jaxpr.outvars) if not isinstance(v, jex.Literal)}
        parts = self._parts(made)
        if used & shown or parts is None:
            return None
        operands = sorted(parts, key=lambda v: parts[v] == SIZES)
        inner = rebuild_jaxpr(self.jaxpr, operands, end.outvars, self.inside).replace(constvars=[])
        params = {"jaxpr": inner, "parts": tuple(parts[v] for v in operands)}
        return end.replace(primitive=chain_p, invars=operands, params=params)

    def _parts(self, made: set[Any]) -> dict[Any, str] | None:
        """The part of each operand; None if one has two, or a shape that no part has."""
        found: dict[Any, str] = {}
        for eqn in self.inside:
            for v, part in zip(eqn.invars, self._parts_of(eqn), strict=True):
                if isinstance(v, jex.Literal) or v in made:
                    continue
                part = SCALAR if not v.aval.shape else part
                if found.setdefault(v, part) != part or not self._fits(v.aval.shape, part):
                    return None
        widths = {v.aval.shape[1] for v, part in found.items() if part in (ROWS, TOKENS)}
        lengths = {v.aval.shape[0] for v, part in found.items() if part == TOKENS}
        return found if len(widths) == 1 and len(lengths) <= 1 else None

    def _parts_of(self, eqn: Any) -> Sequence[str]:
        if _is_grouped(eqn):
            return (ROWS, LAST if eqn is self.last else MATRIX, SIZES)
        if any(eqn is each for each in self.takes):
            return (TOKENS, INDEX)
        if eqn.outvars[0] in self.tables:
            return (self.tables[eqn.outvars[0]], INDEX)
        after = any(eqn is each for each in self.after)
        if after and _adds_rows(eqn):
            return (SCALAR, INDEX, MADE)
        return [HIDDEN if not after else OFFSET if v in self.offsets else MADE for v in _variables(eqn)]

    def _fits(self, shape: Sequence[int], part: str) -> bool:
        """Whether an operand of elementwise work has rows and columns like its results, or one of them."""
        made = self.last.outvars[0].aval.shape
        whole = {HIDDEN: self.hidden, MADE: made, OFFSET: made}.get(part)
        return whole is None or (len(shape) == 2 and all(n in (1, most) for n, most in zip(shape, whole, strict=True)))
