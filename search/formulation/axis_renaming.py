"""Renamings of mesh axes: the images of layouts and strategies, and those that are the same up to names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations, product
from typing import overload

import numpy as np

from search.formulation.layouts import Axes, Layout
from search.formulation.strategies import Strategy

Groups = tuple[tuple[str, ...], ...]
"""Axes that may exchange names, in groups."""


def renamings(groups: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """Every renaming of axes within the groups of interchangeable ones, the identity first."""
    each = [[dict(zip(group, image, strict=True)) for image in permutations(group)] for group in groups]
    return [{k: v for part in parts for k, v in part.items()} for parts in product(*each)]


@overload
def rename(state: Strategy, names: Mapping[str, str]) -> Strategy: ...


@overload
def rename(state: Layout, names: Mapping[str, str]) -> Layout: ...


def rename(state: Strategy | Layout, names: Mapping[str, str]) -> Strategy | Layout:
    """A strategy or layout with its axes renamed."""

    def image(axes: Axes) -> Axes:
        return tuple(names.get(axis, axis) for axis in axes)

    if isinstance(state, Layout):
        return Layout(tuple(map(image, state.dims)), tuple(sorted(image(state.partial))))
    carried = tuple(tuple(sorted(image(axes))) for axes in state.carried)
    return Strategy(tuple(map(image, state.splits)), carried, state.looped)


def images(index: Mapping[Layout, int], groups: Groups) -> np.ndarray:
    """The image of each layout under each renaming of axes: `[renamings, layouts]`, indices, the identity first."""
    found = [[index[rename(layout, names)] for layout in index] for names in renamings(groups)]
    return np.array(found, dtype=np.intp)
