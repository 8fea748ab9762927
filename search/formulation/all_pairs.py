"""Shortest paths between all pairs of nodes of a graph with symmetries.

From a few nodes at a time, the edges that leave the nodes last improved are relaxed until no path gets shorter. If
renaming the nodes changes no price, only one node of each orbit is a start; the distances of the others are its own,
renamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FORBIDDEN = 1e5
"""Seconds that stand for "impossible"; finite, so that differences stay numbers."""
_STARTS = 16
"""Start nodes per pass: few enough for their distances along all edges to stay in the processor's cache."""


@dataclass(frozen=True)
class Edges:
    """Edges sorted by target: `price[e]` from `source[e]` to `target[e]`."""

    source: np.ndarray
    target: np.ndarray
    price: np.ndarray

    def restrict(self, nodes: np.ndarray) -> Edges:
        """The edges between nodes for which `nodes` is true."""
        kept = np.flatnonzero(nodes[self.source] & nodes[self.target] & np.isfinite(self.price))
        return Edges(self.source[kept], self.target[kept], self.price[kept])


def all_pairs(edges: Edges, within: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The length of the shortest path between any two nodes; infinite where there is none.

    **Arguments:**

    - `within`: `[nodes]`, bits; every successor's bits on a path are a subset of the node's own.
    - `images`: `[renamings, nodes]`, permutations of the nodes that keep every price, the identity first.

    **Returns:** `[nodes, nodes]`.
    """
    count = len(within)
    distance = np.full((count, count), np.inf)
    first = images.min(axis=0) == np.arange(count)
    for bits in np.unique(within[first]):
        usable = edges.restrict(within & ~bits == 0)
        starts = np.flatnonzero(first & (within == bits))
        for at in range(0, len(starts), _STARTS):
            some = starts[at : at + _STARTS]
            distance[some] = _distances_from(some, usable, count)
    for image in images[1:]:
        _rename(distance, np.flatnonzero(first), image)
    return distance


def _rename(distance: np.ndarray, starts: np.ndarray, image: np.ndarray) -> None:
    moved = starts[image[starts] != starts]
    distance[np.ix_(image[moved], image)] = distance[moved]


def _distances_from(starts: np.ndarray, edges: Edges, count: int) -> np.ndarray:
    """`[starts, nodes]`: distances from some nodes."""
    reached = np.full((count, len(starts)), np.inf)
    reached[starts, np.arange(len(starts))] = 0.0
    shortened = np.zeros(count, dtype=bool)
    shortened[starts] = True
    while shortened.any():
        shortened = _relax(reached, edges, shortened)
    return reached.T


def _relax(reached: np.ndarray, edges: Edges, shortened: np.ndarray) -> np.ndarray:
    """Relaxes the edges that leave the nodes last improved; returns the nodes that this improves."""
    leaving = np.flatnonzero(shortened[edges.source])
    found = np.zeros(len(reached), dtype=bool)
    for part in _parts(leaving):
        targets = edges.target[part]
        firsts = np.flatnonzero(np.r_[True, targets[1:] != targets[:-1]])
        lengths = reached[edges.source[part]] + edges.price[part, None]
        best, ends = np.minimum.reduceat(lengths, firsts, axis=0), targets[firsts]
        found[ends] |= (best < reached[ends]).any(axis=1)
        reached[ends] = np.minimum(reached[ends], best)
    return found


def _parts(edges: np.ndarray, size: int = 8192) -> Iterator[np.ndarray]:
    """Slices that fit the processor's cache."""
    for at in range(0, len(edges), size):
        yield edges[at : at + size]
