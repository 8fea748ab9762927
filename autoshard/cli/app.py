"""The application: its commands, and how an error leaves it."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from autoshard.cli import audit, chips, explain, search
from autoshard.errors import AutoshardError

app = typer.Typer(
    help="Layout search for JAX: the proven fastest sharding of a function over a torus of chips.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(search.search)
app.command()(explain.explain)
app.command()(audit.audit)
app.command()(chips.chips)


def main() -> None:
    """Runs a command; errors made on purpose become one line, with the whole traceback under `--verbose`."""
    try:
        app()
    except AutoshardError as error:
        if "--verbose" in sys.argv:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}")
        sys.exit(1)


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")
