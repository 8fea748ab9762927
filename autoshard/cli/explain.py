"""`autoshard explain`: a plan as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from autoshard.cli import common

if TYPE_CHECKING:
    from autoshard.comparing.what_if import Remedies
    from autoshard.explaining.bottlenecks import Regimes
    from autoshard.plan import Plan


def explain(
    plan: common.PlanFile,
    symbolic: Annotated[bool, typer.Option("--symbolic", help="Add formulas and crossovers of layouts.")] = False,
    target: Annotated[
        str | None, typer.Argument(metavar="[FILE.py:NAME]", help="The plan's workload; for --remedies.")
    ] = None,
    sizes: common.Settings = None,
    regimes: Annotated[
        bool,
        typer.Option("--regimes", help="Print the bottleneck of each operation, and its distance to the roofline."),
    ] = False,
    remedies: Annotated[
        bool, typer.Option("--remedies", help="Print the effect of int8, twice the batch, more or faster chips.")
    ] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="For each remedy's search; 0: cost the plan's own layout only."),
    ] = None,
    json: common.AsJson = False,
    width: common.Width = None,
    verbose: common.Verbose = False,
) -> None:
    """Print a plan: every matmul with its strategy, arrays, collectives, memory, proof, warnings."""
    from autoshard.explaining.explain import render
    from autoshard.plan import load
    from autoshard.planning.files.plan_file import dumps

    width = width or common.columns()
    with common.report_errors(verbose, json):
        if remedies and target is None:
            raise common.Misuse("--remedies needs the plan's workload: FILE.py:NAME, with the same --set.")
        if json and regimes and remedies:
            raise common.Misuse("--json prints one thing: give --regimes or --remedies, not both.")
        if remedies and target is not None:
            with common.progress("Trying remedies", verbose) as say:
                found = _remedies(load(plan), target, sizes, time_limit, say)
            typer.echo(_text(found, json, width), nl=False)
        if regimes:
            typer.echo(_text(load(plan).regimes(), json, width), nl=False)
        if regimes or remedies:
            return
        if json:
            typer.echo(dumps(load(plan)), nl=False)
            return
        typer.echo(render(load(plan), symbolic=symbolic, width=width), nl=False)


def _remedies(
    plan: Plan, target: str, sizes: list[str] | None, time_limit: float | None, say: Callable[[str], None]
) -> Remedies:
    from autoshard.comparing.what_if import remedies

    work = common.workload(target, common.settings(sizes))
    return remedies(plan, work.fn, *work.args, resolve=time_limit != 0, time_limit=time_limit or None, progress=say)


def _text(found: Regimes | Remedies, json: bool, width: int) -> str:
    from json import dumps

    return dumps(found.to_dict(), indent=2) + "\n" if json else found.render(width)
