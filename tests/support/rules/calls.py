"""Random calls of primitives: random parameters, shapes and operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from autoshard.tracing.blocks import Literal, OpStep
from costmodels.program import Operation
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
