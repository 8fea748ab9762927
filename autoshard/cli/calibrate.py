"""`autoshard calibrate`: measure the attached devices, and write a topology file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from autoshard.cli import common


def calibrate(
    devices: Annotated[
        str,
        typer.Option("--devices", "-d", metavar="CHIP:AxB", help="auto: all that JAX sees; cpu:8: eight host devices."),
    ] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.toml", help="Write the topology to this file.")
    ] = None,
    force: common.Force = False,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="FILE.py:NAME", help="Plan and run this step, and compare its time."),
    ] = None,
    sizes: common.Settings = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few and small sizes, for a trial.")] = False,
    json: common.AsJson = False,
    verbose: common.Verbose = False,
) -> None:
    """Measure matmuls, memory and collectives on the attached devices, and fit the cost model's constants to them.

    autoshard calibrate --devices cpu:8 -o host.toml

    autoshard search FILE.py:NAME --topology host.toml
    """
    from json import dumps

    from autoshard.annotating.attached import topology_of
    from autoshard.calibrating.calibration import calibrate as measure
    from autoshard.calibrating.microbenchmarks import QUICK, Ranges
    from autoshard.calibrating.step_check import check_step
    from autoshard.calibrating.timing import HASTE, Patience
    from autoshard.emitting import targets

    with common.report_errors(verbose, json):
        common.check_output(output, force)
        if devices.startswith("cpu:"):
            targets.host_devices(topology_of(devices).size)  # before a target file starts JAX with fewer
        work = common.workload(check, common.settings(sizes)) if check else None
        ranges, patience = (QUICK, HASTE) if quick else (Ranges(), Patience())
        with common.progress(f"Measuring {devices}", verbose) as say:
            found = measure(devices, ranges=ranges, patience=patience, progress=say)
            if work is not None:
                found = replace(found, checks=(check_step(work, found.topology, say),))
        if output is not None:
            found.save(output)
        typer.echo(dumps(found.to_dict(), indent=2) if json else str(found), nl=json)
        if output is not None:
            typer.echo(f"Wrote {output}.", err=True)
