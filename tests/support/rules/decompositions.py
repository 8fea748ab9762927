"""The results that every LAPACK agrees on, for decompositions of which it leaves signs, phases or an order open.

`DEFINED` maps a primitive to a function of its results. Two correct results of one matrix have equal images under it: products
that give the matrix back, Gram matrices of factors with orthonormal columns, magnitudes, sorted values, and whether a factor is
triangular. Primitives whose results are unique (Cholesky factors, solutions of linear systems) are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

Defined = Callable[..., list[jax.Array]]

TOLERANCE = 1e-4
"""What counts as zero beside the largest entry, in single precision."""


def eig(values: jax.Array, left: jax.Array, right: jax.Array) -> list[jax.Array]:
    """$V \\Lambda V^{-1} = A$ and $U^{-H} \\Lambda U^H = A$ with columns of length 1; the order of the values is open."""
    diagonal, transposed = _diagonal(values), _adjoint(left)
    powers = jnp.stack([jnp.sum(values**k, axis=-1) for k in range(1, values.shape[-1] + 1)], axis=-1)
    return [
        right @ diagonal @ jnp.linalg.inv(right),
        jnp.linalg.inv(transposed) @ diagonal @ transposed,
        powers,
        jnp.linalg.norm(right, axis=-2),
        jnp.linalg.norm(left, axis=-2),
    ]


def eigh(vectors: jax.Array, values: jax.Array) -> list[jax.Array]:
    """$V \\Lambda V^H = A$, $V^H V = I$, values in ascending order."""
    return [vectors @ _diagonal(values) @ _adjoint(vectors), _gram(vectors), values]


def hessenberg(packed: jax.Array, taus: jax.Array) -> list[jax.Array]:
    """$Q H Q^H = A$, $Q^H Q = I$: the sign of each reflection is open."""
    q = _reflections(packed, taus)
    return [q @ jnp.triu(packed, -1) @ _adjoint(q), _gram(q), jnp.abs(jnp.triu(packed, -1))]


def lu(packed: jax.Array, pivots: jax.Array, permutation: jax.Array) -> list[jax.Array]:
    """$L U = P A$ with $|L| \\le 1$: of rows that are nearly equally large, either may be the pivot."""
    lower = jnp.tril(packed, -1)
    product = (lower + jnp.eye(packed.shape[-1], dtype=packed.dtype)) @ jnp.triu(packed)
    return [
        jnp.take_along_axis(product, jnp.argsort(permutation, axis=-1)[..., None], axis=-2),
        jnp.max(jnp.abs(lower), axis=(-2, -1)) <= 1 + TOLERANCE,
        permutation == lax.linalg.lu_pivots_to_permutation(pivots, packed.shape[-2]),
    ]


def qr(q: jax.Array, r: jax.Array) -> list[jax.Array]:
    """$Q R = A$, $Q^H Q = I$, $R$ upper triangular and unique but for the signs of its rows."""
    return [q @ r, _gram(q), jnp.abs(jnp.triu(r)), _is_zero(jnp.tril(r, -1), r)]


def schur(triangular: jax.Array, vectors: jax.Array) -> list[jax.Array]:
    """$Z T Z^H = A$, $Z^H Z = I$, $T$ upper triangular (the matrices have real eigenvalues), which stand in any order."""
    return [
        vectors @ triangular @ _adjoint(vectors),
        _gram(vectors),
        jnp.sort(jnp.diagonal(triangular, axis1=-2, axis2=-1), axis=-1),
        _is_zero(jnp.tril(triangular, -1), triangular),
    ]


def svd(left: jax.Array, values: jax.Array, right: jax.Array) -> list[jax.Array]:
    """$U \\Sigma V^H = A$, $U^H U = V^H V = I$, values in descending order."""
    return [left @ _diagonal(values) @ right, _gram(left), _gram(_adjoint(right)), values]


def tridiagonal(packed: jax.Array, diagonal: jax.Array, off: jax.Array, taus: jax.Array) -> list[jax.Array]:
    """$Q T Q^H = A$, $Q^H Q = I$: the signs beside the diagonal are open."""
    q = _reflections(packed, taus)
    middle = _diagonal(diagonal) + _diagonal(off, 1) + _diagonal(off, -1)
    beside = jnp.diagonal(packed, -1, axis1=-2, axis2=-1)
    kept = [jnp.diagonal(packed, axis1=-2, axis2=-1), jnp.abs(beside)]
    return [q @ middle @ _adjoint(q), _gram(q), diagonal, jnp.abs(off), *kept]


DEFINED: Mapping[str, Defined] = {
    each.__name__: each for each in (eig, eigh, hessenberg, lu, qr, schur, svd, tridiagonal)
}


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _gram(x: jax.Array) -> jax.Array:
    return _adjoint(x) @ x


def _diagonal(entries: jax.Array, k: int = 0) -> jax.Array:
    return jnp.vectorize(lambda row: jnp.diag(row, k), signature="(n)->(m,m)")(entries)


def _is_zero(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(part), axis=(-2, -1)) <= TOLERANCE * jnp.max(jnp.abs(whole), axis=(-2, -1))


def _reflections(packed: jax.Array, taus: jax.Array) -> jax.Array:
    """$Q = H_1 H_2 \\ldots$, $H_i = I - \\tau_i v_i v_i^H$; $v_i$ begins with a 1 in row $i + 1$, then column $i$ below it."""
    identity = jnp.eye(packed.shape[-1], dtype=packed.dtype)
    q = jnp.broadcast_to(identity, packed.shape)
    for i in range(taus.shape[-1]):
        v = jnp.tril(packed, -2)[..., :, i] + identity[i + 1]
        q = q - taus[..., i, None, None] * (q @ v[..., :, None]) * jnp.conj(v)[..., None, :]
    return q
