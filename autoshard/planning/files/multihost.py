"""One plan for all processes of `jax.distributed`.

Processes that run one program must use the same plan. Searches are deterministic, but a search that runs out of time, or
a cache that exists on one host only, could give different plans. So the first process plans, and the others receive its
plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from autoshard import errors
from autoshard.planning.files.plan_file import dumps, loads
from autoshard.planning.records import PlanRecord


def agree_on_plan(name: str, key: str, make: Callable[[], PlanRecord]) -> PlanRecord:
    """The plan that the first process makes, in all processes.

    **Arguments:**

    - `name`: the name of the planned function, for messages.
    - `key`: a hash of everything that the plan depends on; it must be equal in all processes.

    **Raises:** in all processes the error that `make` raised in the first; `PlanMismatchError` if the keys differ.
    """
    if jax.process_count() == 1:
        return make()
    _refuse_others(name, key)
    plan, failure = None, None
    if jax.process_index() == 0:
        try:
            plan = make()
        except Exception as error:  # the other processes must not wait forever
            failure = error
    sent = _broadcast_message(_message(plan, failure))
    if failure is not None:
        raise failure
    if sent["error"] is not None:
        kind, text = sent["error"]
        raise getattr(errors, kind, errors.AutoshardError)(text)
    return plan or loads(sent["plan"], "The plan of process 0")


def _refuse_others(name: str, key: str) -> None:
    """Compares the keys of all processes.

    **Raises:** `PlanMismatchError` in all of them, if one differs.
    """
    from jax.experimental.multihost_utils import process_allgather

    digest = np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint8)
    every = np.asarray(process_allgather(digest))
    others = [str(i) for i, found in enumerate(every) if not np.array_equal(found, every[0])]
    if others:
        raise errors.PlanMismatchError(
            f"{name} must be the same in all processes: process {', '.join(others)} has other arguments or options than process"
            " 0, or another function."
        )


def _message(plan: PlanRecord | None, failure: Exception | None) -> dict[str, Any]:
    error = None
    if failure is not None:
        ours = isinstance(failure, errors.AutoshardError)
        said = str(failure) if ours else f"Process 0 could not plan: {type(failure).__name__}: {failure}"
        error = [type(failure).__name__ if ours else "AutoshardError", said]
    return {"plan": dumps(plan) if plan else None, "error": error}


def _broadcast_message(message: dict[str, Any]) -> dict[str, Any]:
    """The first process's message, in all processes."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    length = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(text))] = text[:length]
    return json.loads(np.asarray(broadcast_one_to_all(padded)).tobytes())
