"""Two processes of `jax.distributed` with four host devices each: one plan, one result, and no waiting for the lost."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import autoshard
from tests.support.paths import ROOT
from tests.support.plans import assert_close, well_linked
from tests.support.scripts import process

PATIENCE = 600
"""Seconds that JAX waits for the other process, and this one for both: a guard against waiting for ever."""

IMPATIENCE = 5


def start(
    indices: tuple[int, ...], *words: object, connect: int = PATIENCE, heartbeat: int = PATIENCE
) -> list[subprocess.Popen[str]]:
    """Starts processes of a group of two, which wait so many seconds for each other to start and to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                process.__name__,
                *map(str, (port, index, connect, heartbeat, *words)),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in indices
    ]


def finished(running: list[subprocess.Popen[str]], timeout: float = PATIENCE) -> list[tuple[int, str, str]]:
    """Return code, output and errors of each; all are ended if one takes too long."""
    try:
        return [(each.wait(timeout), *each.communicate(timeout=timeout)) for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()


def both(*words: object) -> list[Any]:
    """What two processes say, which must both succeed."""
    outcomes = finished(start((0, 1), *words))
    assert [code for code, _, _ in outcomes] == [0, 0], "\n".join(error[-2000:] for _, _, error in outcomes)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in outcomes]


@functools.cache
def plan() -> autoshard.Plan:
    found = autoshard.search(process.step, *process.arguments(), topology=well_linked("cpu:2x4"))
    assert found.estimate.collectives
    return found


def wanted() -> Any:
    return jax.jit(process.step)(*process.arguments())


def array(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree, is_leaf=lambda leaf: isinstance(leaf, list))


@pytest.mark.long
def test_two_processes_run_a_plan_from_a_file(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    for found in both("plan_file", tmp_path / "plan.json"):
        assert found["processes"] == [0, 1]
        assert_close(array(found["result"]), wanted())
        assert_close(array(found["applied"]), wanted())


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("orbax") is None, reason="orbax is not installed (pip install --group test)"
)
def test_two_processes_restore_a_checkpoint_into_the_plan(tmp_path: Path) -> None:
    import orbax.checkpoint as orbax  # pyright: ignore[reportMissingImports]

    plan().save(tmp_path / "plan.json")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", process.arguments()[0])
    for found in both("checkpoint", tmp_path / "plan.json", tmp_path / "saved"):
        assert_close(array(found["result"]), wanted())


@pytest.mark.long
def test_one_process_searches_for_both(tmp_path: Path) -> None:
    """Each has a cache of its own, and only the second has the plan already: the first one's counts all the same."""
    cached = autoshard.autoshard(process.step, topology="cpu:2x4", cache_dir=tmp_path / "1")
    cached.plan_for(*process.arguments())
    first, second = both("decorated", tmp_path)
    assert (first["searches"], second["searches"]) == (1, 0)
    assert first["specs"] == second["specs"]
    for found in (first, second):
        assert_close(array(found["result"]), wanted())
    assert [[file.name for file in (tmp_path / name).iterdir()] for name in "01"] == [[key_of_only(tmp_path / "1")]] * 2


def key_of_only(directory: Path) -> str:
    (file,) = directory.iterdir()
    return file.name


@pytest.mark.long
def test_a_refusal_reaches_both() -> None:
    wanted = {
        "other arguments": (
            "PlanMismatchError",
            "step must be the same in all processes: process 1 has other arguments",
        ),
        "no memory": ("InfeasibleError", "step does not fit on cpu:2x4."),
        "part of the devices": (
            "TopologyError",
            "The plan is for cpu:2x2, 4 chips. The first 4 of 8 host devices belong to 1 of 2 processes; plan for all"
            " devices, or give each process fewer.",
        ),
        "more devices": (
            "TopologyError",
            "The plan is for cpu:4x4, 16 chips. 16 host devices are needed and 2 processes have 8 together. Start each with"
            " JAX_NUM_CPU_DEVICES=8.",
        ),
    }
    for found in both("refused"):
        assert found.keys() == wanted.keys()
        for case, (kind, said) in wanted.items():
            assert found[case][0] == kind and found[case][1].startswith(said)


@pytest.mark.long
def test_a_process_lost_at_start_up_is_an_error() -> None:
    """Of two processes one never starts: the other gives up when its time is over, and says so."""
    ((code, _, error),) = finished(start((0,), "lost", connect=IMPATIENCE))
    assert code != 0 and "DEADLINE_EXCEEDED" in error


@pytest.mark.long
def test_a_process_lost_before_the_search_is_an_error() -> None:
    """One of two is killed once they are connected: the other does not wait for its part for ever."""
    (first, _, error), (second, *_) = finished(start((0, 1), "lost", heartbeat=IMPATIENCE))
    assert second == -signal.SIGKILL and first not in (0, None) and error
