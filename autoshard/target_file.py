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
    """Invalid usage of a command."""


def workload(target: str, keywords: dict[str, Any]) -> Workload:
    """The workload that the function at `FILE.py:NAME` returns for these keywords.

    **Raises:** `Misuse`, in one line, for a missing file or one that does not import, a missing name or one that is not
    callable, unknown keywords, an error of the function, and a result other than a `Workload`.
    """
    from autoshard.emitting.targets import quiet_without_tpu

    quiet_without_tpu()
    path, name = _split(target)
    with _on_path(path.parent.resolve()):
        make = factory(target, keywords)
        found = _attempt(lambda: make(**keywords), f"{name} in {path} failed")
    if not isinstance(found, Workload):
        raise Misuse(f"{name} in {path} must return an autoshard.Workload(fn, args), got {type(found).__name__}.")
    _check_shapes(found, f"{name} in {path}")
    return found


def _check_shapes(found: Workload, where: str) -> None:
    """Refuses arrays with dimensions of text or of fractions, as from `--set batch=abc`."""
    import jax

    for leaf in jax.tree_util.tree_leaves(found.args):
        shape = getattr(leaf, "shape", ())
        if any(isinstance(n, str | float) for n in shape):
            raise Misuse(f"{where} returns an array of shape {tuple(shape)}: its dimensions must be integers.")


def factory(target: str, keywords: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function at `FILE.py:NAME`, which must take the keywords, if given.

    **Raises:** `Misuse`, as for `workload`.
    """
    path, name = _split(target)
    with _on_path(path.parent.resolve()):
        found = _factory(_import_file(path), path, name)
    if keywords is not None:
        _check_keywords(found, name, keywords)
    return found


def _split(target: str) -> tuple[Path, str]:
    file, _, name = target.rpartition(":")
    if not file or not name.isidentifier():
        raise Misuse(f"The target must be FILE.py:NAME, such as examples/palm.py:decode, got {target}.")
    path = find_target(Path(file))
    if not path.is_file():
        raise Misuse(f"There is no file {path}.")
    if path.suffix != ".py":
        raise Misuse(f"The target must be a .py file, got {path}.")
    return path, name


def find_target(path: Path) -> Path:
    """A file; if there is none, the example of this package with that path, such as examples/palm.py."""
    package = Path(__file__).resolve().parent
    if path.is_file() or path.parts[:1] != ("examples",):
        return path
    return next((home / path for home in (package, package.parent) if (home / path).is_file()), path)


@contextmanager
def _on_path(directory: Path) -> Iterator[None]:
    """Lets a file import its neighbours, as if Python ran it, and its package from the package's parent folder."""
    home = directory
    while (home / "__init__.py").is_file():
        home = home.parent
    added = [str(directory)] if home == directory else [str(directory), str(home)]
    sys.path[:0] = added
    try:
        yield
    finally:
        for each in added:
            sys.path.remove(each)


def _import_file(path: Path) -> ModuleType:
    """Imports a file as a module, under a unique name that hides no other module."""
    spec = importlib.util.spec_from_file_location(f"_autoshard_target_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Misuse(f"{path} could not be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    loader = spec.loader
    _attempt(lambda: loader.exec_module(module), f"{path} could not be imported")
    return module


def _attempt(run: Callable[[], Any], what: str) -> Any:
    """Runs the user's code; its errors become one line."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        place = _last_line(error)
        raise Misuse(f"{what}: {type(error).__name__}{f': {said}' if said else ''}{place}") from error


def _last_line(error: BaseException) -> str:
    """The source line of an error: the innermost frame of the user's code."""
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
        raise Misuse(f"{name} in {path} must be a function, got {type(found).__name__}.")
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
