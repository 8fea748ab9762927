"""Rules of matrix decompositions, solves and Fourier transforms: matrices and signals are whole; batches and right-hand
sides may be split.

Operation counts are those of the textbook algorithms (Golub and Van Loan, "Matrix Computations", 4th edition; the transform
by Cooley and Tukey), on the vector unit; dependent iterations take longer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import log2, prod
from typing import Any

from autoshard.rules.rule import Factors, Rule, register
from costmodels.program.program import Output


def _batch_rule(
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    rank: int,
    flops: float,
    linear: Sequence[int] = (),
    columns: int | None = None,
) -> Rule:
    """A rule with a free batch: the last `rank` dimensions of the first operand, and the rest of all other arrays, are whole.

    **Arguments:**

    - `flops`: of one element of the batch.
    - `linear`: the operands that may be partial sums, one at a time.
    - `columns`: the dimension, from the end, of the last operand and of the result along which right-hand sides lie side
      by side; each is solved alone, so it may be split.
    """
    factors = Factors()
    batch = factors.each(inputs[0].shape[: inputs[0].ndim - rank])
    shared = None if columns is None else factors.new(outputs[0].shape[columns])

    def own(k: int, array: Any) -> Iterator[tuple[int, ...]]:
        for i, n in enumerate(array.shape[len(batch) :], len(batch) - array.ndim):
            side_by_side = i == columns and k >= len(inputs) - 1
            yield (factors.new(n, "whole") if shared is None or not side_by_side else shared,)

    uses = [(*batch, *own(k, array)) for k, array in enumerate((*inputs, *outputs))]
    found, given = factors.done(), len(inputs)
    points = prod(factor.size for factor in found[len(batch) :])
    return Rule(
        found,
        tuple(uses[:given]),
        tuple(uses[given:]),
        linear=tuple(frozenset({operand}) for operand in linear),
        op_class="memory",
        traffic=(*range(given), *map(Output, reversed(range(len(outputs))))),
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
def triangular_solve(inputs, outputs, *, left_side, **_):
    """`[a,b,c],[a,d,e] -> [a,f,e]`: $n^2$ for each right-hand side, linear in these; they and the batch may be split."""
    work = float(prod(inputs[1].shape[-2:]) * inputs[0].shape[-1])
    return _batch_rule(inputs, outputs, 2, work, linear=[1], columns=-1 if left_side else -2)


@register("lu_pivots_to_permutation")
def lu_pivots_to_permutation(inputs, outputs, **_):
    """`[a,b] -> [a,c] whole={b,c}`."""
    return _batch_rule(inputs, outputs, 1, 0.0)


@register("tridiagonal_solve")
def tridiagonal_solve(inputs, outputs, **_):
    """Three diagonals `[a,b]` and right-hand sides `[a,c,d]`, which may be split along `d`: about $8 n$ for each."""
    return _batch_rule(inputs, outputs, 1, 8.0 * prod(inputs[3].shape[-2:]), linear=[3], columns=-1)
