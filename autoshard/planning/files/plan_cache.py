"""A cache of plans on disk: one JSON file per program, topology and search options.

Processes may share the directory. Files are written atomically, and two processes with the same problem write the same
plan.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

import jax
import platformdirs

from autoshard._util.files import write_whole
from autoshard._util.version import version
from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.errors import PlanMismatchError
from autoshard.planning.files.plan_file import dumps, load
from autoshard.planning.options import Options
from autoshard.planning.records import PlanRecord
from costmodels.machine.topology import Topology


def default_directory() -> Path:
    """The default directory for plans: the user's cache directory."""
    return platformdirs.user_cache_path("autoshard", appauthor=False) / "plans"


def key_of(target: AnnotatedFunction, topology: Topology, options: Options) -> str:
    """A hash of everything that a plan depends on: program, paths, constants of the topology, options and versions."""
    everything = [
        (target.fingerprint, target.program.name, target.in_tree.data, target.donate_argnums, target.weak),
        (target.traced.paths, target.traced.result_paths),
        topology.to_dict(),
        (options.strict, options.reserve_bytes, options.time_limit, options.fold, options.memory_bytes),
        (options.baselines, repr(options.pins), sorted((options.dims or {}).items()), options.tune),
        (options.padding, options.repeated),
        (version(), jax.__version__),
    ]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def load_or_make(directory: str | PathLike[str], key: str, make: Callable[[], PlanRecord]) -> PlanRecord:
    """The plan of this key, read from the directory, or made and written to it.

    A file that cannot be read is replaced, with a warning. If the directory cannot be written, a warning is given.
    """
    path = Path(directory) / f"{key}.json"
    found = _read(path)
    if found is not None:
        return found
    plan = make()
    if plan.proof.stopped == "interrupted":
        return plan  # a later run may search longer
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, dumps(plan))
    except OSError as error:
        warnings.warn(f"autoshard cannot cache plans in {directory}: {error}", stacklevel=3)
    return plan


def forget(directory: str | PathLike[str], keys: Iterable[str]) -> None:
    """Removes the plans of these keys from the directory."""
    for key in keys:
        (Path(directory) / f"{key}.json").unlink(missing_ok=True)


def _read(path: Path) -> PlanRecord | None:
    try:
        return load(path)
    except FileNotFoundError:
        return None
    except (PlanMismatchError, OSError) as error:
        warnings.warn(f"autoshard searches again and replaces a cached plan: {error}", stacklevel=4)
        return None
