"""Checks for the libraries of optional extras."""

from __future__ import annotations

import importlib.util

from autoshard.errors import AutoshardError

_EXTRAS = {
    "pydantic": "sweep",
    "joblib": "sweep",
    "jinja2": "report",
    "matplotlib": "plots",
    "distributed": "dask",
    "ray": "ray",
}


class MissingExtra(AutoshardError, ImportError):
    """Raised if a library of an extra is not installed; states the extra."""


def require(module: str) -> None:
    """Checks that a library is installed.

    **Raises:** `MissingExtra`, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        extra = _EXTRAS[module]
        raise MissingExtra(f'This needs {module}, which is not installed: pip install "autoshard[{extra}]".')
