"""Shared parts of the commands: options, errors and exit codes, progress, output files."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from autoshard._util.elapsed import elapsed
from autoshard._util.tables import columns as columns
from autoshard.errors import AutoshardError
from autoshard.target_file import Misuse as Misuse
from autoshard.target_file import workload as workload
from costmodels.machine.conventions import PricingError, pricing_from_dict
from costmodels.machine.topology import Topology

Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:NAME", help="A function with keyword arguments (sizes) that returns an autoshard.Workload."
    ),
]
PlanFile = Annotated[
    Path,
    typer.Argument(metavar="PLAN.json", help="A plan, as autoshard search -o writes it.", exists=True, dir_okay=False),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A keyword argument of NAME; may be repeated.")
]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="PATH=NAMES",
        help='Names for formulas: wi="E F" by argument, or E=4096 by size; may be repeated.',
    ),
]
PinOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="PATHS=AXES",
        help="Fix a layout: 'params.*.wq=None,x,yz', axes by dimension; may be repeated.",
    ),
]
TopologyName = Annotated[
    str, typer.Option("--topology", "-t", metavar="CHIP:AxBxC", help="v4:4x4x4, h100:4x8, a TOML file, or auto.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]
Reserve = Annotated[float | None, typer.Option(metavar="GIB", min=0, help="Memory to reserve on each chip.")]
Memory = Annotated[float | None, typer.Option(metavar="GIB", min=0, help="Memory limit per chip.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Bandwidth = Annotated[
    str | None,
    typer.Option(
        metavar="per-axis|total",
        help="The links of a collective: those of its axes, or all of a chip. By default that of the topology.",
    ),
]
Overlap = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        help="The part of the bandwidth time of collectives that computation hides, 0 to 1; or 'looped' or 'async'.",
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        metavar="COLUMNS", min=40, help="Columns to fill at most; by default those of the terminal, up to 120."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print progress messages and tracebacks.")]


@contextmanager
def report_errors(verbose: bool = False, json: bool = False) -> Iterator[None]:
    """Turns errors into a message on standard error and an exit code, and with `json` also into JSON on standard output."""
    try:
        yield
    except (AutoshardError, Misuse, OSError) as error:
        code = exit_code(error)
        if verbose:
            traceback.print_exc()
        else:
            typer.echo(f"autoshard: {error}", err=True)
        if json:
            typer.echo(dumps({"error": type(error).__name__, "message": str(error), "exit_code": code}, indent=2))
        raise typer.Exit(code) from error
    except KeyboardInterrupt:
        typer.echo("autoshard: interrupted.", err=True)
        raise typer.Exit(130) from None


def exit_code(error: BaseException) -> int:
    """2 for what has to be written differently, 1 for an answer that is no."""
    return 2 if isinstance(error, Misuse) or (isinstance(error, AutoshardError) and error.is_usage) else 1


@contextmanager
def progress(doing: str, verbose: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows work with its elapsed time, once it takes a second; every message on its own line if verbose."""
    if verbose:
        typer.echo(doing, err=True)
        yield lambda message: typer.echo(f"  {message}", err=True)
        return
    with elapsed(doing) as say:
        yield say


def in_bytes(gib: float | None) -> float | None:
    """GiB in bytes; None stays None."""
    return None if gib is None else gib * 2**30


def check_output(path: Path | None, force: bool) -> None:
    """Refuses an output file that exists or cannot be written, before any work.

    **Raises:** `Misuse`.
    """
    if path is None:
        return
    if path.is_dir():
        raise Misuse(f"The output must be a file, got the directory {path}.")
    if path.exists() and not force:
        raise Misuse(f"{path} exists; --force overwrites it.")
    if not path.parent.is_dir():
        raise Misuse(f"{path.parent} is not a directory; create it first.")


def with_conventions(topology: str, bandwidth: str | None, overlap: str | None) -> Topology:
    """The topology of a text, with the requested conventions instead of its own.

    **Raises:** `TopologyError`; `Misuse` for unknown conventions.
    """
    from autoshard.annotating.attached import topology_of

    part = None if overlap is None else _value(overlap)  # a number or a name
    asked = {key: value for key, value in (("bandwidth", bandwidth), ("overlap", part)) if value is not None}
    found = topology_of(topology)
    try:
        return dataclasses.replace(found, pricing=pricing_from_dict(found.pricing.to_dict() | asked))
    except PricingError as error:
        raise Misuse(str(error)) from error


# --- the user's target file


def settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["batch=64", "weights=int8"]` as keyword arguments: integers, floats, true and false, or else text.

    **Raises:** `Misuse`.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier():
            raise Misuse(f"--set must be KEY=VALUE, such as batch=64, got {pair}.")
        found[key] = _value(value)
    return found


def pins(texts: Sequence[str] | None) -> dict[str, Any] | None:
    """`["params.*.wq=None,x,yz"]` as pins of arguments."""
    from autoshard.annotating.pins import parse_pin

    return dict(map(parse_pin, texts)) if texts else None


def names(pairs: Sequence[str] | None) -> dict[str, str | int]:
    """`["wi=E F", "B=64"]` as names of dimensions, by argument or by size.

    **Raises:** `Misuse`.
    """
    found: dict[str, str | int] = {}
    for pair in pairs or ():
        key, sign, words = pair.rpartition("=")
        if not sign or not key or not words:
            raise Misuse(f'--dim must be PATH=NAMES, such as wi="E F", or NAME=SIZE, such as E=4096, got {pair}.')
        found[key] = int(words) if words.isdigit() and key.isidentifier() else words
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
