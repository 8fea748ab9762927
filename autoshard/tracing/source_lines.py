"""Source lines of equations, and element sizes of types."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

_JAX_HOME = os.path.dirname(os.path.abspath(jax.__file__))
_INSTALLED = (os.path.dirname(_JAX_HOME), os.path.dirname(os.__file__))
"""The folders of installed packages and of Python itself."""
_OWN_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def source_of(eqn: Any) -> str:
    """`file.py:line` of the innermost frame outside JAX and autoshard, or `unknown`."""
    path, line = next(iter(lines_of(eqn)), ("", 0))
    return f"{os.path.basename(path)}:{line}" if path else "unknown"


def lines_of(eqn: Any) -> Iterator[tuple[str, int]]:
    """The file and line of every frame outside JAX and autoshard, the innermost first."""
    raised = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(raised, "frames", ()) or ():
        if not frame.file_name.startswith((_JAX_HOME, _OWN_HOME)) and "/jax/" not in frame.file_name:
            yield frame.file_name, frame.line_num


def is_jax_own(jaxpr: Any) -> bool:
    """Whether a jaxpr belongs to a function of JAX or autoshard, such as `jnp.where`."""
    return (getattr(jaxpr.debug_info, "func_filename", None) or "").startswith((_JAX_HOME, _OWN_HOME))


def itemsize_of(dtype: Any) -> float:
    """Bytes of one element; 0.5 for 4-bit types."""
    name = str(dtype)
    if "int4" in name or "float4" in name:
        return 0.5
    if "int2" in name:
        return 0.25
    if name.startswith("key<"):
        return float(dtype.itemsize)
    return float(np.dtype(dtype).itemsize)


def user_line(error: BaseException) -> str:
    """The innermost line of an error outside of installed packages and of autoshard, as ` (model.py:12)`, or empty."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if os.path.isfile(frame.filename) and not frame.filename.startswith((*_INSTALLED, _OWN_HOME))
    ]
    return f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
