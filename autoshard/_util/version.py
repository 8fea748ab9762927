"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of


def version() -> str:
    """The version, such as `0.1.0`; "uninstalled" in a folder that is on the path only."""
    try:
        return version_of("autoshard")
    except PackageNotFoundError:
        return "uninstalled"
