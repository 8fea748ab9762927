"""`autoshard carry`: compile the ways to carry a plan, and choose constraints."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autoshard.cli import common


class On(StrEnum):
    """The target of the compiler."""

    auto = "auto"
    host = "host"
    tpu = "tpu"
    gpu = "gpu"


def carry(
    plan: common.PlanFile,
    target: common.Target,
    sizes: common.Settings = None,
    on: Annotated[
        On, typer.Option("--target", help="Compile for the plan's chips if their compiler is installed, or for these.")
    ] = On.auto,
    most: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of programs compiled to choose constraints.")
    ] = 40,
    save: Annotated[
        bool, typer.Option("--save", help="Write the result into the plan file, for exports and plan.jit.")
    ] = False,
    patch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the constraints as a patch for git apply.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the patch.")] = False,
    json: common.AsJson = False,
    verbose: common.Verbose = False,
) -> None:
    """Compile a plan carried by specs, by constraints and by hand, and find the constraints that the source needs.

    autoshard carry plan.json examples/palm.py:decode --set batch=64 --patch constraints.patch

    Exits with 1 if no constraints bring the program within the bounds of the planned one.
    """
    from json import dumps

    from autoshard._util.files import write_whole
    from autoshard.carrying.carry import carry as carry_plan
    from autoshard.carrying.carry import target_of
    from autoshard.carrying.render import carriage_dict, carriage_text
    from autoshard.carrying.written import patch as patch_of
    from autoshard.emitting import targets
    from autoshard.plan import load

    with common.report_errors(verbose):
        common.check_output(patch, force)
        found = load(plan)
        wanted = target_of(found) if on is On.auto else on.value
        if wanted == "host":
            targets.host_devices(found.topology.size)  # before the target file starts JAX with fewer
        with common.progress(f"Compiling {target}", verbose) as say:
            work = common.workload(target, common.settings(sizes))
            found = carry_plan(found, work.fn, *work.args, target=wanted, most=most, progress=say)
        assert found.carriage is not None
        typer.echo(dumps(carriage_dict(found.carriage), indent=2) if json else carriage_text(found), nl=json)
        if patch is not None:
            write_whole(patch, patch_of(found.carriage.constraints, Path.cwd()))
            typer.echo(f"Wrote {patch}.", err=True)
        if save:
            found.save(plan)
            typer.echo(f"Wrote {plan}.", err=True)
        if not found.carriage.within:
            raise typer.Exit(1)
