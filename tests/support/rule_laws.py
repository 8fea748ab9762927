"""Random calls of primitives, and the laws that their rules must keep under any strategy.

| name | is |
|---|---|
| `calls()` | a random call of a primitive: random parameters, shapes and operands |
| `chip_by_chip` | what every chip computes under a strategy, put together again |
| `explicit_layouts` | what JAX's explicit-sharding mode says of the results' layouts |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from autoshard.emitting.program import run_locally
from autoshard.emitting.sharding import spec_of
from autoshard.rules.rule import local_shape
from autoshard.tracing.blocks import Literal, OpStep
from costmodels.program.program import REDUCED_INSIDE, Operation
from search.formulation.layouts import Layout
from search.formulation.strategies import Strategy, input_layout, output_layout, strategy_space
from tests.support.layout_strategies import op_steps
from tests.support.tracing import trace

SIZES = {"x": 2, "y": 2, "z": 2}
Data = st.DataObject


@dataclass(frozen=True)
class Call:
    """A function that calls one primitive last, and its operands."""

    primitive: str
    fn: Callable[..., Any]
    operands: tuple[np.ndarray, ...]

    def traced(self) -> Equation | None:
        """The primitive as the search sees it and as it runs; `None` where JAX has left it out."""
        found = trace(self.fn, *self.operands)
        known: dict[Any, Any] = dict(zip(found.argument_values, map(jnp.asarray, self.operands), strict=True))
        known |= dict(zip(found.constant_values, found.constants, strict=True))
        last = None
        for step in op_steps(found.block):
            operands = [atom.value if isinstance(atom, Literal) else known[atom] for atom in step.operands]
            made = step.eqn.primitive.bind(*operands, **step.eqn.params)
            results = made if step.eqn.primitive.multiple_results else [made]
            known.update(zip(step.results, results, strict=True))
            if step.eqn.primitive.name == self.primitive:
                arrays = [np.asarray(known[atom]) for atom in step.operands if not isinstance(atom, Literal)]
                last = Equation(found.program.operations[step.operation], step, arrays, list(map(np.asarray, results)))
        return last


@dataclass(frozen=True)
class Equation:
    """One equation as the search sees it and as it runs, with the operands it gets and the results it makes."""

    op: Operation
    step: OpStep
    operands: list[np.ndarray]
    results: list[np.ndarray]


# --- random calls

_DIMS = st.sampled_from((1, 2, 3, 4, 6, 8))


def _shape(draw: Any, least: int = 1, most: int = 3) -> tuple[int, ...]:
    return tuple(draw(st.lists(_DIMS, min_size=least, max_size=most)))


def _floats(draw: Any, shape: Sequence[int]) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return rng.integers(-8, 9, shape).astype(np.float32)  # whole numbers: their sums are exact in any order


def _integers(draw: Any, shape: Sequence[int], low: int, high: int) -> np.ndarray:
    return np.random.default_rng(draw(st.integers(0, 99))).integers(low, high, shape).astype(np.int32)


def _some(draw: Any, rank: int) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(st.integers(0, rank - 1)))))


def _binary(draw: Any) -> Call:
    name, fn = draw(st.sampled_from([("add", lax.add), ("mul", lax.mul), ("sub", lax.sub), ("max", lax.max)]))
    shape = _shape(draw)
    return Call(name, fn, (_floats(draw, shape), _floats(draw, shape)))


def _select(draw: Any) -> Call:
    shape = _shape(draw)
    which = _integers(draw, shape if draw(st.booleans()) else (), 0, 2).astype(bool)
    return Call("select_n", lax.select_n, (which, _floats(draw, shape), _floats(draw, shape)))


def _unary(draw: Any) -> Call:
    name, fn = draw(st.sampled_from([("neg", lax.neg), ("abs", lax.abs), ("sign", lax.sign), ("square", lax.square)]))
    return Call(name, fn, (_floats(draw, _shape(draw)),))


def _reduction(draw: Any) -> Call:
    name = draw(st.sampled_from(["reduce_sum", "reduce_max", "reduce_min"]))
    shape = _shape(draw)
    axes = _some(draw, len(shape))
    return Call(name, lambda x: getattr(lax, name)(x, axes=axes), (_floats(draw, shape),))


def _transpose(draw: Any) -> Call:
    shape = _shape(draw)
    order = draw(st.permutations(range(len(shape))))
    return Call("transpose", lambda x: lax.transpose(x, order), (_floats(draw, shape),))


def _reshape(draw: Any) -> Call:
    """Dimensions of small factors, merged otherwise on either side."""
    factors = draw(st.lists(st.sampled_from((1, 2, 2, 3, 4)), min_size=1, max_size=5))

    def merged() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(1, len(factors) - 1)))) if len(factors) > 1 else []
        return [prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]

    before, after = merged(), merged()
    return Call("reshape", lambda x: lax.reshape(x, after), (_floats(draw, before),))


def _broadcast(draw: Any) -> Call:
    shape = _shape(draw)
    kept = _some(draw, len(shape))
    operand = [1 if draw(st.booleans()) else shape[i] for i in kept]
    return Call("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, shape, kept), (_floats(draw, operand),))


def _squeeze(draw: Any) -> Call:
    shape = list(_shape(draw))
    at = draw(st.integers(0, len(shape)))
    return Call("squeeze", lambda x: lax.squeeze(x, (at,)), (_floats(draw, [*shape[:at], 1, *shape[at:]]),))


def _dot(draw: Any) -> Call:
    """Any order of batch, contracted and free dimensions on either side."""
    batch, summed, left, right = (draw(st.lists(st.sampled_from((1, 2, 3, 4)), max_size=n)) for n in (2, 2, 2, 2))
    sides = []
    for free in (left, right):
        names = [*(("b", i) for i in range(len(batch))), *(("k", i) for i in range(len(summed)))]
        names += [("f", i) for i in range(len(free))]
        names = draw(st.permutations(names))
        sizes = {"b": batch, "k": summed, "f": free}
        sides.append((names, [sizes[kind][i] for kind, i in names]))

    def places(kind: str, count: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(names.index((kind, i)) for i in range(count)) for names, _ in sides)

    numbers = (places("k", len(summed)), places("b", len(batch)))
    operands = tuple(_floats(draw, shape) for _, shape in sides)
    return Call("dot_general", lambda a, b: lax.dot_general(a, b, numbers), operands)  # pyright: ignore[reportArgumentType]


def _slice(draw: Any) -> Call:
    shape = _shape(draw)
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    limits = [draw(st.integers(start + 1, n)) for start, n in zip(starts, shape, strict=True)]
    strides = [draw(st.integers(1, 3)) for _ in shape]
    return Call("slice", lambda x: lax.slice(x, starts, limits, strides), (_floats(draw, shape),))


def _starts(draw: Any, count: int) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(draw(st.integers(-3, 10)), np.int32) for _ in range(count))


def _dynamic_slice(draw: Any) -> Call:
    shape = _shape(draw)
    sizes = [draw(st.integers(1, n)) for n in shape]

    def fn(x: Any, *starts: Any) -> Any:
        return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)

    return Call("dynamic_slice", fn, (_floats(draw, shape), *_starts(draw, len(shape))))


def _update(draw: Any) -> Call:
    shape = _shape(draw)
    sizes = [draw(st.integers(1, n)) for n in shape]

    def fn(x: Any, update: Any, *starts: Any) -> Any:
        return lax.dynamic_update_slice(x, update, starts, allow_negative_indices=False)

    operands = (_floats(draw, shape), _floats(draw, sizes), *_starts(draw, len(shape)))
    return Call("dynamic_update_slice", fn, operands)


def _pad(draw: Any) -> Call:
    shape = _shape(draw)
    config = [(draw(st.integers(-1, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 1))) for _ in shape]
    return Call("pad", lambda x: lax.pad(x, np.float32(3), config), (_floats(draw, shape),))


def _concatenate(draw: Any) -> Call:
    shape = list(_shape(draw))
    at = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.lists(_DIMS, min_size=1, max_size=3))
    operands = tuple(_floats(draw, [*shape[:at], n, *shape[at + 1 :]]) for n in parts)
    return Call("concatenate", lambda *xs: lax.concatenate(xs, at), operands)


def _along(draw: Any) -> Call:
    shape = _shape(draw)
    at = draw(st.integers(0, len(shape) - 1))
    choices: list[tuple[str, Callable[..., Any]]] = [
        ("sort", lambda x: lax.sort(x, dimension=at)),
        ("rev", lambda x: lax.rev(x, (at,))),
        ("argmax", lambda x: lax.argmax(x > 0, at, jnp.int32)),
    ]
    name, fn = draw(st.sampled_from(choices))
    return Call(name, fn, (_floats(draw, shape),))


def _unlike(draw: Any, shape: Sequence[int]) -> np.ndarray:
    """Floats or integers with many ties; now and then floats that are no numbers, infinite or negative zeros."""
    kind = draw(st.sampled_from(("few", "special", "int32", "int8")))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    found = rng.integers(-2, 3, shape)
    if kind == "special":
        return rng.choice(np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0], np.float32), shape)
    return found.astype(np.float32 if kind == "few" else kind)


def running(draw: Any) -> Call:
    """A running reduction along any dimension, either way."""
    shape = _shape(draw)
    at, reverse = draw(st.integers(0, len(shape) - 1)), draw(st.booleans())
    name = draw(st.sampled_from(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"]))
    x = _floats(draw, shape) if name == "cumlogsumexp" else _unlike(draw, shape)
    return Call(name, lambda x: getattr(lax, name)(x, axis=at, reverse=reverse), (x,))


def parts(draw: Any) -> Call:
    """Parts of one size, mostly, joined or taken apart."""
    shape, count = list(_shape(draw)), draw(st.integers(2, 6))
    at, uneven = draw(st.integers(0, len(shape) - 1)), draw(st.integers(0, 4)) == 0
    sizes = [shape[at] + (uneven and i == 0) for i in range(count)]
    each = [_floats(draw, [*shape[:at], n, *shape[at + 1 :]]) for n in sizes]
    if draw(st.booleans()):
        return Call("concatenate", lambda *xs: lax.concatenate(xs, at), tuple(each))
    return Call("split", lambda x: lax.split(x, sizes, at), (np.concatenate(each, at),))


def best(draw: Any) -> Call:
    """The best few of a dimension, mostly so few that every piece has as many."""
    shape = list(_shape(draw))
    at = draw(st.integers(0, len(shape) - 1))
    shape[at] *= 4
    k = min(shape[at], draw(st.integers(1, 6)))
    return Call("top_k", lambda x: lax.top_k(x, k, axis=at), (_unlike(draw, shape),))


def reduced_again(draw: Any) -> Call:
    """Reductions for which there is no collective."""
    shape = _shape(draw)
    axes, bits = _some(draw, len(shape)), draw(st.booleans())
    name = draw(st.sampled_from(["reduce_and", "reduce_or", "reduce_xor"])) if bits else "reduce_prod"
    x = _integers(draw, shape, -9, 9) if bits else _unlike(draw, shape)
    return Call(name, lambda x: getattr(lax, name)(x, axes=axes), (x,))


_MODES = st.sampled_from(["clip", "fill"])


def _take(draw: Any) -> Call:
    shape, rows = _shape(draw), _shape(draw, 0, 2)
    at, mode = draw(st.integers(0, len(shape) - 1)), draw(_MODES)
    indices = _integers(draw, rows, -12, 12)
    return Call("gather", lambda x, i: jnp.take(x, i, axis=at, mode=mode), (_floats(draw, shape), indices))


def _take_along(draw: Any) -> Call:
    shape = _shape(draw)
    at = draw(st.integers(0, len(shape) - 1))
    indices = _integers(draw, [draw(_DIMS) if i == at else n for i, n in enumerate(shape)], -9, 9)
    fn = lambda x, i: jnp.take_along_axis(x, i, at, mode="clip")  # noqa: E731
    return Call("gather", fn, (_floats(draw, shape), indices))


def _scatter(draw: Any) -> Call:
    shape, rows = _shape(draw), draw(st.integers(1, 4))
    name, mode = draw(st.sampled_from(["add", "max", "min", "multiply"])), draw(st.sampled_from(["clip", "drop"]))
    primitive = {"add": "scatter-add", "max": "scatter-max", "min": "scatter-min", "multiply": "scatter-mul"}[name]
    fn = lambda x, i, u: getattr(x.at[i], name)(u, mode=mode)  # noqa: E731
    operands = (_floats(draw, shape), _integers(draw, (rows,), -9, 9), _floats(draw, (rows, *shape[1:])))
    return Call(primitive, fn, operands)


def _ragged(draw: Any) -> Call:
    m, k, n, g = (draw(st.sampled_from((1, 2, 4, 6, 8))) for _ in range(4))
    sizes = _integers(draw, (g,), 0, max(1, 2 * m // g + 1))
    return Call("ragged_dot_general", lax.ragged_dot, (_floats(draw, (m, k)), _floats(draw, (g, k, n)), sizes))


ORACLE = (_binary, _select, _unary, _reduction, _transpose, _reshape, _broadcast, _squeeze, _dot, _concatenate)
MOVING = (
    _slice,
    _dynamic_slice,
    _update,
    _pad,
    _along,
    parts,
    running,
    best,
    reduced_again,
    _take,
    _take_along,
    _scatter,
    _ragged,
)


@st.composite
def calls(draw: st.DrawFn, family: Callable[[Any], Call]) -> Call:
    """A random call of one family of primitives."""
    return family(draw)


# --- chip by chip


@dataclass(frozen=True)
class _Chip:
    """One chip's strategy as a rule's `local` function sees it, with this chip's place on the mesh."""

    rule: Any
    strategy: Strategy
    place: dict[str, Any]
    on_tpu = True
    order = ()

    def size(self, factor: int) -> int:
        return self.rule.factors[factor].size // prod(SIZES[axis] for axis in self.strategy.splits[factor])

    def start(self, factor: int) -> Any:
        return _number(self.strategy.splits[factor], self.place) * self.size(factor)

    def is_split(self, factor: int) -> bool:
        return bool(self.strategy.splits[factor])

    def gathered(self, factor: int, piece: Any) -> Any:
        found = piece
        for axis in reversed(self.strategy.splits[factor]):
            found = lax.all_gather(found, axis, axis=0, tiled=False)
        return jnp.reshape(found, (-1, *piece.shape))

    def permuted(self, factor: int, piece: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        senders = np.array([sender for sender, _ in sorted(pairs, key=lambda pair: pair[1])])
        own = self.start(factor) // self.size(factor)
        return self.gathered(factor, piece)[jnp.asarray(senders)[own]]


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
