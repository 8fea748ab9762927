"""Colour refinement: what looks alike is told apart by what it sees, until all of one colour see the same.

Each round costs what changed in the one before, not the size of the graph: a chain needs as many rounds as it has links. As in
Hopcroft, "An n log n algorithm for minimizing states in a finite automaton", 1971, the most of those that part keep their name.
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
    """Gives members of one colour new ones, in place, until all members of a colour have the same sight.

    **Arguments:**

    - `colours`: per vertex its first colour.
    - `members`: the vertices whose colour may change.
    - `sight`: what a vertex sees under the colours as they are.
    - `seers`: per vertex the members whose sight its colour is part of; no others, since who sees none that is new must see
      what it saw.
    """
    sizes = Counter(colours[i] for i in members)
    unused = itertools.count(max(colours, default=-1) + 1)
    doubtful: Iterable[int] = members
    while doubtful:
        sights: dict[int, dict[Hashable, list[int]]] = {}
        for i in doubtful:
            sights.setdefault(colours[i], {}).setdefault(sight(i), []).append(i)
        leaving = [group for colour, groups in sights.items() for group in _leaving(groups, sizes[colour])]
        for group in leaving:
            sizes[colours[group[0]]] -= len(group)
            new = next(unused)
            sizes[new] = len(group)
            for i in group:
                colours[i] = new
        doubtful = sorted({seer for group in leaving for i in group for seer in seers.get(i, ())})


def _leaving(groups: Mapping[Hashable, list[int]], size: int) -> list[list[int]]:
    """The groups of one colour that see what the rest of it does not: all but the largest if everyone was looked at."""
    found = list(groups.values())
    if sum(map(len, found)) == size:
        found.remove(max(found, key=len))
    return found
