"""Tracing of a JAX function to a program over factors.

Public JAX traces the function to a jaxpr. Calls, remat and custom derivatives are inlined. `scan`, `while` and `cond`
become regions with boundary operations, each of which owns the layout of a value that crosses the boundary. Arguments
keep their paths.

JAX traces a function once for the same abstract arguments, and returns one jaxpr from then on. Each jaxpr is walked once
for the same names, donations and rules, so a search and the first call of its plan share a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax

from autoshard._util.identity import IdentityMap, distinct
from autoshard.errors import TraceError
from autoshard.rules.rule import REGISTRY, RuleMaker
from autoshard.tracing.blocks import Literal, Traced
from autoshard.tracing.builder import Builder
from autoshard.tracing.calls import name_of
from autoshard.tracing.closed_over import closed_over, first_equal
from autoshard.tracing.jaxprs import custom_vjps
from autoshard.tracing.loops.in_place import carry_in_place
from autoshard.tracing.loops.partial_sums import with_partial_boundaries
from autoshard.tracing.pytrees import argument_paths
from autoshard.tracing.source_lines import user_line
from autoshard.tracing.walk import Tracer
from autoshard.workload import Workload
from costmodels.program.program import Program
from search.collector import seldom_collected


@seldom_collected()
def trace(
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: Sequence[int] = (),
    name: str = "",
    strict: bool = False,
    chains: bool = False,
) -> Traced:
    """Traces a function of pytrees to a program.

    **Arguments:**

    - `args`: pytrees of arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.
    - `strict`: raise for primitives without a rule instead of replicating their arrays.
    - `chains`: whether chains of grouped matmuls are one operation each (`compose_chains`).

    **Raises:** `TraceError` if JAX cannot trace the function with these arguments; `UnsupportedPrimitiveError`.
    """
    if not callable(fn):
        hint = ": pass its `fn` and `*args`" if isinstance(fn, Workload) else ""
        raise TraceError(f"The function must be callable, got {type(fn).__name__}{hint}.")
    try:
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    except Exception as error:
        said = f"{name_of(fn)} could not be traced with these arguments: {error}"
        raise TraceError(said + user_line(error)) from error
    out_named, out_tree = jax.tree_util.tree_flatten_with_path(out_shape)
    call = _Call(
        name or name_of(fn),
        jax.tree_util.tree_structure(args),
        out_tree,
        tuple(argument_paths(fn, args)),
        tuple("result" + jax.tree_util.keystr(path) for path, _ in out_named),
        tuple(_donated_positions(args, donate_argnums)),
        strict,
        tuple(REGISTRY.items()),
        chains,
    )
    walked = _WALKED.setdefault(closed, {})
    if call not in walked:
        walked[call] = _walk(closed, call)
    return walked[call]


class _Call(NamedTuple):
    """The inputs of a program besides its jaxpr; `donated` are positions of flat arguments."""

    name: str
    in_tree: Any
    out_tree: Any
    paths: tuple[str, ...]
    result_paths: tuple[str, ...]
    donated: tuple[int, ...]
    strict: bool
    rules: tuple[tuple[str, RuleMaker], ...]
    chains: bool = False


_WALKED: WeakKeyDictionary[Any, dict[_Call, Traced]] = WeakKeyDictionary()
"""The programs of each jaxpr, for as long as JAX keeps the jaxpr: until the function is gone."""


def _walk(closed: Any, call: _Call) -> Traced:
    own_derivatives = next(custom_vjps(closed.jaxpr), "")
    closed = carry_in_place(closed, call.donated)
    builder = Builder()
    tracer = Tracer(builder, call.strict, call.chains)
    sources = zip(closed.jaxpr.invars, call.paths, strict=True)
    argument_values = [builder.add_source(var.aval, path) for var, path in sources]
    constants, constant_values = _enter_constants(builder, closed)
    held = [builder.held[0][array] for array in closed.consts]
    env = dict(zip((*closed.jaxpr.invars, *closed.jaxpr.constvars), (*argument_values, *held), strict=True))
    block = tracer.block(closed.jaxpr, env, 0)
    results = [builder.add_sink(atom, path) for atom, path in zip(block.outputs, call.result_paths, strict=True)]
    donated = _donations(call.donated, closed.jaxpr.invars, block.outputs, builder.values)
    program = Program(
        call.name,
        tuple(builder.values),
        with_partial_boundaries([op for op in builder.operations if op is not None]),
        tuple(builder.regions),
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
        in_tree=call.in_tree,
        out_tree=call.out_tree,
        paths=call.paths,
        result_paths=call.result_paths,
        literal_results=block.outputs,
        custom_vjp=own_derivatives,
    )


def _enter_constants(builder: Builder, closed: Any) -> tuple[list[Any], list[int]]:
    """The distinct arrays that a function and its parts close over, and their values; registers all in the builder."""
    arrays = distinct((*closed.consts, *closed_over(closed.jaxpr)))
    first = first_equal(arrays)
    kept = list(dict.fromkeys(first))
    values = {at: builder.hold(arrays[at], f"constant {k}") for k, at in enumerate(kept)}
    builder.held[0] = IdentityMap((array, values[at]) for array, at in zip(arrays, first, strict=True))
    return [arrays[at] for at in kept], list(values.values())


def _donated_positions(args: Sequence[Any], donate_argnums: Sequence[int]) -> list[int]:
    """The positions of donated flat arguments."""
    counts = [len(jax.tree_util.tree_leaves(arg)) for arg in args]
    return [sum(counts[:i]) + k for i in sorted(donate_argnums) for k in range(counts[i])]


def _donations(donated: Sequence[int], invars, outputs, values) -> tuple[tuple[int, int], ...]:
    """Pairs each donated flat argument with the first free result of the same shape and type, as JAX does."""
    free = {k: values[atom] for k, atom in enumerate(outputs) if not isinstance(atom, Literal)}
    pairs = []
    for at in donated:
        aval = invars[at].aval
        match = next((k for k, v in free.items() if v.shape == aval.shape and v.dtype == str(aval.dtype)), None)
        if match is not None:
            pairs.append((at, match))
            del free[match]
    return tuple(pairs)
