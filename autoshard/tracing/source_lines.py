"""Source lines of equations, and element sizes of types."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

_JAX_HOME = os.path.dirname(os.path.abspath(jax.__file__))
_OWN_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def source_of(eqn: Any) -> str:
    """`file.py:line` of the innermost frame outside JAX and autoshard, or `unknown`."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()) or ():
        if not frame.file_name.startswith((_JAX_HOME, _OWN_HOME)) and "/jax/" not in frame.file_name:
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return "unknown"


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
