"""One line of text per primitive, its einsum, and the law that no strategy changes what the primitive computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend.core.primitives as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from layout_strategies import assert_equal, cpu_topology, op_steps, problem_of, random_choice, run_planned

from autoshard.blocks import OpStep
from autoshard.rules.rule import REGISTRY, rule_for
from autoshard.trace import trace
from search.solution import Choice


class Row:
    """A primitive, the text of its rule, a function that calls it, and what arguments the function takes."""

    def __init__(self, primitive: str, text: str, fn: Callable[..., Any] | None, *args: jax.ShapeDtypeStruct) -> None:
        self.primitive, self.text, self.fn, self.args = primitive, text, fn, args


def _spec(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# What arguments are made of: floats, complex numbers, integers, bytes, booleans, PRNG keys.
F, C, B = partial(_spec, jnp.float32), partial(_spec, jnp.complex64), partial(_spec, jnp.bool_)
I, I8, U, U8 = (partial(_spec, dtype) for dtype in (jnp.int32, jnp.int8, jnp.uint32, jnp.uint8))
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


def step_of(primitive: str, fn: Callable[..., Any], *args: Any) -> OpStep:
    """The last equation of a primitive in a function."""
    steps = [step for step in op_steps(trace(fn, *args).block) if step.eqn.primitive.name == primitive]
    return steps[-1]


def text_of(primitive: str, fn: Callable[..., Any] | None, *args: jax.ShapeDtypeStruct) -> str:
    """The text of a primitive's rule."""
    if fn is None:
        avals = [jax.core.ShapedArray(arg.shape, arg.dtype) for arg in args]
        return str(rule_for(primitive, avals, avals or [jax.core.ShapedArray((8, 4), np.float32)], {}))
    return str(step_of(primitive, fn, *args).rule)


def _absent(name: str) -> Callable[..., Any] | None:
    """A function that only newer versions of JAX have."""
    return getattr(lax, name, None)


def _on_one_chip(kind: AxisType) -> jax.sharding.NamedSharding:
    mesh = jax.make_mesh((1,), ("a",), axis_types=(kind,), devices=jax.devices()[:1])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))


def _max_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 2), "VALID")


def _windows_at(x: jax.Array, at: jax.Array) -> jax.Array:
    """Windows `[4, 3]` of `x[:, i]` that begin at given places."""
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(1,), start_index_map=(1, 2))
    return lax.gather(x, at, numbers, (4, 1, 3), mode="fill")


def _add_windows_at(x: jax.Array, at: jax.Array, windows: jax.Array) -> jax.Array:
    numbers = lax.ScatterDimensionNumbers((1, 2), (1,), (1, 2))
    return lax.scatter_add(x, at, windows, numbers, mode="clip")




TABLE = [
    Row("abs", "[a,b] -> [a,b]", lax.abs, F(8, 4)),
    Row("acos", "[a,b] -> [a,b]", lax.acos, F(8, 4)),
    Row("acosh", "[a,b] -> [a,b]", lambda x: lax.acosh(x + 1), F(8, 4)),
    Row("add", "[a,b],[a,b] -> [a,b] linear=[[0, 1]]", lax.add, F(8, 4), F(8, 4)),
    Row("add_any", "[a,b],[a,b] -> [a,b] linear=[[0, 1]]", jex.add_jaxvals_p.bind, F(8, 4), F(8, 4)),
    Row("and", "[a,b],[a,b] -> [a,b]", lax.bitwise_and, I(8, 4), I(8, 4)),
    Row("approx_top_k", "[a,b] -> [c,b],[c,b] whole={a,c}", lambda x: lax.approx_max_k(x, 2, reduction_dimension=0), F(8, 4)),
    Row("argmax", "[a,b] -> [a] whole={b}", lambda x: lax.argmax(x, 1, jnp.int32), F(8, 4)),
    Row("argmin", "[a,b] -> [a] whole={b}", lambda x: lax.argmin(x, 1, jnp.int32), F(8, 4)),
    Row("asin", "[a,b] -> [a,b]", lax.asin, F(8, 4)),
    Row("asinh", "[a,b] -> [a,b]", lax.asinh, F(8, 4)),
    Row("atan", "[a,b] -> [a,b]", lax.atan, F(8, 4)),
    Row("atan2", "[a,b],[a,b] -> [a,b]", lax.atan2, F(8, 4), F(8, 4)),
    Row("atanh", "[a,b] -> [a,b]", lax.atanh, F(8, 4)),
    Row("bessel_i0e", "[a,b] -> [a,b]", lax.bessel_i0e, F(8, 4)),
    Row("bessel_i1e", "[a,b] -> [a,b]", lax.bessel_i1e, F(8, 4)),
    Row("bitcast_convert_type", "[a,b] -> [a,b]", lambda x: lax.bitcast_convert_type(x, jnp.int32), F(8, 4)),
    Row("bitcast_convert_type", "[a,b] -> [a,b,c] whole={c}", lambda x: lax.bitcast_convert_type(x, jnp.uint8), F(8, 4)),
    Row("bitcast_convert_type", "[a,b] -> [a] whole={b}", lambda x: lax.bitcast_convert_type(x, jnp.uint32), U8(8, 4)),
    Row("broadcast_in_dim", "[a,b] -> [a,c,b] linear=[[0]]", lambda x: lax.broadcast_in_dim(x, (8, 2, 4), (0, 2)), F(8, 4)),
    Row("broadcast_in_dim", "[1,a] -> [b,a] linear=[[0]]", lambda x: lax.broadcast_in_dim(x, (8, 4), (0, 1)), F(1, 4)),
    Row("broadcast_in_dim", "[] -> [a,b] linear=[[0]]", lambda: lax.full((8, 4), 1.0)),
    Row("cbrt", "[a,b] -> [a,b]", lax.cbrt, F(8, 4)),
    Row("ceil", "[a,b] -> [a,b]", lax.ceil, F(8, 4)),
    Row("clamp", "[],[a,b],[] -> [a,b]", lax.clamp, F(), F(8, 4), F()),
    Row("clamp", "[a,b],[a,b],[a,b] -> [a,b]", lax.clamp, F(8, 4), F(8, 4), F(8, 4)),
    Row("clz", "[a,b] -> [a,b]", lax.clz, I(8, 4)),
    Row("complex", "[a,b],[a,b] -> [a,b] linear=[[0, 1]]", lax.complex, F(8, 4), F(8, 4)),
    Row("concatenate", "[a,b],[a,c] -> [a,d] whole={b,c,d} linear=[[0, 1]]", lambda x, y: lax.concatenate((x, y), 1), F(8, 4), F(8, 2)),
    Row("conj", "[a,b] -> [a,b] linear=[[0]]", lax.conj, C(8, 4)),
    Row("conv_general_dilated", "[ab,cd,e,f],[cag,d,h,i] -> [b,cag,j,k] sum={d} whole={e,f,h,i,j,k}", lambda x, w: lax.conv_general_dilated(x, w, (1, 2), "SAME"), F(4, 8, 6, 6), F(4, 8, 3, 3)),
    Row("conv_general_dilated", "[ab,cd,e],[caf,d,g] -> [b,caf,h] sum={d} whole={e,g,h}", lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=4), F(2, 8, 6), F(8, 2, 3)),
    Row("conv_general_dilated", "[ab,c,de],[b,f,adg] -> [adg,h,e] sum={b} whole={c,f,h}", lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", batch_group_count=2, dimension_numbers=("CWN", "IWO", "CWN")), F(4, 6, 8), F(4, 3, 8)),
    Row("convert_element_type", "[a,b] -> [a,b] linear=[[0]]", lambda x: lax.convert_element_type(x, jnp.bfloat16), F(8, 4)),
    Row("convert_element_type", "[a,b] -> [a,b]", lambda x: lax.convert_element_type(x, jnp.int32), F(8, 4)),
    Row("copy", "[a,b] -> [a,b] linear=[[0]]", jnp.copy, F(8, 4)),
    Row("cos", "[a,b] -> [a,b]", lax.cos, F(8, 4)),
    Row("cosh", "[a,b] -> [a,b]", lax.cosh, F(8, 4)),
    Row("cumlogsumexp", "[a,b] -> [a,b] whole={b}", lambda x: lax.cumlogsumexp(x, axis=1, reverse=True), F(4, 8)),
    Row("cummax", "[a,b] -> [a,b] whole={b}", lambda x: lax.cummax(x, axis=1, reverse=True), F(4, 8)),
    Row("cummin", "[a,b] -> [a,b] whole={b}", lambda x: lax.cummin(x, axis=1, reverse=True), F(4, 8)),
    Row("cumprod", "[a,b] -> [a,b] whole={b}", lambda x: lax.cumprod(x, axis=1, reverse=True), F(4, 8)),
    Row("cumsum", "[a,b] -> [a,b] whole={b} linear=[[0]]", lambda x: lax.cumsum(x, axis=1, reverse=True), F(4, 8)),
    Row("device_put", "[a,b] -> [a,b] linear=[[0]]", jax.device_put, F(8, 4)),
    Row("device_put", "[a,b],[c] -> [a,b],[c]", lambda x, y: jax.device_put((x, y)), F(8, 4), F(8)),
    Row("digamma", "[a,b] -> [a,b]", lax.digamma, F(8, 4)),
    Row("div", "[a,b],[a,b] -> [a,b] linear=[[0]]", lax.div, F(8, 4), F(8, 4)),
    Row("div", "[a,b],[a,b] -> [a,b]", lax.div, I(8, 4), I(8, 4)),
    Row("dot_general", "[a,b],[b,c] -> [a,c] sum={b}", lambda a, b: a @ b, F(8, 4), F(4, 8)),
    Row("dot_general", "[a,b,c,d],[a,e,b,d] -> [a,b,c,e] sum={d}", lambda a, b: jnp.einsum("bhqd,bkhd->bhqk", a, b), F(2, 4, 2, 8), F(2, 8, 4, 8)),
    Row("dot_general", "[a,b,c],[c,d,b] -> [a,d] sum={b,c}", lambda a, b: jnp.einsum("abc,dca->db", a, b), F(2, 4, 8), F(4, 8, 2)),
    Row("dot_general", "[a,b],[b,c] -> [a,c] sum={b}", lambda a, b: lax.dot(a, b, preferred_element_type=jnp.int32), I8(8, 4), I8(4, 8)),
    Row("dynamic_slice", "[a,b,c],[],[],[] -> [a,d,1] sum={c} whole={b,d} linear=[[0]]", lambda x, i: lax.dynamic_slice(x, (i, i, i), (4, 3, 1), allow_negative_indices=False), F(4, 8, 8), N()),
    Row("dynamic_slice", "[a,b],[],[] -> [a,1] whole={b} linear=[[0]]", lambda x, i: lax.dynamic_slice(x, (i, i - 8), (8, 1), allow_negative_indices=False), B(8, 8), N()),
    Row("dynamic_update_slice", "[a,b,c],[a,d,1],[],[],[] -> [a,b,c] whole={b,d} linear=[[0, 1]]", lambda x, u, i: lax.dynamic_update_slice(x, u, (i, i, i), allow_negative_indices=False), F(4, 8, 8), F(4, 3, 1), N()),
    Row("empty", " -> [a,b]", lambda: lax.empty((8, 4), jnp.float32) * 0),
    Row("empty2", " -> [a,b]", None),
    Row("eq", "[a,b],[a,b] -> [a,b]", lax.eq, F(8, 4), F(8, 4)),
    Row("eq_to", "[a,b],[a,b] -> [a,b]", jex.eq_to_p.bind, F(8, 4), F(8, 4)),
    Row("erf", "[a,b] -> [a,b]", lax.erf, F(8, 4)),
    Row("erf_inv", "[a,b] -> [a,b]", lax.erf_inv, F(8, 4)),
    Row("erfc", "[a,b] -> [a,b]", lax.erfc, F(8, 4)),
    Row("exp", "[a,b] -> [a,b]", lax.exp, F(8, 4)),
    Row("exp2", "[a,b] -> [a,b]", lax.exp2, F(8, 4)),
    Row("expm1", "[a,b] -> [a,b]", lax.expm1, F(8, 4)),
    Row("floor", "[a,b] -> [a,b]", lax.floor, F(8, 4)),
    Row("gather", "[a,b],[c,d] -> [c,b] sum={a} whole={d}", lambda x, i: jnp.take(x, i, axis=0, mode="fill"), F(8, 4), N(4)),
    Row("gather", "[a,b],[c,d] -> [c,b] sum={a} whole={d} linear=[[0]]", lambda x, i: jnp.take(x, i, axis=0, mode="clip"), F(8, 4), N(4)),
    Row("gather", "[a,b],[c,d,e] -> [c,d,b] sum={a} whole={e} linear=[[0]]", lambda x, i: x.at[i].get(mode="promise_in_bounds"), I(8, 4), I(2, 4)),
    Row("gather", "[a,b],[c,d] -> [c,b] sum={a} whole={d}", lambda x, i: x.at[i].get(mode="fill"), I(8, 4), N(4)),
    Row("gather", "[a,b],[c,d] -> [c,b] whole={a,d}", lambda x, i: x.at[i].get(mode="fill"), B(8, 4), N(4)),
    Row("gather", "[a,b,c],[d,e] -> [d,b] sum={a,c} whole={e}", lambda x, i, j: x.at[i, :, j].get(mode="fill"), F(8, 2, 4), N(4), N(4)),
    Row("gather", "[a,b],[a,c,d] -> [a,c] sum={b} whole={d}", lambda x, i: jnp.take_along_axis(x, i, 1, mode="fill"), F(4, 8), N(4, 2)),
    Row("gather", "[a,b],[c,d] -> [c,b] sum={a} whole={d}", lambda x, i: x.at[i].get(mode="fill"), F(256, 2), U8(4)),
    Row("gather", "[a,b,c],[d,e] -> [d,a,f] sum={b} whole={c,e,f}", _windows_at, F(4, 8, 8), N(4, 2)),
    Row("ge", "[a,b],[a,b] -> [a,b]", lax.ge, F(8, 4), F(8, 4)),
    Row("gt", "[a,b],[a,b] -> [a,b]", lax.gt, F(8, 4), F(8, 4)),
    Row("igamma", "[a,b],[a,b] -> [a,b]", lax.igamma, F(8, 4), F(8, 4)),
    Row("igamma_grad_a", "[a,b],[a,b] -> [a,b]", lax.igamma_grad_a, F(8, 4), F(8, 4)),
    Row("igammac", "[a,b],[a,b] -> [a,b]", lax.igammac, F(8, 4), F(8, 4)),
    Row("imag", "[a,b] -> [a,b] linear=[[0]]", lax.imag, C(8, 4)),
    Row("integer_pow", "[a,b] -> [a,b]", lambda x: lax.integer_pow(x, 3), F(8, 4)),
    Row("iota", " -> [a,b]", lambda: lax.broadcasted_iota(jnp.int32, (8, 4), 0)),
    Row("iota", " -> [a,b]", lambda: lax.broadcasted_iota(jnp.bfloat16, (1024, 2), 0)),
    Row("is_finite", "[a,b] -> [a,b]", lax.is_finite, F(8, 4)),
    Row("layout_constraint", "[a,b] -> [a,b] linear=[[0]]", lambda x: with_layout_constraint(x, Layout((1, 0))), F(8, 4)),
    Row("le", "[a,b],[a,b] -> [a,b]", lax.le, F(8, 4), F(8, 4)),
    Row("le_to", "[a,b],[a,b] -> [a,b]", jex.le_to_p.bind, F(8, 4), F(8, 4)),
    Row("lgamma", "[a,b] -> [a,b]", lax.lgamma, F(8, 4)),
    Row("log", "[a,b] -> [a,b]", lax.log, F(8, 4)),
    Row("log1p", "[a,b] -> [a,b]", lax.log1p, F(8, 4)),
    Row("log2", "[a,b] -> [a,b]", _absent("log2"), F(8, 4)),
    Row("logistic", "[a,b] -> [a,b]", lax.logistic, F(8, 4)),
    Row("lt", "[a,b],[a,b] -> [a,b]", lax.lt, F(8, 4), F(8, 4)),
    Row("lt_to", "[a,b],[a,b] -> [a,b]", jex.lt_to_p.bind, F(8, 4), F(8, 4)),
    Row("max", "[a,b],[a,b] -> [a,b]", lax.max, F(8, 4), F(8, 4)),
    Row("min", "[a,b],[a,b] -> [a,b]", lax.min, F(8, 4), F(8, 4)),
    Row("mul", "[a,b],[a,b] -> [a,b] linear=[[0], [1]]", lax.mul, F(8, 4), F(8, 4)),
    Row("mul", "[a,b],[1,b] -> [a,b] linear=[[0], [1]]", lax.mul, F(8, 4), F(1, 4)),
    Row("name", "[a,b] -> [a,b] linear=[[0]]", lambda x: checkpoint_name(x, "x"), F(8, 4)),
    Row("ne", "[a,b],[a,b] -> [a,b]", lax.ne, F(8, 4), F(8, 4)),
    Row("neg", "[a,b] -> [a,b] linear=[[0]]", lax.neg, F(8, 4)),
    Row("nextafter", "[a,b],[a,b] -> [a,b]", lax.nextafter, F(8, 4), F(8, 4)),
    Row("not", "[a,b] -> [a,b]", lax.bitwise_not, I(8, 4)),
    Row("one_minus_square", "[a,b] -> [a,b]", _absent("one_minus_square"), F(8, 4)),
    Row("or", "[a,b],[a,b] -> [a,b]", lax.bitwise_or, I(8, 4), I(8, 4)),
    Row("pad", "[a,b],[] -> [a,c] whole={b,c}", lambda x: lax.pad(x, np.float32(1), ((0, 0, 0), (1, 1, 1))), F(8, 4)),
    Row("pad", "[a,b],[] -> [a,b] whole={a}", lambda x: lax.pad(x, np.float32(1), ((1, -1, 0), (0, 0, 0))), F(8, 4)),
    Row("platform_index", " -> []", lambda x: lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x), F(8)),
    Row("polygamma", "[a,b],[a,b] -> [a,b]", lambda x, y: lax.polygamma(jnp.ceil(x), y), F(8, 4), F(8, 4)),
    Row("population_count", "[a,b] -> [a,b]", lax.population_count, I(8, 4)),
    Row("pow", "[a,b],[a,b] -> [a,b]", lax.pow, F(8, 4), F(8, 4)),
    Row("pvary", "[a,b] -> [a,b] linear=[[0]]", None, F(8, 4)),
    Row("random_bits", "[] -> [a,b] whole={a,b}", lambda k: jax.random.bits(k, (8, 4)), K()),
    Row("random_clone", "[] -> []", jax.random.clone, K()),
    Row("random_fold_in", "[a],[b] -> [c] whole={a,b,c}", jax.vmap(jax.random.fold_in), K(8), I(8)),
    Row("random_gamma", "[],[a] -> [b] whole={a,b}", lambda k, a: jax.random.gamma(k, a), K(), F(8)),
    Row("random_seed", "[] -> []", jax.random.key, I()),
    Row("random_split", "[] -> [a] whole={a}", lambda k: jax.random.split(k, 8), K()),
    Row("random_unwrap", "[a] -> [b,c] whole={a,b,c}", jax.random.key_data, K(8)),
    Row("random_wrap", "[a,b] -> [c] whole={a,b,c}", jax.random.wrap_key_data, U(8, 2)),
    Row("real", "[a,b] -> [a,b] linear=[[0]]", lax.real, C(8, 4)),
    Row("reduce", "[a,b],[] -> [a] whole={b}", lambda x: lax.reduce(x, np.float32(1), lambda a, b: a * b + 1, (1,)), F(8, 4)),
    Row("reduce_and", "[a,b] -> [] and={a,b}", lambda x: lax.reduce_and(x, axes=(0, 1)), B(8, 4)),
    Row("reduce_and", "[a,b] -> [b] whole={a}", lambda x: lax.reduce_and(x, axes=(0,)), I(8, 4)),
    Row("reduce_max", "[a,b,c] -> [a,c] max={b}", lambda x: lax.reduce_max(x, axes=(1,)), F(4, 8, 2)),
    Row("reduce_max", "[a,b] -> [b] max={a}", lambda x: lax.reduce_max(x, axes=(0,)), B(8, 4)),
    Row("reduce_min", "[a,b,c] -> [a,c] min={b}", lambda x: lax.reduce_min(x, axes=(1,)), F(4, 8, 2)),
    Row("reduce_or", "[a,b] -> [] or={a,b}", lambda x: lax.reduce_or(x, axes=(0, 1)), B(8, 4)),
    Row("reduce_or", "[a,b] -> [b] whole={a}", lambda x: lax.reduce_or(x, axes=(0,)), I(8, 4)),
    Row("reduce_precision", "[a,b] -> [a,b] linear=[[0]]", lambda x: lax.reduce_precision(x, 8, 23), F(8, 4)),
    Row("reduce_prod", "[a,b,c] -> [a,c] whole={b}", lambda x: lax.reduce_prod(x, axes=(1,)), F(4, 8, 2)),
    Row("reduce_sum", "[a,b,c] -> [a,c] sum={b} linear=[[0]]", lambda x: lax.reduce_sum(x, axes=(1,)), F(4, 8, 2)),
    Row("reduce_sum", "[a,b] -> [b] sum={a} linear=[[0]]", lambda x: lax.reduce_sum(x, axes=(0,)), I(8, 4)),
    Row("reduce_window", "[a,b],[] -> [a,c] whole={b,c}", lambda x: lax.reduce_window(x, np.float32(1), lambda a, b: a * b + 1, (1, 2), (1, 2), "VALID"), F(4, 8)),
    Row("reduce_window_max", "[a,b] -> [a,c] whole={b,c}", lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 1), "SAME"), F(4, 8)),
    Row("reduce_window_min", "[a,b] -> [c,b] whole={a,c}", lambda x: lax.reduce_window(x, np.inf, lax.min, (2, 1), (2, 1), "SAME"), F(8, 4)),
    Row("reduce_window_sum", "[a,b] -> [a,c] whole={b,c} linear=[[0]]", lambda x: lax.reduce_window(x, np.float32(0), lax.add, (1, 2), (1, 2), "SAME"), F(4, 8)),
    Row("reduce_xor", "[a,b] -> [b] whole={a}", lambda x: lax.reduce_xor(x, axes=(0,)), I(8, 4)),
    Row("regularized_incomplete_beta", "[a,b],[a,b],[a,b] -> [a,b]", lax.betainc, F(8, 4), F(8, 4), F(8, 4)),
    Row("rem", "[a,b],[a,b] -> [a,b]", lax.rem, F(8, 4), F(8, 4)),
    Row("reshape", "[a,b,c] -> [a,bc] linear=[[0]]", lambda x: x.reshape(4, 16), F(4, 2, 8)),
    Row("reshape", "[ab,cd] -> [a,b,c,1,d] linear=[[0]]", lambda x: x.reshape(8, 2, 2, 1, 8), F(16, 16)),
    Row("reshape", "[ab,c] -> [ad,e] whole={b,c,d,e} linear=[[0]]", lambda x: x.reshape(4, 6), F(6, 4)),
    Row("reshape", "[a,b,c,d,1] -> [1,abc,d] linear=[[0]]", lambda x: x.reshape(1, 8, 4), F(2, 2, 2, 4, 1)),
    Row("reshape", "[a,b] -> [c,d] whole={a,b,c,d} linear=[[0]]", lambda x: x.reshape(0, 8), F(4, 0)),
    Row("reshard", "[a,b] -> [a,b] linear=[[0]]", lambda x: jax.sharding.reshard(x, _on_one_chip(AxisType.Explicit)), F(8, 4)),
    Row("rev", "[a,b] -> [a,b] whole={b} linear=[[0]]", lambda x: lax.rev(x, (1,)), F(8, 4)),
    Row("rng_bit_generator", "[a] -> [b],[c,d] whole={a,b,c,d}", lambda k: lax.rng_bit_generator(k, (8, 4)), U(4)),
    Row("round", "[a,b] -> [a,b]", lax.round, F(8, 4)),
    Row("rsqrt", "[a,b] -> [a,b]", lax.rsqrt, F(8, 4)),
    Row("scatter", "[a,b],[c,d],[c,b] -> [a,b] whole={c,d}", lambda x, i, u: x.at[i].set(u), F(8, 4), P(4), F(4, 4)),
    Row("scatter", "[a,b],[c],[b] -> [a,b] whole={c}", lambda x, i, u: x.at[i].set(u), F(8, 4), N(), F(4)),
    Row("scatter", "[a,b,c],[d,e],[d,c] -> [a,b,c] whole={d,e}", lambda x, i, u: x.at[jnp.arange(4), i].set(u), F(4, 8, 2), N(4), F(4, 2)),
    Row("scatter", "[a,b],[c,d],[c,b] -> [a,b] whole={c,d}", lambda x, i, u: x.at[i].set(u, mode="clip"), I(8, 4), P(4), I(4, 4)),
    Row("scatter-add", "[a,b],[c,d],[c,b] -> [a,b] sum={c} whole={d} linear=[[0, 2]]", lambda x, i, u: x.at[i].add(u), F(8, 4), P(4), F(4, 4)),
    Row("scatter-add", "[a,b],[c],[b] -> [a,b] whole={c} linear=[[0, 2]]", lambda x, i, u: x.at[i].add(u), F(8, 4), N(), F(4)),
    Row("scatter-add", "[a,b],[c,d],[c,b] -> [a,b] sum={c} whole={d} linear=[[0, 2]]", lambda x, i, u: x.at[i].add(u, mode="clip"), F(8, 4), N(4), F(4, 4)),
    Row("scatter-add", "[a,b],[a,c,d],[a,c] -> [a,b] sum={c} whole={d} linear=[[0, 2]]", lambda x, i, u: jax.vmap(lambda x, i, u: x.at[i].add(u))(x, i, u), F(4, 8), N(4, 2), F(4, 2)),
    Row("scatter-add", "[a,b,c],[d,e],[d,a,f] -> [a,b,c] sum={d} whole={c,e,f} linear=[[0, 2]]", _add_windows_at, F(4, 8, 8), N(2, 2), F(2, 4, 3)),
    Row("scatter-max", "[a,b],[c,d],[c,b] -> [a,b] whole={c,d}", lambda x, i, u: x.at[i].max(u), F(8, 4), P(4), F(4, 4)),
    Row("scatter-max", "[a,b],[c],[b] -> [a,b] whole={c}", lambda x, i, u: x.at[i].max(u), F(8, 4), N(), F(4)),
    Row("scatter-min", "[a,b],[c,d],[c,b] -> [a,b] whole={c,d}", lambda x, i, u: x.at[i].min(u), F(8, 4), P(4), F(4, 4)),
    Row("scatter-mul", "[a,b],[c,d],[c,b] -> [a,b] whole={c,d}", lambda x, i, u: x.at[i].multiply(u), F(8, 4), P(4), F(4, 4)),
    Row("scatter-mul", "[a,b],[c],[b] -> [a,b] whole={c}", lambda x, i, u: x.at[i].multiply(u), F(8, 4), N(), F(4)),
    Row("scatter-sub", "[a,b],[c,d],[c,b] -> [a,b] sum={c} whole={d} linear=[[0, 2]]", lambda x, i, u: x.at[i].subtract(u), F(8, 4), P(4), F(4, 4)),
    Row("select_and_gather_add", "[a,b],[a,b] -> [a,c] whole={b,c}", lambda x, t: jax.jvp(_max_pool, (x,), (t,))[1], F(4, 8), F(4, 8)),
    Row("select_and_scatter_add", "[a,b],[a,c] -> [a,c] whole={b,c} linear=[[0]]", jax.grad(lambda x: (_max_pool(x) * 2).sum()), F(4, 8)),
    Row("select_n", "[a,b],[a,b],[a,b] -> [a,b] linear=[[1, 2]]", lax.select_n, B(8, 4), F(8, 4), F(8, 4)),
    Row("select_n", "[],[a,b],[a,b] -> [a,b] linear=[[1, 2]]", lax.select_n, B(), F(8, 4), F(8, 4)),
    Row("sharding_constraint", "[a,b] -> [a,b] linear=[[0]]", lambda x: lax.with_sharding_constraint(x, _on_one_chip(AxisType.Auto)), F(8, 4)),
    Row("shift_left", "[a,b],[a,b] -> [a,b]", lax.shift_left, I(8, 4), I(8, 4)),
    Row("shift_right_arithmetic", "[a,b],[a,b] -> [a,b]", lax.shift_right_arithmetic, I(8, 4), I(8, 4)),
    Row("shift_right_logical", "[a,b],[a,b] -> [a,b]", lax.shift_right_logical, I(8, 4), I(8, 4)),
    Row("sign", "[a,b] -> [a,b]", lax.sign, F(8, 4)),
    Row("sin", "[a,b] -> [a,b]", lax.sin, F(8, 4)),
    Row("sinh", "[a,b] -> [a,b]", lax.sinh, F(8, 4)),
    Row("slice", "[a,b,c] -> [a,d,1] sum={c} whole={b,d} linear=[[0]]", lambda x: lax.slice(x, (0, 1, 5), (4, 7, 6), (1, 2, 1)), F(4, 8, 8)),
    Row("slice", "[a,b] -> [a,1] whole={b} linear=[[0]]", lambda x: lax.slice(x, (0, 5), (8, 6)), B(8, 8)),
    Row("sort", "[a,b] -> [a,b] whole={b}", lambda x: lax.sort(x, dimension=1), F(8, 4)),
    Row("sort", "[a,b],[a,b] -> [a,b],[a,b] whole={a}", lambda x, y: lax.sort((x, y), dimension=0, num_keys=1), F(8, 4), I(8, 4)),
    Row("split", "[a,b] -> [a,c],[a,d] whole={b,c,d} linear=[[0]]", lambda x: lax.split(x, (2, 6), 1), F(4, 8)),
    Row("sqrt", "[a,b] -> [a,b]", lax.sqrt, F(8, 4)),
    Row("square", "[a,b] -> [a,b]", lax.square, F(8, 4)),
    Row("squeeze", "[a,1,b] -> [a,b] linear=[[0]]", lambda x: lax.squeeze(x, (1,)), F(4, 1, 8)),
    Row("stack", "[a,b],[a,b] -> [a,c,b] whole={c} linear=[[0, 1]]", lambda x, y: jnp.stack((x, y), 1), F(8, 4), F(8, 4)),
    Row("stop_gradient", "[a,b] -> [a,b] linear=[[0]]", lax.stop_gradient, F(8, 4)),
    Row("sub", "[a,b],[a,b] -> [a,b] linear=[[0, 1]]", lax.sub, F(8, 4), F(8, 4)),
    Row("tan", "[a,b] -> [a,b]", lax.tan, F(8, 4)),
    Row("tanh", "[a,b] -> [a,b]", lax.tanh, F(8, 4)),
    Row("threefry2x32", "[a],[a],[a],[a] -> [a],[a]", lambda a, b, c, d: jex.threefry2x32_p.bind(a, b, c, d), U(8), U(8), U(8), U(8)),
    Row("tile", "[a,b] -> [ca,db] linear=[[0]]", lambda x: lax.tile(x, (2, 4)), F(4, 2)),
    Row("top_k", "[a,b] -> [a,c],[a,c] whole={b,c}", lambda x: lax.top_k(x, 2), F(8, 4)),
    Row("transpose", "[a,b,c] -> [c,a,b] linear=[[0]]", lambda x: x.transpose(2, 0, 1), F(2, 4, 8)),
    Row("unstack", "[a,b] -> [b],[b] whole={a} linear=[[0]]", lambda x: jnp.unstack(x, axis=0), F(2, 8)),
    Row("with_memory_space_constraint", "[a,b] -> [a,b] linear=[[0]]", None, F(8, 4)),
    Row("xor", "[a,b],[a,b] -> [a,b]", lax.bitwise_xor, I(8, 4), I(8, 4)),
    Row("zeta", "[a,b],[a,b] -> [a,b]", lambda x, y: lax.zeta(x + 2, y), F(8, 4), F(8, 4)),
]
IDS = [f"{row.primitive}-{i}" for i, row in enumerate(TABLE)]


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_text(row: Row) -> None:
    assert text_of(row.primitive, row.fn, *row.args) == row.text


def test_every_rule_is_in_the_table_in_alphabetical_order() -> None:
    primitives = [row.primitive for row in TABLE]
    assert set(primitives) == set(REGISTRY)
    assert primitives == sorted(primitives)


@pytest.mark.parametrize("row", [row for row in TABLE if row.fn], ids=[i for i, row in zip(IDS, TABLE) if row.fn])
def test_no_strategy_changes_the_result(row: Row) -> None:
    Law(row, "2x2x2").check(6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["2x2x2", "4x2"])
@pytest.mark.parametrize("row", [row for row in TABLE if row.fn], ids=[i for i, row in zip(IDS, TABLE) if row.fn])
def test_no_strategy_of_all_changes_the_result(row: Row, shape: str) -> None:
    Law(row, shape).check(None)


class Law:
    """A primitive under its strategies, with random layouts around it, computes what it computes on one chip."""

    def __init__(self, row: Row, shape: str) -> None:
        assert row.fn is not None
        linear = step_of(row.primitive, row.fn, *row.args).rule.linear
        self.rng = np.random.default_rng(0)
        self.fn, specs = summed_before(row.fn, row.args) if linear else (row.fn, row.args)
        self.args = [draw(spec, self.rng) for spec in specs]
        self.topology = cpu_topology(shape)
        self.traced = trace(self.fn, *self.args)
        self.problem = problem_of(self.traced, self.topology)
        step = step_of(row.primitive, self.fn, *self.args)
        self.node = self.problem.operation_nodes[step.operation]

    def check(self, count: int | None) -> None:
        """Runs up to `count` strategies that differ in what they split, or all of them."""
        strategies = self.problem.nodes[self.node].states
        order = [int(i) for i in self.rng.permutation(len(strategies))]
        chosen = order if count is None else self._different(order, count)
        choices = [choice for i in chosen if (choice := self._choice(i)) is not None]
        assert choices, "no strategy is feasible"
        unsharded = jax.jit(self.fn)(*self.args)
        for at in range(0, len(choices), 16):
            for planned in run_planned(self.traced, self.topology, choices[at : at + 16], *self.args):
                assert_equal(planned, unsharded)

    def _choice(self, state: int) -> Choice | None:
        return random_choice(self.problem, self.rng, {self.node: state})

    def _different(self, order: list[int], count: int) -> list[int]:
        """Strategies each of which splits or carries something, or a pair of things, that none before it did."""
        chosen: list[int] = []
        seen: set[object] = set()
        for i in order:
            strategy = self.problem.nodes[self.node].states[i]
            active = [k for k, axes in enumerate((*strategy.splits, *strategy.carried)) if axes]
            new = {frozenset((a, b)) for a in active for b in active} - seen
            if (new or len(order) == 1) and len(chosen) < count and self._choice(i) is not None:
                chosen.append(i)
                seen |= new
        return chosen


def summed_before(fn: Callable[..., Any], specs: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[Callable[..., Any], list[Any]]:
    """The function of floating-point arguments that are sums, so that partial sums can reach it."""
    floats = [jnp.issubdtype(spec.dtype, np.inexact) for spec in specs]
    wider = [jax.ShapeDtypeStruct((8, *s.shape), s.dtype) if f else s for s, f in zip(specs, floats, strict=True)]

    def summing(*args: jax.Array) -> Any:
        return fn(*(lax.reduce_sum(a, axes=(0,)) / 8 if f else a for a, f in zip(args, floats, strict=True)))

    return summing, wider
