"""How much a test tries: less in `make test` than in `make test-all`.

Hypothesis's profile says which: `all` has 100 examples, Hypothesis's own default, `ci` half and `few` a fifth of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings


def tries(count: int, least: int = 3) -> int:
    """`count` in the profile `all`; otherwise the profile's share of it, but not less than `least`."""
    return min(count, max(least, count * settings().max_examples // 100))


def examples(count: int, least: int = 3, **options: Any) -> settings:
    """Settings for a property that takes longer than most: so many examples in the profile `all`, as `tries`."""
    return settings(max_examples=tries(count, least), **options)


def mostly_long(cases: Iterable[Any], *quick: Any, slow: Collection[Any] = ()) -> list[Any]:
    """The parameters of a test: `quick` run in `make test`, the others in `make test-all`, those of `slow` in sweeps."""

    def marks(case: Any) -> list[pytest.MarkDecorator]:
        return [pytest.mark.slow] if case in slow else [] if case in quick else [pytest.mark.long]

    return [pytest.param(case, marks=marks(case)) for case in cases]
