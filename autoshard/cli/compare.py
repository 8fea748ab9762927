"""`autoshard diff`, `why-not` and `best`: comparisons of plans."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from autoshard.cli import common

_Limit = Annotated[float | None, typer.Option(metavar="SECONDS", min=0, help="Stop then, with the plans found so far.")]


def diff(
    before: common.PlanFile,
    after: common.PlanFile,
    json: common.AsJson = False,
    width: common.Width = None,
    verbose: common.Verbose = False,
) -> None:
    """Compare two plans: step times, operations that differ with their costs, arrays with other layouts."""
    from autoshard.comparing.diff import diff as compare
    from autoshard.plan import load

    width = width or common.columns()
    with common.report_errors(verbose, json):
        found = compare(load(before), load(after))
        typer.echo(json_module.dumps(found.to_dict(), indent=2) if json else found.render(width), nl=json)


def why_not(
    plan: common.PlanFile,
    family: Annotated[str, typer.Argument(metavar="[LAYOUT]", help="A baseline layout, such as 'Megatron 1D'.")] = "",
    pin: common.PinOptions = None,
    memory: common.Memory = None,
    time_limit: _Limit = None,
    json: common.AsJson = False,
    width: common.Width = None,
    verbose: common.Verbose = False,
) -> None:
    """Compare a plan with the best plan under another layout, pin or memory limit, operation by operation.

    autoshard why-not plan.json "Megatron 1D"
    autoshard why-not plan.json --pin "params.*.wq=None,x,yz"
    """
    from autoshard.comparing.other_plans import why_not as compare
    from autoshard.plan import load

    width = width or common.columns()
    with common.report_errors(verbose, json):
        if not family and not pin and memory is None:
            from autoshard.planning.baselines import FAMILIES

            raise common.Misuse(f"Give a layout name ({', '.join(FAMILIES)}), --pin or --memory.")
        with common.progress(f"Searching another layout for {plan}", verbose) as say:
            held = None if memory is None else memory * 2**30
            found = compare(load(plan), family, common.pins(pin), held, time_limit, say)
        typer.echo(json_module.dumps(found.to_dict(), indent=2) if json else found.render(width), nl=json)


def best(
    plan: common.PlanFile,
    count: Annotated[int, typer.Option("--count", "-k", metavar="K", min=1, help="Number of plans.")] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plans into this folder, as 1.json, 2.json, ...")
    ] = None,
    time_limit: _Limit = None,
    json: common.AsJson = False,
    width: common.Width = None,
    verbose: common.Verbose = False,
) -> None:
    """Print the k best plans that shard at least one matmul differently, each compared with the best."""
    from autoshard._util.tables import time as in_words
    from autoshard.comparing.diff import diff as compare
    from autoshard.comparing.other_plans import best_plans
    from autoshard.plan import load
    from autoshard.planning.files.plan_file import dumps

    width = width or common.columns()
    with common.report_errors(verbose, json):
        with common.progress(f"Searching the {count} best plans", verbose) as say:
            found = best_plans(load(plan), count, time_limit, say)
        if json:
            every = {"proven": found.proven, "plans": [json_module.loads(dumps(each)) for each in found]}
            typer.echo(json_module.dumps(every))
        for place, other in enumerate(() if json else found):
            step = f"{place + 1}. {in_words(other.estimate.seconds)}"
            typer.echo(
                step if place == 0 else f"\n{step}\n{compare(found[0], other).render_operations(width)}", nl=place == 0
            )
        if len(found) < count and not json:
            typer.echo("There are no more.")
        if not found.proven and not json:
            typer.echo("The time limit was reached: there may be other plans between these.")
        if output is not None:
            output.mkdir(exist_ok=True)
            for place, other in enumerate(found):
                other.save(output / f"{place + 1}.json")
            typer.echo(f"Wrote {len(found)} plans to {output}.", err=True)
