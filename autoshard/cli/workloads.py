"""`FILE.py:NAME` with `--set size=...`: from the command line to a workload."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoshard.errors import AutoshardError
from autoshard.workload import Workload


class TargetFileError(AutoshardError):
    """A target file, or the factory that it should hold, cannot be used; says what was got and what would fit."""


def workload_of(target: str, settings: Sequence[str]) -> Workload:
    """Loads `FILE.py:NAME` and calls the factory with the settings.

    **Arguments:**

    - `target`: a Python file and the name of a function in it that returns an `autoshard.Workload`.
    - `settings`: `key=value` each, passed as keyword arguments; values are read as integers, floats or booleans if they are.

    **Raises:** `TargetFileError`.
    """
    path, separator, name = target.rpartition(":")
    if not separator or not path or not name:
        raise TargetFileError(f"{target!r} is not of the form FILE.py:NAME")
    factory = _named(_module(Path(path)), name, path)
    keywords = dict(_setting(text) for text in settings)
    _check_keywords(factory, keywords, target)
    try:
        made = factory(**keywords)
    except Exception as error:
        raise TargetFileError(f"{target} failed with {type(error).__name__}: {error}") from error
    if not isinstance(made, Workload):
        raise TargetFileError(f"{target} returned {type(made).__name__}, not an autoshard.Workload")
    return made


def _module(path: Path) -> Any:
    if not path.is_file():
        raise TargetFileError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise TargetFileError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up by name
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TargetFileError(f"{path} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _named(module: Any, name: str, path: str) -> Any:
    found = getattr(module, name, None)
    if callable(found):
        return found
    known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_") and _made_in(v, module))
    what = "holds no" if found is None else "has a value, not a function, called"
    raise TargetFileError(f"{path} {what} {name}; its functions are {', '.join(known) or 'none'}")


def _made_in(value: Any, module: Any) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise TargetFileError(f"--set {text!r} is not of the form key=value")
    return key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _check_keywords(factory: Any, keywords: dict[str, Any], target: str) -> None:
    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters)
        raise TargetFileError(f"{target}: {error}; it takes {known or 'nothing'}") from error
