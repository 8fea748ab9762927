"""Formats: the shardings of arrays over the mesh, and the orders of their dimensions in memory.

An `ArrayPlan` without an order has the device's default: row-major on CPUs and GPUs, on TPUs the order with the least
tile padding (`search.formulation.tpu_tiles.default_order`), by the shape and the type alone. A matmul that needs another
order copies the array in every step. The compiler knows the uses of an array; with `Layout.AUTO` it chooses the orders of
arguments and results (`of_the_compiler`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding

from autoshard.emitting import bind, targets
from autoshard.emitting.meshes import AxisNames, on_mesh
from autoshard.emitting.sharding import spec_of
from autoshard.errors import AutoshardError
from autoshard.planning import records
from autoshard.planning.carriage import Carry
from autoshard.planning.records import ArrayPlan, PlanRecord

P = TypeVar("P", bound=PlanRecord)
Order = tuple[int, ...]
"""The dimensions of an array from major to minor; empty for the device's default."""


def formats(plan: PlanRecord, mesh: Mesh, axes: AxisNames | None = None) -> tuple[tuple[Any, ...], Any]:
    """The `Format`s of the arguments and results on a mesh that fits the plan, as pytrees of the same structure."""
    plan = on_mesh(plan, mesh, axes)
    ins, outs = flat_formats(plan, mesh)
    return plan.in_tree.rebuild(ins), plan.out_tree.rebuild(outs)


def flat_formats(plan: PlanRecord, mesh: Mesh) -> tuple[list[Format], list[Format]]:
    """The formats of the flat arguments and of the flat results."""
    ordered = has_orders(plan, mesh)

    def of(array: ArrayPlan) -> Format:
        layout = Layout(array.order) if ordered and array.order else None
        return Format(layout, NamedSharding(mesh, spec_of(array.layout)))

    return [of(array) for array in plan.arguments], [of(array) for array in plan.results]


def has_orders(plan: PlanRecord, mesh: Mesh) -> bool:
    """Whether the plan has orders of dimensions, and the mesh has the kind of chip for which they were chosen."""
    kind = plan.topology.chip.kind
    here = mesh.devices.flat[0].platform
    return _KINDS.get(here, here) == kind and any(array.order for array in (*plan.arguments, *plan.results))


_KINDS = {"cuda": "gpu", "rocm": "gpu"}
"""JAX's name of a platform, if it differs from the catalogue's."""


# --- orders chosen by the compiler


def choose_formats(plan: P, fn: Callable[..., Any], *args: Any, devices: Sequence[Any] | None = None) -> P:
    """The plan with the formats that the compiler chooses for its arguments and results.

        plan = autoshard.choose_formats(plan, decode, params, cache, tokens, position)
        params = plan.place(params, argument="params")

    The planned program is compiled once more, ahead of time, for the plan's own chips. A donated argument and the result
    that overwrites it have the same format.

    **Arguments:**

    - `args`: the planned arguments, arrays or `jax.ShapeDtypeStruct`s; nothing is allocated or run.
    - `devices`: compile for these instead.

    **Raises:** `PlanMismatchError` if the plan is not for this function and these arguments; `AutoshardError` if the
    compiler is not available, or rejects the program.
    """
    topology = plan.topology
    chosen = targets.devices_of(topology, targets.COMPILERS[topology.chip.kind]) if devices is None else devices
    mesh = targets.mesh_of(chosen, topology.axis_sizes)
    try:
        return of_the_compiler(plan, fn, args, mesh)
    except jax.errors.JaxRuntimeError as error:
        raise AutoshardError(f"The compiler refused {plan.name} for {topology.name}. It says: {error}") from error


@dataclass(frozen=True)
class _Auto:
    """The compiler's choice: an order per flat argument and result."""

    arguments: tuple[Order, ...]
    results: tuple[Order, ...]


def of_the_compiler(plan: P, fn: Callable[..., Any], args: Sequence[Any], mesh: Mesh, carry: Carry = "manual") -> P:
    """The plan with the orders that the compiler of the mesh's devices chooses for its arguments and results.

    This compiles the planned program once more. The result that overwrites a donated argument has the argument's order.

    **Arguments:**

    - `args`: the arguments of the plan, arrays or `jax.ShapeDtypeStruct`s.
    - `carry`: the way in which the program carries the plan: "manual", or "specs" for the function as it is written.

    **Raises:** `PlanMismatchError` if the plan is not for this function and these arguments; `jax.errors.JaxRuntimeError`
    if the compiler rejects the program.
    """
    donated = bind.trace_as_planned(plan, fn, args).program.donated
    chosen = _compile_with_auto(plan, fn, args, mesh, carry)
    results = list(chosen.results)
    for result, argument in records.predecessors(plan.arguments, plan.results, donated).items():
        results[result] = chosen.arguments[argument]
    return with_orders(plan, chosen.arguments, results, "compiler")


def with_orders(plan: P, arguments: Sequence[Order], results: Sequence[Order], source: str = "given") -> P:
    """The plan with these orders of its flat arguments and results; `source` is recorded as their origin."""
    ins, outs = records.with_orders(plan.arguments, arguments), records.with_orders(plan.results, results)
    return replace(plan, arguments=ins, results=outs, emission=replace(plan.emission, formats=source))


def without_orders(plan: P) -> P:
    """The plan with every array in the device's default order."""
    return with_orders(plan, [()] * len(plan.arguments), [()] * len(plan.results), "default")


def _compile_with_auto(
    plan: PlanRecord, fn: Callable[..., Any], args: Sequence[Any], mesh: Mesh, carry: Carry
) -> _Auto:
    plain = without_orders(plan)
    ins, outs = (
        [Format(Layout.AUTO if _is_ordered(array) else None, each.sharding) for array, each in zip(*pair, strict=True)]
        for pair in zip((plan.arguments, plan.results), flat_formats(plain, mesh), strict=True)
    )
    flat, structure = jax.tree_util.tree_flatten(tuple(args))
    run = bind.checked(plain, fn) if carry == "specs" else bind.bind_plan(plain, fn, mesh, keep_padding=True)

    def step(*leaves: Any) -> list[Any]:
        return jax.tree_util.tree_leaves(run(*jax.tree_util.tree_unflatten(structure, leaves)))

    donated = tuple(i for i, array in enumerate(plan.arguments) if array.donated)
    options = bind.compiler_options(plan, mesh) or None
    compiled = (
        jax.jit(step, in_shardings=tuple(ins), out_shardings=outs, donate_argnums=donated, keep_unused=True)
        .lower(*map(_padded_shape, flat, plan.arguments))
        .compile(options)
    )
    return _Auto(
        _orders(plan.arguments, compiled.input_formats[0]),
        _orders(plan.results, jax.tree_util.tree_leaves(compiled.output_formats)),
    )


def _is_ordered(array: ArrayPlan) -> bool:
    """Whether an array has more than one order: it is numeric, with more than one dimension."""
    return len(array.shape) > 1 and 0 not in array.shape and not array.dtype.startswith("key<")


def _orders(arrays: Sequence[ArrayPlan], found: Sequence[Format]) -> tuple[Order, ...]:
    return tuple(
        each.layout.major_to_minor if _is_ordered(array) and isinstance(each.layout, Layout) else ()
        for array, each in zip(arrays, found, strict=True)
    )


def _padded_shape(leaf: Any, array: ArrayPlan) -> Any:
    """An argument's shape and type with its planned padding."""
    return jax.ShapeDtypeStruct(array.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf
