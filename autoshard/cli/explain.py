"""`autoshard explain`: a plan in words and tables."""

from __future__ import annotations

from typing import Annotated

import typer

from autoshard.cli import common


def explain(
    plan: common.PlanFile,
    symbolic: Annotated[bool, typer.Option("--symbolic", help="Add formulas, and where layouts cross over.")] = False,
    width: Annotated[int, typer.Option(metavar="COLUMNS", min=80, help="Columns to fill at most.")] = 120,
    verbose: common.Verbose = False,
) -> None:
    """Print a plan: every matmul with its strategy, arrays, collectives, memory, proof, warnings."""
    from autoshard.explain import render
    from autoshard.plan_file import load

    with common.reported(verbose):
        typer.echo(render(load(plan), symbolic=symbolic, width=width), nl=False)
