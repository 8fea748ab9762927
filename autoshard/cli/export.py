"""`autoshard export`: a plan's layouts as configuration for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from autoshard.cli import common


def export(
    plan: common.PlanFile,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="Such as specs or rules: PartitionSpecs or regex rules as Python; flax or maxtext: logical axes.",
        ),
    ],
    argument: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this argument; paths then start inside it.")
    ] = None,
    axes: Annotated[
        list[str] | None, typer.Option("--axis", metavar="AXIS=NAME", help="Rename a mesh axis; may be repeated.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="NAMES.json",
            exists=True,
            dir_okay=False,
            help='Names of dimensions, for logical axes: {"REGEX over paths": ["embed", null, ...], ...}.',
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
    force: common.Force = False,
    verbose: common.Verbose = False,
) -> None:
    """Write the layouts of a plan's arguments in a format of other libraries.

    autoshard export plan.json --format rules --argument params -o partition_rules.py
    """
    from autoshard.export import FORMATS
    from autoshard.plan import load

    with common.report_errors(verbose):
        if format not in FORMATS:
            raise common.Misuse(f"--format must be one of {', '.join(FORMATS)}, got {format}.")
        common.check_output(output, force)
        text = load(plan).export(format, output, argument=argument, names=_names(names), axes=_axes(axes))
        if output is None:
            typer.echo(text, nl=False)
        else:
            typer.echo(f"Wrote {output}.", err=True)


def _axes(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        axis, sign, name = pair.partition("=")
        if not sign or not name.isidentifier():
            raise common.Misuse(f"--axis must be AXIS=NAME, such as x=data, got {pair}.")
        found[axis] = name
    return found


def _names(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise common.Misuse(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict) or not found or not all(isinstance(each, list) for each in found.values()):
        raise common.Misuse(
            f'{path} must map regular expressions to lists of names, such as {{"mlp/wi$": ["embed", "mlp"]}}.'
        )
    return found
