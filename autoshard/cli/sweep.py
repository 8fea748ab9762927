"""`autoshard sweep` and `autoshard ask`: many points, their frontier, and questions to it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from autoshard.cli import common


def sweep(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="What to sweep over.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where results go.")] = Path("results"),
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep results there: jobs that share it never repeat a point.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes of this machine, all cores by default; 0 for this process.")
    ] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Solve on the Dask cluster with this scheduler.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Solve on this Ray cluster; local starts one here.")
    ] = None,
    json: common.AsJson = False,
    verbose: common.Verbose = False,
) -> None:
    """Search every point of a job, in parallel, and show the frontier of latency against cost.

    autoshard sweep job.toml -o results/

    A job that was interrupted goes on where it stopped. Exits with 1 when a point failed or a result could not be kept.
    """
    from json import dumps

    from autoshard.sweep.job import load_job
    from autoshard.sweep.points import points
    from autoshard.sweep.results import FAILED
    from autoshard.sweep.rows import sweep_result
    from autoshard.sweep.runner import Sweep
    from autoshard.sweep.store import Store
    from autoshard.sweep.text import render

    with common.reported(verbose):
        if dask is not None and ray is not None:
            raise common.Misuse("--dask and --ray name two engines; one would do.")
        asked = load_job(job)
        every = list(points(asked))
        output.mkdir(parents=True, exist_ok=True)
        path = store or output / "points.sqlite"
        with Store(path) as kept, _progress(asked.name, len(every)) as bar:
            run = Sweep(every, kept, _engine(workers, dask, ray), asked.constraints, bar.say)
            done = [bar.advanced(each) for each in run]
        found = sweep_result(asked, done, every, str(path))
        typer.echo(dumps(found.to_dict(), indent=1) if json else render(found), nl=json)
        _write(output / f"{asked.name}.json", found.to_dict())
        _closing(run, done, output / f"{asked.name}.json")
        if run.unkept or any(row.outcome == FAILED for row in found.rows):
            raise typer.Exit(1)


def _closing(run: Any, done: list[Any], path: Path) -> None:
    known = sum(each.known for each in done)
    typer.echo(f"{run.solved} points solved, {known} known from the store. Wrote {path}.", err=True)
    if run.unkept:
        typer.echo(f"autoshard: {len(run.unkept)} results could not be kept: {run.trouble}", err=True)


def _write(path: Path, data: Any) -> None:
    from json import dumps

    from autoshard.whole_files import write_whole

    try:
        write_whole(path, dumps(data, indent=1) + "\n")
    except OSError as error:
        raise common.Misuse(f"{path} could not be written, the text above is all: {error}.") from error


def _engine(workers: int | None, dask: str | None, ray: str | None) -> Any:
    from autoshard.sweep import engines

    if dask is not None:
        return engines.dask(dask)
    if ray is not None:
        return engines.ray("" if ray == "local" else ray)
    count = engines.cores() if workers is None else workers
    return engines.processes(count) if count else engines.here


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def advanced(self, done: Any) -> Any:
        self.bar.advance(self.task)
        return done

    def say(self, text: str) -> None:
        typer.echo(f"autoshard: {text}", err=True)


@contextmanager
def _progress(name: str, total: int) -> Any:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(escape(name), total=total))


def ask(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP.json", help="What autoshard sweep wrote.", exists=True, dir_okay=False)
    ],
    under_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="The cheapest slice at this latency or less.")
    ] = None,
    chips: Annotated[int | None, typer.Option(metavar="COUNT", help="The fastest plan on so many chips.")] = None,
    longest: Annotated[
        str | None, typer.Option(metavar="KNOB", help="The largest value of a knob that fits, such as context.")
    ] = None,
    gain: Annotated[
        str | None, typer.Option(metavar="KNOB:A:B", help="What B gains over A, such as weights:bf16:int8.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="Of this phase only.")] = None,
    verbose: common.Verbose = False,
) -> None:
    """Answer a question from a finished sweep; without one, show it again.

    autoshard ask results/palm.json --under-ms 30
    """
    from autoshard.sweep import text
    from autoshard.sweep.rows import load_sweep

    with common.reported(verbose):
        found = load_sweep(sweep)
        phases = found.phases if phase is None else (phase,)
        if phase is not None and phase not in found.phases:
            raise common.Misuse(f"{sweep} has no phase {phase}; it has {', '.join(found.phases)}.")
        parts = tuple(gain.split(":")) if gain is not None else ()
        if gain is not None and len(parts) != 3:
            raise common.Misuse(f"--gain {gain} is no KNOB:A:B, such as weights:bf16:int8.")
        lines: list[str] = []
        for name in phases:
            if under_ms is not None:
                lines.append(text.answer_cheapest(found, name, under_ms / 1e3))
            if chips is not None:
                lines.append(text.answer_fastest(found, name, chips))
            if longest is not None:
                lines.append(text.answer_longest(found, name, longest))
            if parts:
                lines += text.answer_gain(found, name, parts[0], parts[1], parts[2])
        typer.echo("\n".join(lines) if lines else text.render(found), nl=bool(lines))
