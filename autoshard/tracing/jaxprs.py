"""Queries on jaxprs: needed equations, inlined calls, closed-over constants."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from autoshard._util.identity import distinct
from autoshard.tracing.source_lines import source_of

INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
CALLS = """
checkpoint closed_call composite core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call jit pjit
remat2
""".split()

KERNELS = ("pallas_call", "ffi_call", "core_map")
"""Primitives that run a kernel of the user's, with a name of its own among the parameters."""


def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that the outputs or a side effect need, in order."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in wanted for v in eqn.outvars):
            kept.append(_mark_unused(eqn, wanted) if eqn.primitive.name == "pallas_call" else eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return kept[::-1]


def _mark_unused(eqn: Any, wanted: Collection[Any]) -> Any:
    """An equation whose results that nothing reads are marked as such (`DropVar`)."""
    return eqn.replace(outvars=[v if v in wanted else jex.DropVar(v.aval) for v in eqn.outvars])


def callee(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr that a call runs, and the arrays that it closes over."""
    inner = next(eqn.params[key] for key in INLINED if key in eqn.params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, jex.ClosedJaxpr) else (inner, ())


def is_rematerialised(eqn: Any) -> bool:
    """Whether a call is the rematerialisation of a `jax.checkpoint` in the backward pass."""
    kept_apart = eqn.params.get("prevent_cse", False)  # one flag for all operands, or one for each
    return bool(eqn.params.get("differentiated")) and (any(kept_apart) if isinstance(kept_apart, tuple) else kept_apart)


def scan_counts(params: Any) -> tuple[int, int]:
    """The numbers of constants and of carries of a scan; JAX 0.12 stores them in the operands' tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carries, _ = params["ft_in"].unpack()
    return len(constants), len(carries)


def without_sharding(eqn: Any) -> Any:
    """An equation without the user's sharding of its result, which is for another mesh: the plan shards it."""
    placed = [key for key in ("out_sharding", "sharding") if eqn.params.get(key) is not None]
    return eqn.replace(params={**eqn.params, **dict.fromkeys(placed)}) if placed else eqn


def is_held(constant: Any) -> bool:
    """Whether a constant is an array or a PRNG key, and not a scalar literal."""
    aval = jax.typeof(constant)
    return bool(aval.shape) or jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def distinct_arrays(constants: Iterable[Any]) -> list[Any]:
    """The arrays among constants, each once."""
    return distinct(each for each in constants if is_held(each))


def unbatch_predicate(condition: Any, body: Any, n_cond: int, n_body: int) -> tuple[Any, Any]:
    """A `while` whose predicate `vmap` has batched, with a scalar predicate.

    The loop runs while any element of the predicate holds, and updates the elements for which it holds.
    """
    test, step = jex.jaxpr_as_fun(condition), jex.jaxpr_as_fun(body)

    def is_any_true(*args: Any) -> Any:
        (flags,) = test(*args)
        return lax.reduce_or(flags, axes=tuple(range(flags.ndim)))

    def change(*args: Any) -> list[Any]:
        held, carry = args[:n_cond], args[n_cond + n_body :]
        (flags,) = test(*held, *carry)
        moved = step(*args[n_cond:])
        wide = [lax.broadcast_in_dim(flags, new.shape, range(flags.ndim)) for new in moved]
        return [lax.select_n(flag, old, new) for flag, old, new in zip(wide, carry, moved, strict=True)]

    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*condition.in_avals[:n_cond], *body.in_avals)]
    return jax.make_jaxpr(is_any_true)(*specs[:n_cond], *specs[n_cond + n_body :]), jax.make_jaxpr(change)(*specs)


def custom_vjps(jaxpr: Any) -> Iterator[str]:
    """The source lines that call a `custom_vjp`, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("custom_vjp_call"):
            yield source_of(eqn)
        for inner in jax.tree_util.tree_leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from custom_vjps(inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.ClosedJaxpr | jex.Jaxpr)
