"""How many points a minute does a sweep solve, with one and two workers, on every engine, and are the results the same?

    python benchmarks/sweep_scaling.py        # one table, and benchmarks/results/sweep_scaling.json

The job is PaLM 8B decode over batches and types. Every engine gets a store of its own and the same points; the clock
starts when each worker has solved two points, so that importing JAX is not in it. `ours` is points a minute; two workers
are to be near twice one (`speedup`). Results are compared bit for bit with those of one process; an engine that is not
installed is a row with that reason.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from autoshard.annotating.attached import topology_of
from autoshard.sweep import engines
from autoshard.sweep.extras import MissingExtra, require
from autoshard.sweep.points import Point, Run
from autoshard.sweep.runner import Sweep
from autoshard.sweep.store import Store

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sweep_scaling.json"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def point(batch: int, weights: str) -> Point:
    sizes: tuple[tuple[str, Any], ...] = (("size", "8b"), ("batch", batch), ("context", 2080), ("weights", weights))
    run = Run("decode", "decode", f"{ROOT}/examples/palm.py:decode", sizes, batch)
    return Point((run,), topology_of("v4:2x2x2"), sizes)


def points(count: int) -> list[Point]:
    """The given number of points, all different."""
    batches = [8 * (i + 1) for i in range(count // 2)]
    return [point(batch, weights) for batch in batches for weights in ("bf16", "int8")]


@contextmanager
def local(workers: int) -> Iterator[engines.Engine]:
    yield engines.processes(workers)


@contextmanager
def on_dask(workers: int) -> Iterator[engines.Engine]:
    require("distributed")
    from distributed import LocalCluster  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options, env=ENVIRONMENT) as started:
        cluster: Any = started
        yield engines.dask(cluster.scheduler_address)


@contextmanager
def on_ray(workers: int) -> Iterator[engines.Engine]:
    require("ray")
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
    try:
        yield engines.ray()
    finally:
        ray.shutdown()


ENGINES: tuple[tuple[str, Callable[[int], AbstractContextManager[engines.Engine]], int], ...] = (
    ("processes, 1 worker", local, 1),
    ("processes, 2 workers", local, 2),
    ("Dask, 2 workers", on_dask, 2),
    ("Ray, 2 workers", on_ray, 2),
)


def measured(engine: engines.Engine, every: list[Point], workers: int) -> tuple[float, dict[str, Any]]:
    """Seconds a point, from when each worker has solved about two, and the results by key."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "points.sqlite")) as store:
        done, started = {}, 0.0
        for count, each in enumerate(Sweep(every, store, engine), 1):
            done[each.key] = each.result.to_dict() | {"wall_seconds": 0.0}
            if count == 2 * workers:
                started = time.monotonic()
        return (time.monotonic() - started) / (len(every) - 2 * workers), done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=48)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for name, start, workers in ENGINES:
        row: dict[str, Any] = {"row": f"points a minute: {name}", "reference": None, "ours": None}
        try:
            with start(workers) as engine:
                seconds, found = measured(engine, points(asked.points), workers)
        except MissingExtra as error:
            rows.append(row | {"why": str(error)})
            continue
        first = first or found
        rows.append(row | {"ours": 60 / seconds, "workers": workers, "same results as one process": found == first})
        rows[-1]["speedup"] = rows[-1]["ours"] / rows[0]["ours"]
    for row in rows:
        row["load when measured"] = os.getloadavg()[0]
        shown = f"{row['ours']:6.1f}  {row['speedup']:.2f} ×" if row["ours"] is not None else row["why"]
        print(f"{row['row']:42s} {shown}  {row.get('same results as one process', '')}")
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
