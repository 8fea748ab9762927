"""`autoshard search`: find and prove the fastest layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoshard.cli import common

if TYPE_CHECKING:
    from autoshard.comparing.verify import Verification
    from autoshard.plan import Plan


class Solver(StrEnum):
    """Who searches."""

    presolved = "presolved"
    cp_sat = "cp-sat"


class Compiler(StrEnum):
    """The compilers that verify plans."""

    host = "host"
    tpu = "tpu"
    gpu = "gpu"


def search(
    target: common.Target,
    topology: Annotated[
        str, typer.Option("--topology", "-t", metavar="CHIP:AxBxC", help="v4:4x4x4, h100:4x8, a TOML file, or auto.")
    ],
    sizes: common.Settings = None,
    dims: common.Dims = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: common.AsJson = False,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Stop then, with the remaining gap.")
    ] = None,
    reserve: Annotated[float | None, typer.Option(metavar="GIB", min=0, help="Memory to reserve on each chip.")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", min=0, help="Memory limit per chip.")] = None,
    pin: common.PinOptions = None,
    fold: Annotated[bool, typer.Option(help="Use one layout for all layers of an unrolled model.")] = True,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Compare with baselines: data parallel, Megatron 1D, ...")
    ] = False,
    solver: Annotated[
        Solver, typer.Option(help="CP-SAT after presolve, or alone: a reference for small functions and meshes.")
    ] = Solver.presolved,
    verify: Annotated[
        Compiler | None,
        typer.Option(help="Compile the best plans, and take the one with the fastest compiled program."),
    ] = None,
    top_k: Annotated[int, typer.Option(metavar="K", min=1, help="Number of plans that --verify compiles.")] = 4,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="With --verify: write a topology with the compiler's efficiencies."),
    ] = None,
    bandwidth: common.Bandwidth = None,
    overlap: common.Overlap = None,
    verbose: common.Verbose = False,
) -> None:
    """Search the fastest layout of a function, prove it, and explain it.

    autoshard search examples/palm.py:decode --topology v4:4x4x4 --set batch=64 -o plan.json
    """
    from autoshard.comparing.verify import verify as compile_best
    from autoshard.emitting.targets import host_devices
    from autoshard.pipeline import search as search_plan

    with common.report_errors(verbose):
        common.check_output(output, force)
        common.check_output(calibration, force)
        if calibration is not None and verify is not Compiler.tpu:
            raise common.Misuse("--calibration needs --verify tpu: only the TPU compiler reports cycles.")
        where = common.with_conventions(topology, bandwidth, overlap)
        if verify is Compiler.host:
            host_devices(where.size)  # before the target file starts JAX with fewer
        with common.progress(f"Searching {target} on {topology}", verbose) as say:
            work = common.workload(target, common.settings(sizes))
            plan = search_plan(
                work.fn,
                *work.args,
                topology=where,
                donate_argnums=work.donate_argnums,
                name=work.name,
                reserve_bytes=None if reserve is None else reserve * 2**30,
                time_limit=time_limit,
                progress=say,
                pins=common.pins(pin),
                fold=fold,
                memory_bytes=None if memory is None else memory * 2**30,
                baselines=baselines,
                solver=solver.value,
                dims={**work.dims, **common.names(dims)},
            )
            verified = None
            if verify is not None:
                verified = compile_best(
                    plan, work.fn, *work.args, target=verify.value, k=top_k, time_limit=time_limit, progress=say
                )
                plan = verified.best
        _show(plan, verified, target, output, calibration, json)


def _show(
    plan: Plan,
    verified: Verification | None,
    target: str,
    output: Path | None,
    calibration: Path | None,
    json: bool,
) -> None:
    """Writes the requested files, and prints the result to standard output."""
    from autoshard._util.files import write_whole
    from autoshard.planning.plan_file import dumps
    from costmodels.machine.topology_file import topology_toml

    if verified is not None:
        typer.echo(str(verified), err=json)
        if calibration is not None:
            write_whole(calibration, topology_toml(verified.calibrated(), f"From compiled programs of {target}."))
            typer.echo(f"Wrote {calibration}.", err=True)
    if output is not None:
        plan.save(output)
    typer.echo(dumps(plan) if json else plan.explain(), nl=False)
    if output is not None:
        typer.echo(f"Wrote {output}.", err=True)
    if verified is not None and verified.is_slow:
        raise typer.Exit(1)
