"""`autoshard sweep` and `autoshard ask`: many points, their frontier, and questions about it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from autoshard.cli import common
from autoshard.cli.audit import On

if TYPE_CHECKING:
    from autoshard.sweep.analysis.answers import Answer
    from autoshard.sweep.analysis.rows import SweepResult


def sweep(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of results.")] = Path(
        "results"
    ),
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The store of results; jobs with one store share points.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes on this machine, all cores by default; 0 for this process.")
    ] = None,
    dask: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Solve on the Dask cluster with this scheduler.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Solve on this Ray cluster; local starts one here.")
    ] = None,
    verify: Annotated[
        On | None, typer.Option(help="Compile the frontier's plans, and show their steps; kept in the store.")
    ] = None,
    json: common.AsJson = False,
    width: common.Width = None,
    verbose: common.Verbose = False,
) -> None:
    """Search every point of a job, in parallel, and show the frontier of latency against cost.

    autoshard sweep job.toml -o results/

    An interrupted job resumes where it stopped. Exits with 1 if a point failed or a result could not be stored.
    """
    from json import dumps

    from autoshard.sweep.analysis.answers import render
    from autoshard.sweep.analysis.rows import sweep_result
    from autoshard.sweep.job_file import load_job
    from autoshard.sweep.points import points
    from autoshard.sweep.results import FAILED
    from autoshard.sweep.runner import Sweep
    from autoshard.sweep.store import Store

    with common.report_errors(verbose, json):
        if dask is not None and ray is not None:
            raise common.Misuse("Give either --dask or --ray, not both.")
        asked = load_job(job)
        every = list(points(asked))
        output.mkdir(parents=True, exist_ok=True)
        path = store or output / "points.sqlite"
        with Store(path) as kept, _progress(asked.name, len(every)) as bar:
            run = Sweep(every, kept, _engine(workers, dask, ray), asked.constraints, bar.say)
            done = [bar.advance_bar(each) for each in run]
        found = sweep_result(asked, done, every, str(path))
        if verify is not None:
            from autoshard.sweep.compiled import compile_frontier

            with Store(path) as kept:
                found = compile_frontier(found, done, kept, verify.value, bar.say)
        typer.echo(dumps(found.to_dict(), indent=1) if json else render(found, width or common.columns()), nl=json)
        _write(output / f"{asked.name}.json", found.to_dict())
        _report_end(run, done, output / f"{asked.name}.json")
        if run.unkept or any(row.outcome == FAILED for row in found.rows):
            raise typer.Exit(1)


def _report_end(run: Any, done: list[Any], path: Path) -> None:
    known = sum(each.known for each in done)
    typer.echo(f"{run.solved} points solved, {known} known from the store. Wrote {path}.", err=True)
    if run.unkept:
        typer.echo(f"autoshard: {len(run.unkept)} results could not be stored: {run.trouble}", err=True)


def _write(path: Path, data: Any) -> None:
    from json import dumps

    from autoshard._util.files import write_whole

    try:
        write_whole(path, dumps(data, indent=1) + "\n")
    except OSError as error:
        raise common.Misuse(f"{path} could not be written; only the text above is complete: {error}.") from error


def _engine(workers: int | None, dask: str | None, ray: str | None) -> Any:
    from autoshard.sweep import engines

    if dask is not None:
        return engines.dask(dask)
    if ray is not None:
        return engines.ray("" if ray == "local" else ray)
    count = engines.cores() if workers is None else workers
    return engines.processes(count) if count else engines.run_here


_TELL_SECONDS = 60.0
"""The interval of progress lines where no bar can be drawn."""
_SPEED_SECONDS = 3600.0
"""The time over which the bar averages the duration of points: some take minutes."""


class _Bar:
    """A progress bar on a terminal, and progress lines elsewhere."""

    def __init__(self, bar: Any, task: Any, total: int) -> None:
        self.bar, self.task, self.total = bar, task, total
        self.ended = self.searched = 0
        self.began = self.told = monotonic()

    def advance_bar(self, done: Any) -> Any:
        self.bar.advance(self.task)
        self.ended += 1
        self.searched += not done.known and done.result.wall_seconds > 0
        now = monotonic()
        if self.bar.disable and now - self.told >= _TELL_SECONDS:
            self.told, left = now, (self.total - self.ended) * (now - self.began) / max(self.searched, 1)
            self.say(f"{self.ended} of {self.total} points, {_minutes(left)} left at this pace.")
        return done

    def say(self, text: str) -> None:
        typer.echo(f"autoshard: {text}", err=True)


def _minutes(seconds: float) -> str:
    return f"{max(round(seconds / 60), 1)} min"


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
    console = Console(stderr=True)
    plain = not console.is_terminal
    with Progress(*columns, console=console, speed_estimate_period=_SPEED_SECONDS, disable=plain) as bar:
        yield _Bar(bar, bar.add_task(escape(name), total=total), total)


def ask(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP.json", help="A result of autoshard sweep.", exists=True, dir_okay=False)
    ],
    under_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="The cheapest slice with at most this time per token.")
    ] = None,
    first_token_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="The cheapest slice with at most this time to the first token.")
    ] = None,
    chips: Annotated[
        int | None, typer.Option(metavar="COUNT", help="The fastest plan on this number of chips.")
    ] = None,
    most: Annotated[
        str | None, typer.Option(metavar="tokens|tokens-per-chip|tokens-per-dollar", help="The highest throughput.")
    ] = None,
    longest: Annotated[
        str | None, typer.Option(metavar="KNOB", help="The largest value of a variable that fits, such as context.")
    ] = None,
    gain: Annotated[
        str | None, typer.Option(metavar="KNOB:A:B", help="The gain of B over A, such as weights:bf16:int8.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help='Only this phase, such as decode or "prefill + decode".')] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="KNOB=VALUE", help="Only these points; may be repeated.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Write the plan of the answer; one file per phase.")
    ] = None,
    force: common.Force = False,
    json: common.AsJson = False,
    width: common.Width = None,
    verbose: common.Verbose = False,
) -> None:
    """Answer questions about a finished sweep; without a question, print the sweep again.

    autoshard ask results/palm.json --under-ms 30

    Limits apply to the other question: --longest context --under-ms 30 is the longest at 30 ms per token. Exits with 1 if no
    plan answers the question.
    """
    from autoshard.sweep.analysis import answers
    from autoshard.sweep.analysis.questions import Questions, answer_all
    from autoshard.sweep.analysis.rows import load_sweep

    with common.report_errors(verbose, json):
        if most is not None and most not in get_args(answers.Most):
            raise common.Misuse(f"--most must be one of {', '.join(get_args(answers.Most))}, got {most}.")
        _check_limits({"--under-ms": under_ms, "--first-token-ms": first_token_ms})
        found = load_sweep(sweep)
        for each in where or ():
            found = _select_points(found, each)
        phases = found.phases if phase is None else _phases(found, phase)
        per_token, first_token = (None if each is None else each / 1e3 for each in (under_ms, first_token_ms))
        limited = cast("answers.Most | None", most)
        questions = Questions(per_token, first_token, chips, limited, longest, _gain_of(gain))
        given = answer_all(found, phases, questions, width or common.columns())
        if questions.has_limits and not given:
            raise common.Misuse(f"That limit does not apply to the phases of {sweep} ({', '.join(phases)}).")
        _print_answers(given, _select_phases(found, phases), width, json)
        if given and not any(each.found for each in given):
            raise typer.Exit(1)
        if save is not None:
            _save(found, sweep, [each.row for each in given if each.row is not None], save, force)


def _gain_of(text: str | None) -> tuple[str, str, str] | None:
    """The variable and the two values of --gain."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 3:
        raise common.Misuse(f"--gain must be KNOB:A:B, such as weights:bf16:int8, got {text}.")
    return parts[0], parts[1], parts[2]


def _print_answers(given: list[Answer], sweep: SweepResult, width: int | None, json: bool) -> None:
    """Prints the answers; without any, the sweep. Answers fold on a terminal or to a given width only."""
    from json import dumps
    from textwrap import fill

    from autoshard.sweep.analysis.answers import render

    columns, folds = width or common.columns(), width is not None or sys.stdout.isatty()
    if json:
        every = [each.to_dict() for each in given]
        typer.echo(dumps({"answers": every} if given else sweep.to_dict(), indent=1))
    elif given:
        lines = [str(each) for each in given]
        typer.echo("\n".join(fill(line, columns) if folds and "\n" not in line else line for line in lines))
    else:
        typer.echo(render(sweep, columns), nl=False)


def _phases(found: Any, asked: str) -> tuple[str, ...]:
    """The phase of this name, ignoring spaces."""
    fitting = tuple(phase for phase in found.phases if phase.replace(" ", "") == asked.replace(" ", ""))
    if not fitting:
        raise common.Misuse(f"The phase must be one of {', '.join(found.phases)}, got {asked}.")
    return fitting


def _select_phases(found: Any, phases: tuple[str, ...]) -> Any:
    from dataclasses import replace

    return replace(found, rows=tuple(row for row in found.rows if row.phase in phases))


def _select_points(found: Any, pair: str) -> Any:
    """The sweep with only those points at which a variable (or `topology`, or `chip`) has a value."""
    from dataclasses import replace

    knob, sign, value = pair.partition("=")
    if not sign:
        raise common.Misuse(f"--where must be KNOB=VALUE, such as weights=int8, got {pair}.")

    def select(row: Any) -> Any:
        return getattr(row, knob) if knob in ("topology", "chip") else row.knobs.get(knob)

    rows = tuple(row for row in found.rows if str(select(row)) == value)
    if not rows:
        there = dict.fromkeys(str(each) for row in found.rows if (each := select(row)) is not None)
        knobs = dict.fromkeys(key for row in found.rows for key in row.knobs)
        would = f"{knob} has {', '.join(there)}" if there else f"there are {', '.join([*knobs, 'topology', 'chip'])}"
        raise common.Misuse(f"No point has {pair}; {would}.")
    return replace(found, rows=rows)


def _check_limits(limits: dict[str, float | None]) -> None:
    for flag, given in limits.items():
        if given is not None and not given > 0:
            raise common.Misuse(f"{flag} must be a number above 0, got {given:g}.")


def _save(found: Any, source: Path, rows: list[Any], path: Path, force: bool) -> None:
    """Writes the plans of the only answer."""
    from autoshard.sweep.store import Store, find_store
    from autoshard.sweep.worker import unpack

    if len(rows) != 1:
        names = ", ".join(f"{row.phase} on {row.name}" for row in rows) or "none"
        raise common.Misuse(f"--save needs exactly one answer, got {len(rows)} ({names}); select one with --phase.")
    (row,) = rows
    store = find_store(found.store, source)
    if store is None:
        raise common.Misuse(f"The store of {source}, {found.store or 'none'}, does not exist.")
    several = len(row.phase_seconds) > 1
    with Store(store) as kept:
        for phase in row.phase_seconds:
            target = path.with_stem(f"{path.stem}-{phase}") if several else path
            common.check_output(target, force)
            data = kept.plan(row.key, phase)
            if data is None:
                raise common.Misuse(f"{store} has no plan of {row.phase} on {row.name}; run the sweep again.")
            unpack(data).save(target)
            typer.echo(f"Wrote {target}.", err=True)
