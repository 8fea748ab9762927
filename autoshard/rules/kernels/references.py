"""The reads of tables by the steps of a kernel's grid, and accesses to references, in jaxprs of Pallas kernels.

A *table* is an operand that is read before the kernel runs (scalar prefetch): its elements may choose blocks and work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core as jex

NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Lookup:
    """One read of a table: per dimension of the table the grid dimension whose step is the index, if it is exactly that."""

    table: int
    steps: tuple[int | None, ...]


@dataclass(frozen=True)
class Source:
    """The grid dimensions from whose steps a number is computed (`direct`), and those by which it is `looked_up` in tables.

    `step` is the grid dimension whose step the number is, if it is exactly that.
    """

    step: int | None = None
    direct: frozenset[int] = NONE
    looked_up: frozenset[int] = NONE


def merge(sources: Sequence[Source]) -> Source:
    """The source of a number that is computed from several."""
    return Source(
        None, NONE.union(*(each.direct for each in sources)), NONE.union(*(each.looked_up for each in sources))
    )


def indices_of(eqn: Any, operands: int = 1) -> Sequence[Any] | None:
    """The indices by which an equation reads or writes a reference: atoms, integers and slices.

    None if the reference is indexed in several stages. An empty sequence is the whole reference. `operands` of the equation
    come before the indices.
    """
    transforms: Any = jax.tree.unflatten(eqn.params["tree"], eqn.invars[operands:])
    if not transforms:
        return ()
    if len(transforms) > 1 or not hasattr(transforms[0], "indices"):
        return None
    return transforms[0].indices


def is_whole(eqn: Any, operands: int) -> bool:
    """Whether an equation accesses all of a reference."""
    indices = indices_of(eqn, operands)
    if indices is None:
        return False
    sizes = eqn.invars[0].aval.shape
    return all(
        getattr(index, "start", None) == 0
        and getattr(index, "size", None) == size
        and getattr(index, "stride", None) == 1
        for index, size in zip(indices, sizes if indices else (), strict=True)
    )


def lookup(eqn: Any, table: int, rank: int, source_of: Any) -> tuple[Lookup, Source]:
    """The lookup of a `get` equation on a table, and the source of its result."""
    indices = indices_of(eqn) or ()
    sources = [_source_of_index(index, source_of) for index in indices]
    exact = tuple(each.step for each in sources) or (None,) * rank
    direct = NONE.union(*(each.direct for each in sources if each.step is None))
    looked_up = NONE.union(*(each.looked_up for each in sources), {step for step in exact if step is not None})
    if len(eqn.invars) > 1 and not indices:  # indexed in several stages
        direct = merge([source_of(atom) for atom in eqn.invars[1:]]).direct
    return Lookup(table, exact), Source(None, direct, looked_up)


def _source_of_index(index: Any, source_of: Any) -> Source:
    if isinstance(index, int):
        return Source()
    if hasattr(index, "start"):
        return merge([source_of(each) for each in (index.start, index.size) if not isinstance(each, int)])
    return source_of(index)


@dataclass(frozen=True)
class IndexMap:
    """The indices of an operand's or a result's block: per dimension the source, and the lookups that are made for them."""

    jaxpr: Any
    sources: tuple[Source, ...]
    lookups: tuple[Lookup, ...]

    @classmethod
    def of(cls, closed: Any, rank: int) -> IndexMap:
        """The reading of an index map, for a grid of `rank` dimensions."""
        known: dict[Any, Source] = {v: Source(i, frozenset({i})) for i, v in enumerate(closed.jaxpr.invars[:rank])}
        tables = {v: i for i, v in enumerate(closed.jaxpr.invars[rank:])}
        lookups: list[Lookup] = []

        def source_of(atom: Any) -> Source:
            return known.get(atom, Source()) if not isinstance(atom, jex.Literal) else Source()

        for eqn in closed.jaxpr.eqns:
            if eqn.primitive.name == "get" and eqn.invars[0] in tables:
                table = eqn.invars[0]
                found, source = lookup(eqn, tables[table], len(table.aval.shape), source_of)
                lookups.append(found)
            elif any(v in tables for v in eqn.invars if not isinstance(v, jex.Literal)):
                everything = frozenset(range(rank))  # a call that reads a table: by any step
                source = Source(None, everything, everything)
            else:
                source = merge([source_of(atom) for atom in eqn.invars])
            known.update(dict.fromkeys(eqn.outvars, source))
        return cls(closed, tuple(map(source_of, closed.jaxpr.outvars)), tuple(lookups))

    def values(self, dimension: int, step: int, count: int) -> list[int]:
        """The indices along a dimension for each of `count` steps, on which alone they depend."""
        out = self.jaxpr.jaxpr.outvars[dimension]
        variable = self.jaxpr.jaxpr.invars[step]
        if out is variable:
            return list(range(count))
        needed = _needed(self.jaxpr.jaxpr, out)
        short = self.jaxpr.jaxpr.replace(
            invars=[variable],
            outvars=[out],
            eqns=needed,
            debug_info=self.jaxpr.jaxpr.debug_info._replace(arg_names=None, result_paths=None),
        )
        with jax.ensure_compile_time_eval():
            found = jax.vmap(jex.jaxpr_as_fun(jex.ClosedJaxpr(short, self.jaxpr.consts)))(
                jax.numpy.arange(count, dtype="int32")
            )[0]
        return [int(each) for each in found]


def _needed(jaxpr: Any, out: Any) -> list[Any]:
    """The equations that a result needs."""
    wanted, kept = {out}, []
    for eqn in reversed(jaxpr.eqns):
        if any(v in wanted for v in eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return kept[::-1]
