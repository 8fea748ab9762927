"""`autoshard search`: find and prove the fastest layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoshard.cli import common

if TYPE_CHECKING:
    from autoshard.comparing.verify import Verification
    from autoshard.plan import Plan
    from autoshard.workload import Workload


REFUSED = 3
"""The exit status if the compiler refused the first plan, and a smaller one compiled."""


class Solver(StrEnum):
    """Who searches."""

    presolved = "presolved"
    cp_sat = "cp-sat"


class Compiler(StrEnum):
    """The compilers that verify plans."""

    host = "host"
    tpu = "tpu"
    gpu = "gpu"


class Alone(StrEnum):
    """The way in which the plan must be carried."""

    specs = "specs"


_TimeLimit = Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Stop then, with the remaining gap.")]
_Baselines = Annotated[
    bool, typer.Option("--baselines", help="Compare with baselines: data parallel, Megatron 1D, ...")
]
_Padding = Annotated[
    bool,
    typer.Option(help="Pad dimensions that the mesh axes do not divide, where that is faster; not with --carry."),
]
_Solver = Annotated[
    Solver, typer.Option(help="CP-SAT after presolve, or alone: a reference for small functions and meshes.")
]
_Verify = Annotated[
    Compiler | None,
    typer.Option(help="Compile the best plans, and take the one with the fastest compiled program."),
]
_TopK = Annotated[int, typer.Option(metavar="K", min=1, help="Number of plans that --verify or --carry compiles.")]
_Against = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PINS",
        help="With --verify: compile the best plan with these pins too, such as 'cache.*=None,xy; tokens=x'.",
    ),
]
_Carry = Annotated[
    Alone | None,
    typer.Option(
        help="Compile plans by their specs alone, and take the fastest step; add constraints if specs do not suffice."
    ),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="With --verify: write a topology with the compiler's efficiencies."),
]
_Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this file.")]
_Fold = Annotated[bool, typer.Option(help="Use one layout for all layers of an unrolled model.")]


def search(
    target: common.Target,
    topology: common.TopologyName,
    sizes: common.Settings = None,
    dims: common.Dims = None,
    output: _Output = None,
    force: common.Force = False,
    json: common.AsJson = False,
    time_limit: _TimeLimit = None,
    reserve: common.Reserve = None,
    memory: common.Memory = None,
    pin: common.PinOptions = None,
    fold: _Fold = True,
    baselines: _Baselines = False,
    padding: _Padding = True,
    solver: _Solver = Solver.presolved,
    verify: _Verify = None,
    top_k: _TopK = 4,
    against: _Against = None,
    carry: _Carry = None,
    calibration: _Calibration = None,
    bandwidth: common.Bandwidth = None,
    overlap: common.Overlap = None,
    verbose: common.Verbose = False,
) -> None:
    """Search the fastest layout of a function, prove it, and explain it.

    autoshard search examples/palm.py:decode --topology v4:4x4x4 --set batch=64 -o plan.json

    With --verify the exit status is 1 if no plan compiles or the best is much slower than planned, and 3 if the compiler
    refused the first plan and a smaller one compiled.
    """
    from autoshard.emitting.targets import host_devices
    from autoshard.pipeline import search as search_plan

    with common.report_errors(verbose, json):
        common.check_output(output, force)
        common.check_output(calibration, force)
        _check_options(verify, carry, calibration, against)
        where = common.with_conventions(topology, bandwidth, overlap)
        if verify is Compiler.host or (carry is not None and where.chip.kind != "tpu"):
            host_devices(where.size)  # before the target file starts JAX with fewer
        with common.progress(f"Searching {target} on {topology}", verbose) as say:
            work = common.workload(target, common.settings(sizes))
            plan = search_plan(
                work.fn,
                *work.args,
                topology=where,
                donate_argnums=work.donate_argnums,
                name=work.name,
                reserve_bytes=common.in_bytes(reserve),
                time_limit=time_limit,
                progress=say,
                pins=common.pins(pin),
                fold=fold,
                memory_bytes=common.in_bytes(memory),
                baselines=baselines,
                solver=solver.value,
                padding=padding and carry is None,
                dims={**work.dims, **common.names(dims)},
            )
            verified = None
            if verify is not None:
                verified = _verified(plan, work, verify, top_k, against or (), time_limit, say)
                plan = verified.best
            if carry is not None:
                plan = _best_carried(plan, work, top_k, time_limit, say)
        _show(plan, verified, target, output, calibration, json)


def _check_options(
    verify: Compiler | None, carry: Alone | None, calibration: Path | None, against: list[str] | None
) -> None:
    """Refuses options that need another one or exclude each other."""
    if calibration is not None and verify is not Compiler.tpu:
        raise common.Misuse("--calibration needs --verify tpu: only the TPU compiler reports cycles.")
    if against and verify is None:
        raise common.Misuse("--against needs --verify: it names layouts to compile.")
    if carry is not None and verify is not None:
        raise common.Misuse("--carry and --verify both choose among compiled plans; give one of them.")


def _verified(
    plan: Plan,
    work: Workload,
    compiler: Compiler,
    most: int,
    against: Sequence[str],
    time_limit: float | None,
    say: Callable[[str], None],
) -> Verification:
    """The best plans and those with the pins of `against`, compiled."""
    from autoshard.comparing.verify import verify

    pins = {text: common.pins(text.split(";")) or {} for text in against}
    return verify(
        plan, work.fn, *work.args, target=compiler.value, k=most, time_limit=time_limit, progress=say, pins=pins
    )


def _best_carried(plan: Plan, work: Workload, most: int, time_limit: float | None, say: Callable[[str], None]) -> Plan:
    """The plan whose specs alone, or with the least constraints, take the shortest step; the comparison goes to stderr."""
    from autoshard.carrying.carry import target_of
    from autoshard.comparing.carried_plans import best_carried

    target = target_of(plan)
    found = best_carried(plan, work.fn, *work.args, target=target, k=most, time_limit=time_limit, progress=say)
    typer.echo(str(found), err=True)
    return found.best


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
    from autoshard.planning.files.plan_file import dumps
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
    if verified is not None and (verified.is_slow or verified.is_refused):
        raise typer.Exit(1)
    if verified is not None and verified.refusals:
        raise typer.Exit(REFUSED)
