"""Sweeps that are killed, workers that die, disks that are full; and engines that must all find the same."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from autoshard.sweep import engines
from autoshard.sweep.analysis.rows import Row, sweep_result
from autoshard.sweep.extras import MissingExtra, require
from autoshard.sweep.points import points
from autoshard.sweep.results import FAILED, SOLVED, Result
from autoshard.sweep.runner import Sweep
from autoshard.sweep.store import Store, StoreError
from tests.support.paths import ROOT
from tests.support.scripts.jobs import JOB, job, written

COMMAND = [sys.executable, "-c", "from autoshard.cli import main; main()", "sweep"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
Cluster = Callable[[], AbstractContextManager[engines.Engine]]
PATIENCE = 300  # seconds that workers have to end; a guard against waiting for ever
MORE = JOB.replace("batch = [8, 64]", "batch = [8, 16, 32, 64, 128, 256]")


def stored(path: Path) -> dict[str, Result | None]:
    """Everything that is kept, by key; times are not compared."""
    with Store(path) as store:
        return {key: store.get(key) for key in store.keys()}  # noqa: SIM118


def swept(folder: Path, engine: engines.Engine, text: str = JOB) -> tuple[Row, ...]:
    asked = job(folder, text)
    every = list(points(asked))
    with Store(folder / "store") as store:
        return sweep_result(asked, list(Sweep(every, store, engine)), every).rows


# --- The store


def test_results_are_never_changed_or_removed(tmp_path: Path):
    with Store(tmp_path / "store") as store:
        store.add("a", "first", Result(SOLVED, status="OPTIMAL"))
        store.add("a", "again", Result(SOLVED, status="FEASIBLE"))
        assert store.get("a") == Result(SOLVED, status="OPTIMAL")
        for statement in ("DELETE FROM results", "UPDATE results SET point = ''"):
            with pytest.raises(sqlite3.IntegrityError, match=r"results (never|are never)"):
                store.database.execute(statement)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "store").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreError, match="cannot be used as a store"):
        Store(tmp_path / "store")


def test_two_jobs_may_write_to_one_store(tmp_path: Path):
    with Store(tmp_path / "store") as one, Store(tmp_path / "store") as two:
        one.add("a", "", Result(SOLVED))
        two.add("b", "", Result(SOLVED))
        assert one.keys() == two.keys() == ["a", "b"]


# --- Kills


@pytest.mark.long
def test_killed_twice_and_resumed_nothing_is_lost_or_repeated(tmp_path: Path):
    """Each time at a random moment of the sweep itself; the store in the end is that of an undisturbed run."""
    path = written(tmp_path, MORE)
    generator, kills = random.Random(0), 0
    store = tmp_path / "out" / "points.sqlite"
    while kills < 2:
        began = attempts(store)
        command = [*COMMAND, str(path), "-o", str(tmp_path / "out"), "--workers", "0"]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        goal = began + generator.randint(1, 3)
        while attempts(store) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    finished = subprocess.run([*COMMAND, str(path), "-o", str(tmp_path / "out"), "--workers", "0"], env=ENVIRONMENT)
    assert finished.returncode == 0
    (tmp_path / "calm").mkdir()
    swept(tmp_path / "calm", engines.run_here, MORE)
    assert stored(store) == stored(tmp_path / "calm" / "store")
    with Store(store) as found:
        tries = Counter(key for key, _ in found.attempts())
        assert tries.keys() == set(found.keys())
        assert sum(tries.values()) <= len(tries) + kills  # one point was in flight at each kill
        for key, session, begun_at in found.database.execute("SELECT key, session, begun_at FROM attempts"):
            ((made_by, made_at),) = found.database.execute("SELECT session, made_at FROM results WHERE key = ?", (key,))
            assert session == made_by or begun_at < made_at  # none was begun again once it was there


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the children of a process are read from /proc")
def test_a_sweep_that_is_killed_leaves_no_workers_behind(tmp_path: Path):
    command = [*COMMAND, str(written(tmp_path, MORE)), "-o", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while attempts(tmp_path / "out" / "points.sqlite") < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it cannot finish while its children are counted
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    children = {child for thread in threads for child in (thread / "children").read_text().split()}
    process.kill()
    process.wait()
    assert len(children) >= 2
    end = time.monotonic() + PATIENCE
    while left := [child for child in children if running(child)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def running(process: str) -> bool:
    """Whether a process is there and has not ended; nobody may be left to ask for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def attempts(store: Path) -> int:
    if not store.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as database:
            return database.execute("SELECT count(*) FROM attempts").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        if "database" in locals():
            database.close()


# --- Workers


def troubled(tmp_path: Path, trouble: str) -> str:
    """The job with one point more, on which workers die."""
    sign = tmp_path / "sign"
    sign.write_text(str(os.getpid()))
    text = JOB.replace('weights = ["bfloat16", "float32"]', f'weights = "float32"\ntrouble = ["", "{trouble}"]')
    arguments = f'dtype = {{ of = "weights" }}, trouble = {{ of = "trouble" }}, sign = "{sign}"'
    text = text.replace('kinds = "v5e"\ncounts = [4]', 'topologies = "v5e:2x2"').replace("batch = [8, 64]", "batch = 8")
    return text.replace('dtype = { of = "weights" }', arguments).replace("width = [256, 1024]", "width = 256")


def deadly(tmp_path: Path) -> str:
    """Of two widths the larger kills every worker that takes it."""
    text = troubled(tmp_path, "die").replace('trouble = ["", "die"]', 'trouble = "die"')
    return text.replace("width = 256", "width = [256, 512]")


@pytest.mark.long
def test_a_worker_that_dies_costs_its_own_points_only(tmp_path: Path):
    found = swept(tmp_path, engines.processes(2), deadly(tmp_path))
    assert {(row.knobs["width"], row.outcome) for row in found} == {(256, SOLVED), (512, FAILED)}
    assert {row.why for row in found if row.outcome == FAILED} == {
        "The worker died: its process died, twice. The usual cause is a lack of memory; try fewer workers."
    }


@pytest.mark.long
def test_a_worker_that_died_once_has_its_point_solved_by_another(tmp_path: Path):
    text = troubled(tmp_path, "die once").replace('trouble = ["", "die once"]', 'trouble = "die once"')
    text = text.replace("width = 256", "width = 512")
    found = swept(tmp_path, engines.processes(2), text)
    assert {row.outcome for row in found} == {SOLVED}
    assert (tmp_path / "sign.died").exists()


def test_an_error_in_the_target_is_the_points_own(tmp_path: Path):
    found = swept(tmp_path, engines.run_here, troubled(tmp_path, "raise"))
    assert {(row.knobs["trouble"], row.outcome) for row in found} == {("", SOLVED), ("raise", FAILED)}


# --- Disks


def test_a_full_disk_is_said_and_the_rest_goes_on(tmp_path: Path):
    asked, said = job(tmp_path), []
    every = list(points(asked))
    with Store(tmp_path / "store", most_pages=16) as store:
        run = Sweep(every, store, say=said.append)
        done = list(run)
    assert [each.result.outcome for each in done] == [SOLVED] * len(every)
    assert 0 < len(run.unkept) <= len(every)
    assert len(said) == 1
    assert "cannot be written: database or disk is full" in said[0]
    with Store(tmp_path / "store") as store:  # there is room again: only what is missing is solved
        again = Sweep(every, store)
        list(again)
    assert again.solved == len(run.unkept)


@pytest.mark.long
def test_the_command_says_that_a_result_could_not_be_kept(tmp_path: Path):
    """A limit on the size of files stands for a disk that fills up."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)); "
    command = [
        sys.executable,
        "-c",
        limited + COMMAND[2],
        *COMMAND[3:],
        str(written(tmp_path)),
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, "--workers", "0"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "16 with a plan" in done.stdout
    assert "results could not be stored" in done.stderr
    assert "Traceback" not in done.stderr


# --- Engines


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, ...]:
    return swept(tmp_path_factory.mktemp("alone"), engines.run_here)


@pytest.mark.long
def test_one_and_two_processes_find_the_same(tmp_path: Path, alone: tuple[Row, ...]):
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        assert swept(tmp_path / str(workers), engines.processes(workers)) == alone


@contextmanager
def on_dask() -> Iterator[engines.Engine]:
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(**options, env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}) as cluster,
    ):
        yield engines.dask(cluster.scheduler_address)


@contextmanager
def on_ray() -> Iterator[engines.Engine]:
    ray = pytest.importorskip("ray")
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        yield engines.ray()
    finally:
        ray.shutdown()


CLUSTERS = pytest.mark.parametrize("cluster", [on_dask, on_ray], ids=["dask", "ray"])


@pytest.mark.long
@CLUSTERS
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_finds_the_same(tmp_path: Path, alone: tuple[Row, ...], cluster: Cluster):
    with cluster() as engine:
        assert swept(tmp_path, engine) == alone


@pytest.mark.long
@CLUSTERS
@pytest.mark.filterwarnings("ignore")
def test_a_worker_of_a_cluster_that_dies_costs_its_own_points_only(tmp_path: Path, cluster: Cluster):
    with cluster() as engine:
        found = swept(tmp_path, engine, deadly(tmp_path))
    assert {(row.knobs["width"], row.outcome) for row in found} == {(256, SOLVED), (512, FAILED)}
    assert all("worker died" in row.why for row in found if row.outcome == FAILED)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r'pip install "autoshard\[dask\]"'):
        require("distributed")
