"""Binding of a plan to its function, which is traced, checked against the plan, and run on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, reshard

from autoshard.annotating.fingerprint import computes_same, fingerprint
from autoshard.annotating.hbm_traffic import annotate_traffic
from autoshard.annotating.masks import pad_traced
from autoshard.annotating.pins import pin_program
from autoshard.emitting.constrained import constrained
from autoshard.emitting.memory_orders import Order
from autoshard.emitting.meshes import AxisNames, as_planned, on_mesh
from autoshard.emitting.padding import padded_as, unpadded_like
from autoshard.emitting.program import emit
from autoshard.emitting.sharding import make_mesh, mesh_in_context, spec_of
from autoshard.emitting.tpu_workarounds.scoped_memory import memory_option
from autoshard.errors import AutoshardError, PlanMismatchError
from autoshard.planning.carriage import Constraint
from autoshard.planning.records import ArrayPlan, PlanRecord
from autoshard.rules.pin import spec_of_pin
from autoshard.tracing import pytrees
from autoshard.tracing.blocks import Traced
from autoshard.tracing.trace import trace
from autoshard.tracing.traced_function import abstract
from costmodels.program.grouped import CHAIN
from costmodels.program.program import Program
from search.formulation.layouts import Axes

_NAMED = 8
"""The number of differences that an error lists."""

_NEARLY_FULL = 0.9
"""The fraction of a chip's memory above which a plan counts as nearly filling it."""

_COMPUTED_AGAIN = "xla_jf_rematerialization_percent_shared_memory_limit"
"""The TPU compiler's option for the memory use, in percent, above which it rematerialises; 95 by default."""


def bind_plan(
    plan: PlanRecord,
    fn: Callable[..., Any],
    mesh: Mesh | None,
    orders: Sequence[Order] = (),
    keep_padding: bool = False,
    constraints: Sequence[Constraint] | None = None,
    axes: AxisNames | None = None,
) -> Callable[..., Any]:
    """`fn` as planned, traced once per structure of its arguments and mesh, as `jax.jit` does.

    **Arguments:**

    - `axes`: the names of the plan's axes on the mesh, as for `on_mesh`.
    - `orders`: per flat argument the order of its dimensions in memory, empty for the device's default.
    - `keep_padding`: whether all results keep their padding, instead of only those that replace a padded argument.
    - `constraints`: leaves the collectives to the partitioner, with these constraints; by default they are the plan's.
    """
    known: dict[Any, tuple[PlanRecord, Traced, Any]] = {}

    @functools.wraps(fn)
    def run_planned(*args: Any, **keywords: Any) -> Any:
        args = pytrees.positional(fn, args, keywords)
        flat, structure = jax.tree_util.tree_flatten(args)
        chosen = mesh or mesh_in_context(abstract=True) or make_mesh(plan)
        if (structure, chosen) in known:
            here, traced, run = known[structure, chosen]
            check_arguments(plan, fn, args)
        else:
            here, traced = on_mesh(plan, chosen, axes), trace_as_planned(plan, fn, args)
            if constraints is None:
                program = emit(traced, here.choice, here.topology, chosen, plan.emission, orders)
            else:
                program = constrained(traced, here.choice, here.topology, chosen, constraints, orders)
            run = _undifferentiable(fn, traced.custom_vjp, jax.jit(program))
            if not any(isinstance(array, Tracer) for array in traced.constants):
                known[structure, chosen] = here, traced, run
        arrays = [_to_dtype(leaf, array.dtype) for leaf, array in zip(flat, plan.arguments, strict=True)]
        given = [padded_as(array, row) for array, row in zip((*arrays, *traced.constants), plan.sources, strict=True)]
        results = run(*_place_arrays(here, chosen, given))
        if not keep_padding:
            results = unpadded_like(plan, traced.program, arrays, results)
        return jax.tree_util.tree_unflatten(traced.out_tree, results)

    return run_planned


def checked(plan: PlanRecord, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` itself, with its arguments checked against the plan when it is traced."""

    @functools.wraps(fn)
    def same(*args: Any, **keywords: Any) -> Any:
        args = pytrees.positional(fn, args, keywords)
        check_arguments(plan, fn, args)
        return fn(*args)

    return same


def _to_dtype(leaf: Any, dtype: str) -> Any:
    """A leaf as an array of the planned type; PRNG keys are arrays already, of types that NumPy lacks."""
    return leaf if dtype.startswith("key<") else jnp.asarray(leaf, dtype)


def trace_as_planned(plan: PlanRecord, fn: Callable[..., Any], args: Sequence[Any]) -> Traced:
    """A trace of `fn`, with the plan's numbering of operations and values.

    **Raises:** `PlanMismatchError`, with the paths, shapes and types that differ, or the first operation that differs.
    """
    plan = as_planned(plan)
    abstracted = _check_and_abstract(plan, fn, args)
    found = trace(fn, *abstracted, donate_argnums=plan.donate_argnums, name=plan.name, chains=_has_chains(plan))
    found = annotate_traffic(found)
    found = pad_traced(found, plan.padding)
    program, _ = pin_program(found.program, found.paths, plan.topology, _argument_pins(plan))
    same = fingerprint(program) == plan.fingerprint or (
        plan.program is not None and computes_same(program, plan.program)
    )
    if not same:
        raise PlanMismatchError(_program_difference(plan, found))
    _check_choice(plan, program)
    return found


def _has_chains(plan: PlanRecord) -> bool:
    """Whether the plan is of the program whose chains of grouped matmuls are one operation each."""
    return any(row.primitive == CHAIN for row in plan.operations)


def _argument_pins(plan: PlanRecord) -> list[Any] | None:
    """The pins of the arguments that the plan was searched with, as a flat list of specs."""
    if plan.program is None:
        return None
    pins = (plan.program.operations[op_index].pinned for op_index in plan.program.arguments)
    return [None if dims is None else spec_of_pin(dims) for dims in pins]


def _check_and_abstract(plan: PlanRecord, fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """The structure of the arguments, with the planned shapes, without padding, and types.

    **Raises:** `PlanMismatchError` if the arguments differ from the planned ones.
    """
    flat = check_arguments(plan, fn, args)
    avals = [
        jax.ShapeDtypeStruct(array.unpadded_shape, leaf.dtype, weak_type=array.weak)
        for leaf, array in zip(flat, plan.arguments, strict=True)
    ]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tuple(args)), avals)


# --- features that a planned program lacks


def _undifferentiable(fn: Callable[..., Any], own: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which raises under differentiation if `fn` has a `custom_vjp`: the planned program does not keep it."""
    if not own:
        return run
    guarded = jax.custom_jvp(run)

    @guarded.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise AutoshardError(
            f"{getattr(fn, '__name__', fn)} has a custom derivative (custom_vjp at {own}), which its planned form does not"
            " keep. Plan the gradient instead: autoshard.search(jax.grad(loss), ...)."
        )

    return guarded


def _place_arrays(plan: PlanRecord, mesh: Any, arrays: list[Any]) -> list[Any]:
    """The arrays in their planned layouts; on explicit mesh axes JAX does not reshard them by itself."""
    if AxisType.Explicit not in mesh.axis_types:
        return arrays
    pairs = zip(arrays, plan.sources, strict=True)
    return [reshard(array, NamedSharding(mesh, spec_of(row.layout))) for array, row in pairs]


# --- the compiler


def compiler_options(plan: PlanRecord, mesh: Mesh) -> dict[str, str | bool]:
    """Compiler options for TPUs: the on-chip memory for an operation, and one for a plan that nearly fills a TPU's memory.

    Above 95 % of the memory, which a plan may use, the compiler (libtpu 0.0.42) rematerialises to save memory. It also
    rematerialises gathers, which are then communicated twice. It counts its code and all results as live all the time, so
    it begins before the memory is full. The option limits rematerialisation to programs that do not fit at all.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    full = plan.estimate.peak_bytes > _NEARLY_FULL * plan.topology.chip.usable_hbm_bytes
    return {**memory_option(plan.emission), **({_COMPUTED_AGAIN: "100"} if full else {})}


# --- meshes


# --- checks


def check_arguments(plan: PlanRecord, fn: Callable[..., Any], args: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """The flat arguments' shapes and types, which may include the plan's padding; parameters may have other names.

    **Raises:** `PlanMismatchError` if their structure, shapes or types differ from the plan.
    """
    found = flat = abstract(fn, args)
    alike = pytrees.describe(tuple(args)) == plan.in_tree.data
    paths = [array.path for array in plan.arguments]
    planned = {array.path: type_text(array.unpadded_shape, array.dtype) for array in plan.arguments}
    if alike:  # an array may have its padding already
        flat = [_without_padding(leaf, array) for leaf, array in zip(flat, plan.arguments, strict=True)]
    given = {
        path: type_text(leaf.shape, leaf.dtype)
        for path, leaf in zip(paths if alike else pytrees.argument_paths(fn, args), flat, strict=True)
    }
    if alike and planned == given:
        return found
    faults = [
        f"{path} is {given.get(path, 'missing')}, planned {planned.get(path, 'without it')}"
        for path in dict.fromkeys((*planned, *given))
        if planned.get(path) != given.get(path)
    ]
    faults = faults or ["the pytree structure differs from the planned one"]
    raise PlanMismatchError(
        f"The plan {plan.name!r} is for other arguments; search again for these:{list_faults(faults)}"
    )


def _without_padding(leaf: jax.ShapeDtypeStruct, array: ArrayPlan) -> jax.ShapeDtypeStruct:
    same = leaf.shape == array.shape
    return jax.ShapeDtypeStruct(array.unpadded_shape, leaf.dtype) if same and array.padding else leaf


def list_faults(faults: Sequence[str]) -> str:
    """The first few differences, as lines of an error."""
    lines = "".join(f"\n  {fault}" for fault in faults[:_NAMED])
    return lines + (f"\n  and {len(faults) - _NAMED} more" if len(faults) > _NAMED else "")


def _check_choice(plan: PlanRecord, program: Program) -> None:
    """Checks that the program can have the strategies and layouts of the plan, which may come from a damaged file.

    **Raises:** `PlanMismatchError`, with the first invalid one.
    """
    sizes, strategies = plan.topology.axis_sizes, plan.choice.strategies

    def divides(dimensions: Sequence[int], splits: Sequence[Axes]) -> bool:
        parts = (prod(sizes[axis] for axis in axes) for axes in splits)
        return len(dimensions) == len(splits) and all(d % n == 0 for d, n in zip(dimensions, parts, strict=True))

    faults = []
    if len(strategies) != len(program.operations):
        faults.append(f"it has {len(strategies)} operations, the function {len(program.operations)}")
    for op, strategy in zip(program.operations, strategies, strict=False):
        if not divides([factor.size for factor in op.factors], strategy.splits):
            faults.append(
                f"{op.name} has factors of {[f.size for f in op.factors]}, and splits {list(strategy.splits)}"
            )
    for value, layout in plan.choice.hubs.items():
        if not 0 <= value < len(program.values):
            faults.append(f"it keeps value {value}, and the function has {len(program.values)}")
        elif not divides(program.values[value].shape, layout.dims):
            faults.append(f"it keeps value {value}, of shape {program.values[value].shape}, as {layout}")
    if faults:
        raise PlanMismatchError(f"The plan {plan.name!r} is damaged: {faults[0]}. Search again.")


def type_text(shape: Sequence[int], dtype: Any) -> str:
    """An array's type as errors write it: `bfloat16[4096,128]`."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def _program_difference(plan: PlanRecord, found: Traced) -> str:
    """The message for another function with the same arguments, with the first difference."""
    planned = [(row.primitive, row.sizes, row.name) for row in plan.operations]
    given = [(op.primitive, tuple(f.size for f in op.factors), op.name) for op in found.program.operations]
    first = next(
        (i for i, (a, b) in enumerate(zip(planned, given, strict=False)) if a[:2] != b[:2]),
        min(len(planned), len(given)),
    )
    here = given[first][2] if first < len(given) else "the end"
    there = planned[first][2] if first < len(planned) else "the end"
    where = f": where it has {here}, the planned one had {there}" if here != there or len(planned) != len(given) else ""
    versions = (
        f" (planned with JAX {plan.jax_version}, this is {jax.__version__})"
        if plan.jax_version != jax.__version__
        else ""
    )
    return f"The plan {plan.name!r} is for another function, with the same arguments{where}{versions}. Search again."
