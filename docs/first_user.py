"""The way of a first user: a fresh environment outside the repository, the wheel, and every snippet of README and docs.

    python docs/first_user.py [--python python3.12] [PAGE.md ...]

For each Python (3.11 and 3.12, where there is one) it builds the wheel, installs it with its extras and the libraries that the
pages use into a new virtual environment, and runs the pages with `docs/snippets.py`. Exits with 1 if a snippet fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "sweep,report,plots,tpu"
LIBRARIES = ("flax", "optax", "orbax-checkpoint", "equinox", "transformers==4.57.6")
"""The libraries of the pages; transformers 4.57 is the last line with Flax models."""
PYTHONS = ("python3.11", "python3.12")
PAGES = ("README.md", "docs/index.md", "docs/sweeps.md", "docs/rules.md", "docs/plan.md", "docs/costs.md")


def pages() -> list[Path]:
    """README, the pages with snippets, and those about adoption, in the order in which people read them."""
    return [*(ROOT / page for page in PAGES), *sorted((ROOT / "docs" / "adopt").glob("*.md"))]


def found(names: Sequence[str]) -> list[str]:
    """Those of the Pythons that start; says so of the others."""
    working = []
    for name in names:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            working.append(path)
        else:
            print(f"{name} is not on this machine: not tried", flush=True)
    return working


def walk(python: str, wanted: Sequence[Path]) -> bool:
    """Whether all snippets run in a fresh environment of this Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: object) -> int:
            return subprocess.run([str(word) for word in command], cwd=folder, env=environment).returncode

        env = Path(folder, "env")
        inside = env / "bin" / "python"
        print(f"{python}: a fresh environment with the wheel and {', '.join(LIBRARIES)}", flush=True)
        if run(python, "-m", "venv", env):
            return False
        pip = (inside, "-m", "pip", "--disable-pip-version-check", "--quiet")
        if run(*pip, "wheel", "--no-deps", "--wheel-dir", Path(folder, "dist"), ROOT):
            return False
        (wheel,) = Path(folder, "dist").glob("autoshard-*.whl")
        if run(*pip, "install", f"{wheel}[{EXTRAS}]", *LIBRARIES):
            return False
        return run(inside, ROOT / "docs" / "snippets.py", *wanted) == 0


def main() -> None:
    """Runs the pages under every Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--python", action="append", help="a Python to try, by name or path; may be repeated")
    given = parser.parse_args()
    wanted = [page.resolve() for page in given.pages] or pages()
    results = {python: walk(python, wanted) for python in found(given.python or PYTHONS)}
    for python, worked in results.items():
        print(f"{python}: {'all snippets ran as printed' if worked else 'FAILED'}")
    sys.exit(not results or not all(results.values()))


if __name__ == "__main__":
    main()
