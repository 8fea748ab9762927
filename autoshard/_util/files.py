"""Atomic writes of text files."""

from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{32}\.tmp")
_STALE_SECONDS = 3600.0
"""The age above which a temporary file counts as left by a killed process."""


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically, through a temporary file beside it.

    Temporary files of killed processes are removed after an hour.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a full disk must raise before the old file is replaced
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sweep(path.parent)


def _sweep(directory: Path) -> None:
    """Removes the temporary files of killed processes."""
    with suppress(OSError):
        for each in os.scandir(directory):
            if _TEMPORARY.fullmatch(each.name) and time.time() - each.stat().st_mtime > _STALE_SECONDS:
                with suppress(OSError):  # another process was faster
                    os.unlink(each.path)
