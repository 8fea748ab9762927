"""Runs the snippets of Markdown pages, in order, as a reader would: `python docs/snippets.py PAGE.md ...`.

| block | is |
|---|---|
| `python title="model.py"`, `toml title="job.toml"` | a file with this name |
| `python` | run, all blocks of a page in one session |
| `bash` | run line by line; a command may end in a comment, and one that must fail ends in `# exit code N` |
| any other | shown, not run |

Each page runs in a folder of its own, outside the repository, with this Python. A comment before a block, or at the top of the
page, says what it needs: `<!-- needs: equinox -->` names modules, without which it is skipped with that reason, and
`<!-- shown only: REASON -->` is never run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_FENCE = re.compile(
    r"(?P<notes>(?:<!--[^>]*-->\s*\n)*)^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
_NEEDS = re.compile(r"<!-- needs: ([\w., ]+) -->")
_SHOWN = re.compile(r"<!-- shown only: (.+?) -->")
_EXIT = re.compile(r"# exit code (\d+)")
_SECONDS = 600


@dataclass(frozen=True)
class Block:
    """A block of code of a page: its language, its file name, its line, what it needs, and why it is not run."""

    language: str
    title: str
    code: str
    line: int
    needs: tuple[str, ...] = ()
    shown_only: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    for found in _FENCE.finditer(text):
        notes = found["notes"] or ""
        needs = tuple(name.strip() for each in _NEEDS.findall(notes) for name in each.split(","))
        shown = _SHOWN.search(notes)
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(found["language"], found["title"] or "", found["code"], line, needs, shown[1] if shown else "")


def missing(needs: Sequence[str]) -> list[str]:
    """The modules that are not installed."""
    return [name for name in needs if importlib.util.find_spec(name.partition(".")[0]) is None]


def page_needs(text: str) -> tuple[str, ...]:
    """The modules that a page needs, named before its title."""
    head = text.partition("\n# ")[0] if not text.startswith("# ") else ""
    return tuple(name.strip() for each in _NEEDS.findall(head) for name in each.split(","))


def run_page(page: Path, folder: Path) -> int:
    """Runs a page in a folder; returns the number of blocks that were run.

    **Raises:** what a block raises, with the page and line in its traceback.
    """
    text = page.read_text()
    if lacking := missing(page_needs(text)):
        print(f"  skipped: {', '.join(lacking)} is not installed", flush=True)
        return 0
    os.chdir(folder)
    session = sys.modules["page"] = ModuleType("page")  # dataclasses look their module up
    count = 0
    for block in blocks(text):
        lacking = missing(block.needs)
        if block.shown_only or lacking:
            why = block.shown_only or f"{', '.join(lacking)} is not installed"
            print(f"  line {block.line}: not run: {why}", flush=True)
        elif block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), vars(session))
            count += 1
        elif block.language == "bash":
            for command in _commands(block.code):
                _run_command(command)
            count += 1
    return count


def _commands(code: str) -> list[str]:
    """The commands of a block; a line that ends in a backslash goes on."""
    joined = code.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _run_command(command: str) -> None:
    expected = int(found[1]) if (found := _EXIT.search(command)) else 0
    began = time.monotonic()
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=_SECONDS)
    print(f"  {time.monotonic() - began:5.1f} s  $ {command}", flush=True)
    if done.returncode != expected:
        raise RuntimeError(
            f"{command} exited with {done.returncode}, expected {expected}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )


def main() -> None:
    """Runs every page in a process of its own; exits with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        _run_here(given.pages[0])
        return
    failed = []
    for page in given.pages:
        began = time.monotonic()
        print(page, flush=True)
        done = subprocess.run([sys.executable, __file__, "--inside", str(page.resolve())])
        print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
        if done.returncode:
            failed.append(str(page))
    print(f"failed: {', '.join(failed)}" if failed else f"{len(given.pages)} pages ran as printed", flush=True)
    sys.exit(bool(failed))


def _run_here(page: Path) -> None:
    sys.path[0] = ""  # the reader's folder, not this script's
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        home = Path.cwd()
        try:
            run_page(page, Path(folder))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        finally:
            os.chdir(home)


if __name__ == "__main__":
    main()
