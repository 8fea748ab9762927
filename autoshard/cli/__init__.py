"""The command line, one module per command; those that compare plans share one.

Results go to standard output; progress and errors go to standard error. Exit codes: 0 for success, 1 if no plan fits, an audit
fails or a value is refused, 2 for invalid usage.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from autoshard.cli.audit import audit
from autoshard.cli.calibrate import calibrate
from autoshard.cli.chips import chips
from autoshard.cli.compare import best, diff, why_not
from autoshard.cli.explain import explain
from autoshard.cli.export import export
from autoshard.cli.phases import phases
from autoshard.cli.report import report
from autoshard.cli.roofline import roofline
from autoshard.cli.search import search
from autoshard.cli.sweep import ask, sweep
from autoshard.cli.trace import trace

app = typer.Typer(
    help="Layout search for JAX: the proven fastest sharding of a function over a TPU or GPU topology.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    search,
    phases,
    explain,
    why_not,
    best,
    diff,
    audit,
    trace,
    export,
    roofline,
    report,
    sweep,
    ask,
    chips,
    calibrate,
):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"autoshard {version('autoshard')}")
        except PackageNotFoundError:
            typer.echo("autoshard (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Layout search for JAX: the proven fastest sharding of a function over a TPU or GPU topology."""


def main() -> None:
    """Runs the command line."""
    app()
