"""A function with the arguments it is to be laid out for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """A function with abstract (or concrete) arguments: what a target file's factory returns.

    **Arguments:**

    - `fn`: the function, of pytrees.
    - `args`: its positional arguments, pytrees of `jax.ShapeDtypeStruct` or arrays.
    - `donate_argnums`: the positions of arguments whose memory the results may take.
    - `name`: what the plan is called; the function's name by default.
    - `dims`: names of dimensions for formulas, as for `autoshard.search`.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate_argnums: tuple[int, ...] = ()
    name: str = ""
    dims: Mapping[str, str | int] = field(default_factory=dict)
