"""Loops over stacks: how a round may update and read a slice, and random loops that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

ROUNDS, ROWS, COLUMNS = 3, 4, 5


def mixed(total: Any, array: Any) -> Any:
    """A number that every element has a part in."""
    return total * 31 + jnp.sum(array * jnp.arange(1, 1 + array.size, dtype=jnp.int32).reshape(array.shape))


def part(old: Any, total: Any, at: Any) -> Any:
    return lax.dynamic_update_slice(old, jnp.full((1, 2), total, jnp.int32), (at, total % 7 - 1))


def rows(old: Any, total: Any, at: Any) -> Any:
    return old.at[jnp.stack([at, total % 6])].set(jnp.arange(COLUMNS, dtype=jnp.int32) + total, mode="drop")


def added(old: Any, total: Any, at: Any) -> Any:
    return old.at[at, jnp.array([1, 3])].add(total)


def small_indices(old: Any, total: Any, at: Any) -> Any:
    return lax.dynamic_update_slice(old, old[:1] + total, (at.astype(jnp.uint8) % 4, jnp.uint8(0)))


def each_row(old: Any, total: Any, at: Any) -> Any:
    """Positions of their own, as a batch of sequences has."""
    write = jax.vmap(lambda row, k: lax.dynamic_update_slice(row, row[:1] * 2 + total, (k,)))
    return write(old, jnp.arange(len(old), dtype=jnp.int32) + at)


def called(old: Any, total: Any, at: Any) -> Any:
    return jax.jit(part)(old, total + 1, at)


def looped(old: Any, total: Any, at: Any) -> Any:
    return lax.fori_loop(0, at, lambda i, c: part(c, total + c[i, 0], i), old)


def until(old: Any, total: Any, at: Any) -> Any:
    step = lambda state: (state[0] + 1, part(state[1], total, state[0]))  # noqa: E731
    return lax.while_loop(lambda state: state[0] < at, step, (jnp.int32(0), old))[1]


def chosen(old: Any, total: Any, at: Any) -> Any:
    return lax.cond(total % 2 == 0, part, lambda old, *_: old, old, total, at)


def nested(old: Any, total: Any, at: Any) -> Any:
    write = lambda c, row: (c + row[0], lax.dynamic_update_slice(row, (c + at)[None], (at,)))  # noqa: E731
    return lax.scan(write, total, old)[1]


def replacing(old: Any, total: Any, at: Any) -> Any:
    return old * 3 + total


def forgetting(old: Any, total: Any, at: Any) -> Any:
    return jnp.roll(jnp.zeros_like(old) + total, 1) + jnp.arange(COLUMNS, dtype=jnp.int32)


WRITES = [
    part,
    rows,
    added,
    small_indices,
    each_row,
    called,
    looped,
    until,
    chosen,
    nested,
    replacing,
    forgetting,
]
READS: list[Callable[[Any, Any], Any]] = [
    lambda old, at: old,
    lambda old, at: lax.dynamic_slice(old, (at, 1), (2, 3)),
    lambda old, at: lax.dynamic_index_in_dim(old, at),
    lambda old, at: old[jnp.stack([at, at + 1, at])],
    lambda old, at: jax.vmap(lambda row, k: lax.dynamic_slice(row, (k,), (2,)))(
        old, jnp.arange(ROWS, dtype=jnp.int32) * at
    ),
]


@st.composite
def loops(draw: st.DrawFn) -> tuple[Callable[..., Any], int, list[int]]:
    """A function of a number and some stacks that scans over them and updates them, how many, and those that are donated."""
    stacks = draw(st.integers(1, 3))
    version = st.integers(0, 20)  # of those that a slice has had so far
    actions: Any = st.one_of(
        st.tuples(st.just("write"), st.integers(0, stacks - 1), st.sampled_from(WRITES)),
        st.tuples(st.just("read"), version, st.sampled_from(READS)),
        st.tuples(st.just("write an old one"), version, st.sampled_from(WRITES)),
    )
    body = draw(st.lists(actions, min_size=1, max_size=5))
    piled = draw(st.lists(version, min_size=0, max_size=2))
    reverse, afterwards, twice = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())

    def fn(total: Any, *arrays: Any) -> Any:
        def step(total: Any, slices: Any) -> Any:
            now, versions = list(slices), list(slices)
            for what, which, how in body:
                at = (total % 5).astype(jnp.int32)
                if what == "write":
                    now[which] = how(now[which], total, at)
                    versions.append(now[which])
                elif what == "read":
                    total = mixed(total, how(versions[which % len(versions)], at))
                else:
                    versions.append(how(versions[which % len(versions)], total, at))
            results = now[: len(arrays)]
            return total, (results, [versions[k % len(versions)] for k in piled])

        xs = [*arrays, arrays[0]] if twice else list(arrays)
        found = lax.scan(step, total, xs, reverse=reverse)
        return (found, arrays[0] + 1) if afterwards else found

    donated = draw(st.lists(st.integers(0, stacks), unique=True))
    return fn, stacks, donated


NUMBERS = np.random.default_rng(0).integers(-9, 9, (3, ROUNDS, ROWS, COLUMNS)).astype(np.int32)
