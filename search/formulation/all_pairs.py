"""Shortest paths between all pairs of nodes of a graph with symmetries.

From a few nodes at a time, all edges are relaxed until no path gets shorter (Bellman and Ford), those into nodes with
equally many edges together. If renaming the nodes changes no price, only one node of each orbit is a start; the distances
of the others are its own, renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FORBIDDEN = 1e5
"""Seconds that stand for "impossible"; finite, so that differences stay numbers."""
_EDGES, _STARTS = 4096, 64
"""Edges relaxed at a time, and start nodes per pass: few enough for the processor's cache.

Five graphs of 536 to 2,697 layouts (four mesh axes) take 1.28 s of a processor, with 1024 edges or 32 starts 1.5 s.
"""


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
        blocks = list(_blocks(edges.restrict(within & ~bits == 0)))
        starts = np.flatnonzero(first & (within == bits))
        for at in range(0, len(starts), _STARTS):
            some = starts[at : at + _STARTS]
            distance[some] = _distances_from(some, blocks, count)
    for image in images[1:]:
        _rename(distance, np.flatnonzero(first), image)
    return distance


def _rename(distance: np.ndarray, starts: np.ndarray, image: np.ndarray) -> None:
    moved = starts[image[starts] != starts]
    distance[np.ix_(image[moved], image)] = distance[moved]


Block = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Nodes (`[nodes]`), and the sources (`[edges, nodes]`) and prices (`[edges, nodes, 1]`) of all edges into them."""


def _blocks(edges: Edges) -> Iterator[Block]:
    """All edges, in blocks of nodes with equally many."""
    targets, first, degree = np.unique(edges.target, return_index=True, return_counts=True)
    for count in np.unique(degree).tolist():
        alike = np.flatnonzero(degree == count)
        for some in np.array_split(alike, max(1, len(alike) * count // _EDGES)):
            into = first[some] + np.arange(count)[:, None]
            yield targets[some], edges.source[into], edges.price[into, None]


def _distances_from(starts: np.ndarray, blocks: Sequence[Block], count: int) -> np.ndarray:
    """`[starts, nodes]`: distances from some nodes."""
    reached = np.full((count, len(starts)), np.inf)
    reached[starts, np.arange(len(starts))] = 0.0
    while True:
        before = reached.copy()
        for targets, sources, prices in blocks:
            lengths = reached.take(sources, axis=0)
            lengths += prices
            reached[targets] = np.minimum(reached[targets], lengths.min(axis=0))
        if np.array_equal(before, reached):
            return reached.T
