"""Looped collective einsums: what a product hides of the collectives around it (`costmodels.pricing`).

A product hides one collective: the all-gather that ends the change of layout of one of its operands, or the reduce-scatter that
begins that of its result; which one is part of its strategy. So what a change of layout costs depends on the strategies at its
two ends, as any cost of an edge does, and the search stays exact.

What it leaves out is never hidden: an all-reduce, an exchange, a gather of what several operations then take from one place,
partial sums that are added up before they are reduced, and what runs less often than the product.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from search.formulation.all_pairs import FORBIDDEN
from search.formulation.collective_steps import StepGraph

LOOPED_KINDS = ("all-gather", "reduce-scatter")
"""The collectives that a looped einsum hides."""
_ALIKE = 1e-9
"""The part by which two paths may differ and still cost the same."""


class StepLoops(NamedTuple):
    """Per step what a product may hide of it: seconds on the wire, without latency and launch; and of how many pieces."""

    wire_seconds: np.ndarray
    pieces: np.ndarray


class Ends(NamedTuple):
    """Per change of layout the reduce-scatter that its path begins with, and the all-gather that it ends with; -1 for none.

    `scatter_seconds` and `gather_seconds` are what a product may hide of them, and the parts how much of the product's own time
    they may take: all pieces but one.
    """

    first: np.ndarray
    last: np.ndarray
    scatter_seconds: np.ndarray
    scatter_part: np.ndarray
    gather_seconds: np.ndarray
    gather_part: np.ndarray


def ends_of(graph: StepGraph, price: np.ndarray, distance: np.ndarray, loops: StepLoops | None) -> Ends:
    """The ends of the cheapest path between every two layouts: of paths that cost alike, of that with the most to hide.

    **Arguments:**

    - `price`: seconds per step; `distance`: seconds per pair of layouts.
    """
    count = len(graph.layouts)
    first, last = (np.full((count, count), -1, dtype=np.intp) for _ in range(2))
    if loops is not None:
        reached = np.where(distance < FORBIDDEN, distance * (1 + _ALIKE), -1.0)
        most = np.zeros((2, count, count))
        for k in np.flatnonzero((loops.wire_seconds > 0) & np.isfinite(price)).tolist():
            a, b, wire = graph.source[k], graph.target[k], loops.wire_seconds[k]
            if graph.steps[k].kind == "all-gather":
                better = (distance[:, a] + price[k] <= reached[:, b]) & (wire > most[0, :, b])
                last[better, b], most[0, better, b] = k, wire
            else:
                better = (distance[b] + price[k] <= reached[a]) & (wire > most[1, a])
                first[a, better], most[1, a, better] = k, wire
        # The first step is that of the path to where the last one begins.
        first = np.take_along_axis(first, np.where(last >= 0, graph.source[last], np.arange(count)), axis=1)
    return Ends(first, last, *_hideable(loops, first), *_hideable(loops, last))


def _hideable(loops: StepLoops | None, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each step the seconds on the wire, and the part of a product's time that it can take."""
    if loops is None or not len(loops.pieces):
        return np.zeros(steps.shape), np.zeros(steps.shape)
    part = 1 - 1 / loops.pieces
    return np.where(steps >= 0, loops.wire_seconds[steps], 0.0), np.where(steps >= 0, part[steps], 0.0)


class Hiding(NamedTuple):
    """Per strategy of a product the seconds of one run that one of its changes of layout may hide behind: 0 where another does.

    `key` tells which product and which of its changes of layout.
    """

    key: tuple
    seconds: np.ndarray


class Groups(NamedTuple):
    """States that have a layout and what they hide in common: both, per group."""

    layouts: np.ndarray
    seconds: np.ndarray


def grouped(layouts_of: np.ndarray, behind: Hiding | None) -> tuple[Groups, np.ndarray]:
    """The groups of states with one layout and one time to hide behind, and the group of each state."""
    seconds = np.zeros(len(layouts_of)) if behind is None else behind.seconds
    found, group = np.unique(np.stack([layouts_of, seconds], axis=1), axis=0, return_inverse=True)
    return Groups(found[:, 0].astype(np.intp), found[:, 1]), group.reshape(-1)


def hidden_seconds(ends: Ends, before: Groups, after: Groups) -> np.ndarray:
    """What is hidden of the change between every two groups: scatters by the product before, gathers by the one after."""
    window = np.ix_(before.layouts, after.layouts)
    scattered = np.minimum(ends.scatter_seconds[window], before.seconds[:, None] * ends.scatter_part[window])
    return scattered + np.minimum(ends.gather_seconds[window], after.seconds * ends.gather_part[window])
