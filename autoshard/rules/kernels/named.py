"""JAX's own kernels whose grids do not show what may be split: paged attention and grouped matmuls.

Each is a named `jit` around a `pallas_call`. The static arguments of the call are not in its jaxpr. They are recovered from the
shapes and numbers in it, and the function is traced with them: it is the kernel only if its jaxpr is the same. One
operation of the plan then calls JAX's function on each chip's shards.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.extend.core import Primitive

from autoshard.rules.kernels import grouped_matmul, paged_attention
from autoshard.rules.kernels.candidate import Candidate
from autoshard.rules.rule import Pieces, Rule

_OPS = "jax.experimental.pallas.ops.tpu"
_READERS: dict[str, tuple[str, Callable[[Any, Any], Iterator[Candidate]]]] = {
    "paged_attention": (f"{_OPS}.paged_attention.paged_attention_kernel", paged_attention.paged),
    "ragged_paged_attention": (f"{_OPS}.ragged_paged_attention.kernel", paged_attention.ragged),
    "gmm": (f"{_OPS}.megablox.gmm", grouped_matmul.candidates),
}
"""Per name of a jitted function its module, and the calls of it that a jaxpr may be."""


@dataclass(frozen=True)
class Call:
    """A call of a kernel, as a parameter of its equation."""

    name: str
    rule: Rule


def named_kernel(eqn: Any) -> Any | None:
    """The equation of one opaque kernel that a call of a jitted function is; None if it is another function."""
    name = eqn.params.get("name")
    if eqn.primitive.name not in ("jit", "pjit") or name not in _READERS or not isinstance(name, str):
        return None
    made = _rule(name, eqn.params["jaxpr"])
    if made is None:
        return None
    return eqn.replace(primitive=_primitive(name), params={"call": Call(name, made)})


@functools.lru_cache(maxsize=256)
def _rule(name: str, closed: Any) -> Rule | None:
    module, reader = _READERS[name]
    kernels = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    if module not in sys.modules or len(kernels) != 1:
        return None
    try:
        found = next(
            (each for each in reader(sys.modules[module], closed) if _is_call_of(each.call, name, closed)), None
        )
    except (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ):  # another function of the name, or another JAX
        return None
    return None if found is None else _without_too_small(found, closed)


def _is_call_of(fn: Callable[..., Any], name: str, closed: Any) -> bool:
    """Whether a jaxpr is that of a function."""
    try:
        (eqn,) = jax.make_jaxpr(fn)(*_specs(closed.in_avals)).jaxpr.eqns
    except (ValueError, TypeError, NotImplementedError, AssertionError):  # not with these static arguments
        return False
    return eqn.params.get("name") == name and str(eqn.params["jaxpr"]) == str(closed)


def _specs(avals: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]


def _without_too_small(found: Candidate, closed: Any) -> Rule:
    """A candidate's rule in which dimensions stay whole whose shards of one element the kernel refuses."""
    if found.local is not None:
        return replace(found.rule, local=found.local)
    factors = list(found.rule.factors)
    for i, factor in enumerate(factors):
        if factor.kind != "whole" and not _accepts(found, closed, i):
            factors[i] = replace(factor, kind="whole")
    return replace(found.rule, factors=tuple(factors), local=functools.partial(_run, found))


def _accepts(found: Candidate, closed: Any, factor: int) -> bool:
    """Whether a kernel runs on shards of one element along a factor."""
    sizes = [1 if i == factor else each.size for i, each in enumerate(found.rule.factors)]
    specs = [
        jax.ShapeDtypeStruct([prod(sizes[i] for i in dim) for dim in dims], aval.dtype)
        for dims, aval in zip(found.rule.inputs, closed.in_avals, strict=True)
    ]
    try:
        jax.eval_shape(found.call, *specs)
    except (ValueError, TypeError, NotImplementedError, AssertionError, ZeroDivisionError):
        return False
    return True


def _run(found: Candidate, eqn: Any, rule: Rule, pieces: Pieces, *operands: Any) -> Sequence[Any]:
    return jax.tree.leaves(found.call(*operands))


@functools.cache
def _primitive(name: str) -> Primitive:
    """The primitive of a kernel, which exists in plans only: it has the shapes of its equation."""
    made = Primitive(f"kernel:{name}")
    made.multiple_results = True
    return made
