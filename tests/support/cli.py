"""Commands, run in this process.

| name | is |
|---|---|
| `run` | a command's outcome |
| `refused` | the one line that a failing command prints |
"""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from autoshard.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(*arguments: str | Path, code: int = 2) -> str:
    """What a command says that fails: one line on standard error, and nothing else."""
    found = run(*arguments)
    assert found.exit_code == code, found.output
    assert found.stdout == ""
    assert found.stderr.startswith("autoshard: ") and found.stderr.count("\n") == 1
    return found.stderr.removeprefix("autoshard: ").rstrip("\n")
