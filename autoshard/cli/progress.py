"""Progress on stderr for whatever takes longer than a moment, and results on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

Say = Callable[[str], None]


@contextmanager
def working(what: str, verbose: bool) -> Iterator[Say]:
    """Shows `what` is going on, with the latest word from the work itself; every word on its own line if `verbose`."""
    console = Console(stderr=True, highlight=False)
    with console.status(what) as status:

        def say(word: str) -> None:
            if verbose:
                console.log(word, markup=False)
            status.update(f"{what}: {word}".replace("[", r"\["))

        yield say


def show(text: str) -> None:
    """Writes a result to stdout as it is."""
    typer.echo(text.rstrip("\n"))
