"""The unit of the memory rows: arrays that share memory, and their life."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """Arrays that share memory: the array that stands for them, and the first and last point of their life."""

    value: int
    members: tuple[int, ...]
    first: int
    last: int
