"""Small questions about jaxprs: what is needed, what is walked into, what is closed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from autoshard.tracing.source_lines import source_of

INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
CALLS = """
checkpoint closed_call composite core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr custom_vmap_call jit pjit
remat2
""".split()

KERNELS = ("pallas_call", "ffi_call", "core_map")
"""Primitives that run a kernel of the user's, with a name of its own among the parameters."""


def needed(jaxpr: Any) -> list[Any]:
    """The equations that the outputs or a side effect need, in order."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in wanted for v in eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return kept[::-1]


def called(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr that a call runs, and the arrays that it closes over."""
    inner = next(eqn.params[key] for key in INLINED if key in eqn.params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, jex.ClosedJaxpr) else (inner, ())


def computed_again(eqn: Any) -> bool:
    """Whether a call computes what was computed before, and is to do so: a `jax.checkpoint` on the way back."""
    kept_apart = eqn.params.get("prevent_cse", False)  # one answer for all operands, or one for each
    return bool(eqn.params.get("differentiated")) and (any(kept_apart) if isinstance(kept_apart, tuple) else kept_apart)


def scan_counts(params: Any) -> tuple[int, int]:
    """How many operands of a scan are constants and how many carries; JAX 0.12 says it by the operands' tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carries, _ = params["ft_in"].unpack()
    return len(constants), len(carries)


def without_sharding(eqn: Any) -> Any:
    """An equation without the user's own placement of its result, made for the user's mesh: the plan places it."""
    placed = [key for key in ("out_sharding", "sharding") if eqn.params.get(key) is not None]
    return eqn.replace(params={**eqn.params, **dict.fromkeys(placed)}) if placed else eqn


def is_held(constant: Any) -> bool:
    """Whether a constant is more than a number written into the program: an array, or a PRNG key."""
    aval = jax.typeof(constant)
    return bool(aval.shape) or jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def unique(arrays: Sequence[Any]) -> list[Any]:
    return list({id(array): array for array in arrays if is_held(array)}.values())


def unbatched(condition: Any, body: Any, n_cond: int, n_body: int) -> tuple[Any, Any]:
    """Under `vmap` a predicate has dimensions: the loop goes on while any of it holds, and changes what it holds for."""
    test, step = jex.jaxpr_as_fun(condition), jex.jaxpr_as_fun(body)

    def go_on(*args: Any) -> Any:
        (flags,) = test(*args)
        return lax.reduce_or(flags, axes=tuple(range(flags.ndim)))

    def change(*args: Any) -> list[Any]:
        held, carry = args[:n_cond], args[n_cond + n_body :]
        (flags,) = test(*held, *carry)
        moved = step(*args[n_cond:])
        wide = [lax.broadcast_in_dim(flags, new.shape, range(flags.ndim)) for new in moved]
        return [lax.select_n(flag, old, new) for flag, old, new in zip(wide, carry, moved, strict=True)]

    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*condition.in_avals[:n_cond], *body.in_avals)]
    return jax.make_jaxpr(go_on)(*specs[:n_cond], *specs[n_cond + n_body :]), jax.make_jaxpr(change)(*specs)


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
