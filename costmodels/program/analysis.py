"""Analyses of frozen programs and problems, computed once and cached on the object they are about."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")


def cached_analysis(compute: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A function of a frozen object and hashable arguments that computes each answer once per object.

    The object keeps the answers beside its cached properties, so they go when it goes, and a changed copy begins without them.
    """

    @wraps(compute)
    def look_up(subject: S, *args: P.args, **options: P.kwargs) -> T:
        answers: dict[Any, Any] = vars(subject).setdefault("_analyses", {})
        key = (compute, *args, *options.items()) if args or options else compute
        if key not in answers:
            answers[key] = compute(subject, *args, **options)
        return answers[key]

    return look_up
