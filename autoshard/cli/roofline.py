"""`autoshard roofline`: plans as a roofline plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoshard.cli import common


def roofline(
    plans: Annotated[
        list[Path],
        typer.Argument(metavar="PLAN.json...", help="Plans, such as prefill and decode.", exists=True, dir_okay=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The output: .png, .svg, .pdf, or .html with tables.")
    ],
    force: common.Force = False,
    verbose: common.Verbose = False,
) -> None:
    """Draw the rooflines of plans, one panel each: every operation, its bottleneck, and its distance to the roof.

    autoshard roofline prefill.json decode.json -o roofline.png
    """
    from autoshard.explaining.roofline import save_roofline
    from autoshard.plan import load

    with common.report_errors(verbose):
        common.check_output(output, force)
        save_roofline([load(plan) for plan in plans], output)
        typer.echo(f"Wrote {output}.", err=True)
