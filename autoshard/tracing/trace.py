"""Tracing of a JAX function to a program over factors.

Public JAX traces the function to a jaxpr. Calls, remat and custom derivatives are inlined. `scan`, `while` and `cond`
become regions with boundary operations, each of which owns the layout of a value that crosses the boundary. Arguments
keep their paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from autoshard.errors import TraceError
from autoshard.tracing.blocks import Literal, Traced
from autoshard.tracing.closed_over import closed_over, first_alike
from autoshard.tracing.jaxprs import custom_vjps
from autoshard.tracing.loops.in_place import in_place
from autoshard.tracing.pytrees import argument_paths
from autoshard.tracing.walk import Tracer
from costmodels.program.program import Program


def trace(
    fn: Callable[..., Any], *args: Any, donate_argnums: Sequence[int] = (), name: str = "", strict: bool = False
) -> Traced:
    """Traces a function of pytrees to a program.

    **Arguments:**

    - `args`: pytrees of arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.
    - `strict`: raise for primitives without a rule instead of replicating their arrays.

    **Raises:** `TraceError` if JAX cannot trace the function with these arguments; `UnsupportedPrimitiveError`.
    """
    try:
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    except Exception as error:
        raise TraceError(f"{_name_of(fn)} could not be traced with these arguments: {error}") from error
    own_derivatives = next(custom_vjps(closed.jaxpr), "")
    closed = in_place(closed, _donated(args, donate_argnums))
    in_tree, paths = jax.tree_util.tree_structure(args), argument_paths(fn, args)
    out_named, out_tree = jax.tree_util.tree_flatten_with_path(out_shape)
    result_paths = tuple("result" + jax.tree_util.keystr(path) for path, _ in out_named)
    tracer = Tracer(strict)
    argument_values = [tracer.source(var.aval, path) for var, path in zip(closed.jaxpr.invars, paths, strict=True)]
    constants, constant_values = _held(tracer, closed)
    held = [tracer.held[0][id(array)] for array in closed.consts]
    env = dict(zip((*closed.jaxpr.invars, *closed.jaxpr.constvars), (*argument_values, *held), strict=True))
    block = tracer.block(closed.jaxpr, env, 0)
    results = [tracer.sink(atom, path) for atom, path in zip(block.outputs, result_paths, strict=True)]
    donated = _donations(args, donate_argnums, closed.jaxpr.invars, block.outputs, tracer.values)
    program = Program(
        name or _name_of(fn),
        tuple(tracer.values),
        tuple(op for op in tracer.operations if op is not None),
        tuple(tracer.regions),
        tuple(range(len(argument_values))),
        tuple(range(len(argument_values), len(argument_values) + len(constant_values))),
        tuple(results),
        donated,
        tuple(dict.fromkeys(tracer.warnings)),
    )
    return Traced(
        program=program,
        block=block,
        argument_values=tuple(argument_values),
        constant_values=tuple(constant_values),
        constants=tuple(constants),
        in_tree=in_tree,
        out_tree=out_tree,
        paths=paths,
        result_paths=result_paths,
        literal_results=block.outputs,
        custom_vjp=own_derivatives,
    )


def _held(tracer: Tracer, closed: Any) -> tuple[list[Any], list[int]]:
    """The distinct arrays that a function and its parts close over, and their values; registers all in the tracer."""
    arrays = list({id(array): array for array in (*closed.consts, *closed_over(closed.jaxpr))}.values())
    first = first_alike(arrays)
    kept = list(dict.fromkeys(first))
    values = {at: tracer.hold(arrays[at], f"constant {k}") for k, at in enumerate(kept)}
    tracer.held[0] = {id(array): values[at] for array, at in zip(arrays, first, strict=True)}
    return [arrays[at] for at in kept], list(values.values())


def _name_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or type(fn).__name__


def _donated(args: Sequence[Any], donate_argnums: Sequence[int]) -> list[int]:
    """The positions of donated flat arguments."""
    counts = [len(jax.tree_util.tree_leaves(arg)) for arg in args]
    return [sum(counts[:i]) + k for i in sorted(donate_argnums) for k in range(counts[i])]


def _donations(args, donate_argnums, invars, outputs, values) -> tuple[tuple[int, int], ...]:
    """Pairs each donated flat argument with the first free result of the same shape and type, as JAX does."""
    free = {k: values[atom] for k, atom in enumerate(outputs) if not isinstance(atom, Literal)}
    pairs = []
    for at in _donated(args, donate_argnums):
        aval = invars[at].aval
        match = next((k for k, v in free.items() if v.shape == aval.shape and v.dtype == str(aval.dtype)), None)
        if match is not None:
            pairs.append((at, match))
            del free[match]
    return tuple(pairs)
