"""Folders of the repository, and commands of its examples."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
DATA = ROOT / "tests" / "data"

PALM = f"{ROOT / 'examples' / 'palm.py'}:decode"
TINY = ("--set", "size=tiny", "--set", "batch=8", "--set", "context=16")
