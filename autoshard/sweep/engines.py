"""Engines that solve points: this process, processes of this machine, a Dask cluster, a Ray cluster.

An engine is a generator: it takes tasks when it has room and yields each with its outcome. A worker's death is the outcome
`WorkerDied` of its task; the other tasks continue.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from threading import Thread
from time import sleep
from typing import Any, Protocol

from autoshard.sweep.extras import require

Outcome = Any
"""The result of a task, or its exception."""


class Task(Protocol):
    """A callable for a worker; it must pickle."""

    def __call__(self) -> Any: ...


class WorkerDied(Exception):
    """A worker ended while it worked on a task."""


Engine = Callable[[Iterable[Any]], Iterator[tuple[Any, Outcome]]]


def run_here(tasks: Iterable[Any]) -> Iterator[tuple[Any, Outcome]]:
    """Runs the tasks serially in this process."""
    for task in tasks:
        yield task, _attempt(task)


def _attempt(task: Any) -> Outcome:
    try:
        return task()
    except Exception as error:
        return error


# --- Processes of this machine

_AHEAD = 1
"""The number of queued tasks while all processes work, so that none idles."""


def processes(workers: int) -> Engine:
    """That many processes of this machine (joblib's loky)."""
    require("joblib")

    def run(tasks: Iterable[Any]) -> Iterator[tuple[Any, Outcome]]:
        waiting = iter(tasks)
        broken: list[Any] = []
        while True:
            yield from _until_broken(waiting, workers, broken)
            if not broken:
                return
            # The task that killed its worker is unknown, so each runs alone, in a process of its own.
            for task in broken:
                alone: list[Any] = []
                yield from _until_broken(iter([task]), 1, alone)
                if alone:
                    yield task, WorkerDied("its process died, twice")
            broken = []

    return run


def _until_broken(tasks: Iterator[Any], workers: int, broken: list[Any]) -> Iterator[tuple[Any, Outcome]]:
    """Runs tasks until there are none, or a process dies; its running tasks are added to `broken`."""
    from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor  # pyright: ignore

    options = {"initializer": leave_with, "initargs": (os.getpid(),), "env": {"JAX_PLATFORMS": "cpu"}}
    executor: Executor = ProcessPoolExecutor(max_workers=workers, **options)
    running: dict[Future[Any], Any] = {}
    try:
        while not broken or running:
            while not broken and len(running) < workers + _AHEAD and (task := next(tasks, None)) is not None:
                try:
                    running[executor.submit(task)] = task
                except BrokenProcessPool:
                    broken.append(task)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    broken.append(task)
                else:
                    yield task, error if error is not None else future.result()
    finally:
        executor.shutdown(wait=True, kill_workers=True)  # pyright: ignore[reportCallIssue]


_LOOK_SECONDS = 1.0


def leave_with(parent: int) -> None:
    """Ends this process soon after its parent, so that a killed sweep leaves no workers behind."""

    def watch() -> None:
        while os.getppid() == parent:
            sleep(_LOOK_SECONDS)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


# --- Clusters


def dask(address: str) -> Engine:
    """The workers of the Dask cluster whose scheduler listens at an address such as `tcp://10.0.0.1:8786`."""
    require("distributed")

    def run(tasks: Iterable[Any]) -> Iterator[tuple[Any, Outcome]]:
        from distributed import Client, KilledWorker, as_completed  # pyright: ignore[reportMissingImports]

        with Client(address) as client:
            waiting, running = iter(tasks), {}
            finished = as_completed()

            def fill() -> None:
                threads: Any = client.nthreads()
                room = 2 * max(sum(threads.values()), 1)
                while len(running) < room and (task := next(waiting, None)) is not None:
                    future = client.submit(task, pure=False)
                    running[future.key] = task
                    finished.add(future)

            fill()
            for future in finished:
                task, error = running.pop(future.key), future.exception()
                if isinstance(error, KilledWorker):
                    error = WorkerDied(f"its Dask worker died, {error}")
                fill()
                yield task, error if error is not None else future.result()
                fill()

    return run


def ray(address: str = "") -> Engine:
    """The workers of a Ray cluster; without an address, of one that is started on this machine."""
    require("ray")

    def run(tasks: Iterable[Any]) -> Iterator[tuple[Any, Outcome]]:
        import ray as cluster  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError, WorkerCrashedError  # pyright: ignore[reportMissingImports]

        started = not cluster.is_initialized()
        if started:
            cluster.init(address or "local", log_to_driver=False, include_dashboard=False, configure_logging=False)
        try:
            remote = cluster.remote(max_retries=1)(_attempt)
            waiting, running = iter(tasks), {}
            while True:
                room = 2 * int(cluster.cluster_resources().get("CPU", 1))
                while len(running) < room and (task := next(waiting, None)) is not None:
                    running[remote.remote(task)] = task
                if not running:
                    return
                (done, *_), _ = cluster.wait(list(running), num_returns=1)
                task = running.pop(done)
                try:
                    yield task, cluster.get(done)
                except WorkerCrashedError:
                    yield task, WorkerDied("its Ray worker died, twice")
                except RayError as error:
                    yield task, error
        finally:
            if started:
                cluster.shutdown()

    return run


def cores() -> int:
    """The number of processes that this machine can run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
