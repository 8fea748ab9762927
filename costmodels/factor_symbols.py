"""The symbols of an operation's factors, and products of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from costmodels.machine.lazy_sympy import sympy


@cache
def size_symbol(factor: int) -> sympy.Symbol:
    """$d_i$: the size of factor `i` in elements."""
    return sympy.Symbol(f"d{factor}", positive=True, integer=True)


@cache
def shards_symbol(factor: int) -> sympy.Symbol:
    """$s_i$: the number of shards of factor `i`."""
    return sympy.Symbol(f"s{factor}", positive=True, integer=True)


def points(factors: Iterable[int]) -> sympy.Expr:
    """The product of the factors' sizes on one chip."""
    return sympy.Mul(*(size_symbol(i) / shards_symbol(i) for i in factors))


@cache
def tile_symbol() -> sympy.Symbol:
    """$t$: the side of the matrix unit's tile."""
    return sympy.Symbol("t", positive=True)


def tiles(factors: Sequence[int]) -> sympy.Expr:
    """The product of the factors' sizes on one chip, in whole tiles."""
    return tile_symbol() * sympy.ceiling(points(factors) / tile_symbol()) if factors else tile_symbol()


def flatten(dims: Sequence[Sequence[int]]) -> list[int]:
    """The factors of all dimensions."""
    return [factor for dim in dims for factor in dim]


def number(value: float) -> sympy.Expr:
    """A number, as an integer if it is one."""
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)
