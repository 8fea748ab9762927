"""The pages: every snippet of README and docs runs as printed. `make first-user` does the same with the wheel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SNIPPETS, FIRST_USER = script("snippets"), script("first_user")
PAGES = FIRST_USER.pages()


def run(page: Path, folder: Path) -> str:
    """What a page prints, run with this Python outside of the repository."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    }
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "docs" / "snippets.py"), str(page)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", [ROOT / "docs" / "adopt" / "meshes.md"], ids=lambda page: page.stem)
def test_a_page_runs_as_printed(page: Path, tmp_path: Path) -> None:
    assert "1 pages ran as printed" in run(page, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in ("meshes", "README")], ids=lambda page: page.stem
)
def test_every_other_page_runs_as_printed(page: Path, tmp_path: Path) -> None:
    said = run(page, tmp_path)
    skipped = [line.strip() for line in said.splitlines() if line.strip().startswith("skipped: ")]
    if skipped:
        pytest.skip(f"{page.name} {skipped[0]}")


@pytest.mark.slow
def test_the_readme_runs_as_printed(tmp_path: Path) -> None:
    run(ROOT / "README.md", tmp_path)


def test_every_page_is_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert all(f"adopt/{page.name}" in site for page in (ROOT / "docs" / "adopt").glob("*.md"))


def test_every_block_of_code_is_run_or_says_why_not() -> None:
    for page in PAGES:
        for block in SNIPPETS.blocks(page.read_text()):
            runs = block.language in ("python", "bash") or block.title
            assert runs or block.shown_only or block.language not in ("sh", "shell", "console", "toml"), (
                page,
                block.line,
            )


TEXT = """# Title

```python title="a.py"
X = 3
```

```python
from a import X
```

<!-- needs: no_such_module -->
```python
raise SystemExit
```

<!-- shown only: it needs a TPU -->
```bash
false
```

```bash
python -c "import a; assert a.X == 3"
python -c "raise SystemExit(3)" # exit code 3
```
"""


def test_blocks_files_sessions_and_exit_codes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(TEXT)
    said = run(page, tmp_path)
    assert "no_such_module is not installed" in said and "not run: it needs a TPU" in said
    page.write_text(TEXT.replace("SystemExit(3)", "SystemExit(4)"))
    with pytest.raises(AssertionError, match="exited with 4, expected 3"):
        run(page, tmp_path)
    page.write_text(TEXT.replace("from a import X", "from a import X\n1 / 0"))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(page, tmp_path)
