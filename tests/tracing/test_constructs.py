"""Every construct of a jaxpr is traced with its meaning: under random layouts, the function computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from autoshard.errors import UnsupportedPrimitiveError
from tests.support.effort import tries
from tests.support.layout_strategies import assert_layouts_do_not_matter
from tests.support.rules.unruled import NAME, unruled_p
from tests.support.tracing import trace

X = jnp.arange(32.0).reshape(8, 4) / 32
W = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)), jnp.float32)
TABLE = np.arange(32, dtype=np.float32).reshape(8, 4)
KEY = jax.random.key(3)


def matmul_step(carry: Array, w: Array) -> tuple[Array, Array]:
    carry = jnp.tanh(carry @ w)
    return carry, carry.sum(0)


def scan_with_everything(x: Array, w: Array) -> Any:
    """Constants, a carry, sliced inputs and stacked outputs."""

    def step(carry, scanned):
        row, i = scanned
        carry = jnp.tanh(carry @ w) + row
        return carry, (carry[:, 0], i * 2, jnp.float32(1))

    return lax.scan(step, x, (x[:, None, :] * jnp.ones((8, 1, 4)), jnp.arange(8)))


def scan_backwards(x: Array, w: Array) -> Any:
    return lax.scan(matmul_step, x, jnp.stack((w, w * 2)), reverse=True)


def scan_of_length(x: Array) -> Any:
    return lax.scan(lambda c, _: (c * 2, None), x, None, length=3)


def scan_swapping_carries(x: Array, y: Array) -> Any:
    return lax.scan(lambda c, _: ((c[1], c[0] + 1, c[2]), c[0]), (x, y, 0), None, length=3)


def scan_with_literal_init(x: Array) -> Any:
    def step(carry, row):
        total, count, _ = carry
        return (total + row, count + 1, True), 0.0

    return lax.scan(step, (jnp.zeros(4), 0, False), x)


def scan_in_scan(x: Array, w: Array) -> Any:
    def outer(carry, _):
        carry, sums = lax.scan(matmul_step, carry, jnp.stack((w, w)))
        return carry, sums

    return lax.scan(outer, x, None, length=2)


def scan_unrolled(x: Array, w: Array) -> Any:
    return lax.scan(matmul_step, x, jnp.stack((w, w, w)), unroll=2)


def empty_scan(x: Array) -> Any:
    return lax.scan(lambda c, row: (c + row, c), x[0], x[:0])


def while_growing(x: Array) -> Any:
    return lax.while_loop(lambda c: (c[0] < 5) & (c[1].sum() < 1e6), lambda c: (c[0] + 1, c[1] * 3), (0, x))


def while_with_constants(x: Array, w: Array, limit: Array) -> Any:
    return lax.while_loop(lambda c: jnp.max(c) < limit, lambda c: jnp.abs(c @ w) + 1, x)


def while_batched(x: Array) -> Any:
    return jax.vmap(lambda row: lax.while_loop(lambda r: r.sum() < 5, lambda r: r * 2 + 1, row))(x)


def fori(x: Array, n: Array) -> Any:
    return lax.fori_loop(0, n, lambda i, c: c.at[i].set(c[i] * 2), x)


def cond(x: Array, flag: Array) -> Any:
    return lax.cond(flag, lambda x: (x @ x.T, x.sum()), lambda x: (x @ x.T * 2, 0.0), x)


def cond_of_constants(x: Array) -> Any:
    return lax.cond(x.sum() > 0, lambda: (1.0, x), lambda: (2.0, x * 0))


def switch(x: Array, i: Array) -> Any:
    return lax.switch(i, [lambda x: x, lambda x: x * 2, lambda x: jnp.flip(x, 0)], x)


def cond_in_scan(x: Array) -> Any:
    def step(carry, i):
        return lax.cond(i % 2 == 0, lambda c: c + 1, lambda c: c * 2, carry), i

    return lax.scan(step, x, jnp.arange(4))


def nested_calls(x: Array, w: Array) -> Any:
    inner = jax.jit(lambda x: jnp.sin(x @ w))
    return jax.jit(lambda x: inner(inner(x)) + inner(x))(x)


def remat(x: Array, w: Array) -> Any:
    return jax.checkpoint(lambda x: jnp.tanh(jnp.sin(x) @ w))(x)


def gradients(x: Array, w: Array) -> Any:
    def loss(w):
        return jnp.sum(jnp.square(lax.scan(jax.checkpoint(matmul_step), x, jnp.stack((w, w)))[0]))

    return jax.value_and_grad(loss)(w)


@jax.custom_jvp
def cube(x: Array) -> Array:
    return x * x * x * TABLE


cube.defjvp(lambda primals, tangents: (cube(*primals), 3 * primals[0] ** 2 * tangents[0]))


@jax.custom_vjp
def clipped(x: Array) -> Array:
    return jnp.minimum(x, 0.5)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g * 2,))


def custom_derivatives(x: Array) -> Any:
    return cube(x), clipped(x), jax.grad(lambda x: clipped(x).sum())(x), jax.jvp(cube, (x,), (x,))


def closed_over(x: Array) -> Any:
    """Constants of the function, of a call inside it, of a loop's body, of a branch; one of them a key."""

    def step(carry, row):
        noise = jax.jit(lambda: jax.random.uniform(KEY, (4,)))()
        return jax.jit(lambda c: c + TABLE[0] + noise)(carry) + row, None

    call = jax.jit(lambda x: x + TABLE)
    branch = lax.cond(x[0, 0] < 1, lambda x: jax.jit(lambda x: x * TABLE)(x), lambda x: x - TABLE[:, :1], x)
    return call(x) + TABLE, lax.scan(step, x[0], jax.jit(lambda: jnp.asarray(TABLE))())[0], branch


def while_closing_over(x: Array) -> Any:
    grow = jax.jit(lambda x: x + TABLE[:1])
    small = jax.jit(lambda x: (x * TABLE[1]).sum() < 1000)
    return lax.while_loop(small, grow, x)


def generate(w: Array, start: Array, key: Array) -> Any:
    """A loop that draws tokens until a stop token, as samplers do."""

    def body(state):
        i, tokens, key = state
        key, sub = jax.random.split(key)
        logits = w[tokens[:, i] % 4] @ w.T
        token = jax.random.categorical(sub, logits, axis=-1).astype(jnp.int32)
        return i + 1, lax.dynamic_update_index_in_dim(tokens, token, i + 1, 1), key

    def go_on(state):
        i, tokens, _ = state
        return (i < 3) & jnp.any(tokens[:, i] != 7)

    return lax.while_loop(go_on, body, (0, start, key))


def integers(a: Array, b: Array) -> Any:
    """Integer division and remainder round; sums wrap around."""
    total = a.sum(0)
    return a // b, a % b, total // 3, total % 5, -total, lax.div(total, jnp.int32(4)), a.astype(jnp.int8).sum(1)


def booleans(a: Array) -> Any:
    flags = a > 3
    return (
        flags,
        flags & ~flags,
        flags.any(0),
        flags.all(),
        flags.sum(),
        flags.astype(jnp.float32) @ jnp.ones((4, 2)),
        flags[2],
    )


def small_types(a: Array) -> Any:
    return a, a.astype(jnp.int32).sum(0), a[1], a.T, a.astype(jnp.float8_e4m3fn)


def keys(key: Array, many: Array, x: Array) -> Any:
    """Keys split, folded, stored, indexed and carried."""
    a, b = jax.random.split(key)
    drawn, final = lax.scan(lambda k, _: (jax.random.fold_in(k, 1), jax.random.normal(k, (4,))), b, None, length=2)
    each = jax.vmap(lambda k: jax.random.uniform(k, (4,)))(many)
    dropped = jnp.where(jax.random.bernoulli(a, 0.5, x.shape), x, 0.0)
    return drawn, final, each, dropped, many[::2], many[3], jnp.concatenate((many, many)), many.reshape(2, 4)


def pins(x: Array) -> Any:
    """Marks of the user's own, and their words for where an array lives."""
    x = jax.device_put(lax.stop_gradient(x) * 1)
    return lax.optimization_barrier(jnp.copy(x)), checkpoint_name(x, "x")


def explicit_mesh(x: Array, w: Array) -> Any:
    """Explicit axis types, as some models want them."""
    mesh = jax.make_mesh((1,), ("a",), devices=jax.devices()[:1])
    x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec("a")))
    y = jnp.einsum("ab,bc->ac", x, w, out_sharding=NamedSharding(mesh, PartitionSpec(None, "a")))
    return y.astype(jnp.int32).sum(0), jnp.zeros_like(y) + y


@jax.custom_batching.custom_vmap
def doubled(x: Array) -> Array:
    return x * 2


doubled.def_vmap(lambda size, batched, x: (x * 2, batched[0]))


def other_calls(x: Array) -> Any:
    return doubled(x), lax.composite(lambda x: jnp.sin(x), name="test.sin")(x)


def unknown(x: Array) -> Any:
    return unruled_p.bind(x), lax.linalg.qr(x)


def parts(x: Array) -> Any:
    return {"a": None, "b": (x, None, [x * 2]), "c": ()}


def repeated(x: Array, unused: Array) -> Any:
    return x, x * 2, x, x


def experts(x: Array, w: Array) -> Any:
    """Tokens sent to the experts that score them highest, and back."""
    scores = jax.nn.softmax(x @ w)
    gate, expert = lax.top_k(scores, 2)
    sent = jnp.zeros((4, 8, 4)).at[expert.T, jnp.arange(8)].set(x)
    back = jnp.einsum("ebk,ekj->ebj", sent, jnp.stack([w] * 4))
    picked = back[expert, jnp.arange(8)[:, None]]
    return (picked * gate[..., None]).sum(1), jax.nn.one_hot(expert, 4).sum((0, 1)), jnp.cumsum(expert, 0)


INTS = jnp.arange(-16, 16).reshape(8, 4)

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "scan_with_everything": (scan_with_everything, (X, W)),
    "scan_backwards": (scan_backwards, (X, W)),
    "scan_of_length": (scan_of_length, (X,)),
    "scan_swapping_carries": (scan_swapping_carries, (X, X + 1)),
    "scan_with_literal_init": (scan_with_literal_init, (X,)),
    "scan_in_scan": (scan_in_scan, (X, W)),
    "scan_unrolled": (scan_unrolled, (X, W)),
    "empty_scan": (empty_scan, (X,)),
    "while_growing": (while_growing, (X,)),
    "while_with_constants": (while_with_constants, (X, jnp.abs(W), jnp.float32(50))),
    "while_batched": (while_batched, (X,)),
    "fori": (fori, (X, jnp.int32(5))),
    "cond_true": (cond, (X, jnp.bool_(True))),
    "cond_false": (cond, (X, jnp.bool_(False))),
    "cond_of_constants": (cond_of_constants, (X,)),
    "switch": (switch, (X, jnp.int32(7))),
    "cond_in_scan": (cond_in_scan, (X,)),
    "nested_calls": (nested_calls, (X, W)),
    "remat": (remat, (X, W)),
    "gradients": (gradients, (X, W)),
    "custom_derivatives": (custom_derivatives, (X,)),
    "closed_over": (closed_over, (X,)),
    "while_closing_over": (while_closing_over, (X,)),
    "generate": (generate, (W, jnp.ones((8, 4), jnp.int32), KEY)),
    "literal_results": (lambda x: (x, 1.0, 2, np.float32(3)), (X,)),
    "array_literal_results": (lambda x: (x, TABLE, jnp.zeros((8, 4))), (X,)),
    "repeated": (repeated, (X, W)),
    "same_argument_twice": (lambda x, y: x @ y.T, (X, X)),
    "zero_size": (lambda x, y: (x @ y, x.sum(1), x[:, :0], jnp.concatenate((x, x), 1), x.T), (X[:, :0], W[:0])),
    "scalars": (lambda a, b: (a + b, a * 2, jnp.sin(b)), (jnp.float32(1), jnp.float32(2))),
    "no_arguments": (lambda: jnp.arange(8) * 2, ()),
    "no_results": (lambda x: (), (X,)),
    "integers": (integers, (INTS, jnp.where(INTS == 0, 3, INTS))),
    "booleans": (booleans, (INTS,)),
    "int4": (small_types, (INTS.astype(jnp.int4),)),
    "keys": (keys, (KEY, jax.random.split(KEY, 8), X)),
    "pins": (pins, (X,)),
    "explicit_mesh": (explicit_mesh, (X, W)),
    "other_calls": (other_calls, (X,)),
    "unknown": (unknown, (X,)),
    "parts": (parts, (X,)),
    "experts": (experts, (X, W)),
}


@pytest.mark.parametrize("name", CASES)
def test_layouts_do_not_matter(name: str) -> None:
    fn, args = CASES[name]
    assert_layouts_do_not_matter(fn, *args, count=tries(2, least=1))


def test_a_primitive_without_a_rule_is_said_by_name_and_line() -> None:
    where = f"test_constructs.py:{unknown.__code__.co_firstlineno + 1}"
    warnings = trace(unknown, X).program.warnings
    assert f"{NAME} at {where} has no sharding rule: its arrays are replicated" in warnings
    with pytest.raises(UnsupportedPrimitiveError, match=f"{NAME} at {where} has no sharding rule"):
        trace(unknown, X, strict=True)


def test_loops_multiply_and_constants_are_arguments_of_the_program() -> None:
    traced = trace(closed_over, X)
    regions = traced.program.regions
    assert [(region.kind, region.count) for region in regions] == [
        ("main", 1),
        ("branch", 1),
        ("branch", 1),
        ("loop", 8),
    ]
    sizes = [traced.program.values[value].shape for value in traced.constant_values]
    assert len(sizes) == len(traced.constants) == len(traced.program.constants)
    assert (8, 4) in sizes and () in sizes  # the table and the key
