"""How much a test tries: less in `make test` than in `make test-all`.

Hypothesis's profile says which: `all` has 100 examples, Hypothesis's own default, and `few` a quarter of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings


def tries(count: int, least: int = 5) -> int:
    """`count` in the profile `all`; otherwise the profile's share of it, but not less than `least`."""
    return min(count, max(least, count * settings().max_examples // 100))


def examples(count: int, least: int = 5, **options: Any) -> settings:
    """Settings for a property that takes longer than most: so many examples in the profile `all`, as `tries`."""
    return settings(max_examples=tries(count, least), **options)


def mostly_long(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The parameters of a test; those that are not among `quick` run in `make test-all` only."""
    return [pytest.param(case, marks=[] if case in quick else [pytest.mark.long]) for case in cases]
