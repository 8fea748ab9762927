"""Processes that are killed, disks that are full or read-only, and plan files that want to do harm."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from autoshard._util import files
from autoshard.errors import PlanMismatchError
from autoshard.plan import loads
from autoshard.planning.files import plan_file
from autoshard.planning.files.plan_cache import load_or_make
from autoshard.planning.files.plan_file import dumps
from tests.support.paths import ROOT
from tests.support.plans import planned_block, small_plan


def script(text: str, *words: object) -> str:
    """Runs a script in a Python of its own, which must succeed; what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- killed

KILLED = """
    import os, random, signal, sys, time
    from dataclasses import replace
    from pathlib import Path
    import autoshard
    from autoshard.planning.files.plan_cache import load_or_make

    file, directory = Path(sys.argv[1]), Path(sys.argv[2])
    first = autoshard.load(file)
    plans = [first, replace(first, name="another")]
    random.seed(0)

    def write(begun):
        os.write(begun, b"!")
        while True:
            for plan in plans:
                plan.save(file)
                (directory / "key.json").unlink(missing_ok=True)
                load_or_make(directory, "key", lambda: plan)

    def left():
        return len(list(directory.parent.rglob("*.tmp")))

    kills = 0
    while kills < 60 or not left():
        waiting, begun = os.pipe()
        child = os.fork()
        if child == 0:
            write(begun)
        os.read(waiting, 1)
        for each in waiting, begun:
            os.close(each)
        time.sleep(random.random() * 0.02)
        kills += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert autoshard.load(file) in plans
        found = directory / "key.json"
        assert not found.exists() or autoshard.load(found) in plans
    plans[1].save(file)
    assert autoshard.load(file) == plans[1] == load_or_make(directory, "other", lambda: plans[1])
    print(left())
"""


@pytest.mark.long
def test_a_writer_may_be_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty are, and more until one was killed while it wrote.

    The files are one plan or the other, the next run succeeds, and what was left goes when it is old.
    """
    file = tmp_path / "plan.json"
    planned_block()[0].save(file)
    left = int(script(KILLED, file, tmp_path / "cache"))
    assert left > 0, "no writer was killed while it wrote"
    monkeypatch.setattr(files, "_STALE_SECONDS", -1.0)
    small_plan().save(file)
    load_or_make(tmp_path / "cache", "new", small_plan)
    assert not list(tmp_path.rglob(".*"))


def test_a_young_temporary_file_is_another_writers(tmp_path: Path) -> None:
    young, old, foreign = (tmp_path / f".plan.json.1.{digit * 32}.tmp" for digit in ("a", "b", "x"))
    for each in (young, old, foreign):
        each.write_text("")
    for each in (old, foreign):
        os.utime(each, (time.time() - 7200, time.time() - 7200))
    small_plan().save(tmp_path / "plan.json")
    assert sorted(tmp_path.iterdir()) == sorted([young, foreign, tmp_path / "plan.json"])


# --- disks


class Full:
    """A file on a disk that is full after some characters."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, text: str) -> None:
        self.file.write(text[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refusing(number: int) -> Any:
    """`open` on a disk that is full, or read-only."""

    def opened(path: Any, *rest: Any, **keywords: Any) -> Any:
        if number == errno.ENOSPC:
            return Full(open(path, *rest, **keywords))
        raise OSError(number, os.strerror(number), str(path))

    return opened


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EROFS), ids=("full", "read-only"))
def test_a_disk_that_cannot_be_written_keeps_what_it_has(tmp_path: Path, monkeypatch, number: int) -> None:
    plan, path = small_plan(), tmp_path / "plan.json"
    path.write_text("as it was")
    monkeypatch.setattr(files, "open", refusing(number), raising=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        plan.save(path)
    with pytest.raises(OSError, match=os.strerror(number)):
        plan.export("rules", path)
    with pytest.warns(UserWarning, match=f"autoshard cannot cache plans in .*{os.strerror(number)}"):
        assert load_or_make(tmp_path, "key", lambda: plan) is plan
    assert path.read_text() == "as it was" and list(tmp_path.iterdir()) == [path]


LIMITED = """
    import os, resource, sys, warnings
    from pathlib import Path
    import autoshard
    from autoshard.planning.files.plan_cache import load_or_make

    plan, directory = autoshard.load(sys.argv[1]), Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        plan.save(sys.argv[1])
    except OSError as error:
        print(type(error).__name__, error.errno)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_or_make(directory, "key", lambda: plan) is plan
    print(len(said), os.listdir(directory))
"""


@pytest.mark.long
def test_a_file_that_the_system_cuts_short_is_not_kept(tmp_path: Path) -> None:
    """The operating system lets no file grow past 4 KiB: a real half-written file, which must not stay."""
    file = tmp_path / "plan.json"
    planned_block()[0].save(file)
    before = file.read_bytes()
    said = script(LIMITED, file, tmp_path / "cache").splitlines()
    assert said == [f"OSError {errno.EFBIG}", "1 []"]
    assert file.read_bytes() == before and sorted(each.name for each in tmp_path.iterdir()) == ["cache", "plan.json"]


TMPFS = """
    import os, sys, warnings
    from pathlib import Path
    import autoshard
    from autoshard.planning.files.plan_cache import load_or_make

    plan, disk = autoshard.load(sys.argv[1]), Path(sys.argv[2])
    for _ in range(2):
        try:
            plan.save(disk / "plan.json")
        except OSError as error:
            print(error.strerror, os.listdir(disk))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert load_or_make(disk, "key", lambda: plan) is plan
        print(len(said), os.listdir(disk))
        os.system(f"mount -o remount,ro {disk}")
"""


@pytest.mark.long
def test_a_small_disk_and_a_read_only_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        planned_block()[0].save(tmp_path / "plan.json")
        said = script(TMPFS, tmp_path / "plan.json", disk).splitlines()
    finally:
        subprocess.run(["umount", disk], check=True)
    assert said == ["No space left on device []", "1 []", "Read-only file system []", "1 []"]


# --- hostile files

HOSTILE = """
    import resource, sys
    import autoshard
    from autoshard.planning.files.plan_file import loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        autoshard.load(sys.argv[1])
    except autoshard.PlanMismatchError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, str(error)[:200])
"""
MANY = 2**21 - 100
"""As many entries as pass the count of values, with two signs each."""


@pytest.mark.parametrize(
    "entry, count, said",
    (
        pytest.param("[],", 20 * 2**20, "values; a plan has at most", marks=pytest.mark.slow),
        pytest.param('{"":0},', 9 * 2**20, "values; a plan has at most", marks=pytest.mark.slow),
        pytest.param('{"":0},', MANY, "is not an autoshard plan", marks=pytest.mark.long),
        pytest.param("[[]],", MANY * 2 // 3, "is not an autoshard plan", marks=pytest.mark.long),
        pytest.param("[", 60 * 2**20, "values; a plan has at most", marks=pytest.mark.slow),
        ('{"a":', 2**20, "is not valid JSON, or is truncated"),
        pytest.param("9", 60 * 2**20, "is not valid JSON, or is truncated", marks=pytest.mark.long),
        pytest.param('"\\u0041', 2**20, "is not valid JSON, or is truncated", marks=pytest.mark.long),
    ),
    ids=("lists", "objects", "fewer objects", "fewer lists", "deep lists", "deep objects", "a number", "text"),
)
def test_a_hostile_file_takes_little_memory(tmp_path: Path, entry: str, count: int, said: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text("[" + entry * count + ("0]" if entry.endswith(",") else ""))
    assert path.stat().st_size < plan_file._MOST_BYTES
    mebibytes, text = script(HOSTILE, path).split(" ", 1)
    assert said in text
    assert int(mebibytes) < 1024


def damaged(plan: autoshard.Plan, *path: Any, value: Any) -> str:
    whole = json.loads(dumps(plan))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(whole)


def test_huge_numbers_are_taken_for_what_they_are() -> None:
    plan = small_plan()
    for path in (("topology", "axes", 0, "size"), ("arguments", 0, "shape", 0), ("operations", 0, "count"), ("kept",)):
        value = [{"value": 10**18, "layout": []}] if path == ("kept",) else 10**18
        found = loads(damaged(plan, *path, value=value))
        assert found.in_specs and found.explain()
    wide = loads(damaged(plan, "topology", "axes", 0, "size", value=10**9))
    with pytest.raises(
        autoshard.TopologyError, match="The number of host devices must be at most 4096, got 2000000000"
    ):
        wide.make_mesh()
    with pytest.raises(PlanMismatchError, match="is not valid JSON, or is truncated: Exceeds the limit"):
        loads('{"autoshard_plan": ' + "9" * 5000 + "}")


def function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]).max(axis=0)


@pytest.mark.parametrize(
    "path, value, said",
    (
        (("operations",), [], r"it has 0 operations, the function \d+"),
        (
            ("operations", 2, "splits"),
            [["x", "y"]],
            r"dot_general .* has factors of \[4, 4, 8\], and splits \[\('x', 'y'\)\]",
        ),
        (("kept",), [{"value": 99, "layout": []}], r"it keeps value 99, and the function has \d+"),
        (("kept",), [{"value": 0, "layout": ["x"]}], r"it keeps value 0, of shape \(8, 4\), as .*"),
    ),
    ids=("no operations", "too few factors", "no such value", "another rank"),
)
def test_a_plan_that_its_function_cannot_have_is_refused(path: Any, value: Any, said: str) -> None:
    plan = loads(damaged(small_plan(), *path, value=value))
    with pytest.raises(PlanMismatchError, match=rf"The plan 'small' is damaged: {said}\. Search again\."):
        plan.apply(function)({"w": jnp.ones((8, 4))}, jnp.ones((4, 8)))


def test_arguments_are_a_tuple() -> None:
    with pytest.raises(PlanMismatchError, match=r'in_tree must be a tuple of arguments, got \{"list": '):
        loads(damaged(small_plan(), "in_tree", value={"list": ["*", "*"]}))


def test_an_export_calls_nothing_that_a_file_names() -> None:
    """Exported source is run by its reader: a class is written into it only if it is a namedtuple of this process."""
    call = {"namedtuple": "os:getenv", "fields": {"key": "*", "default": "*"}}
    plan = loads(damaged(small_plan(), "in_tree", value={"tuple": [call]}))
    with pytest.raises(autoshard.ExportError, match=r"The arguments nest arrays in os\.getenv"):
        plan.export("specs")
    tree = {"tuple": [{"dict": {'"); (': "*", "a\n'b": "*"}}]}
    plan = loads(damaged(loads(damaged(small_plan(), "in_tree", value=tree)), "name", value='"""\\'))
    for format, name in (("specs", "IN_SPECS"), ("rules", "PARTITION_RULES")):
        found: dict[str, Any] = {}
        exec(plan.export(format), found)
        assert found[name]


def test_names_in_a_file_are_never_run(tmp_path: Path) -> None:
    """Whatever text a plan has in place of another, nothing is imported, opened or called by its name."""
    canary = tmp_path / "canary"
    for text in (f"__import__('os').system('touch {canary}')", "os:system", f"{canary}", "../../etc/passwd", "{{7*7}}"):
        for path in (
            ("name",),
            ("arguments", 0, "path"),
            ("operations", 2, "einsum"),
            ("topology", "name"),
        ):
            plan = loads(damaged(small_plan(), *path, value=text))
            plan.explain()
            found: dict[str, Any] = {}
            exec(plan.export("rules"), found)
            exec(plan.export("specs"), found)
            assert found["IN_SPECS"] == plan.in_specs
        with pytest.raises(autoshard.PlanMismatchError):
            loads(damaged(small_plan(), "fingerprint", value=text))
    assert not canary.exists()
