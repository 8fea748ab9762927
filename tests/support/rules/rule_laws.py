"""The laws that rules must keep under any strategy.

| name | is |
|---|---|
| `chip_by_chip` | what every chip computes under a strategy, put together again |
| `explicit_layouts` | what JAX's explicit-sharding mode says of the results' layouts |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from autoshard.emitting import spec_of
from autoshard.emitting.local_operation import run_locally
from autoshard.rules.rule import local_shape
from autoshard.tracing.blocks import Literal, OpStep
from costmodels.program import Operation
from costmodels.program.program import REDUCED_INSIDE
from search import Layout, Strategy
from search.formulation.strategies import input_layout, output_layout, strategy_space
from tests.support.rules.calls import SIZES, Call, Equation

# --- chip by chip


@dataclass(frozen=True)
class _Chip:
    """One chip's strategy as a rule's `local` function sees it, with this chip's place on the mesh."""

    rule: Any
    strategy: Strategy
    place: dict[str, Any]
    on_tpu = True
    order = ()
    expert_load = 1.5

    def size(self, factor: int) -> int:
        return self.rule.factors[factor].size // prod(SIZES[axis] for axis in self.strategy.splits[factor])

    def start(self, factor: int) -> Any:
        return _number(self.strategy.splits[factor], self.place) * self.size(factor)

    def is_split(self, factor: int) -> bool:
        return bool(self.strategy.splits[factor])

    def chips(self, factor: int) -> int:
        return prod(SIZES[axis] for axis in self.strategy.splits[factor])

    def axes(self, factor: int) -> tuple[str, ...]:
        return self.strategy.splits[factor]

    def along(self, axis: str) -> int:
        return SIZES[axis]

    def gathered(self, factor: int, piece: Any) -> Any:
        found = piece
        for axis in reversed(self.strategy.splits[factor]):
            found = lax.all_gather(found, axis, axis=0, tiled=False)
        return jnp.reshape(found, (-1, *piece.shape))

    def permuted(self, factor: int, piece: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        senders = np.array([sender for sender, _ in sorted(pairs, key=lambda pair: pair[1])])
        own = self.start(factor) // self.size(factor)
        return self.gathered(factor, piece)[jnp.asarray(senders)[own]]

    def look_up(self, primitive: Any, operand: Any, indices: Any, params: Mapping[str, Any]) -> Any:
        return primitive.bind(operand, indices, **params)


def _number(axes: Sequence[str], place: dict[str, Any]) -> Any:
    at = jnp.int32(0)
    for axis in axes:
        at = at * SIZES[axis] + place[axis]
    return at


def drawn_strategy(draw: Any, op: Operation) -> Strategy:
    """Any strategy of an operation on the mesh of `SIZES`, one that splits much more often than not."""
    found = strategy_space(op, tuple(SIZES.items())).strategies
    some = [draw(st.integers(0, len(found) - 1)) for _ in range(3)]
    return max((found[i] for i in some), key=lambda s: len(s.axes) + sum(map(len, s.carried)))


def chip_by_chip(equation: Equation, strategy: Strategy) -> list[np.ndarray]:
    """The results of an operation that every chip ran on its pieces.

    Checks on the way that pieces have the shapes that the rule says, and that chips which hold the same agree.
    """
    op, step = equation.op, equation.step
    layouts = [input_layout(op.signature, strategy, k) for k in range(len(op.inputs))]
    shares = [_shares(each, layout.partial) for each, layout in zip(equation.operands, layouts, strict=True)]

    def run(place: dict[str, Any], operands: list[Any]) -> list[Any]:
        operands = list(operands)
        full = [a.value if isinstance(a, Literal) else operands.pop(0) for a in step.operands]
        return list(run_locally(step.eqn, step.rule, _Chip(step.rule, strategy, place), full))  # pyright: ignore[reportArgumentType]

    places = [dict(zip(SIZES, coordinates, strict=True)) for coordinates in product(*map(range, SIZES.values()))]
    pieces = [[_piece(s, layout, place) for s, layout in zip(shares, layouts, strict=True)] for place in places]
    numbered = [{axis: np.int32(i) for axis, i in place.items()} for place in places]
    every = _together if any(factor.kind in ("gathered", "exchanged") for factor in op.factors) else _one_by_one
    results = every(run, numbered, pieces)
    found = {tuple(place.values()): result for place, result in zip(places, results, strict=True)}
    return [_assembled(op, strategy, step, k, found) for k in range(len(op.outputs))]


def _one_by_one(run: Callable[..., Any], places: list[Any], pieces: list[Any]) -> list[list[np.ndarray]]:
    compiled = jax.jit(run)
    return [[np.asarray(each) for each in compiled(*chip)] for chip in zip(places, pieces, strict=True)]


def _together(run: Callable[..., Any], places: list[Any], pieces: list[Any]) -> list[list[np.ndarray]]:
    """All chips at once, as a batch along every mesh axis: they may gather one another's pieces."""
    for axis in reversed(SIZES):
        run = jax.vmap(run, axis_name=axis)
    counts = tuple(SIZES.values())
    stacked = jax.tree.map(
        lambda *each: np.stack(each).reshape(*counts, *each[0].shape), *zip(places, pieces, strict=True)
    )
    found = [np.asarray(each).reshape(-1, *each.shape[len(counts) :]) for each in jax.jit(run)(*stacked)]
    return [[each[i] for each in found] for i in range(len(places))]


def _shares(value: np.ndarray, partial: Sequence[str]) -> dict[tuple[int, ...], np.ndarray]:
    """Per place along the partial axes a share of the value; they sum to it."""
    places = list(product(*(range(SIZES[axis]) for axis in partial)))
    rng = np.random.default_rng(len(places))
    shares = {place: rng.integers(-4, 5, value.shape).astype(value.dtype) for place in places[1:]}
    return {places[0]: value - sum(shares.values()) if shares else value, **shares}


def _piece(shares: dict[tuple[int, ...], np.ndarray], layout: Layout, place: dict[str, int]) -> np.ndarray:
    share = shares[tuple(place[axis] for axis in layout.partial)]
    for dim, axes in enumerate(layout.dims):
        size = share.shape[dim] // prod(SIZES[axis] for axis in axes)
        at = int(_number(axes, place))
        share = np.take(share, range(at * size, (at + 1) * size), dim)
    return share


def _assembled(op: Operation, strategy: Strategy, step: OpStep, k: int, found: Any) -> np.ndarray:
    layout = output_layout(op.signature, strategy, k)
    inside = {
        axis: factor.kind
        for factor, axes in zip(op.factors, strategy.splits, strict=True)
        for axis in axes
        if factor.kind in REDUCED_INSIDE
    }
    wanted = local_shape(step.rule.outputs[k], _Chip(step.rule, strategy, {}))
    whole: dict[tuple[int, ...], Any] = {}
    for coordinates, results in found.items():
        assert results[k].shape == wanted, f"a piece of result {k} has the shape {results[k].shape}, not {wanted}"
        place = dict(zip(SIZES, coordinates, strict=True))
        key = tuple(int(_number(axes, place)) for axes in layout.dims)
        combined = tuple(place[axis] for axis in (*layout.partial, *inside))
        known = whole.setdefault(key, {}).setdefault(combined, results[k])
        np.testing.assert_array_equal(known, results[k], "chips that hold the same piece differ")
    kind = next(iter(inside.values()), "sum")
    by = {"max": np.maximum, "min": np.minimum, "and": np.logical_and, "or": np.logical_or}.get(kind, np.add)
    shape = step.eqn.outvars[k].aval.shape
    result = np.zeros(shape, step.eqn.outvars[k].aval.dtype)
    for key, parts in whole.items():
        at = tuple(slice(i * n, (i + 1) * n) for i, n in zip(key, wanted, strict=True))
        result[at] = by.reduce(list(parts.values()))
    return result


# --- JAX's own opinion


def explicit_layouts(call: Call, equation: Equation, strategy: Strategy) -> list[Any] | None:
    """The specs of the results that explicit-sharding mode derives from the operands'; `None` where it has no opinion."""
    mesh = AbstractMesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Explicit,) * len(SIZES))
    op = equation.op
    specs = [spec_of(input_layout(op.signature, strategy, k)) for k in range(len(op.inputs))]
    operands = [
        jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))
        for value, spec in zip(call.operands, specs, strict=True)
    ]
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            found = jax.eval_shape(call.fn, *operands)
    except Exception as error:  # what JAX says where it will not decide has no public type
        if type(error).__name__ != "ShardingTypeError" and not isinstance(
            error, TypeError | ValueError | NotImplementedError
        ):
            raise
        return None
    return [each.sharding.spec for each in jax.tree.leaves(found)]
