"""`autoshard trace`: the operations of a function, and their sharding rules."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from autoshard.cli import common


def trace(
    target: common.Target,
    sizes: common.Settings = None,
    census: Annotated[
        bool, typer.Option("--census", help="One line per primitive: its rule, and its share of the time.")
    ] = False,
    chip: Annotated[str, typer.Option(metavar="CHIP", help="The chip whose roofline gives the times.")] = "v5e",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse operations without a sharding rule.")] = False,
    json: common.AsJson = False,
    verbose: common.Verbose = False,
) -> None:
    """Trace a function without a search: its operations, and the share of its time with exact sharding rules.

    autoshard trace --census examples/palm.py:decode --set batch=64
    """
    from autoshard.annotating.hbm_traffic import annotate_traffic
    from autoshard.explaining.rule_coverage import census_of, summary
    from autoshard.tracing.trace import trace as traced
    from costmodels.machine.chips import UnknownChipError
    from costmodels.machine.chips import chip as chip_named

    with common.report_errors(verbose, json):
        try:
            on = chip_named(chip)
        except UnknownChipError as error:
            raise common.Misuse(str(error)) from error
        work = common.workload(target, common.settings(sizes))
        found = annotate_traffic(
            traced(work.fn, *work.args, donate_argnums=work.donate_argnums, name=work.name, strict=strict)
        )
        counted = census_of(found.program, on)
        if json:
            typer.echo(json_module.dumps(counted.to_dict(), indent=1))
        else:
            typer.echo(counted.render() if census else summary(counted), nl=False)
