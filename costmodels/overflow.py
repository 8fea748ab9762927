"""The chance that the buffers of sent rows are too small, and the time of the path for it (`costmodels.program.grouped`).

The router is assumed to be balanced. Each of $m$ rows is of any group with the same probability, independently.
Then the rows from one of $s_t$ chips to one of $s_g$ are binomial with $m / s_t$ trials of probability $1 / s_g$, and the rows
that a chip multiplies are binomial with $m s_g / s_t$ trials. An overflow needs more than $n$ of these somewhere, for
buffers of $n$ rows. By Boole's inequality its probability is at most

$$s_t s_g P(B(m / s_t, 1 / s_g) > n_{sent}) + s_t P(B(m s_g / s_t, 1 / s_g) > n_{multiplied})$$

Rows of one token are of different groups in most routers. So they are rarer in one place than here: counts of draws without
replacement concentrate more (Hoeffding 1963, "Probability Inequalities for Sums of Bounded Random Variables", theorem 4).
"""

from __future__ import annotations

from math import ceil, exp, lgamma, log, prod

import numpy as np

from costmodels.machine.collectives import seconds_on
from costmodels.machine.topology import Topology
from costmodels.operations import price
from costmodels.program.grouped import Grouped, rows_for_each, rows_in_all, slab_rows
from costmodels.program.program import Operation, Program

_NEGLIGIBLE = 1e-12
"""The part of a sum below which its further, falling terms are left out."""


def tail(trials: int, chance: float, most: int) -> float:
    """The probability of more than `most` successes in independent trials: the binomial distribution's upper tail, summed."""
    if most < 0:
        return 1.0
    if most < trials * chance:  # the other tail is the shorter sum
        return 1.0 - _upper_sum(trials, 1.0 - chance, trials - most - 1)
    return _upper_sum(trials, chance, most)


def _upper_sum(trials: int, chance: float, most: int) -> float:
    """The terms of more than `most` successes, from the first one on, from which they fall."""
    if most >= trials or not 0.0 < chance < 1.0:
        return float(most < trials and chance >= 1.0)
    first = most + 1
    ways = lgamma(trials + 1) - lgamma(first + 1) - lgamma(trials - first + 1)
    term = found = exp(ways + first * log(chance) + (trials - first) * log(1.0 - chance))
    for k in range(first, trials):
        term *= (trials - k) / (k + 1) * chance / (1.0 - chance)
        found += term
        if term <= _NEGLIGIBLE * found:
            break
    return min(found, 1.0)


def overflow_chance(rows: int, sources: int, chips: int, load: float) -> float:
    """An upper bound of the probability that any buffer of any chip is too small, with a balanced router.

    **Arguments:**

    - `rows`: $m$; `sources`: $s_t$; `chips`: $s_g$; `load`: the buffers' rows over the balanced ones.
    """
    sent, room = rows_for_each(rows, sources, chips, load), rows_in_all(rows, sources, chips, load)
    pairs = sources * chips * tail(ceil(rows / sources), 1 / chips, sent)
    return min(1.0, pairs + sources * tail(ceil(rows * chips / sources), 1 / chips, room))


def overflow_seconds(
    program: Program, op: Operation, groups: Grouped, splits: tuple[tuple[str, ...], ...], topology: Topology
) -> float:
    """The seconds that the path for an overflow takes beyond that of sent rows.

    It has the work of gathered tokens, and sums each slab of rows over the chips: tokens over those with tokens, and results
    over those with groups.

    **Arguments:**

    - `splits`: the axes of each factor of the chain; those of its tokens are not empty.
    """
    assert groups.tokens is not None
    over, load = splits[groups.groups], topology.pricing.expert_load
    sources, chips = (prod(topology.axis_sizes[axis] for axis in axes) for axes in (splits[groups.tokens], over))
    rows, size = op.factors[groups.rows[0]].size, program.values[op.outputs[0].value].itemsize
    local = np.array([[float(prod(topology.axis_sizes[axis] for axis in axes)) for axes in splits]])
    whole = local.copy()
    whole[0, groups.tokens] = 1.0
    own, gathered = (
        float(price(program, op, each, topology.chip, topology.pricing.asynchronous, load).seconds[0])
        for each in (local, whole)
    )
    slab = slab_rows(rows_in_all(rows, sources, chips, load))
    widths = [
        prod(op.factors[f].size for f in of) * size
        for of in (groups.matrices[0].contracted, groups.matrices[-1].columns)
    ]
    summed, sent = 0.0, 0.0
    for width, axes in zip(widths, (splits[groups.tokens], over), strict=True):
        summed += float(seconds_on(topology, "all-reduce", axes, slab * width)) if axes else 0.0
        each = chips * rows_for_each(rows, sources, chips, load) * width
        sent += float(seconds_on(topology, "all-to-all", over, each)) if over else 0.0
    return max(gathered + ceil(rows / slab) * summed - own - sent, 0.0)
