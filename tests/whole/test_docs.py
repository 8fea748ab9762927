"""The documentation: pictures are those that the scripts draw, code compiles, notebooks run, the prose lint finds faults."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import autoshard
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_those_that_the_script_draws():
    for name, drawn in script(DOCS / "pictures.py").PICTURES.items():
        kept = (DOCS / "images" / f"concept-{name}.svg").read_text()
        assert kept == drawn().svg(), f"docs/images/concept-{name}.svg is out of date: run python docs/pictures.py"


@pytest.mark.long
def test_the_picture_of_the_rooms_is_drawn_from_the_imports():
    kept = (DOCS / "images" / "rooms.svg").read_text()
    assert kept == script(DOCS / "rooms.py").svg(), "docs/images/rooms.svg is out of date: run python docs/rooms.py"


def test_every_picture_and_page_that_is_named_is_there():
    for page in DOCS.glob("**/*.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference" / "functions.md").read_text()
    public = {
        name
        for name in dir(autoshard)
        if not name.startswith("_") and not isinstance(getattr(autoshard, name), ModuleType)
    }
    assert public - {"TYPE_CHECKING", "Any"} == set(re.findall(r"^::: autoshard\.(\w+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_python_in_the_pages_is_python(page: Path):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(code, page.name, "exec")


LINT = script(DOCS / "prose_lint.py")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The shards of an array.", 0),
        ("There is no plan, and it is no longer searched.", 0),
        ("Computes it anew.", 1),
        ("'a' is no chip; v4 would do.", 2),
        ("What a chip holds.", 1),
        ("Which slice, which batch?", 0),
        ("See `costmodels.machine.chips` and `autoshard.search`.", 0),
        ("See `costmodels.no_such_module`.", 1),
    ],
)
def test_the_prose_lint_finds_forbidden_patterns_and_stale_names(text: str, count: int):
    assert len(list(LINT.faults(LINT.Prose(DOCS / "index.md", 1, text)))) == count


def test_the_prose_lint_reads_docstrings_comments_and_messages(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text('"""Doc."""\nX = 1  # comment\n"""About X."""\n\n\ndef f(x):\n    raise ValueError(f"x is {x}")\n')
    assert {"Doc.", "comment", "About X.", "x is {}"} <= {prose.text for prose in LINT.prose_of(path)}


def cells(path: Path) -> str:
    found = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path):
    compile(cells(path), path.name, "exec")
    assert not any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(path.parent)
    exec(compile(cells(path), path.name, "exec"), {"__name__": "__main__"})
    assert "OPTIMAL" in (said := capsys.readouterr().out) or "with a plan" in said
