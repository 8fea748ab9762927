"""One of several processes: `python -m tests.support.scripts.process PORT INDEX CONNECT HEARTBEAT CASE [...]`.

`test_processes.py` starts them. Each has four host devices. What a case prints last is a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax

DEVICES, PROCESSES = 4, 2


def step(params: Any, x: Any) -> Any:
    import jax.numpy as jnp

    hidden = jnp.tanh(x @ params["up"]) @ params["down"]
    return {"hidden": x + hidden, "largest": hidden.max(axis=0)}


def arguments() -> tuple[Any, ...]:
    import numpy as np

    draw = np.random.default_rng(0).standard_normal
    params = {"up": draw((8, 16), np.float32), "down": draw((16, 8), np.float32)}
    return params, draw((8, 8), np.float32)


def whole(tree: Any) -> Any:
    """Every array gathered, as nested lists."""
    from jax.experimental.multihost_utils import process_allgather

    return jax.tree.map(lambda array: process_allgather(array, tiled=True).tolist(), tree)


def plan_file(path: str) -> Any:
    """Runs a plan from a file on arrays that are made piece by piece."""
    import autoshard

    plan = autoshard.load(path)
    mesh = plan.make_mesh()
    ins, _ = plan.shardings(mesh)
    args = jax.tree.map(lambda a, s: jax.make_array_from_callback(a.shape, s, lambda at: a[at]), arguments(), ins)
    assert not args[0]["up"].is_fully_addressable
    here = {device.process_index for device in mesh.devices.flat}
    return {
        "processes": sorted(here),
        "result": whole(plan.jit(step, mesh)(*args)),
        "applied": whole(plan.apply(step)(*args)),
    }


def checkpoint(path: str, saved: str) -> Any:
    """Restores a checkpoint into the planned layout, and runs."""
    import orbax.checkpoint as orbax  # pyright: ignore[reportMissingImports]

    import autoshard

    plan = autoshard.load(path)
    mesh = plan.make_mesh()
    with orbax.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(Path(saved), plan.abstract_args(mesh, argument="params"))
    ins, _ = plan.shardings(mesh)
    assert jax.tree.map(lambda array: array.sharding, params) == ins[0]
    return {"result": whole(plan.jit(step, mesh)(params, jax.device_put(arguments()[1], ins[1])))}


def decorated(cache: str, topology: str = "cpu:2x4") -> Any:
    """Plans by the decorator; each process has a cache of its own, and searches are counted."""
    import autoshard
    from autoshard import decorator

    searches, planned = [], decorator.plan_and_tune
    decorator.plan_and_tune = lambda *rest: searches.append(1) or planned(*rest)
    sharded = autoshard.autoshard(step, topology=topology, cache_dir=Path(cache, str(jax.process_index())))
    result = sharded(*arguments())
    plan = sharded.plan_for(*arguments())
    return {"searches": len(searches), "specs": str((plan.in_specs, plan.out_specs)), "result": whole(result)}


def refused() -> Any:
    """What the decorator says where it cannot plan, or not the same everywhere."""
    import autoshard

    params, x = arguments()
    fewer = x[: 4 if jax.process_index() == 1 else 8]
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "other arguments": (fewer, {"topology": "cpu:2x4"}),
        "no memory": (x, {"topology": "cpu:2x4", "reserve_bytes": 1e15}),
        "part of the devices": (x, {"topology": "cpu:2x2"}),
        "more devices": (x, {"topology": "cpu:4x4"}),
    }
    said = {}
    for case, (tokens, options) in cases.items():
        try:
            autoshard.autoshard(step, cache_dir=os.devnull, **options)(params, tokens)
        except autoshard.AutoshardError as error:
            said[case] = type(error).__name__, str(error)
    return said


def lost() -> Any:
    """The second process dies before the first call."""
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    return decorated("unused")


def _said(found: Any) -> int:
    print(json.dumps(found), flush=True)
    return 0


CASES = {each.__name__: each for each in (plan_file, checkpoint, decorated, refused, lost)}


def main(port: str, index: str, connect: str, heartbeat: str, case: str, *rest: str) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        PROCESSES,
        int(index),
        initialization_timeout=int(connect),
        heartbeat_timeout_seconds=int(heartbeat),
    )
    _said(CASES[case](*rest))


if __name__ == "__main__":
    main(*sys.argv[1:])
