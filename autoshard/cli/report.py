"""`autoshard report`: a plan or a sweep as a page or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoshard.cli import common


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.json", help="A plan, or a result of autoshard sweep.", exists=True, dir_okay=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The output: .html, or a plot as .png, .svg or .pdf.")
    ],
    audit: Annotated[
        Path | None, typer.Option(metavar="AUDIT.json", help="The output of autoshard audit --json.", exists=True)
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(metavar="COUNT", min=0, help="Tokens of one step of a plan, for tokens per second.")
    ] = None,
    plans: Annotated[
        bool,
        typer.Option("--plans", help="Write a page for each plan of a sweep's frontier, with a link from its point."),
    ] = False,
    force: common.Force = False,
    verbose: common.Verbose = False,
) -> None:
    """Write one self-contained page about a plan or a sweep.

    autoshard report plan.json -o plan.html
    """
    from autoshard.report import write_report

    with common.report_errors(verbose):
        common.check_output(output, force)
        write_report(source, output, audit, tokens, plans)
        typer.echo(f"Wrote {output}.", err=True)
