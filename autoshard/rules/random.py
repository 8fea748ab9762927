"""Rules of random numbers: every chip computes exactly the numbers of the unsharded program.

Threefry in its partitionable form (`jax_threefry_partitionable`, JAX's default) hashes the index of each number, a pair
of 32-bit words, so a chip computes the numbers of its own indices. Any other generator draws all numbers in one
sequence: they are replicated.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from autoshard.rules.elementwise import pointwise
from autoshard.rules.rule import Dims, Factors, Pieces, Rule, local_shape, register, whole_rule

DRAWS = """
random_clone random_fold_in random_gamma random_seed random_split random_unwrap random_wrap rng_bit_generator
""".split()

_HASH_OPERATIONS = 20 * 5 + 5 * 3 + 2
"""Integer operations of a threefry hash: 20 rounds of an addition, a rotation (3) and an exclusive or; 5 additions of
keys to both words with the round's number, and the first one. Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3", Threefry-2x32-20."""
_THREEFRY = "key<fry>"
_WORD = 32


@register(*DRAWS)
def draw(inputs, outputs, **_):
    """Keys and numbers are replicated; a local slice shards them without communication."""
    return whole_rule(inputs, outputs, exact=True)


@register("threefry2x32")
def threefry(inputs, outputs, **_):
    """`[a],[a],[a],[a] -> [a],[a]`: two words of a key and two of a counter are hashed into two."""
    return pointwise(inputs, outputs, flops_per_point=_HASH_OPERATIONS)


@register("random_bits")
def random_bits(inputs, outputs, **_):
    """`[a] -> [b,c,d]`: each chip draws the numbers of its own indices; the keys are replicated."""
    if not _is_partitionable(inputs[0]):
        return whole_rule(inputs, outputs, exact=True)
    factors = Factors()
    keys = factors.each(inputs[0].shape, range(len(inputs[0].shape)))
    numbers = factors.each(outputs[0].shape)
    each = _HASH_OPERATIONS / max(1, prod(inputs[0].shape))  # the factors of the keys are not a loop of their own
    return Rule(factors.done(), (keys,), (numbers,), flops_per_point=each, local=_local_bits)


def _is_partitionable(keys: Any) -> bool:
    partitionable = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    return str(keys.dtype) == _THREEFRY and bool(partitionable)


def _local_bits(eqn, rule: Rule, pieces: Pieces, keys):
    width, shape = eqn.params["bit_width"], eqn.params["shape"]
    split = [any(pieces.is_split(f) for f in dim) for dim in rule.outputs[0]]
    if not any(split):
        return [eqn.primitive.bind(keys, **eqn.params)]
    lead = len(rule.outputs[0]) - len(shape)
    for i, (factor,) in enumerate(rule.outputs[0][:lead]):
        keys = lax.dynamic_slice_in_dim(keys, pieces.start(factor), pieces.size(factor), i)
    words = jax.random.key_data(keys)
    first, second = (lax.expand_dims(words[..., k], range(lead, len(split))) for k in range(2))
    high, low = _counts(rule.outputs[0][lead:], shape, pieces)
    high, low = (jnp.broadcast_to(each, local_shape(rule.outputs[0], pieces)) for each in (high, low))
    first, second = (jnp.broadcast_to(each, low.shape) for each in (first, second))
    return [_as_bits(*threefry2x32_p.bind(first, second, high, low), width)]


def _as_bits(high, low, width: int):
    """A number of `width` bits from the two words of its hash, as `jax.random.bits` makes it."""
    dtype = jnp.dtype(f"uint{width}")
    if width == 2 * _WORD:
        return lax.shift_left(high.astype(dtype), np.asarray(_WORD, dtype)) | low.astype(dtype)
    return (high ^ low).astype(dtype)


def _counts(dims: Dims, shape: tuple[int, ...], pieces: Pieces):
    """The two words of the row-major index of each number of this chip's shard in an array of this shape."""
    local = local_shape(dims, pieces)
    high, low = np.zeros((), np.uint32), np.zeros((), np.uint32)
    for i, (factor,) in enumerate(dims):
        own = lax.broadcasted_iota(np.uint32, local, i) + lax.convert_element_type(pieces.start(factor), np.uint32)
        high, low = _plus((high, low), _times(own, prod(shape[i + 1 :])))
    return high, low


def _plus(a, b):
    """The sum of two numbers of two words each, modulo $2^{64}$."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < b[1]).astype(np.uint32), low


def _times(index, stride: int):
    """An index times a constant, as two words: of 32 bits by 64, modulo $2^{64}$, from products of 16 bits by 16."""
    half, mask = _WORD // 2, np.uint32((1 << _WORD // 2) - 1)
    parts = [np.uint32(stride >> half * k & int(mask)) for k in range(4)]
    total = (jnp.zeros_like(index), jnp.zeros_like(index))
    for at, digit in ((0, index & mask), (1, index >> half)):
        for k, part in enumerate(parts[: 4 - at]):
            if part:
                total = _plus(total, _shifted(digit * part, at + k))
    return total


def _shifted(number, halves: int):
    """A number of 32 bits, moved up by a number of half words, as two words."""
    half, none = _WORD // 2, jnp.zeros_like(number)
    return ((none, number), (number >> half, number << half), (number, none), (number << half, none))[halves]


@register("platform_index")
def constant(inputs, outputs, **_):
    """A number that is the same on every chip."""
    return whole_rule(inputs, outputs, exact=True)
