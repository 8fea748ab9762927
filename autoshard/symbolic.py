"""Symbolic traces: a function traced once for all sizes, whose dimensions can be bound to other numbers without another trace.

A program's factors determine how every size follows from the arguments' (`costmodels.dimensions`). A function may still have
sizes of its own, or behave differently if two sizes are equal. So it is traced twice, at the given sizes and at others, and
the second trace must equal the prediction. A dimension for which it does not cannot be bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import jax

from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.annotating.attached import topology_of
from autoshard.annotating.dimension_names import Names, name_dimensions, primes, with_numbers
from autoshard.annotating.fingerprint import fingerprint
from autoshard.errors import AutoshardError, TraceError
from autoshard.pipeline import annotated_function, plan_function
from autoshard.plan import Plan
from autoshard.planning.options import Options
from autoshard.tracing.blocks import Traced
from costmodels.dimensions import DimensionError, Dimensions, rebound
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from costmodels.symbols import evaluate, parse_expression


@dataclass(frozen=True)
class SymbolicTrace:
    """A traced function with its sizes by name; made by `trace_symbolic`.

    **Attributes:**

    - `dimensions`: every size of the program as an expression in names.
    - `fixed`: the names that cannot be bound, each with the reason.
    """

    target: AnnotatedFunction
    dimensions: Dimensions
    fixed: Mapping[str, str]
    options: Options

    @property
    def program(self) -> Program:
        """The program at the current sizes."""
        return self.target.traced.program

    @property
    def sizes(self) -> dict[str, int]:
        """Name to number."""
        return dict(self.dimensions.sizes)

    def bind(self, **sizes: int) -> SymbolicTrace:
        """The same function at other sizes; its program is that of another trace.

            traced.bind(B=128, S=4096).search("v4:4x4x4").estimate.seconds

        **Raises:** `AutoshardError` for an unknown name, for one that cannot be bound, and for sizes that contradict
        the program's relations.
        """
        for name, size in sizes.items():
            _check(self, name, size)
        try:
            program = rebound(self.program, self.dimensions, sizes)
        except DimensionError as error:
            raise AutoshardError(f"These sizes cannot be bound: {error}.") from error
        dimensions = replace(self.dimensions, sizes={**self.dimensions.sizes, **sizes})
        target = self.target.with_program(program, naming=lambda: dimensions)
        return replace(self, target=target, dimensions=dimensions)

    def search(
        self,
        topology: str | PathLike[str] | Topology,
        reserve_bytes: float | None = None,
        time_limit: float | None = None,
        progress: Callable[[str], None] | None = None,
        padding: bool = True,
    ) -> Plan:
        """The fastest plan at the current sizes, as `autoshard.search` finds it.

        **Raises:** `TopologyError`, `InfeasibleError`.
        """
        options = replace(
            self.options, reserve_bytes=reserve_bytes, time_limit=time_limit, progress=progress, padding=padding
        )
        return plan_function(self.target, topology_of(topology), options)


def trace_symbolic(
    fn: Callable[..., Any],
    *args: Any,
    dims: Names | None = None,
    sizes: Mapping[str, int] | None = None,
    donate_argnums: int | Sequence[int] = (),
    name: str = "",
    strict: bool = False,
) -> SymbolicTrace:
    """Traces a function for all sizes of its arguments.

        traced = autoshard.trace_symbolic(decode, params, cache, tokens, position, dims={"tokens": "B", "cache.k": "N B S D"})
        traced.bind(B=128).search("v4:4x4x4")

        b, s = jax.export.symbolic_shape("b, s")
        traced = autoshard.trace_symbolic(forward, params, jax.ShapeDtypeStruct((b, s), jnp.int32))

    **Arguments:**

    - `args`: arrays or `jax.ShapeDtypeStruct`s; their shapes may contain dimensions of `jax.export.symbolic_shape`.
    - `dims`: names of dimensions, by argument path or by size.
    - `sizes`: numbers for symbolic dimensions during the trace; by default some are tried.
    - `donate_argnums`, `name`, `strict`: as for `autoshard.search`.

    **Raises:** `TraceError`, `UnsupportedPrimitiveError`; `AutoshardError` for names that fit no dimension.
    """
    shapes = [tuple(leaf.shape) if hasattr(leaf, "shape") else () for leaf in jax.tree_util.tree_leaves(args)]
    options = Options(donate_argnums, name, strict, dims=dims, shapes=tuple(shapes))
    target = annotated_function(fn, with_numbers(args, dict(sizes or {})), options)
    dimensions, fixed = _verify(fn, args, target, options)
    target = replace(target, naming=lambda: dimensions)
    return SymbolicTrace(target, dimensions, fixed, replace(options, shapes=()))


# --- Dimensions that can be bound


def _check(trace: SymbolicTrace, name: str, size: int) -> None:
    if name not in trace.dimensions.sizes:
        raise AutoshardError(f"The dimension must be one of {', '.join(trace.dimensions.sizes)}, got {name}.")
    if name in trace.fixed and size != trace.dimensions.sizes[name]:
        raise AutoshardError(f"{name} cannot be bound: {trace.fixed[name]}.")
    if size == 1 and trace.dimensions.sizes[name] != 1:
        raise AutoshardError(
            f"{name} cannot be bound to 1: JAX treats dimensions of 1 differently. Trace with {name} = 1."
        )


def _verify(
    fn: Callable[..., Any], args: Any, target: AnnotatedFunction, options: Options
) -> tuple[Dimensions, dict[str, str]]:
    """The names that can be bound, and the reasons why the others cannot."""
    first = target.dimensions
    fixed = {name: _single_dimension_text(name) for name, size in first.sizes.items() if size == 1}
    names = [name for name in first.sizes if name not in fixed]
    probing = _Probing(fn, target, options)
    probe = _larger(first, names)
    possible = probing.program_at(first, probe) is not None
    if not possible:  # one array may have to be longer than another; then each dimension is also tried alone
        probe = _larger(first, sorted(names, key=lambda name: first.sizes[name]))
    if possible and probing.difference(first, probe) is None:
        return first, fixed
    # Sizes that are equal by chance may have been merged here; at other sizes they are not.
    apart = probing.dimensions_at(first, probe) if possible else None
    if apart is not None and set(apart.sizes) == set(first.sizes):
        back = replace(apart, sizes={**apart.sizes, **first.sizes})
        if _is_same_program(
            rebound_or_none(probing.program_at(first, probe), apart, first.sizes), target.traced.program
        ):
            return back, fixed
    reasons = {name: probing.difference(first, _consistent(first, {name: 2 * first.sizes[name]})) for name in names}
    fixed |= {name: reason for name, reason in reasons.items() if reason is not None}
    together = {name: size for name, size in probe.items() if name not in fixed}
    why = probing.difference(first, together) if together else None
    return first, fixed if why is None else {**fixed, **dict.fromkeys(together, why)}


def _single_dimension_text(name: str) -> str:
    return f"it is 1 here, and JAX treats dimensions of 1 differently; trace with {name} = 2 or more"


def _larger(dimensions: Dimensions, names: Sequence[str]) -> dict[str, int]:
    """Sizes of a second trace: every dimension grows, each by more than the one before."""
    return _consistent(
        dimensions, {name: dimensions.sizes[name] * k for name, k in zip(names, _multipliers(), strict=False)}
    )


def _multipliers():
    """The growth factor of each dimension in the second trace; multiples keep divisibility."""
    yield from (2, 3, 5, 7)
    yield from primes()


def _consistent(dimensions: Dimensions, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, extended by those that equal them in the program."""
    found = dict(sizes)
    for one, other in dimensions.relations:
        left, right = (one, other) if other in dimensions.sizes and one in sizes else (other, one)
        if right in dimensions.sizes and set(map(str, parse_expression(left).free_symbols)) & set(sizes):
            found[right] = int(evaluate(parse_expression(left), {**dimensions.sizes, **found}))
    return found


def rebound_or_none(program: Program | None, dimensions: Dimensions, sizes: Mapping[str, int]) -> Program | None:
    """`rebound`, or None if the sizes do not fit."""
    try:
        return None if program is None else rebound(program, dimensions, sizes)
    except DimensionError:
        return None


def _is_same_program(a: Program | None, b: Program | None) -> bool:
    return a is not None and b is not None and fingerprint(a) == fingerprint(b)


@dataclass(frozen=True)
class _Probing:
    """Traces of the function at other than the given sizes."""

    fn: Callable[..., Any]
    target: AnnotatedFunction
    options: Options

    def traced(self, dimensions: Dimensions, sizes: Mapping[str, int]) -> Traced:
        """The function traced at other sizes; the arguments' shapes follow from the dimensions."""
        program, numbers = self.target.traced.program, {**dimensions.sizes, **sizes}
        flat = [
            jax.ShapeDtypeStruct(
                tuple(int(evaluate(parse_expression(n), numbers)) for n in dimensions.shapes[value]),
                leaf.dtype,
                weak_type=leaf.weak_type,
            )
            for value, leaf in zip(self.target.traced.argument_values, self.target.flat, strict=True)
        ]
        assert len(flat) == len(program.arguments)
        args = jax.tree_util.tree_unflatten(self.target.traced.in_tree, flat)
        return annotated_function(self.fn, args, replace(self.options, dims=None, shapes=())).traced

    def program_at(self, dimensions: Dimensions, sizes: Mapping[str, int]) -> Program | None:
        try:
            return self.traced(dimensions, sizes).program
        except (TraceError, AutoshardError):
            return None

    def dimensions_at(self, dimensions: Dimensions, sizes: Mapping[str, int]) -> Dimensions | None:
        """The dimensions of the trace at other sizes, by the arguments' present names."""
        try:
            other = self.traced(dimensions, sizes)
            names = {
                path: " ".join(dimensions.shapes[v]) for path, v in zip(other.paths, other.argument_values, strict=True)
            }
            return name_dimensions(
                other.program, other.argument_values, other.paths, {k: v for k, v in names.items() if v}
            )
        except (TraceError, AutoshardError):
            return None

    def difference(self, dimensions: Dimensions, sizes: Mapping[str, int]) -> str | None:
        """The reason why binding these sizes differs from tracing with them; None if it does not."""
        at = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        try:
            bound = rebound(self.target.traced.program, dimensions, sizes)
        except DimensionError as error:
            return f"with {at}, {error}"
        try:
            other = self.traced(dimensions, sizes).program
        except AutoshardError as error:
            return f"the function cannot be traced with {at}: {' '.join(str(error).split())[:300]}"
        return (
            None
            if _is_same_program(bound, other)
            else f"with {at} the program differs: {_first_difference(bound, other)}"
        )


def _first_difference(bound: Program, other: Program) -> str:
    """The first operation in which two programs differ."""
    for a, b in zip(bound.operations, other.operations, strict=False):
        if (a.primitive, a.factors, a.inputs, a.outputs) != (b.primitive, b.factors, b.inputs, b.outputs):
            there, here = [f.size for f in b.factors], [f.size for f in a.factors]
            return f"{b.name} " + (
                "can be split in other ways" if there == here else f"has factors {there} instead of {here}"
            )
    return f"it has {len(other.operations)} operations, not {len(bound.operations)}, or connects them differently"
