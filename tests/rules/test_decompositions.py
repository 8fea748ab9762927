"""The comparison of decompositions: it is blind to signs, phases and order, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.support.layout_strategies import assert_equal
from tests.support.rules.decompositions import DEFINED

SIGNS = np.array([1, -1, -1, 1], np.float32)
PHASES = np.exp(1j * np.arange(4)).astype(np.complex64)
ORDER = np.array([2, 0, 3, 1])

FUNCTIONS: dict[str, Callable[[jax.Array], Any]] = {
    "eig": lax.linalg.eig,
    "eigh": lambda x: lax.linalg.eigh(x + jnp.swapaxes(x, -1, -2)),
    "hessenberg": lax.linalg.hessenberg,
    "lu": lax.linalg.lu,
    "qr": lambda x: lax.linalg.qr(x, full_matrices=False),
    "schur": lambda x: lax.linalg.schur(x + jnp.swapaxes(x, -1, -2)),
    "svd": lambda x: lax.linalg.svd(x, full_matrices=False),
    "tridiagonal": lambda x: lax.linalg.tridiagonal(x + jnp.swapaxes(x, -1, -2)),
}

# Other results that are as correct.
OTHERS: dict[str, Callable[..., list[jax.Array]]] = {
    "eig": lambda w, left, right: [w[:, ORDER], (left * PHASES)[..., ORDER], (right * PHASES)[..., ORDER]],
    "eigh": lambda v, w: [v * SIGNS, w],
    "qr": lambda q, r: [q * SIGNS, SIGNS[:, None] * r],
    "schur": lambda t, z: [(SIGNS[:, None] * t * SIGNS)[:, ORDER][..., ORDER], (z * SIGNS)[..., ORDER]],
    "svd": lambda u, s, v: [u * SIGNS, s, SIGNS[:, None] * v],
}

DAMAGES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "another matrix's": lambda x: jnp.roll(x, 1, 0),
    "scaled": lambda x: (1.01 * x).astype(x.dtype),
    "one zero": lambda x: x.at[(0,) * x.ndim].set(0),
}


def results(name: str) -> list[jax.Array]:
    x = np.random.default_rng(0).uniform(0.1, 0.9, (3, 4, 4)).astype(np.float32)
    return jax.tree.leaves(jax.jit(FUNCTIONS[name])(x))


def test_every_comparison_is_tested() -> None:
    assert FUNCTIONS.keys() == DEFINED.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_other_correct_results_are_equal(name: str) -> None:
    found = results(name)
    other = list(map(jnp.asarray, OTHERS[name](*found)))
    assert any(not np.allclose(a, b, atol=0.01) for a, b in zip(found, other, strict=True))
    assert_equal(other, found, defined=DEFINED[name])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_damaged_result_is_not_equal(name: str, damage: str) -> None:
    found = results(name)
    for i, array in enumerate(found):
        if jnp.issubdtype(array.dtype, jnp.inexact):
            with pytest.raises(AssertionError):
                assert_equal([*found[:i], DAMAGES[damage](array), *found[i + 1 :]], found, defined=DEFINED[name])


def test_rows_that_are_placed_wrongly_are_not_equal() -> None:
    packed, pivots, permutation = results("lu")
    with pytest.raises(AssertionError):
        assert_equal(
            [packed, pivots, jnp.roll(permutation, 1, -1)], [packed, pivots, permutation], defined=DEFINED["lu"]
        )
