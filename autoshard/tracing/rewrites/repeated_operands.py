"""Matmuls of repeated operands, as matmuls of the operands themselves.

Attention with fewer key and value heads than query heads is often written with `jnp.repeat`: each key head is read once for
every query head of its group. The repeated array is `groups` times larger, and compilers write it to memory. The same product
is a matmul whose groups are rows:

    [B, K·G, T, D] · repeat([B, K, S, D], G)  =  reshape([B, K, G, T, D] · [B, K, S, D])

Sums over `D` are the same sums. The repeated dimension must be a batch dimension of the matmul; broadcasts, reshapes,
transposes and casts may lie between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax
from jax.extend import core as jex

from autoshard.tracing.equations import equations
from autoshard.tracing.jaxprs import live_equations


@dataclass(frozen=True)
class Repeat:
    """An operand that repeats one dimension of another array.

    **Attributes:**

    - `source`: the array that is repeated.
    - `apply`: makes the operand without its repetition from `source`; the repeated dimension has the `kept` size.
    - `kept`, `groups`: the size of the dimension in `source`, and how often it is repeated.
    - `is_inner`: whether one element's repetitions are neighbours, as `jnp.repeat` has them; `jnp.tile` has not.
    """

    source: Any
    apply: Callable[[Any], Any]
    kept: int
    groups: int
    is_inner: bool


def group_repeats(jaxpr: Any, eqns: Sequence[Any]) -> list[Any]:
    """The equations of a jaxpr, where no matmul reads an operand that is repeated along one of its batch dimensions."""
    makers = {v: eqn for eqn in eqns for v in eqn.outvars}
    found, is_grouped = [], False
    for eqn in eqns:
        grouped = _grouped(eqn, makers) if eqn.primitive.name == "dot_general" else None
        is_grouped |= grouped is not None
        found += [eqn] if grouped is None else grouped
    return live_equations(jaxpr.replace(eqns=found)) if is_grouped else list(eqns)


def _grouped(eqn: Any, makers: Mapping[Any, Any]) -> list[Any] | None:
    """The equations of a matmul with the groups of its repeated operand as rows; None if no operand is repeated."""
    for side in (1, 0):
        operand, batch = eqn.invars[side], eqn.params["dimension_numbers"][1][side]
        for place, dim in enumerate(batch):
            repeat = _repeat_along(operand, dim, makers)
            if repeat is not None:
                atoms = [eqn.invars[1 - side], repeat.source]
                return equations(_product(eqn, side, place, repeat), atoms, eqn.source_info, eqn.outvars)[0]
    return None


def _product(eqn: Any, side: int, place: int, repeat: Repeat) -> Callable[[Any, Any], Any]:
    """The matmul as a function of its other operand and of what is repeated.

    **Arguments:**

    - `side`: 0 if the left operand is repeated, 1 if the right one.
    - `place`: which batch dimension is repeated.
    """
    (summed, batch), others = eqn.params["dimension_numbers"], 1 - side
    split = batch[others][place]
    kept_at, groups_at = (split, split + 1) if repeat.is_inner else (split + 1, split)

    def moved(dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(kept_at if dim == split else dim + (dim > split) for dim in dims)

    sides: list[Any] = [None, None]
    sides[side] = summed[side], batch[side]
    sides[others] = moved(summed[others]), moved(batch[others])
    numbers = tuple(zip(*sides, strict=True))
    params = {**eqn.params, "dimension_numbers": numbers}
    shape = eqn.outvars[0].aval.shape
    free = [dim for dim in range(eqn.invars[others].aval.ndim + 1) if dim not in (*sides[others][0], *sides[others][1])]
    at = (len(shape) + 1 - len(free) if others else len(batch[0])) + free.index(groups_at)
    order = [dim for dim in range(len(shape) + 1) if dim != at]
    order.insert(place + 1 if repeat.is_inner else place, at)

    def product(other: Any, source: Any) -> Any:
        pair = (repeat.kept, repeat.groups) if repeat.is_inner else (repeat.groups, repeat.kept)
        other = lax.reshape(other, (*other.shape[:split], *pair, *other.shape[split + 1 :]))
        operands = [repeat.apply(source), other] if others else [other, repeat.apply(source)]
        made = eqn.primitive.bind(*operands, **params)
        if order != sorted(order):
            made = lax.transpose(made, order)
        return lax.reshape(made, shape)

    return product


# --- Repetitions


def _repeat_along(atom: Any, dim: int, makers: Mapping[Any, Any]) -> Repeat | None:
    """The repetition of an operand along a dimension, seen through transposes and casts; None if it repeats nothing."""
    later, at = [], dim
    while (maker := _maker(atom, makers)) is not None and maker.primitive.name in ("transpose", "convert_element_type"):
        at = maker.params["permutation"][at] if maker.primitive.name == "transpose" else at
        later.append(maker)
        atom = maker.invars[0]
    if maker is None:
        return None
    if maker.primitive.name == "tile":
        return _tiling(maker, at, later)
    if maker.primitive.name == "reshape":
        merged = _merged_pair(maker, at)
        return _broadcast(maker.invars[0], merged, later, makers) if merged else None
    return _broadcast(atom, (at,), later, makers)


def _maker(atom: Any, makers: Mapping[Any, Any]) -> Any:
    return None if isinstance(atom, jex.Literal) else makers.get(atom)


def _merged_pair(eqn: Any, at: int) -> tuple[int, int] | None:
    """The two dimensions that a reshape merges to the dimension `at` of its result, if it does nothing else."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    same = before[:at] == after[:at] and before[at + 2 :] == after[at + 1 :]
    return (at, at + 1) if same and len(before) == len(after) + 1 and eqn.params["dimensions"] is None else None


def _tiling(eqn: Any, at: int, later: Sequence[Any]) -> Repeat | None:
    """The repetition by `jnp.tile` of an array along one dimension and no other."""
    groups, shape = eqn.params["reps"][at], eqn.invars[0].aval.shape
    if groups == 1 or any(times != 1 for place, times in enumerate(eqn.params["reps"]) if place != at):
        return None
    return Repeat(eqn.invars[0], _again(shape, later), shape[at], groups, False)


def _broadcast(expanded: Any, pair: tuple[int, ...], later: Sequence[Any], makers: Mapping[Any, Any]) -> Repeat | None:
    """The repetition of an array that is broadcast along one dimension of a pair, or along the only one given, and no other."""
    source, places = _before_broadcasts(expanded, makers)
    shape = expanded.aval.shape
    spread = [at for at, place in enumerate(places) if place is None]
    if len(spread) != 1 or spread[0] not in pair or isinstance(source, jex.Literal):
        return None
    (at,) = spread
    kept = next((shape[other] for other in pair if other != at), 1)
    unrepeated = (*shape[:at], *((1,) if len(pair) == 1 else ()), *shape[at + 1 :])
    return Repeat(source, _again(unrepeated, later), kept, shape[at], at == pair[-1])


def _again(shape: tuple[int, ...], later: Sequence[Any]) -> Callable[[Any], Any]:
    """The function that brings an array to a shape and then runs transposes and casts on it, of which the last comes first."""

    def apply(array: Any) -> Any:
        array = array if array.shape == shape else lax.reshape(array, shape)
        for eqn in reversed(later):
            array = eqn.primitive.bind(array, **eqn.params)
        return array

    return apply


def _before_broadcasts(array: Any, makers: Mapping[Any, Any]) -> tuple[Any, list[int | None]]:
    """The array that is broadcast to another, and which of its dimensions each of the other is; None where it is repeated."""
    places: list[int | None] = list(range(len(array.aval.shape)))
    while (maker := _maker(array, makers)) is not None and maker.primitive.name == "broadcast_in_dim":
        source = maker.invars[0]
        comes_from = {
            to: k
            for k, to in enumerate(maker.params["broadcast_dimensions"])
            if source.aval.shape[k] == array.aval.shape[to]
        }
        places = [None if place is None else comes_from.get(place) for place in places]
        array = source
    return array, places
