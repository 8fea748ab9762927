"""Names of what an unrolled model has many of: `params['layers'][*]['wq']` for the `wq` of all layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=[\[_'\"/])\d+(?=[\]_'\"/])")
"""A number that stands alone in a path, as a list's index or a layer's does, and not that of `w3` or of a line."""


def unnumbered(name: str) -> str:
    """A name with a star for each number that may tell layers apart: `[3]`, `['3']`, `['layer_3']`, `block_3/`."""
    return _NUMBER.sub("*", name)


def shared_name(names: Iterable[str]) -> str:
    """The one name of things whose names are alike but for numbers: stars where they differ.

        shared_name(["h_0/mlp_1/", "h_1/mlp_1/"])  # "h_*/mlp_1/"

    **Arguments:**

    - `names`: at least one; with the same `unnumbered`.
    """
    different = list(dict.fromkeys(names))
    numbers = zip(*map(_NUMBER.findall, different), strict=True)
    shown = ("*" if len(set(each)) > 1 else each[0] for each in numbers)
    return _NUMBER.sub(lambda _: next(shown), different[0])
