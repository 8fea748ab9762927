"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import autoshard
from autoshard import load
from autoshard.auditing.bounds import SLOWER
from costmodels.machine.chips import catalogue
from costmodels.machine.conventions import Pricing
from tests.support.auditing.made_up import timed
from tests.support.cli import refused, run
from tests.support.paths import PALM, ROOT, TINY


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert run("search", PALM, "-t", "cpu:2x2x2", *TINY, "-o", path).exit_code == 0
    return path


# --- search and explain


def test_search_explains_and_writes_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = run("search", PALM, "--topology", "cpu:2x4", *TINY, "-o", path)
    assert found.exit_code == 0
    assert found.stdout.startswith("palm-tiny-decode on cpu:2x4\n") and "Matmuls" in found.stdout
    assert f"Wrote {path}." in found.stderr
    assert load(path).topology.name == "cpu:2x4"


def test_conventions_of_pricing_are_printed_and_saved(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = run("search", PALM, "-t", "v4:2x2x1", *TINY, "--bandwidth", "total", "--overlap", "0.5", "-o", path)
    assert "total bandwidth (all links of a chip); 50.0 % hidden behind computation" in found.stdout
    assert load(path).topology.pricing == Pricing("total", 0.5)


def test_conventions_that_there_are_not() -> None:
    said = refused("search", PALM, "-t", "v4:2x2x1", *TINY, "--bandwidth", "all")
    assert said == "bandwidth must be 'per-axis' or 'total', got 'all'."
    said = refused("search", PALM, "-t", "v4:2x2x1", *TINY, "--overlap", "1.5")
    assert said == 'overlap must be a number from 0 to less than 1, "looped" or "async", got 1.5.'


def test_json_is_alone_on_standard_output(plan_file: Path) -> None:
    found = run("search", PALM, "-t", "cpu:2x2x2", *TINY, "--json")
    printed, written = json.loads(found.stdout), json.loads(plan_file.read_text())
    assert printed["autoshard_plan"] == 1
    for clock in ("wall_seconds", "presolve_seconds", "solver_seconds"):
        printed["proof"][clock] = written["proof"][clock] = 0
    assert printed == written


def test_verbose_says_what_the_search_does() -> None:
    found = run("search", PALM, "-t", "cpu:2", *TINY, "--json", "--verbose")
    assert json.loads(found.stdout) and " nodes, " in found.stderr


def test_a_file_is_not_overwritten_unasked(plan_file: Path) -> None:
    before = plan_file.read_text()
    said = refused("search", PALM, "-t", "cpu:2", *TINY, "-o", plan_file)
    assert said == f"{plan_file} exists; --force overwrites it."
    assert plan_file.read_text() == before


def test_force_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    assert run("search", PALM, "-t", "cpu:2", *TINY, "-o", path, "--force").exit_code == 0
    assert load(path).topology.name == "cpu:2"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    assert refused("search", PALM, "-t", "cpu:2", *TINY, "-o", tmp_path) == (
        f"The output must be a file, got the directory {tmp_path}."
    )
    away = tmp_path / "nowhere" / "plan.json"
    assert (
        refused("search", PALM, "-t", "cpu:2", *TINY, "-o", away)
        == f"{away.parent} is not a directory; create it first."
    )


def test_explain_prints_what_search_printed(plan_file: Path) -> None:
    found = run("explain", plan_file)
    assert found.exit_code == 0 and found.stdout == load(plan_file).explain()
    assert "sends less than" in run("explain", plan_file, "--symbolic").stdout


# --- audit


def test_audit_as_tables_and_as_json(plan_file: Path) -> None:
    found = run("audit", plan_file, PALM, *TINY)
    assert found.exit_code == 0
    assert found.stdout.startswith("palm-tiny-decode on cpu:2x2x2, compiled for host devices: as planned\n")
    data = json.loads(run("audit", plan_file, PALM, *TINY, "--json").stdout)
    assert data["ok"] is True and data["target"] == "host"


@pytest.mark.parametrize(("planned_seconds", "exit_code"), [(0.99e-3 / SLOWER, 1), (1.01e-3 / SLOWER, 0)])
def test_a_program_that_is_much_slower_than_planned_is_an_answer_that_is_no(
    plan_file: Path, monkeypatch: pytest.MonkeyPatch, planned_seconds: float, exit_code: int
) -> None:
    """The layout is as planned, and a step takes a millisecond: exit status, text and JSON say so, and name the cause."""
    monkeypatch.setattr("autoshard.auditing.audit.audit", lambda *_, **__: timed(planned_seconds))
    said = run("audit", plan_file, PALM, *TINY)
    assert said.exit_code == exit_code and "as planned" in said.stdout and "NOT as planned" not in said.stdout
    told = said.stdout.count("times the planned")
    assert told == (2 if exit_code else 0), "in the verdict and beside the cause"
    assert ("1.00 ms of transpose at model.py:7" in " ".join(said.stdout.split())) == bool(exit_code)
    written = run("audit", plan_file, PALM, *TINY, "--json")
    data = json.loads(written.stdout)
    assert (written.exit_code, data["ok"], data["slow"]) == (exit_code, True, bool(exit_code))


@pytest.mark.long
def test_carry_compares_the_ways_and_stores_them_in_the_plan(plan_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "plan.json"
    own.write_bytes(plan_file.read_bytes())
    patch = tmp_path / "constraints.patch"
    found = run("carry", own, PALM, *TINY, "--most", "1", "--patch", patch, "--save")
    carriage = load(own).carriage
    assert carriage is not None and found.exit_code == (0 if carriage.within else 1)
    assert found.stdout.startswith("palm-tiny-decode on cpu:2x2x2, compiled for host devices")
    assert f"The fastest way: {carriage.fastest}, the default of plan.jit." in found.stdout
    assert patch.read_text() == "" and f"Wrote {own}." in found.stderr
    audited = json.loads(run("audit", own, PALM, *TINY, "--carry", "specs", "--json").stdout)
    assert audited["carry"] == "specs"


def test_audit_of_another_function(plan_file: Path) -> None:
    found = run("audit", plan_file, PALM, "--set", "size=tiny", "--set", "batch=4", "--set", "context=16")
    assert found.exit_code == 1 and found.stdout == ""
    assert "The plan 'palm-tiny-decode' is for other arguments" in found.stderr
    assert "tokens is int32[4], planned int32[8]" in found.stderr


@pytest.mark.long
def test_audit_makes_as_many_host_devices_as_the_plan_needs(tmp_path: Path) -> None:
    """Even for a file that starts JAX, where the environment asks for no devices."""
    (tmp_path / "starts.py").write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "import jax, jax.numpy as jnp\n"
        "from autoshard import Workload\n"
        "one = jnp.ones(())\n"
        "def make():\n"
        "    return Workload(lambda x: x + one, (jax.ShapeDtypeStruct((8, 8), jnp.float32),))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", "from autoshard.cli import main; main()"]
    search = [*command, "search", "starts.py:make", "-t", "cpu:2x3", "-o", "plan.json"]
    audit = [*command, "audit", "plan.json", "starts.py:make", "--json"]
    for each in (search, audit):
        found = subprocess.run(each, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["topology"] == "cpu:2x3"


# --- chips


def test_the_catalogue() -> None:
    lines = run("chips").stdout.splitlines()
    assert lines[0].split() == "chip TFLOP/s GiB HBM GB/s interconnect its numbers are".split()
    assert [line.split()[0] for line in lines[2:-2]] == list(catalogue())
    assert "275" in lines[2] and "3D torus, 45 GB/s a link" in lines[2] and "published" in lines[2]
    assert max(map(len, lines)) <= 120


def test_one_chip_with_sources() -> None:
    found = run("chips", "v4").stdout
    row = next(line for line in found.splitlines() if line.startswith("hbm_bytes_per_second"))
    assert row.split(maxsplit=3) == ["hbm_bytes_per_second", "1.2e+12", "published", "Cloud TPU docs, v4"]
    assert json.loads(run("chips", "v4", "--json").stdout)[0]["name"] == "v4"


def test_no_such_chip() -> None:
    assert refused("chips", "v44").startswith("There is no chip 'v44' in the catalogue. Did you mean v4?")


# --- target files and settings that make no sense


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "target.py"
    path.write_text(text)
    return path


def search(target: str, *more: str, code: int = 2) -> str:
    return refused("search", target, "-t", "cpu:2", *more, code=code)


def test_targets_that_are_none(tmp_path: Path) -> None:
    assert search("palm.py") == "The target must be FILE.py:NAME, such as examples/palm.py:decode, got palm.py."
    assert search(f"{tmp_path / 'gone.py'}:make") == f"There is no file {tmp_path / 'gone.py'}."
    other = tmp_path / "notes.txt"
    other.write_text("")
    assert search(f"{other}:make") == f"The target must be a .py file, got {other}."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found' (target.py:1)"),
        ("x = 1\nraise SystemExit(3)", "SystemExit: 3 (target.py:2)"),
        ("def broken(:", "SyntaxError: invalid syntax (target.py, line 1)"),
    ],
)
def test_files_that_do_not_import(text: str, said: str, tmp_path: Path) -> None:
    path = file(tmp_path, text)
    assert search(f"{path}:make") == f"{path} could not be imported: {said}"


def test_names_that_will_not_do(tmp_path: Path) -> None:
    path = file(tmp_path, "sizes = 3\ndef make(batch=1): return batch\ndef fail(): raise ValueError('not\\ntoday')\n")
    assert search(f"{path}:mak") == f"{path} has no mak. Did you mean make?"
    assert search(f"{path}:zzz") == f"{path} has no zzz. It has make, fail."
    assert search(f"{path}:sizes") == f"sizes in {path} must be a function, got int."
    assert search(f"{path}:make") == f"make in {path} must return an autoshard.Workload(fn, args), got int."
    assert search(f"{path}:fail") == f"fail in {path} failed: ValueError: not today (target.py:3)"
    assert search(f"{path}:make", "--set", "bacth=2") == (
        "make takes batch: got an unexpected keyword argument 'bacth'."
    )
    assert search(f"{path}:make", "--set", "batch") == "--set must be KEY=VALUE, such as batch=64, got batch."


def test_values_are_numbers_truths_or_text(tmp_path: Path) -> None:
    path = file(tmp_path, "def make(**given): raise ValueError(given)")
    settings = [part for pair in ("a=1", "b=2.5", "c=true", "d=int8", "e=x=y") for part in ("--set", pair)]
    said = "ValueError: {'a': 1, 'b': 2.5, 'c': True, 'd': 'int8', 'e': 'x=y'}"
    assert said in search(f"{path}:make", *settings)


def test_a_target_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "sizes_beside.py").write_text("ROWS = 8\n")
    path = file(
        tmp_path,
        "import jax\nimport jax.numpy as jnp\nfrom autoshard import Workload\nfrom sizes_beside import ROWS\n"
        "def make():\n    return Workload(lambda x: x + 1, (jax.ShapeDtypeStruct((ROWS,), jnp.float32),), name='beside')\n",
    )
    before = list(sys.path)
    found = run("search", f"{path}:make", "-t", "cpu:2")
    assert found.exit_code == 0 and found.stdout.startswith("beside on cpu:2\n")
    assert sys.path == before


# --- answers that are no


def test_topologies_that_are_none() -> None:
    said = refused("search", PALM, "-t", "v4:4x4x4x4", *TINY)
    assert said.startswith("v4:4x4x4x4 has 4 sizes, but the torus of v4 has 3 axes")


def test_plans_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    assert refused("explain", path, code=1).startswith(f"{path} is not valid JSON, or is truncated")
    assert run("explain", tmp_path / "gone.json").exit_code == 2


def test_what_does_not_fit() -> None:
    found = run("search", PALM, "-t", "v5e:2x2", "--set", "layers=20")
    assert found.exit_code == 1 and found.stdout == "" and "Traceback" not in found.stderr


def test_verbose_errors_have_a_traceback() -> None:
    found = run("search", PALM, "-t", "v4:4x4x4x4", *TINY, "--verbose")
    assert found.exit_code == 2 and "Traceback" in found.stderr and "TopologyError" in found.stderr


def test_a_command_without_arguments_shows_help() -> None:
    assert "Usage" in run().output


def test_the_command_is_also_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["autoshard", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("autoshard", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("autoshard ")


# --- what scripts and terminals rely on

USAGE = {
    "no such topology": ("search", PALM, "-t", "v5e4x4"),
    "no such chip": ("search", PALM, "-t", "v9:4x4"),
    "no such argument": ("search", PALM, "-t", "cpu:2", *TINY, "--pin", "weights.*=x"),
    "no such axis": ("search", PALM, "-t", "cpu:2", *TINY, "--pin", "params.*=None,q"),
    "no such layout": ("why-not", "PLAN", "Megatron 2D"),
    "no such picture": ("report", "PLAN", "-o", "OUT/plan.xyz"),
    "no such dimension": ("search", PALM, "-t", "cpu:2", *TINY, "--set", "batch=abc"),
    "no such format": ("export", "PLAN", "-f", "xml"),
}


@pytest.mark.parametrize("command", USAGE.values(), ids=USAGE)
def test_what_has_to_be_written_differently_exits_with_2(
    command: tuple[str, ...], plan_file: Path, tmp_path: Path
) -> None:
    given = [each.replace("PLAN", str(plan_file)).replace("OUT", str(tmp_path)) for each in command]
    refused(*given, code=2)


def test_json_also_says_why_nothing_fits() -> None:
    found = run("search", PALM, "-t", "v5e:2x2", "--set", "layers=20", "--json")
    said = json.loads(found.stdout)
    assert found.exit_code == 1 and (said["error"], said["exit_code"]) == ("InfeasibleError", 1)
    assert said["message"] in found.stderr
    wrong = run("chips", "v9", "--json")
    assert (wrong.exit_code, json.loads(wrong.stdout)["exit_code"]) == (2, 2)


def test_explain_as_json_is_the_plan(plan_file: Path) -> None:
    assert json.loads(run("explain", plan_file, "--json").stdout) == json.loads(plan_file.read_text())


@pytest.mark.parametrize(
    "command", (("explain", "PLAN"), ("explain", "PLAN", "--regimes"), ("chips",), ("chips", "v4")), ids=" ".join
)
def test_tables_fit_80_columns(command: tuple[str, ...], plan_file: Path) -> None:
    found = run(*(each.replace("PLAN", str(plan_file)) for each in command), "--width", "80")
    assert found.exit_code == 0 and max(map(len, found.stdout.splitlines())) <= 80


def test_help_version_and_completion() -> None:
    assert "Usage" in run("-h").output and "Usage" in run("search", "-h").output
    assert run("--version").stdout == f"autoshard {autoshard.__version__}\n"
    assert "--install-completion" in run("--help").output


def test_help_needs_no_jax() -> None:
    """It takes half a second of a processor; JAX alone takes one."""
    code = "import sys, autoshard.cli; sys.exit(any(m in sys.modules for m in ('jax', 'ortools', 'sympy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_plan_is_a_line_in_a_prompt(plan_file: Path) -> None:
    shown = repr(autoshard.load(plan_file))
    assert shown.startswith("<Plan ") and "a step (OPTIMAL" in shown and "\n" not in shown and len(shown) < 240
