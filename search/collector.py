"""Garbage collection thresholds for traces and searches: full collections would visit millions of live objects."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (100_000, 20, 1_000_000)
"""Thresholds per generation: cyclic garbage of a trace and a search dies young, so older generations are rarely collected."""

_lock = threading.Lock()
_inside = 0
_before = gc.get_threshold()


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Raises the thresholds of Python's collector; the last thread to leave restores them.

    Large models are planned a fifth faster, in the same memory. A threshold of 0, which disables collections, is kept.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = gc.get_threshold()
            if _before[0]:
                gc.set_threshold(*_THRESHOLDS)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_before)
