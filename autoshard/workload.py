"""A function to be planned, with its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """A function with abstract (or concrete) arguments, as a target file's factory returns it.

    **Arguments:**

    - `fn`: the function, of pytrees.
    - `args`: its positional arguments, pytrees of `jax.ShapeDtypeStruct` or arrays.
    - `donate_argnums`: the positions of arguments whose memory the results may take.
    - `name`: the name of the plan; by default the function's name.
    - `dims`: names of dimensions for formulas, as for `autoshard.search`.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate_argnums: tuple[int, ...] = ()
    name: str = ""
    dims: Mapping[str, str | int] = field(default_factory=dict)
