"""The parts of collectives that a product hides, by looped einsums or asynchronously (`costmodels.machine.conventions`).

Looped collective einsums (as rings, `search.formulation.rings`, under bandwidth per axis):

A product hides one collective: the all-gather that ends the reshard of one of its operands, or the reduce-scatter that
begins the reshard of its result. Its strategy says which one. So the cost of a reshard depends on the strategies at
its two ends, as any cost of an edge does, and the search stays exact.

Other communication is never hidden: an all-reduce, an exchange, a gather from which several operations read, partial
sums that are added up before they are reduced, and collectives that run less often than the product.

Asynchronous collectives: a product hides the reshards at its result and operands as whole paths, latency included. Its
strategy determines the seconds of each (`search.formulation.strategy_costs.hiding_seconds`), so nothing more is chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from search.formulation.all_pairs import FORBIDDEN
from search.formulation.collective_steps import StepGraph
from search.formulation.rings import StepRings

LOOPED_KINDS = ("all-gather", "reduce-scatter")
"""The collectives that a looped einsum hides."""
_ALIKE = 1e-9
"""The relative difference below which two paths count as equally costly."""


class StepLoops(NamedTuple):
    """Per step the seconds that a product may hide, and the number of shards.

    The seconds are communication without latency and launch. `rings` are the steps as rings, if they are costed as such.
    """

    wire_seconds: np.ndarray
    pieces: np.ndarray
    rings: StepRings | None = None


class Ends(NamedTuple):
    """Per reshard the reduce-scatter that begins its path, and the all-gather that ends it; -1 for none.

    `scatter_seconds` and `gather_seconds` are the seconds of them that a product may hide. The parts are the share of
    the product's own time that they may take: all shards but one.
    """

    first: np.ndarray
    last: np.ndarray
    scatter_seconds: np.ndarray
    scatter_part: np.ndarray
    gather_seconds: np.ndarray
    gather_part: np.ndarray


def ends_of(graph: StepGraph, price: np.ndarray, distance: np.ndarray, loops: StepLoops | None) -> Ends:
    """The ends of the cheapest path between every two layouts.

    Equally cheap paths are ranked by the seconds they can hide.

    **Arguments:**

    - `price`: seconds per step; `distance`: seconds per pair of layouts.
    """
    count = len(graph.layouts)
    first, last = (np.full((count, count), -1, dtype=np.intp) for _ in range(2))
    if loops is not None:
        reached = np.where(distance < FORBIDDEN, distance * (1 + _ALIKE), -1.0)
        most = np.full((2, count, count), -1.0)
        rank = loops.wire_seconds if loops.rings is None else loops.rings.rank(loops.wire_seconds)
        for k in np.flatnonzero((loops.wire_seconds > 0) & np.isfinite(price)).tolist():
            a, b, most_hidden = graph.source[k], graph.target[k], rank[k]
            if graph.steps[k].kind == "all-gather":
                better = (distance[:, a] + price[k] <= reached[:, b]) & (most_hidden > most[0, :, b])
                last[better, b], most[0, better, b] = k, most_hidden
            else:
                better = (distance[b] + price[k] <= reached[a]) & (most_hidden > most[1, a])
                first[a, better], most[1, a, better] = k, most_hidden
        # the first step belongs to the path to the layout at which the last one begins
        first = np.take_along_axis(first, np.where(last >= 0, graph.source[last], np.arange(count)), axis=1)
    return Ends(first, last, *_hideable(loops, first), *_hideable(loops, last))


def _hideable(loops: StepLoops | None, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per step the seconds of communication, and the part of a product's time that it can take."""
    if loops is None or not len(loops.pieces):
        return np.zeros(steps.shape), np.zeros(steps.shape)
    part = 1 - 1 / loops.pieces
    return np.where(steps >= 0, loops.wire_seconds[steps], 0.0), np.where(steps >= 0, part[steps], 0.0)


class Hiding(NamedTuple):
    """Per strategy of a product the seconds of one run that one of its reshards may hide behind.

    They are 0 if another reshard is hidden there. For rings there is a row of seconds per strategy
    (`search.formulation.rings.work_columns`).

    `key` identifies the product and the reshard.
    """

    key: tuple
    seconds: np.ndarray


class Groups(NamedTuple):
    """Groups of states with one layout and one time (or one row of times) to hide behind: both, per group."""

    layouts: np.ndarray
    seconds: np.ndarray


def group_layouts(layouts_of: np.ndarray, behind: Hiding | None) -> tuple[Groups, np.ndarray]:
    """The groups of states with one layout and one time to hide behind, and the group of each state."""
    seconds = np.zeros(len(layouts_of)) if behind is None else behind.seconds
    rows = np.concatenate([layouts_of[:, None], seconds.reshape(len(layouts_of), -1)], axis=1)
    found, group = np.unique(rows, axis=0, return_inverse=True)
    return Groups(found[:, 0].astype(np.intp), found[:, 1:] if seconds.ndim > 1 else found[:, 1]), group.reshape(-1)


def hidden_beside(seconds: np.ndarray, before: Groups, after: Groups) -> np.ndarray:
    """Seconds hidden of the asynchronous reshard between every two groups.

    **Arguments:**

    - `seconds`: of the reshards, from the groups `before` to the groups `after`.
    """
    hidden = np.minimum(seconds, before.seconds[:, None] + after.seconds)
    return np.where(seconds < FORBIDDEN, hidden, 0.0)


def hidden_seconds(ends: Ends, before: Groups, after: Groups) -> np.ndarray:
    """Seconds hidden of the reshard between every two groups: scatters behind the product before, gathers after."""
    window = np.ix_(before.layouts, after.layouts)
    scattered = np.minimum(ends.scatter_seconds[window], before.seconds[:, None] * ends.scatter_part[window])
    return scattered + np.minimum(ends.gather_seconds[window], after.seconds * ends.gather_part[window])


def ring_seconds_saved(rings: StepRings, ends: Ends, before: Groups, after: Groups) -> np.ndarray:
    """Seconds that rings save of the reshard between every two groups and the products at its ends."""
    window = np.ix_(before.layouts, after.layouts)
    first, last = ends.first[window], ends.last[window]
    saved = np.zeros(first.shape)
    if before.seconds.ndim > 1:
        saved = saved + rings.saved(first, before.seconds[:, None, :])
    return saved + rings.saved(last, after.seconds[None]) if after.seconds.ndim > 1 else saved
