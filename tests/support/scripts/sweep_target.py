"""What the tests sweep over: two layers of a feed-forward network, small enough that a search takes no time.

With `trouble` a point goes wrong on purpose: "raise" in the factory, "die" in the worker (once, or each time) where the
network is wide.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from autoshard import Workload


def feed_forward(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def network(batch: int = 8, width: int = 256, dtype: str = "bfloat16", trouble: str = "", sign: str = "") -> Workload:
    """A feed-forward network; `sign` names a file that tells workers from the process that started them."""
    if trouble == "raise":
        raise ValueError("no such network")
    if trouble.startswith("die") and width > 256 and Path(sign).read_text() != str(os.getpid()):
        if trouble == "die":
            os._exit(1)
        if not Path(f"{sign}.died").exists():
            Path(f"{sign}.died").touch()
            os._exit(1)
    params = {
        "up": jax.ShapeDtypeStruct((width, 4 * width), jnp.dtype(dtype)),
        "down": jax.ShapeDtypeStruct((4 * width, width), jnp.dtype(dtype)),
    }
    return Workload(feed_forward, (params, jax.ShapeDtypeStruct((batch, width), jnp.dtype(dtype))), name="network")
