"""`trace`: a function as the program that is searched: traced, with its HBM traffic."""

from __future__ import annotations

from typing import Any

from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.tracing import Traced
from autoshard.tracing import trace as tracing


def trace(*args: Any, **options: Any) -> Traced:
    """As `autoshard.tracing.trace.trace`, annotated."""
    return annotate_traffic(tracing.trace(*args, **options))
