"""`autoshard phases`: several phases of one model with one layout of their shared arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoshard.cli import common

if TYPE_CHECKING:
    from autoshard.phases import PhasePlans

_Targets = Annotated[
    list[str], typer.Argument(metavar="FILE.py:NAME FILE.py:NAME ...", help="The phases, each named NAME.")
]
_Share = Annotated[str, typer.Option(metavar="ARGUMENT", help="The argument whose arrays all phases share.")]
_Weights = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=NUMBER", help="Weight of a phase: its number of runs; 1 by default."),
]
_Limits = Annotated[list[str] | None, typer.Option(metavar="NAME=SECONDS", help="Time limit of a phase's step.")]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="[NAME.]KEY=VALUE", help="A keyword argument of all phases, or of one; may be repeated."
    ),
]
_Folder = Annotated[Path | None, typer.Option("--output", "-o", help="Write NAME.json of each into this folder.")]
_TimeLimit = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0, help="For each search: stop then, with the remaining gap."),
]
_Padding = Annotated[bool, typer.Option(help="Pad dimensions that the mesh axes do not divide, where that is faster.")]


def phases(
    targets: _Targets,
    topology: common.TopologyName,
    share: _Share = "params",
    weight: _Weights = None,
    at_most: _Limits = None,
    sizes: _Settings = None,
    output: _Folder = None,
    reserve: common.Reserve = None,
    time_limit: _TimeLimit = None,
    padding: _Padding = True,
    bandwidth: common.Bandwidth = None,
    overlap: common.Overlap = None,
    json: common.AsJson = False,
    verbose: common.Verbose = False,
) -> None:
    """Search the layout of shared arrays that is fastest for several phases together, and the cost of sharing for each.

    autoshard phases palm.py:prefill palm.py:decode -t v4:4x4x4 --set batch=64 --weight decode=64
    """
    from autoshard.phases import search_phases

    with common.report_errors(verbose, json):
        named = _named(targets)
        names = list(named)
        weights, limits = _numbers("--weight", weight, names), _numbers("--at-most", at_most, names)
        where = common.with_conventions(topology, bandwidth, overlap)
        with common.progress(f"Searching {', '.join(names)} on {topology}", verbose) as say:
            works = {
                name: common.workload(target, common.settings(_own(sizes, name, names)))
                for name, target in named.items()
            }
            found = search_phases(
                works,
                shared=share,
                topology=where,
                weights=weights,
                at_most=limits or None,
                reserve_bytes=common.in_bytes(reserve),
                time_limit=time_limit,
                progress=say,
                padding=padding,
            )
        _show(found, output, json)


def _show(found: PhasePlans, output: Path | None, json: bool) -> None:
    """Prints the plans, and writes them to the folder if there is one."""
    from json import dumps, loads

    from autoshard.planning.files.plan_file import dumps as plan_text

    plans = {name: loads(plan_text(plan)) for name, plan in found.items()} if json else {}
    typer.echo(dumps(plans) if json else found.explain(), nl=json)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, plan in found.items():
            plan.save(output / f"{name}.json")
        typer.echo(f"Wrote {len(found)} plans to {output}.", err=True)
    elif not json:
        typer.echo("-o DIR keeps the plans, for explain, audit and report.", err=True)


def _named(targets: Sequence[str]) -> dict[str, str]:
    """The targets by the names of their phases.

    **Raises:** `Misuse`.
    """
    names = [target.rpartition(":")[2] for target in targets]
    if len(set(names)) < len(names) or len(names) < 2:
        raise common.Misuse(f"Expected two or more phases with different names, got {', '.join(names)}.")
    return dict(zip(names, targets, strict=True))


def _numbers(option: str, pairs: Sequence[str] | None, names: Sequence[str]) -> dict[str, float]:
    """`["decode=64"]` as numbers by phase.

    **Raises:** `Misuse`.
    """
    found = {}
    for pair in pairs or ():
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise common.Misuse(f"{option} must be NAME=NUMBER, such as {names[-1]}=64, got {pair}.") from None
        if name not in names or not found[name] > 0:
            raise common.Misuse(f"{option} must be a number above 0 for one of {', '.join(names)}, got {pair}.")
    return found


def _own(pairs: Sequence[str] | None, name: str, names: Sequence[str]) -> list[str]:
    """The settings of one phase: those for all phases, and those with its name."""
    found = []
    for pair in pairs or ():
        head, dot, _ = pair.partition("=")[0].partition(".")
        if not dot or head == name:
            found.append(pair if not dot else pair[len(head) + 1 :])
        elif head not in names:
            raise common.Misuse(f"--set {pair}: the phase must be one of {', '.join(names)}, got {head}.")
    return found
