"""Options of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoshard.annotating.dimension_names import Names
from autoshard.rules.pin import Pins
from search.answer.solution import Limits, Solver


@dataclass(frozen=True)
class Options:
    """The options of `search`, which documents them.

    - `repeated`: whether every call pads and cuts its donated arguments, as those of a decorated function do.
    - `sends_rows`: whether rows of tokens may be sent to the chips of their groups (`costmodels.program.grouped`).
    """

    donate_argnums: int | Sequence[int] = ()
    name: str = ""
    strict: bool = False
    reserve_bytes: float | None = None
    time_limit: float | None = None
    progress: Callable[[str], None] | None = None
    pins: Pins | None = None
    fold: bool = True
    memory_bytes: float | None = None
    baselines: bool = False
    dims: Names | None = None
    shapes: tuple[Any, ...] = ()
    solver: Solver = "presolved"
    padding: bool = True
    tune: bool = False
    repeated: bool = False
    sends_rows: bool = True

    def limits(self) -> Limits:
        """The limits of the search."""
        limits = Limits(reserve_bytes=self.reserve_bytes, memory_bytes=self.memory_bytes, solver=self.solver)
        return limits if self.time_limit is None else replace(limits, wall_seconds=self.time_limit)
