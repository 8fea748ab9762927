"""Rules of matrix decompositions and Fourier transforms: each matrix or signal is whole, batches may be split.

Operation counts are those of the textbook algorithms (Golub and Van Loan, "Matrix Computations", 4th edition; the transform
by Cooley and Tukey), on the vector unit; dependent iterations take longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log2, prod
from typing import Any

from autoshard.rules.rule import Factors, Rule, register


def _batch_rule(
    inputs: Sequence[Any], outputs: Sequence[Any], rank: int, flops: float, linear: Sequence[int] = ()
) -> Rule:
    """A rule with a free batch: the last `rank` dimensions of the first operand, and the rest of all other arrays, are whole.

    **Arguments:**

    - `flops`: of one element of the batch.
    - `linear`: the operands that may be partial sums, one at a time.
    """
    factors = Factors()
    batch = factors.each(inputs[0].shape[: inputs[0].ndim - rank])
    uses = [(*batch, *((factors.new(n, "whole"),) for n in array.shape[len(batch) :])) for array in (*inputs, *outputs)]
    found, given = factors.done(), len(inputs)
    points = prod(factor.size for factor in found[len(batch) :])
    return Rule(
        found,
        tuple(uses[:given]),
        tuple(uses[given:]),
        linear=tuple(frozenset({operand}) for operand in linear),
        op_class="memory",
        traffic=(*range(given), *range(-len(outputs), 0)),
        flops_per_point=flops / max(points, 1),
    )


@register("fft")
def fft(inputs, outputs, *, fft_lengths, **_):
    """`[a,b] -> [a,c] whole={b,c}`: $5 N \\log_2 N$."""
    points = prod(fft_lengths)
    return _batch_rule(inputs, outputs, len(fft_lengths), 5.0 * points * log2(max(points, 2)), linear=[0])


_COUNTS = {
    "cholesky": 1 / 3,
    "lu": 2 / 3,
    "qr": 4 / 3,
    "householder_product": 4 / 3,
    "hessenberg": 10 / 3,
    "tridiagonal": 4 / 3,
    "eigh": 9.0,
    "svd": 21.0,
    "eig": 25.0,
    "schur": 25.0,
}
"""$c$ of the $c \\, m n \\min(m, n)$ that a decomposition of an $m \\times n$ matrix takes."""


def _decomposition(count: float) -> Callable[..., Rule]:
    def rule(inputs, outputs, **_):
        rows, columns = inputs[0].shape[-2:]
        return _batch_rule(inputs, outputs, 2, count * rows * columns * min(rows, columns))

    return rule


for _name, _count in _COUNTS.items():
    register(_name)(_decomposition(_count))


@register("triangular_solve")
def triangular_solve(inputs, outputs, **_):
    """`[a,b,c],[a,d,e] -> [a,f,g]`, whole except the batch: $n^2$ for each right-hand side, linear in the right-hand sides."""
    return _batch_rule(inputs, outputs, 2, float(prod(inputs[1].shape[-2:]) * inputs[0].shape[-1]), linear=[1])


@register("lu_pivots_to_permutation")
def lu_pivots_to_permutation(inputs, outputs, **_):
    """`[a,b] -> [a,c] whole={b,c}`."""
    return _batch_rule(inputs, outputs, 1, 0.0)


@register("tridiagonal_solve")
def tridiagonal_solve(inputs, outputs, **_):
    """Three diagonals `[a,b]` and right-hand sides `[a,c,d]`: about $8 n$ for each of these."""
    return _batch_rule(inputs, outputs, 1, 8.0 * prod(inputs[3].shape[-2:]), linear=[3])
