"""A call of every primitive that has a rule, in alphabetical order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend.core.primitives as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

from autoshard.rules.pin import pin
from autoshard.rules.rule import rule_for
from autoshard.tracing.blocks import OpStep
from autoshard.tracing.rewrites.decompositions import compose_chains
from tests.support.layout_strategies import (
    op_steps,
)
from tests.support.tracing import trace


class Example:
    """A primitive, a function that calls it (`None` where this JAX has none), and what arguments the function takes."""

    def __init__(self, primitive: str, fn: Callable[..., Any] | None, *args: jax.ShapeDtypeStruct) -> None:
        self.primitive, self.fn, self.args = primitive, fn, args

    def text(self) -> str:
        """The text of the primitive's rule."""
        if self.fn is not None:
            return str(self.step(self.fn, *self.args).rule)
        return str(rule_for(self.primitive, self.args, self.args, {}))

    def step(self, fn: Callable[..., Any], *args: Any) -> OpStep:
        """The primitive's last equation in a function."""
        steps = [step for step in op_steps(trace(fn, *args).block) if step.eqn.primitive.name == self.primitive]
        return steps[-1]


def _spec(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# What arguments are made of: floats, complex numbers, integers, bytes, booleans, PRNG keys.
F, C, B = partial(_spec, jnp.float32), partial(_spec, jnp.complex64), partial(_spec, jnp.bool_)
I, I8, U, U8 = (  # noqa: E741
    partial(_spec, dtype) for dtype in (jnp.int32, jnp.int8, jnp.uint32, jnp.uint8)
)
N = partial(_spec, jnp.int16)  # indices: some negative, some past the end
P = partial(_spec, jnp.uint16)  # indices: distinct, one past the end


def K(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape))


def draw(spec: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """Random numbers of a kind: floats between 0.1 and 0.9, where most functions are defined."""
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(rng.integers(1000)), spec.shape)
    if spec.dtype == jnp.int16:
        return jnp.asarray(rng.integers(-10, 11, spec.shape), spec.dtype)
    if spec.dtype == jnp.uint16:
        return jnp.asarray(rng.permutation(9)[: max(1, np.prod(spec.shape, dtype=int))].reshape(spec.shape), spec.dtype)
    if jnp.issubdtype(spec.dtype, np.inexact):
        return jnp.asarray(rng.uniform(0.1, 0.9, spec.shape), spec.dtype)
    return jnp.asarray(rng.integers(0, 2 if spec.dtype == bool else 8, spec.shape), spec.dtype)


def _definite(x: jax.Array) -> jax.Array:
    """Matrices that have all decompositions."""
    return x @ jnp.swapaxes(x, -1, -2) + jnp.eye(x.shape[-1], dtype=x.dtype)


def _absent(name: str) -> Callable[..., Any] | None:
    """A function that only newer versions of JAX have."""
    return getattr(lax, name, None)


def _on_one_chip(kind: AxisType) -> jax.sharding.NamedSharding:
    mesh = jax.make_mesh((1,), ("a",), axis_types=(kind,), devices=jax.devices()[:1])
    return jax.sharding.NamedSharding(mesh, PartitionSpec("a"))


def _max_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 2), "VALID")


def _windows_at(x: jax.Array, at: jax.Array) -> jax.Array:
    """Windows `[4, 3]` of `x[:, i]` that begin at given places."""
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(1,), start_index_map=(1, 2))
    return lax.gather(x, at, numbers, (4, 1, 3), mode="fill")


def _add_windows_at(x: jax.Array, at: jax.Array, windows: jax.Array) -> jax.Array:
    numbers = lax.ScatterDimensionNumbers((1, 2), (1,), (1, 2))
    return lax.scatter_add(x, at, windows, numbers, mode="clip")


def _gradient_of_experts(x: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    experts = jnp.zeros((4, 4, 2))
    return jax.vjp(lambda w: lax.ragged_dot(x, w, sizes), experts)[1](cotangent)[0]


def _chained(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function that is one chain of grouped matmuls, as the equation that a trace composes of it."""

    def run(*args: jax.Array) -> jax.Array:
        jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
        (eqn,) = compose_chains(jaxpr, jaxpr.eqns)
        given = dict(zip(jaxpr.invars, args, strict=True))
        return eqn.primitive.bind(*(given[v] for v in eqn.invars), **eqn.params)

    return run


def _experts(rows: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(jnp.cos(lax.ragged_dot(rows, up, sizes)), down, sizes)


def _experts_of_tokens(x: jax.Array, at: jax.Array, up: jax.Array, down: jax.Array, to: jax.Array, sizes: jax.Array):
    take, add = lax.GatherDimensionNumbers((1,), (0,), (0,)), lax.ScatterDimensionNumbers((1,), (0,), (0,))
    made = _experts(lax.gather(x, at, take, (1, x.shape[1]), mode="clip"), up, down, sizes)
    return lax.scatter_add(lax.full_like(made, 0, shape=(4, made.shape[1])), to, lax.neg(made), add, mode="clip")


def _experts_and_back(x: jax.Array, at: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array):
    take, add = lax.GatherDimensionNumbers((1,), (0,), (0,)), lax.ScatterDimensionNumbers((1,), (0,), (0,))
    made = _experts(lax.gather(x, at, take, (1, x.shape[1]), mode="clip"), up, down, sizes)
    return lax.scatter_add(lax.full_like(made, 0, shape=(x.shape[0], made.shape[1])), at, made, add, mode="clip")


F84, F48, I84, B84 = F(8, 4), F(4, 8), I(8, 4), B(8, 4)

UNARY = """
abs acos asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1
floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square stop_gradient tan tanh
""".split()
BINARY = (
    "add atan2 complex div eq ge gt igamma igamma_grad_a igammac le lt max min mul ne nextafter pow rem sub".split()
)
EXAMPLES = [
    *(Example(name, getattr(lax, name), F84) for name in UNARY),
    *(Example(name, getattr(lax, name), F84, F84) for name in BINARY),
    Example("acosh", lambda x: lax.acosh(x + 1), F84),
    Example("add_any", jex.add_jaxvals_p.bind, F84, F84),
    Example("and", lax.bitwise_and, I84, I84),
    Example("approx_top_k", lambda x: lax.approx_max_k(x, 2, reduction_dimension=0), F84),
    Example("argmax", lambda x: lax.argmax(x, 1, jnp.int8), F(8, 132)),
    Example("argmin", lambda x: lax.argmin(x, 1, jnp.int8), F(8, 132)),
    Example("autoshard_pin", lambda x: pin(x, PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * 2)), F84),
    Example("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, jnp.int32), F84),
    Example("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, jnp.uint8), F84),
    Example("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, jnp.uint32), U8(8, 4)),
    Example("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (8, 2, 4), (0, 2)), F84),
    Example("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (8, 4), (0, 1)), F(1, 4)),
    Example("broadcast_in_dim", lambda: lax.full((8, 4), 1.0)),
    Example("clamp", lax.clamp, F(), F84, F()),
    Example("clamp", lax.clamp, F84, F84, F84),
    Example("clz", lax.clz, I84),
    Example("concatenate", lambda x, y: lax.concatenate((x, y), 1), F84, F(8, 2)),
    Example("concatenate", lambda x, y: lax.concatenate((x, y), 1), F84, F84),
    Example("conj", lax.conj, C(8, 4)),
    Example(
        "conv_general_dilated",
        lambda x, w: lax.conv_general_dilated(x, w, (1, 2), "SAME"),
        F(4, 8, 6, 6),
        F(4, 8, 3, 3),
    ),
    Example(
        "conv_general_dilated",
        lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=4),
        F(2, 8, 6),
        F(8, 2, 3),
    ),
    Example(
        "conv_general_dilated",
        lambda x, w: lax.conv_general_dilated(
            x, w, (1,), "SAME", batch_group_count=2, dimension_numbers=("CWN", "IWO", "CWN")
        ),
        F(4, 6, 8),
        F(4, 3, 8),
    ),
    Example("convert_element_type", lambda x: lax.convert_element_type(x, jnp.bfloat16), F84),
    Example("convert_element_type", lambda x: lax.convert_element_type(x, jnp.int32), F84),
    Example("copy", jnp.copy, F84),
    Example("cumlogsumexp", lambda x: lax.cumlogsumexp(x, axis=1, reverse=True), F48),
    Example("cummax", lambda x: lax.cummax(x, axis=1, reverse=True), F48),
    Example("cummin", lambda x: lax.cummin(x, axis=1, reverse=True), F48),
    Example("cumprod", lambda x: lax.cumprod(x, axis=1, reverse=True), F48),
    Example("cumsum", lambda x: lax.cumsum(x, axis=1, reverse=True), F48),
    Example("device_put", jax.device_put, F84),
    Example("device_put", lambda x, y: jax.device_put((x, y)), F84, F(8)),
    Example("div", lax.div, I84, I84),
    Example("dot_general", lambda a, b: a @ b, F84, F48),
    Example("dot_general", lambda a, b: jnp.einsum("bhqd,bkhd->bhqk", a, b), F(2, 4, 2, 8), F(2, 8, 4, 8)),
    Example("dot_general", lambda a, b: jnp.einsum("abc,dca->db", a, b), F(2, 4, 8), F(4, 8, 2)),
    Example("dot_general", lambda a, b: lax.dot(a, b, preferred_element_type=jnp.int32), I8(8, 4), I8(4, 8)),
    Example(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, i, i), (4, 3, 1), allow_negative_indices=False),
        F(4, 8, 8),
        N(),
    ),
    Example(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, i, i), (2, 3, 1), allow_negative_indices=False),
        F(4, 8, 8),
        N(),
    ),
    Example(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, i - 8), (8, 1), allow_negative_indices=False),
        B(8, 8),
        N(),
    ),
    Example(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, i, i), allow_negative_indices=False),
        F(4, 8, 8),
        F(4, 3, 1),
        N(),
    ),
    Example(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, i, i), allow_negative_indices=False),
        F(4, 8, 8),
        F(3, 3, 1),
        N(),
    ),
    Example("empty", lambda: lax.empty((8, 4), jnp.float32) * 0),
    Example("empty2", None, F84),
    Example("eq_to", jex.eq_to_p.bind, F84, F84),
    Example("gather", lambda x, i: jnp.take(x, i, axis=0, mode="fill"), F84, N(4)),
    Example("gather", lambda x, i: jnp.take(x, i, axis=0, mode="clip"), F84, N(4)),
    Example("gather", lambda x, i: x.at[i].get(mode="promise_in_bounds"), I84, I(2, 4)),
    Example("gather", lambda x, i: x.at[i].get(mode="fill"), I84, N(4)),
    Example("gather", lambda x, i: x.at[i].get(mode="fill"), B84, N(4)),
    Example("gather", lambda x, i, j: x.at[i, :, j].get(mode="fill"), F(8, 2, 4), N(4), N(4)),
    Example("gather", lambda x, i: jnp.take_along_axis(x, i, 1, mode="fill"), F48, N(4, 2)),
    Example("gather", lambda x, i: x.at[i].get(mode="fill"), F(256, 2), U8(4)),
    Example("gather", _windows_at, F(4, 8, 8), N(4, 2)),
    Example("imag", lax.imag, C(8, 4)),
    Example("integer_pow", lambda x: lax.integer_pow(x, 3), F84),
    Example("iota", lambda: lax.broadcasted_iota(jnp.int32, (8, 4), 0)),
    Example("iota", lambda: lax.broadcasted_iota(jnp.bfloat16, (1024, 2), 0)),
    Example("layout_constraint", lambda x: with_layout_constraint(x, Layout((1, 0))), F84),
    Example("le_to", jex.le_to_p.bind, F84, F84),
    Example("log2", _absent("log2"), F84),
    Example("lt_to", jex.lt_to_p.bind, F84, F84),
    Example("mul", lax.mul, F84, F(1, 4)),
    Example("mulhi", _absent("mulhi"), I84, I84),
    Example("name", lambda x: checkpoint_name(x, "x"), F84),
    Example("not", lax.bitwise_not, I84),
    Example("one_minus_square", _absent("one_minus_square"), F84),
    Example("or", lax.bitwise_or, I84, I84),
    Example("pad", lambda x: lax.pad(x, np.float32(1), ((0, 0, 0), (1, 1, 1))), F84),
    Example("pad", lambda x: lax.pad(x, np.float32(1), ((1, -1, 0), (0, 0, 0))), F84),
    Example("platform_index", lambda x: lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x), F(8)),
    Example("polygamma", lambda x, y: lax.polygamma(jnp.ceil(x), y), F84, F84),
    Example("population_count", lax.population_count, I84),
    Example("pvary", None, F84),
    Example("random_bits", lambda k: jax.random.bits(k, (8, 4)), K()),
    Example("random_bits", jax.vmap(lambda k: jax.random.bits(k, (8, 4))), K(8)),
    Example("random_bits", lambda w: jax.random.bits(jax.random.wrap_key_data(w, impl="rbg"), (8, 4)), U(4)),
    Example("random_clone", jax.random.clone, K()),
    Example("random_fold_in", jax.vmap(jax.random.fold_in), K(8), I(8)),
    Example("random_gamma", lambda k, a: jax.random.gamma(k, a), K(), F(8)),
    Example("random_seed", jax.random.key, I()),
    Example("random_split", lambda k: jax.random.split(k, 8), K()),
    Example("random_unwrap", jax.random.key_data, K(8)),
    Example("random_wrap", jax.random.wrap_key_data, U(8, 2)),
    Example("ragged_chain", _chained(_experts), F(8, 4), F(4, 4, 2), F(4, 2, 6), U8(4)),
    Example("ragged_chain", _chained(_experts_and_back), F(4, 4), I(8, 1), F(4, 4, 2), F(4, 2, 6), U8(4)),
    Example("ragged_chain", _chained(_experts_of_tokens), F(6, 4), I(8, 1), F(4, 4, 2), F(4, 2, 6), I(8, 1), U8(4)),
    Example("ragged_dot_general", lax.ragged_dot, F(8, 4), F(4, 4, 2), U8(4)),
    Example("ragged_dot_general", jax.vmap(lax.ragged_dot), F(2, 8, 4), F(2, 4, 4, 2), U8(2, 4)),
    Example("ragged_dot_general", _gradient_of_experts, F(8, 4), F(8, 2), U8(4)),
    Example("real", lax.real, C(8, 4)),
    Example("reduce", lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b + a * b, (1,)), F84),
    Example("reduce_and", lambda x: lax.reduce_and(x, axes=(0, 1)), B84),
    Example("reduce_and", lambda x: lax.reduce_and(x, axes=(0,)), I84),
    Example("reduce_max", lambda x: lax.reduce_max(x, axes=(1,)), F(4, 8, 2)),
    Example("reduce_max", lambda x: lax.reduce_max(x, axes=(0,)), B84),
    Example("reduce_min", lambda x: lax.reduce_min(x, axes=(1,)), F(4, 8, 2)),
    Example("reduce_or", lambda x: lax.reduce_or(x, axes=(0, 1)), B84),
    Example("reduce_or", lambda x: lax.reduce_or(x, axes=(0,)), I84),
    Example("reduce_precision", lambda x: lax.reduce_precision(x, 8, 23), F84),
    Example("reduce_prod", lambda x: lax.reduce_prod(x, axes=(1,)), F(4, 8, 2)),
    Example("reduce_sum", lambda x: lax.reduce_sum(x, axes=(1,)), F(4, 8, 2)),
    Example("reduce_sum", lambda x: lax.reduce_sum(x, axes=(0,)), I84),
    Example(
        "reduce_window",
        lambda x: lax.reduce_window(x, np.float32(0), lambda a, b: a + b + a * b, (1, 2), (1, 2), "VALID"),
        F48,
    ),
    Example("reduce_window_max", lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 1), "SAME"), F48),
    Example("reduce_window_min", lambda x: lax.reduce_window(x, np.inf, lax.min, (2, 1), (2, 1), "SAME"), F84),
    Example("reduce_window_sum", lambda x: lax.reduce_window(x, np.float32(0), lax.add, (1, 2), (1, 2), "SAME"), F48),
    Example("reduce_xor", lambda x: lax.reduce_xor(x, axes=(0,)), I84),
    Example("regularized_incomplete_beta", lax.betainc, F84, F84, F84),
    Example("reshape", lambda x: x.reshape(4, 16), F(4, 2, 8)),
    Example("reshape", lambda x: x.reshape(8, 2, 2, 1, 8), F(16, 16)),
    Example("reshape", lambda x: x.reshape(4, 6), F(6, 4)),
    Example("reshape", lambda x: x.reshape(1, 8, 4), F(2, 2, 2, 4, 1)),
    Example("reshape", lambda x: x.reshape(0, 8), F(4, 0)),
    Example("reshard", lambda x: jax.sharding.reshard(x, _on_one_chip(AxisType.Explicit)), F84),
    Example("rev", lambda x: lax.rev(x, (1,)), F84),
    Example("rng_bit_generator", lambda k: lax.rng_bit_generator(k, (8, 4)), U(4)),
    Example("scatter", lambda x, i, u: x.at[i].set(u), F84, P(4), F(4, 4)),
    Example("scatter", lambda x, i, u: x.at[i].set(u), F84, N(), F(4)),
    Example("scatter", lambda x, i, u: x.at[jnp.arange(4), i].set(u), F(4, 8, 2), N(4), F(4, 2)),
    Example("scatter", lambda x, i, u: x.at[i].set(u, mode="clip"), I84, P(4), I(4, 4)),
    Example("scatter-add", lambda x, i, u: x.at[i].add(u), F84, P(4), F(4, 4)),
    Example("scatter-add", lambda x, i, u: x.at[i].add(u), F84, N(), F(4)),
    Example("scatter-add", lambda x, i, u: x.at[i].add(u, mode="clip"), F84, N(4), F(4, 4)),
    Example("scatter-add", lambda x, i, u: jax.vmap(lambda x, i, u: x.at[i].add(u))(x, i, u), F48, N(4, 2), F(4, 2)),
    Example("scatter-add", _add_windows_at, F(4, 8, 8), N(2, 2), F(2, 4, 3)),
    Example("scatter-max", lambda x, i, u: x.at[i].max(u), F84, P(4), F(4, 4)),
    Example("scatter-max", lambda x, i, u: x.at[i].max(u), F84, N(), F(4)),
    Example("scatter-min", lambda x, i, u: x.at[i].min(u), F84, P(4), F(4, 4)),
    Example("scatter-mul", lambda x, i, u: x.at[i].multiply(u), F84, P(4), F(4, 4)),
    Example("scatter-mul", lambda x, i, u: x.at[i].multiply(u), F84, N(), F(4)),
    Example("scatter-sub", lambda x, i, u: x.at[i].subtract(u), F84, P(4), F(4, 4)),
    Example("select_and_gather_add", lambda x, t: jax.jvp(_max_pool, (x,), (t,))[1], F48, F48),
    Example("select_and_scatter_add", jax.grad(lambda x: (_max_pool(x) * 2).sum()), F48),
    Example("select_n", lax.select_n, B84, F84, F84),
    Example("select_n", lax.select_n, B(), F84, F84),
    Example("cholesky", lambda x: lax.linalg.cholesky(_definite(x)), F(8, 4, 4)),
    Example("eig", lambda x: lax.linalg.eig(x), F(8, 3, 3)),
    Example("eigh", lambda x: lax.linalg.eigh(_definite(x)), F(8, 4, 4)),
    Example("fft", lambda x: jnp.fft.irfft(jnp.abs(jnp.fft.rfft(x))), F(8, 8)),
    Example("fft", lambda x: jnp.fft.fft2(x), C(8, 4, 4)),
    Example("hessenberg", lambda x: lax.linalg.hessenberg(x), F(8, 4, 4)),
    Example("householder_product", lambda x, t: lax.linalg.householder_product(x, t), F(8, 4, 2), F(8, 2)),
    Example("lu", lambda x: lax.linalg.lu(_definite(x)), F(8, 4, 4)),
    Example("lu_pivots_to_permutation", lambda x: lax.linalg.lu_pivots_to_permutation(x % 4, 6), I84),
    Example("qr", lambda x: lax.linalg.qr(x, full_matrices=False), F(8, 4, 2)),
    Example("schur", lambda x: lax.linalg.schur(_definite(x)), F(8, 4, 4)),
    Example("svd", lambda x: lax.linalg.svd(x, full_matrices=False), F(8, 4, 2)),
    Example(
        "triangular_solve",
        lambda a, b: lax.linalg.triangular_solve(_definite(a), b, left_side=True),
        F(8, 4, 4),
        F(8, 4, 2),
    ),
    Example(
        "triangular_solve",
        lambda a, b: lax.linalg.triangular_solve(_definite(a), b, left_side=False),
        F(8, 4, 4),
        F(8, 2, 4),
    ),
    Example("tridiagonal", lambda x: lax.linalg.tridiagonal(_definite(x)), F(8, 4, 4)),
    Example(
        "tridiagonal_solve", lambda a, b, c, x: lax.linalg.tridiagonal_solve(a, b + 2, c, x), *[F(8, 4)] * 3, F(8, 4, 2)
    ),
    Example("shard_map_layout", None, F84),
    Example("sharding_constraint", lambda x: lax.with_sharding_constraint(x, _on_one_chip(AxisType.Auto)), F84),
    Example("shift_left", lax.shift_left, I84, I84),
    Example("shift_right_arithmetic", lax.shift_right_arithmetic, I84, I84),
    Example("shift_right_logical", lax.shift_right_logical, I84, I84),
    Example("slice", lambda x: lax.slice(x, (0, 1, 5), (4, 7, 6), (1, 2, 1)), F(4, 8, 8)),
    Example("slice", lambda x: lax.slice(x, (0, 3, 5), (4, 7, 6), (1, 2, 1)), F(4, 8, 8)),
    Example("slice", lambda x: lax.slice(x, (0, 5), (8, 6)), B(8, 8)),
    Example("sort", lambda x: lax.sort(x, dimension=1), F84),
    Example("sort", lambda x, y: lax.sort((x, y), dimension=0, num_keys=1), F84, I84),
    Example("split", lambda x: lax.split(x, (2, 6), 1), F48),
    Example("split", lambda x: lax.split(x, (4, 4, 4), 1), F(4, 12)),
    Example("squeeze", lambda x: lax.squeeze(x, (1,)), F(4, 1, 8)),
    Example("stack", lambda x, y: jnp.stack((x, y), 1), F84, F84),
    Example("threefry2x32", lambda a, b, c, d: jex.threefry2x32_p.bind(a, b, c, d), U(8), U(8), U(8), U(8)),
    Example("tile", lambda x: lax.tile(x, (2, 4)), F(4, 2)),
    Example("top_k", lambda x: lax.top_k(x, 2), F84),
    Example("transpose", lambda x: x.transpose(2, 0, 1), F(2, 4, 8)),
    Example("unstack", lambda x: jnp.unstack(x, axis=0), F(2, 8)),
    Example("with_memory_space_constraint", None, F84),
    Example("xor", lax.bitwise_xor, I84, I84),
    Example("zeta", lambda x, y: lax.zeta(x + 2, y), F84, F84),
]
EXAMPLES.sort(key=lambda example: example.primitive)
