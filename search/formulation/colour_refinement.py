"""Colour refinement: splits classes until all members of a class have identically coloured neighbours.

Each round costs as much as changed in the one before, not the size of the graph: a chain needs as many rounds as it
has links. As in Hopcroft, "An n log n algorithm for minimizing states in a finite automaton", 1971, the largest part
of a split class keeps its name.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping


def refine(
    colours: list[int],
    members: Collection[int],
    sight: Callable[[int], Hashable],
    seers: Mapping[int, Collection[int]],
) -> None:
    """Splits colours, in place, until all members of a colour have the same sight.

    **Arguments:**

    - `colours`: per vertex its first colour.
    - `members`: the vertices whose colour may change.
    - `sight`: the coloured neighbourhood of a vertex under the current colours.
    - `seers`: per vertex the members whose sight its colour is part of; the sight of all others is unchanged.
    """
    sizes = Counter(colours[i] for i in members)
    unused = itertools.count(max(colours, default=-1) + 1)
    doubtful: Iterable[int] = members
    while doubtful:
        sights: dict[int, dict[Hashable, list[int]]] = {}
        for i in doubtful:
            sights.setdefault(colours[i], {}).setdefault(sight(i), []).append(i)
        leaving = [group for colour, groups in sights.items() for group in _without_largest(groups, sizes[colour])]
        for group in leaving:
            sizes[colours[group[0]]] -= len(group)
            new = next(unused)
            sizes[new] = len(group)
            for i in group:
                colours[i] = new
        doubtful = sorted({seer for group in leaving for i in group for seer in seers.get(i, ())})


def _without_largest(groups: Mapping[Hashable, list[int]], size: int) -> list[list[int]]:
    """The groups of one colour that get a new one: all but the largest if every member was looked at."""
    found = list(groups.values())
    if sum(map(len, found)) == size:
        found.remove(max(found, key=len))
    return found
