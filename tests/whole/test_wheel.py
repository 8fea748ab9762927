"""The wheel, in a fresh environment, beside a user's own `search.py` and `costmodels.py`."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest

import autoshard
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

NESTED = {"costmodels": "_costmodels", "search": "_search", "examples": "examples"}


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed, without the repository on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def build(*arguments: object) -> Path:
    """The wheel that `python -m build` makes, as a packager would call it."""
    *options, out = arguments
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, ROOT, cwd=ROOT)
    (wheel,) = Path(str(out)).glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("--wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a virtual environment with the wheel in it, and modules whose names we must not depend on."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    # The dependencies are borrowed from here; a path from a .pth file does not bring its own .pth files (the checkout).
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site_packages, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    for name in NESTED:
        (folder / f"{name}.py").write_text(f"raise AssertionError('imported the {name}.py of the user')")
    return folder


def files_of(package: Path) -> list[Path]:
    return [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_holds_every_file_under_one_package(wheel: Path):
    expected = {
        Path("autoshard", NESTED.get(package, ""), path.relative_to(ROOT / package)).as_posix()
        for package in ("autoshard", *NESTED)
        for path in files_of(ROOT / package)
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if not name.startswith("autoshard-")} == expected
    assert "autoshard/py.typed" in names


def test_imports_no_top_level_search_or_costmodels(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    for name in filter(lambda name: name.endswith(".py"), archive.namelist()):
        for node in ast.walk(ast.parse(archive.read(name))):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {module.split(".")[0] for module in modules} & NESTED.keys(), f"{name}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"(costmodels|search|examples)(\.\w+)+", node.value), f"{name}:{node.lineno}"


def test_differs_from_the_repository_in_imports_only(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    for package, nested in NESTED.items():
        for path in (ROOT / package).rglob("*.py"):
            ours = path.read_text().splitlines()
            theirs = archive.read(f"autoshard/{nested}/{path.relative_to(ROOT / package).as_posix()}").decode()
            for line, other in zip(ours, theirs.splitlines(), strict=True):
                assert line == other or line.lstrip().startswith(tuple(f"from {name}" for name in NESTED))


def test_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    from_source_archive = build(tmp_path)
    assert from_source_archive.read_bytes() == wheel.read_bytes()


def test_imports_beside_a_users_search(user: Path):
    script = "import autoshard, sys; print(autoshard.__file__); assert 'search' not in sys.modules"
    where = run(user / "env/bin/python", "-W", "error", "-c", script, cwd=user)
    assert Path(where.strip()).is_relative_to(user)


@pytest.mark.skipif(importlib.util.find_spec("autoshard.cli") is None, reason="the command is not written yet")
def test_command_runs_beside_a_users_search(user: Path):
    chips = run(user / "env/bin/autoshard", "chips", cwd=user)
    assert "v4" in chips and "h100" in chips


@pytest.mark.skipif(not hasattr(autoshard, "autoshard"), reason="the decorator is not written yet")
def test_decorator_runs_beside_a_users_search(user: Path):
    script = """
        import json
        import jax, jax.numpy as jnp
        import autoshard

        @autoshard.autoshard(topology="cpu:2x4", cache_dir="cache")
        def forward(params, x):
            return jax.nn.relu(x @ params["up"]) @ params["down"]

        params = {"up": jnp.ones((16, 32)), "down": jnp.ones((32, 16))}
        result = forward(params, jnp.ones((8, 16)))
        print(json.dumps({"devices": len(result.sharding.device_set), "values": result.ravel().tolist()}))
    """
    (user / "model.py").write_text(dedent(script))
    shown = run(user / "env/bin/python", "model.py", cwd=user)
    result = json.loads(shown.splitlines()[-1])
    assert result == {"devices": 8, "values": [16.0 * 32.0] * (8 * 16)}
    assert any((user / "cache").iterdir())
