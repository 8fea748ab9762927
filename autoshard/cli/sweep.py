"""`autoshard sweep` and `autoshard ask`: many points, their frontier, and questions to it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from time import monotonic
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

    from autoshard.sweep.analysis.answers import render
    from autoshard.sweep.analysis.rows import sweep_result
    from autoshard.sweep.job_file import load_job
    from autoshard.sweep.points import points
    from autoshard.sweep.results import FAILED
    from autoshard.sweep.runner import Sweep
    from autoshard.sweep.store import Store

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

    from autoshard._util.files import write_whole

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


_TELL_SECONDS = 60.0
"""How often a log, where no bar can be drawn, is told how far a sweep is."""
_SPEED_SECONDS = 3600.0
"""Over what time the bar takes the mean of how long points take: some take minutes."""


class _Bar:
    """A bar on a terminal, and now and then a line elsewhere."""

    def __init__(self, bar: Any, task: Any, total: int) -> None:
        self.bar, self.task, self.total = bar, task, total
        self.ended = self.searched = 0
        self.began = self.told = monotonic()

    def advanced(self, done: Any) -> Any:
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
        Path, typer.Argument(metavar="SWEEP.json", help="What autoshard sweep wrote.", exists=True, dir_okay=False)
    ],
    under_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="The cheapest slice at so long a token, or less.")
    ] = None,
    first_token_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="The cheapest slice at so long to the first token, or less.")
    ] = None,
    chips: Annotated[int | None, typer.Option(metavar="COUNT", help="The fastest plan on so many chips.")] = None,
    longest: Annotated[
        str | None, typer.Option(metavar="KNOB", help="The largest value of a knob that fits, such as context.")
    ] = None,
    gain: Annotated[
        str | None, typer.Option(metavar="KNOB:A:B", help="What B gains over A, such as weights:bf16:int8.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help='Of this phase only, such as decode or "prefill + decode".')] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="KNOB=VALUE", help="Of these points only; may be repeated.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Write the plan of the answer; one file a phase.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    verbose: common.Verbose = False,
) -> None:
    """Answer questions from a finished sweep; without one, show it again.

    autoshard ask results/palm.json --under-ms 30

    Limits hold for the questions beside them: --longest context --under-ms 30 is the longest at 30 ms a token.
    """
    from autoshard.sweep.analysis import answers
    from autoshard.sweep.analysis.rows import load_sweep

    with common.reported(verbose):
        _check_limits({"--under-ms": under_ms, "--first-token-ms": first_token_ms})
        found = load_sweep(sweep)
        for each in where or ():
            found = _only(found, each)
        phases = found.phases if phase is None else _phases(found, phase)
        parts = tuple(gain.split(":")) if gain is not None else ()
        if gain is not None and len(parts) != 3:
            raise common.Misuse(f"--gain {gain} is no KNOB:A:B, such as weights:bf16:int8.")
        asked = [None if each is None else each / 1e3 for each in (under_ms, first_token_ms)]
        given: list[answers.Answer] = []
        for name in phases:
            limits = answers.limits_of(found, name, asked[0], asked[1])
            if any(limits):
                given += answers.answer_cheapest(found, name, *limits)
            if chips is not None:
                given += answers.answer_fastest(found, name, chips, *limits)
            if longest is not None:
                given.append(answers.answer_longest(found, name, longest, *limits))
            if parts:
                values = [_value_of(found, parts[0], each) for each in parts[1:]]
                given += [answers.Answer(line) for line in answers.answer_gain(found, name, parts[0], *values)]
        if any(asked) and not given:
            raise common.Misuse(f"{sweep} has only {', '.join(phases)}, which that is no limit of.")
        shown = "\n".join(each.words for each in given) if given else answers.render(_of_phases(found, phases))
        typer.echo(shown, nl=bool(given))
        if save is not None:
            _save(found, sweep, [each.row for each in given if each.row is not None], save, force)


def _value_of(found: Any, knob: str, text: str) -> Any:
    """The value of a knob that is written so; the text itself if there is none."""
    return next((row.knobs[knob] for row in found.rows if str(row.knobs.get(knob)) == text), text)


def _phases(found: Any, asked: str) -> tuple[str, ...]:
    """The phase of this name, spaces aside."""
    fitting = tuple(phase for phase in found.phases if phase.replace(" ", "") == asked.replace(" ", ""))
    if not fitting:
        raise common.Misuse(f"The sweep has no phase {asked}; it has {', '.join(found.phases)}.")
    return fitting


def _of_phases(found: Any, phases: tuple[str, ...]) -> Any:
    from dataclasses import replace

    return replace(found, rows=tuple(row for row in found.rows if row.phase in phases))


def _only(found: Any, pair: str) -> Any:
    """The sweep with the points alone at which a knob (or `topology`, or `chip`) has a value."""
    from dataclasses import replace

    knob, sign, value = pair.partition("=")
    if not sign:
        raise common.Misuse(f"--where {pair} is no KNOB=VALUE, such as weights=int8.")

    def of(row: Any) -> Any:
        return getattr(row, knob) if knob in ("topology", "chip") else row.knobs.get(knob)

    rows = tuple(row for row in found.rows if str(of(row)) == value)
    if not rows:
        there = dict.fromkeys(str(each) for row in found.rows if (each := of(row)) is not None)
        knobs = dict.fromkeys(key for row in found.rows for key in row.knobs)
        would = f"{knob} has {', '.join(there)}" if there else f"there are {', '.join([*knobs, 'topology', 'chip'])}"
        raise common.Misuse(f"No point has {pair}; {would}.")
    return replace(found, rows=rows)


def _check_limits(limits: dict[str, float | None]) -> None:
    for flag, given in limits.items():
        if given is not None and not given > 0:
            raise common.Misuse(f"{flag} {given:g} is no limit; a number above 0 would do.")


def _save(found: Any, source: Path, rows: list[Any], path: Path, force: bool) -> None:
    """Writes the plans of the one row that was the answer."""
    from autoshard.sweep.store import Store
    from autoshard.sweep.worker import unpacked

    if len(rows) != 1:
        names = ", ".join(f"{row.phase} on {row.name}" for row in rows) or "none"
        raise common.Misuse(f"--save takes one answer, and there are {len(rows)} ({names}); --phase picks one.")
    (row,) = rows
    stores = [Path(found.store), source.parent / Path(found.store).name]
    store = next((each for each in stores if each.is_file()), None)
    if not found.store or store is None:
        raise common.Misuse(f"The plans of {source} are in {found.store or 'no store'}, which is not there.")
    several = len(row.phase_seconds) > 1
    with Store(store) as kept:
        for phase in row.phase_seconds:
            target = path.with_stem(f"{path.stem}-{phase}") if several else path
            common.writable(target, force)
            data = kept.plan(row.key, phase)
            if data is None:
                raise common.Misuse(f"{store} has no plan of {row.phase} on {row.name}; the sweep finds it again.")
            unpacked(data).save(target)
            typer.echo(f"Wrote {target}.", err=True)
