"""Rooms and files are small: at most 15 modules a folder, and 400 lines a module."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support.paths import ROOT

MOST_FILES, MOST_LINES = 15, 400
FOLDERS = ("autoshard", "search", "costmodels", "tests", "examples", "benchmarks", "docs")

CROWDED = {"benchmarks"}
"""Folders of scripts, each of which answers one question."""
LONG = {
    "search/formulation/problem.py",
}
"""Modules that are to be split; one that no longer is long must leave this list."""


def modules() -> list[Path]:
    """The modules of the code, its tests and its scripts, as paths in the repository."""
    return [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_a_room_has_at_most_15_files() -> None:
    counts = Counter(path.parent.as_posix() for path in modules())
    assert {room for room, count in counts.items() if count > MOST_FILES} == CROWDED


def test_a_file_has_at_most_400_lines() -> None:
    lines = {path.as_posix(): (ROOT / path).read_text().count("\n") for path in modules()}
    assert {name for name, count in lines.items() if count > MOST_LINES} == LONG
