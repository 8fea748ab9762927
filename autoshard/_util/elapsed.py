"""Progress on standard error: what is being done and for how long, once it takes more than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

SILENT_SECONDS = 1.0
"""The seconds before the first line."""
_MOST_BETWEEN = 60.0
"""The seconds between two lines at most, where lines are not overwritten; before that each wait is twice the last."""

Say = Callable[[str], None]


@contextmanager
def elapsed(doing: str, stream: TextIO | None = None, ended: str = "done") -> Iterator[Say]:
    """Shows work on standard error with its elapsed time: one changing line on a terminal, else a line now and then.

        with elapsed("autoshard: planning decode") as say:
            say("searching")          # autoshard: planning decode: searching (3 s)

    Work of less than a second shows nothing. Longer work ends with a line with its time, unless it raises.
    """
    shown = _Shown(doing, stream or sys.stderr)
    thread = threading.Thread(target=shown.run, daemon=True)
    thread.start()
    try:
        yield shown.say
    except BaseException:
        shown.stop(thread)
        raise
    shown.stop(thread)
    if shown.seconds >= SILENT_SECONDS:
        shown.write(f"{doing}: {ended} in {duration(shown.seconds)}\n")


def duration(seconds: float) -> str:
    """Elapsed time in whole seconds or minutes: `3 s`, `2 min 5 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Shown:
    """The lines about one piece of work."""

    def __init__(self, doing: str, stream: TextIO) -> None:
        self._doing, self._message, self._stream = doing, "", stream
        self._began, self._over = time.monotonic(), threading.Event()
        self._overwrites = stream.isatty()
        self.seconds = 0.0

    def say(self, message: str) -> None:
        """Takes what is being done at present."""
        self._message = message

    def run(self) -> None:
        """Writes lines until the work is over."""
        wait = SILENT_SECONDS
        while not self._over.wait(wait):
            seconds = time.monotonic() - self._began
            line = ": ".join(filter(None, (self._doing, self._message))) + f" ({seconds:.0f} s)"
            self.write(f"\r\x1b[K{line}" if self._overwrites else f"{line}\n")
            wait = SILENT_SECONDS if self._overwrites else min(2 * wait, _MOST_BETWEEN)

    def stop(self, thread: threading.Thread) -> None:
        """Ends the lines."""
        self.seconds = time.monotonic() - self._began
        self._over.set()
        thread.join()
        if self._overwrites and self.seconds >= SILENT_SECONDS:
            self.write("\r\x1b[K")

    def write(self, text: str) -> None:
        """Writes to the stream, unless it is closed."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass
