"""The command line, one module per command; those that compare plans share one.

Results go to standard output; progress and errors go to standard error. Exit codes: 0 for success, 1 if no plan fits, an audit
fails or a question has no answer, 2 for invalid usage: an option, a name or a value that does not exist.
"""

from __future__ import annotations

from typing import Annotated

import typer

from autoshard._util.version import version
from autoshard.cli.audit import audit
from autoshard.cli.calibrate import calibrate
from autoshard.cli.carry import carry
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
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_PANELS = {
    "Plan": (search, phases, trace),
    "Read and compare plans": (explain, why_not, best, diff, report, roofline),
    "Check and use plans": (audit, carry, export),
    "Many plans": (sweep, ask),
    "Hardware": (chips, calibrate),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"autoshard {version()}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Layout search for JAX: the proven fastest sharding of a function over a TPU or GPU topology."""


def main() -> None:
    """Runs the command line."""
    app()
