"""The user's target file: `FILE.py:NAME` as a workload."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from autoshard.workload import Workload


class Misuse(Exception):
    """A command that makes no sense, in a sentence."""


def workload(target: str, keywords: dict[str, Any]) -> Workload:
    """What the function that `FILE.py:NAME` names returns for these keywords.

    **Raises:** `Misuse`, in one line, for a file that is missing or does not import, a name that is not there or cannot be
    called, keywords that it does not take, an error that it raises, and a result that is no `Workload`.
    """
    path, name = _split(target)
    with _on_path(path.parent.resolve()):
        make = factory(target, keywords)
        found = _attempt(lambda: make(**keywords), f"{name} in {path} failed")
    if not isinstance(found, Workload):
        raise Misuse(f"{name} in {path} returned {type(found).__name__}; an autoshard.Workload(fn, args) would do.")
    return found


def factory(target: str, keywords: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function that `FILE.py:NAME` names; where keywords are given, one that takes them.

    **Raises:** `Misuse`, as `workload` does.
    """
    path, name = _split(target)
    with _on_path(path.parent.resolve()):
        found = _factory(_imported(path), path, name)
    if keywords is not None:
        _check_keywords(found, name, keywords)
    return found


def _split(target: str) -> tuple[Path, str]:
    file, _, name = target.rpartition(":")
    if not file or not name.isidentifier():
        raise Misuse(f"{target} is no FILE.py:NAME, such as examples/palm.py:decode.")
    path = Path(file)
    if not path.is_file():
        raise Misuse(f"There is no file {path}.")
    if path.suffix != ".py":
        raise Misuse(f"{path} is no .py file.")
    return path, name


@contextmanager
def _on_path(directory: Path) -> Iterator[None]:
    """Lets a file import its neighbours, as it could if Python ran it."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _imported(path: Path) -> ModuleType:
    """The module, under a name of its own, so that it hides no other."""
    spec = importlib.util.spec_from_file_location(f"_autoshard_target_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Misuse(f"{path} could not be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    loader = spec.loader
    _attempt(lambda: loader.exec_module(module), f"{path} could not be imported")
    return module


def _attempt(run: Callable[[], Any], what: str) -> Any:
    """Runs the user's code; whatever it raises becomes one line."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        place = _last_line(error)
        raise Misuse(f"{what}: {type(error).__name__}{f': {said}' if said else ''}{place}") from error


def _last_line(error: BaseException) -> str:
    """Where in the user's code it happened: the innermost frame that is not Python's or ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _factory(module: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        near = get_close_matches(name, own, n=1) or [
            key for key in own if vars(module)[key].__module__ == module.__name__
        ]
        hint = f" Did you mean {near[0]}?" if len(near) == 1 else f" It has {', '.join(near)}." if near else ""
        raise Misuse(f"{path} has no {name}.{hint}")
    found = getattr(module, name)
    if not callable(found):
        raise Misuse(f"{name} in {path} is {type(found).__name__}, which cannot be called.")
    return found


def _check_keywords(found: Callable[..., Any], name: str, keywords: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise Misuse(f"{name} takes {', '.join(signature.parameters) or 'no sizes'}: {error}.") from error
