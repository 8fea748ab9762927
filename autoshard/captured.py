"""The arrays that the parts of a function close over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from autoshard.jaxprs import CALLS, INLINED, is_held, needed, unique
from autoshard.mapped import meaning


def closed_over(jaxpr: Any) -> list[Any]:
    """The arrays that calls, loops and branches inside a jaxpr close over, at any depth."""
    found = []
    for eqn in needed(jaxpr):
        for inner, consts in _walked(eqn):
            found += [*(c for c in consts if is_held(c)), *closed_over(inner)]
    return unique(found)


def _walked(eqn: Any) -> list[tuple[Any, Sequence[Any]]]:
    """The jaxprs that the tracer walks into at an equation, with the constants they close over."""
    name, params = eqn.primitive.name, eqn.params
    if name == "shard_map":
        inside = [meaning(eqn)]
    elif name in CALLS:
        inside = [next(params[key] for key in INLINED if key in params)]
    elif name == "while":
        inside = [params["cond_jaxpr"], params["body_jaxpr"]]
    else:
        inside = {"scan": [params.get("jaxpr")], "cond": params.get("branches", ())}.get(name, ())
    return [(each.jaxpr, each.consts) if isinstance(each, jex.ClosedJaxpr) else (each, ()) for each in inside]
