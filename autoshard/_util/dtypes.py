"""Names and sizes of types: NumPy makes each name again whenever it is asked for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def dtype_name(dtype: Any) -> str:
    """The name of a type, such as `bfloat16`."""
    return str(dtype)


@cache
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
