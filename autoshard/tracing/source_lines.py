"""Source lines of equations."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax

_JAX_HOME = os.path.dirname(os.path.abspath(jax.__file__))
_INSTALLED = (os.path.dirname(_JAX_HOME), os.path.dirname(os.__file__))
"""The folders of installed packages and of Python itself."""
_OWN_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def source_of(eqn: Any) -> str:
    """`file.py:line` of the innermost frame outside JAX and autoshard, or `unknown`."""
    return _innermost(getattr(eqn.source_info, "traceback", None))


@lru_cache(maxsize=4096)
def _innermost(raised: Any) -> str:
    """The innermost frame of a traceback; those of the layers of a Python loop are equal."""
    path, line = next(_frames(raised), ("", 0))
    return f"{os.path.basename(path)}:{line}" if path else "unknown"


def lines_of(eqn: Any) -> Iterator[tuple[str, int]]:
    """The file and line of every frame outside JAX and autoshard, the innermost first."""
    return _frames(getattr(eqn.source_info, "traceback", None))


def _frames(raised: Any) -> Iterator[tuple[str, int]]:
    for frame in getattr(raised, "frames", ()) or ():
        if not frame.file_name.startswith((_JAX_HOME, _OWN_HOME)) and "/jax/" not in frame.file_name:
            yield frame.file_name, frame.line_num


def is_jax_own(jaxpr: Any) -> bool:
    """Whether a jaxpr belongs to a function of JAX or autoshard, such as `jnp.where`."""
    return (getattr(jaxpr.debug_info, "func_filename", None) or "").startswith((_JAX_HOME, _OWN_HOME))


def user_line(error: BaseException) -> str:
    """The innermost line of an error outside of installed packages and of autoshard, as ` (model.py:12)`, or empty."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if os.path.isfile(frame.filename) and not frame.filename.startswith((*_INSTALLED, _OWN_HOME))
    ]
    return f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
