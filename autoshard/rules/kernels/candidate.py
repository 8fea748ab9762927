"""A call of one of JAX's kernels that a jaxpr may be, with its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoshard.rules.rule import Local, Rule


@dataclass(frozen=True)
class Candidate:
    """A call with static arguments: a function of the flat operands, and its rule; `local` runs it on shards otherwise."""

    call: Callable[..., Any]
    rule: Rule
    local: Local | None = None


def kernel_of(closed: Any) -> Any:
    """The `pallas_call` equation of a kernel's jaxpr."""
    return next(eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "pallas_call")
