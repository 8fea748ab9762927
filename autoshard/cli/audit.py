"""`autoshard audit`: hold the compiled program against its plan."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from autoshard.cli import common


class On(StrEnum):
    """The target of the compiler."""

    host = "host"
    tpu = "tpu"
    gpu = "gpu"


class Way(StrEnum):
    """The ways to carry a plan."""

    manual = "manual"
    constraints = "constraints"
    specs = "specs"


def audit(
    plan: common.PlanFile,
    target: common.Target,
    sizes: common.Settings = None,
    on: Annotated[
        On, typer.Option("--target", help="Compile for CPU devices, or for the plan's TPUs or GPUs.")
    ] = On.host,
    carry: Annotated[
        Way | None,
        typer.Option(help="The way in which the program carries the plan; by default that of plan.jit."),
    ] = None,
    json: common.AsJson = False,
    verbose: common.Verbose = False,
) -> None:
    """Compile a planned function, without running it, and compare collectives and memory with the plan.

    autoshard audit plan.json examples/palm.py:decode --set batch=64 --target tpu

    Exits with 1 if the compiled program is not as planned or takes more than 1.3 times the planned time.
    """
    from json import dumps

    from autoshard.auditing.audit import audit as audit_plan
    from autoshard.emitting import targets
    from autoshard.plan import load

    with common.report_errors(verbose, json):
        found = load(plan)
        if on is On.host:
            targets.host_devices(found.topology.size)  # before the target file starts JAX with fewer
        with common.progress(f"Compiling {target} for {_WHAT[on]}", verbose):
            work = common.workload(target, common.settings(sizes))
            report = audit_plan(
                found, work.fn, *work.args, target=on.value, carry=None if carry is None else carry.value
            )
        typer.echo(dumps(report.to_dict(), indent=2) if json else str(report), nl=json)
        if not report.ok or report.is_slow:
            raise typer.Exit(1)


_WHAT = {On.host: "host devices", On.tpu: "the TPU", On.gpu: "the GPU"}
