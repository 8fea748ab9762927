"""Plans that one version of JAX writes and another reads: `python -m tests.support.scripts.versions write|check DIRECTORY`.

`write` plans every case into the directory, `check` binds each plan in it to its function again, audits the compiled program
on host devices and runs it. Both print a line of JSON. `tests/data` holds what `write` wrote under two versions of JAX; it
is to be written anew, under both, by whoever changes what programs cost or how they are traced.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}

import jax
import numpy as np

import autoshard
from examples import llama, palm
from tests.support.plans import assert_close, drawn, well_linked

Case = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]


def palm_prefill() -> Case:
    work = palm.prefill(size="tiny", batch=2, length=16)
    return work.fn, (drawn(work.args[0]), np.arange(32, dtype=np.int32).reshape(2, 16)), work.donate_argnums


def palm_decode() -> Case:
    work = palm.decode(size="tiny", batch=8, context=16)
    return work.fn, _drawn(work.args), work.donate_argnums


def llama_unrolled() -> Case:
    work = llama.decode(size="tiny", batch=8, context=16, unrolled=True)
    return work.fn, _drawn(work.args), work.donate_argnums


def _drawn(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parameters and cache at random; tokens and position."""
    return (*drawn(args[:2]), np.arange(8, dtype=np.int32), np.int32(5))


CASES = {each.__name__: each for each in (palm_prefill, palm_decode, llama_unrolled)}


def planned(name: str) -> autoshard.Plan:
    """The plan of a case; its search takes no time that files would tell apart."""
    fn, args, donate = CASES[name]()
    found = autoshard.search(fn, *args, topology=well_linked("cpu:2x4"), donate_argnums=donate, name=name)
    return replace(found, proof=replace(found.proof, wall_seconds=0.0, presolve_seconds=0.0, solver_seconds=0.0))


def write(directory: Path) -> dict[str, str]:
    """Plans every case into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        planned(name).save(directory / f"{name}.json")
    return dict.fromkeys(CASES, jax.__version__)


def check(file: Path) -> dict[str, Any]:
    """Loads a plan, audits its program and runs it; says by which JAX it was written."""
    plan = autoshard.load(file)
    fn, args, _ = CASES[file.stem]()
    audit = autoshard.audit(plan, fn, *args, target="host")
    assert audit.ok, str(audit)
    wanted = jax.jit(fn)(*args)
    ins, _ = plan.shardings(plan.make_mesh())
    assert_close(plan.jit(fn)(*jax.device_put(jax.tree.map(np.asarray, args), ins)), wanted, rtol=0.02)
    return {"written": plan.jax_version, "checked": jax.__version__, "collectives": len(plan.estimate.collectives)}


if __name__ == "__main__":
    where = Path(sys.argv[2])
    files = sorted(where.glob("*.json"))
    print(json.dumps(write(where) if sys.argv[1] == "write" else {each.stem: check(each) for each in files}))
