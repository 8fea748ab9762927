"""Paths of arrays: one grammar for pins, names of dimensions and tables.

A path is what JAX prints, with the argument's name first: `params['layers'][3]['wq'].value`. Its dotted form joins the
keys: `params.layers.3.wq.value`. In a pattern over dotted paths, `*` stands for any run of characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_KEY = re.compile(r"""\['((?:[^'\\]|\\.)*)'\]|\["((?:[^"\\]|\\.)*)"\]|\[([^\]]*)\]|([^.\[\]]+)""")

_NUMBER = re.compile(r"(?<=[\[_'\"/])\d+(?=[\]_'\"/])")
"""A number that is a whole part of a path, such as an index or a layer's number, unlike the 3 of `w3` or a line number."""


def keys_of(path: str) -> tuple[str, ...]:
    """The keys of a path: `params['a b'][3].value` as `("params", "a b", "3", "value")`."""
    return tuple(next(filter(None, found), "") for found in _KEY.findall(path))


def dotted(path: str) -> str:
    """`params['layers'][3]['wq']` as `params.layers.3.wq`."""
    return ".".join(keys_of(path))


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is a path, or matches its whole dotted form."""
    return pattern == path or fnmatchcase(dotted(path), pattern)


def matches_end(pattern: str, path: str) -> bool:
    """Whether a pattern is a path, or matches the last keys of its dotted form."""
    keys = keys_of(path)
    return pattern == path or any(fnmatchcase(".".join(keys[at:]), pattern) for at in range(len(keys)))


def star_numbers(name: str) -> str:
    """A name with a star for each number that may tell layers apart: `[3]`, `['3']`, `['layer_3']`, `block_3/`."""
    return _NUMBER.sub("*", name)


def shared_name(names: Iterable[str]) -> str:
    """The common name of names that differ only in numbers, with stars where they differ.

        shared_name(["h_0/mlp_1/", "h_1/mlp_1/"])  # "h_*/mlp_1/"

    **Arguments:**

    - `names`: at least one; with the same `star_numbers`.
    """
    different = list(dict.fromkeys(names))
    numbers = zip(*map(_NUMBER.findall, different), strict=True)
    shown = ("*" if len(set(each)) > 1 else each[0] for each in numbers)
    return _NUMBER.sub(lambda _: next(shown), different[0])
