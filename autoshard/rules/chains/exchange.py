"""Rows of tokens sent to the chips of their groups and back, in buffers of a fixed size.

Every chip knows the number of each row's token and the size of each group, so it knows which rows any chip sends to any other,
and in which order: that of the rows. Nothing but rows is sent. The chips of a mesh that split the tokens are numbered along all
their axes; those that split the groups, along some of these. Chips that differ in the other axes only have the same groups,
and each takes the rows of its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.rules.chains.evaluate import BY_ROW, TOKENS, evaluate, numbers_of
from costmodels.program.grouped import rows_for_each, rows_in_all


@dataclass(frozen=True)
class Chips:
    """The chips that split the tokens of a chain.

    - `axes`, `counts`: the mesh axes that split the tokens, major to minor, and their sizes; `sharing`: those that split the
      groups, too.
    - `tokens`: the number of tokens on a chip.
    """

    axes: tuple[str, ...]
    counts: tuple[int, ...]
    sharing: tuple[str, ...]
    tokens: int

    @property
    def sources(self) -> int:
        """The number of chips with tokens of their own."""
        return int(np.prod(self.counts))

    @property
    def parts(self) -> int:
        """The number of chips with groups of their own."""
        return int(np.prod([n for axis, n in zip(self.axes, self.counts, strict=True) if axis in self.sharing]))

    def placed(self, number: Any) -> tuple[Any, Any]:
        """A chip's number along the axes of the groups, and along the other ones."""
        places = dict(zip(self.axes, jnp.unravel_index(number, self.counts), strict=True))
        table = dict(zip(self.axes, self.counts, strict=True))
        found = []
        for axes in (self.sharing, [axis for axis in self.axes if axis not in self.sharing]):
            place = jnp.zeros_like(number)
            for axis in axes:
                place = place * table[axis] + places[axis]
            found.append(place)
        return found[0], found[1]


@dataclass(frozen=True)
class Exchange:
    """The way of a chain's rows over the chips.

    **Arguments:**

    - `numbers`: `[m]`, the number of each row's token; `targets`: the number of the token that its result is added to.
    - `ends`: `[parts]`, the first row after those of the groups of each chip.
    - `here`: this chip's number among those that split the tokens.
    - `load`: the buffers' rows over the balanced ones.
    """

    chips: Chips
    numbers: Any
    targets: Any
    ends: Any
    here: Any
    load: float

    @cached_property
    def sent(self) -> int:
        """The rows of the buffer for each chip with groups."""
        return rows_for_each(self.numbers.shape[0], self.chips.sources, self.chips.parts, self.load)

    @cached_property
    def room(self) -> int:
        """The rows of the buffer in which a chip multiplies."""
        return rows_in_all(self.numbers.shape[0], self.chips.sources, self.chips.parts, self.load)

    @cached_property
    def part(self) -> Any:
        """`[m]`: the number of the chip with each row's group; `parts` for a row of no group."""
        rows = jnp.arange(self.numbers.shape[0], dtype=np.int32)
        return jnp.sum(rows[:, None] >= self.ends[None], 1, dtype=np.int32)

    def fits(self) -> Any:
        """Whether no buffer of any chip is too small; the same on all chips."""
        chips, grouped = self.chips, self.part < self.chips.parts
        good, homes = jnp.bool_(True), []
        for numbers in (self.numbers, self.targets):
            home = numbers // chips.tokens
            good &= jnp.all(~grouped | ((numbers >= 0) & (home < chips.sources)))
            pairs = _count_pairs(home, chips.sources, self.part, chips.parts)
            good &= jnp.max(pairs) <= self.sent
            homes.append(chips.placed(jnp.clip(home, 0, chips.sources - 1)))
        (_, one), (_, other) = homes
        good &= jnp.all(~grouped | (one == other))
        beside = chips.sources // chips.parts
        return good & (jnp.max(_count_pairs(one, beside, self.part, chips.parts)) <= self.room)

    def dispatch(self, tokens: Any) -> Any:
        """`[room, e]`: the rows of this chip's groups, of tokens `[tokens, e]` of the chips with the same other axes."""
        rows, _ = self._leaving(self.numbers)
        local = jnp.clip(self.numbers[rows] - self.here * self.chips.tokens, 0, self.chips.tokens - 1)
        taken = tokens[local]
        if self.chips.parts == 1:
            return taken.reshape(-1, tokens.shape[1])[: self.room]
        got = lax.all_to_all(taken, self.chips.sharing, 0, 0).reshape(-1, tokens.shape[1])
        home, place = self._arriving(self.numbers)
        return got[jnp.clip(home * self.sent + place, 0, got.shape[0] - 1)]

    def combine(self, made: Any) -> Any:
        """`[tokens, n]`: the sums by token of the results `[room, n]` of all chips."""
        if self.chips.parts > 1:
            home, _ = self._arriving(self.targets)
            order = jnp.argsort(home, stable=True)
            begins = _begins(home, self.chips.parts)
            at = begins[:, None] + jnp.arange(self.sent, dtype=np.int32)
            back = made[order[jnp.clip(at, 0, made.shape[0] - 1)]]
            made = lax.all_to_all(back, self.chips.sharing, 0, 0).reshape(-1, made.shape[1])
        rows, there = self._leaving(self.targets)
        rows, there = (each.reshape(-1)[: made.shape[0]] for each in (rows, there))
        local = jnp.where(there, self.targets[rows] - self.here * self.chips.tokens, self.chips.tokens)
        zeros = jnp.zeros((self.chips.tokens, made.shape[1]), made.dtype)
        return zeros.at[local].add(made[: local.shape[0]], mode="drop")

    @cached_property
    def own(self) -> Any:
        """`[room]`: the rows of this chip's groups that are of the tokens of chips with the same other axes; then `m`s."""
        part, beside = self.chips.placed(self.here)
        count, place = self.numbers.shape[0], jnp.arange(self.room, dtype=np.int32)
        if len(self.chips.sharing) == len(self.chips.axes):  # all rows of the groups, which are consecutive
            edges = jnp.concatenate([jnp.zeros(1, np.int32), self.ends.astype(np.int32)])
            rows = edges[part] + place
            return jnp.where(rows < edges[part + 1], rows, count)
        mine = (self.part == part) & (self.chips.placed(self._home(self.numbers))[1] == beside)
        rows = jnp.argsort(~mine, stable=True)[: self.room].astype(np.int32)
        return jnp.where(place < jnp.sum(mine, dtype=np.int32), rows, count)

    def _home(self, numbers: Any) -> Any:
        return jnp.clip(numbers // self.chips.tokens, 0, self.chips.sources - 1)

    def _leaving(self, numbers: Any) -> tuple[Any, Any]:
        """Both `[parts, sent]`: this chip's rows by the chip of their group, and whether there is one in each place."""
        mine = self._home(numbers) == self.here
        part = jnp.where(mine, self.part, self.chips.parts)
        order = jnp.argsort(part, stable=True).astype(np.int32)
        begins = _begins(part, self.chips.parts)
        count = jnp.sum(part[:, None] == jnp.arange(self.chips.parts), 0, dtype=np.int32)
        place = jnp.arange(self.sent, dtype=np.int32)
        rows = order[jnp.clip(begins[:, None] + place, 0, part.shape[0] - 1)]
        return rows, place < count[:, None]

    def _arriving(self, numbers: Any) -> tuple[Any, Any]:
        """Both `[room]`: the chip that each own row comes from, `parts` for none, and its place among the rows from there."""
        rows = jnp.minimum(self.own, numbers.shape[0] - 1)
        home = self.chips.placed(self._home(numbers))[0][rows]
        home = jnp.where(self.own < numbers.shape[0], home, self.chips.parts)
        each = (home[:, None] == jnp.arange(self.chips.parts)).astype(np.int32)
        place = jnp.sum(each * (jnp.cumsum(each, 0) - 1), 1, dtype=np.int32)
        return home, place


def _begins(sorted_by: Any, parts: int) -> Any:
    """The first place of each part where elements are sorted by part."""
    return jnp.sum(sorted_by[None] < jnp.arange(parts)[:, None], 1, dtype=np.int32)


def _count_pairs(one: Any, ones: int, other: Any, others: int) -> Any:
    """`[ones, others]`: the number of elements of each pair, exact up to 2^24."""
    left = (one[:, None] == jnp.arange(ones)).astype(jnp.bfloat16)
    right = (other[:, None] == jnp.arange(others)).astype(jnp.bfloat16)
    return jnp.einsum("ma,mb->ab", left, right, preferred_element_type=jnp.float32)


def run_exchanged(
    exchange: Exchange, jaxpr: Any, parts: tuple[str, ...], arrays: tuple[Any, ...], begins: Any, ends: Any
) -> Any:
    """The result `[tokens, n]` of a chain whose rows go to the chips of their groups and back.

    **Arguments:**

    - `arrays`: the operands but the last, the sizes; tokens and matrices are those of this chip.
    - `begins`, `ends`: `[g]`, the rows of each of this chip's groups.
    """
    own = exchange.own
    rows = exchange.dispatch(next(a for a, part in zip(arrays, parts, strict=False) if part == TOKENS))
    taken = [
        a[jnp.minimum(own, a.shape[0] - 1)] if part in BY_ROW and a.shape[0] > 1 else a
        for a, part in zip(arrays, parts, strict=False)
    ]
    before = [jnp.sum(own[None] < edge[:, None], 1, dtype=np.int32) for edge in (begins, ends)]
    return exchange.combine(evaluate(jaxpr, (*taken, before[1] - before[0]), gathered=rows))


def exchange_of(jaxpr: Any, operands: tuple[Any, ...], chips: Chips, ends: Any, here: Any, load: float) -> Exchange:
    """The exchange of a chain's rows."""
    known = dict(zip(jaxpr.invars, operands, strict=True))
    numbers, targets = (known[numbers_of(jaxpr, each)].reshape(-1) for each in ("gather", "scatter-add"))
    return Exchange(chips, numbers.astype(np.int32), targets.astype(np.int32), ends, here, load)
