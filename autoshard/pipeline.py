"""From a function to its plan: trace, annotate and search, then an account of what was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import jax

from autoshard._util.collector import seldom_collected
from autoshard.annotating.dimension_names import Names, named, symbols_of
from autoshard.annotating.pins import PinError, Pins, unpinned, with_pins
from autoshard.emitting.attached import topology_of
from autoshard.emitting.bind import abstract
from autoshard.errors import AutoshardError
from autoshard.plan import Plan
from autoshard.planning import records_of
from autoshard.planning.baselines import baselines as plain_layouts
from autoshard.planning.infeasibility import conflict, explained
from autoshard.tracing import pytrees
from autoshard.tracing.blocks import Traced
from autoshard.tracing.trace import fingerprint, trace
from costmodels.dimensions import Dimensions
from costmodels.machine.topology import Topology
from search.answer.solution import Solver
from search.solve import Limits, NoPlan, Solution
from search.solve import search as solve

_LOG = logging.getLogger("autoshard")


@dataclass(frozen=True)
class Options:
    """How to plan; each as `search` explains it."""

    donate_argnums: int | Sequence[int] = ()
    name: str = ""
    strict: bool = False
    reserve_bytes: float | None = None
    time_limit: float | None = None
    progress: Callable[[str], None] | None = None
    pins: Pins | None = None
    fold: bool = True
    memory_bytes: float | None = None
    baselines: bool = False
    dims: Names | None = None
    shapes: tuple[Any, ...] = ()
    solver: Solver = "presolved"

    def limits(self) -> Limits:
        """When the search stops."""
        limits = Limits(reserve_bytes=self.reserve_bytes, memory_bytes=self.memory_bytes, solver=self.solver)
        return limits if self.time_limit is None else replace(limits, wall_seconds=self.time_limit)


@dataclass(frozen=True)
class Target:
    """A traced function with what its plan keeps of the arguments: nesting, donations, and which are Python scalars.

    `dimensions` are its sizes by name, `flat` the shapes and types of the arguments it was traced with.
    """

    traced: Traced
    in_tree: pytrees.Data
    donate_argnums: tuple[int, ...]
    weak: tuple[bool, ...]
    fingerprint: str
    dimensions: Dimensions
    flat: tuple[Any, ...]


def search(
    fn: Callable[..., Any],
    *args: Any,
    topology: str | PathLike[str] | Topology,
    donate_argnums: int | Sequence[int] = (),
    name: str = "",
    strict: bool = False,
    reserve_bytes: float | None = None,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    pins: Pins | None = None,
    fold: bool = True,
    memory_bytes: float | None = None,
    baselines: bool = False,
    dims: Names | None = None,
    solver: Solver = "presolved",
) -> Plan:
    """Searches the layout of every array and operation of a function that makes one step fastest on a topology.

        plan = autoshard.search(decode, params, cache, tokens, position, topology="v4:4x4x4", donate_argnums=1)
        plan.proof.status, plan.estimate.seconds

    **Arguments:**

    - `fn`: a function of pytrees of arrays.
    - `args`: its arguments, arrays or `jax.ShapeDtypeStruct`s; only shapes and types count, and nothing is allocated.
    - `topology`: `CHIP:AxBxC`, the path of a TOML file, a `Topology`, or "auto" for the devices that JAX sees.
    - `donate_argnums`: positions of arguments whose memory the results may take, as for `jax.jit`.
    - `name`: what the plan is called; the function's name by default.
    - `strict`: refuse primitives without a sharding rule, instead of computing them whole on every chip.
    - `reserve_bytes`: memory of each chip to leave free; by default a twentieth, for what a compiler may need on top.
    - `time_limit`: seconds after which the best plan so far is returned, with the gap that is left.
    - `progress`: called with a line of text now and then; by default these go to the log "autoshard".
    - `pins`: layouts that you decide: `{"params.*.wq": P(None, "x", ("y", "z"))}`, patterns over dotted argument paths, or
      a tree of specs per argument with `None` for what is free. `autoshard.pin` pins intermediates.
    - `fold`: whether the layers that a Python loop unrolled are laid out alike, which makes depth free. Without it, layers may
      differ, and the search takes as many times longer.
    - `memory_bytes`: what the plan may take of each chip's memory; by default all but the reserve.
    - `baselines`: whether plain layouts (data parallel, Megatron 1D, ...) are searched as well, to compare with.
    - `dims`: names of dimensions for formulas, such as `{"tokens": "B", "layers.wi_gate": "N E F"}` or `{"B": 64}`
      (`autoshard.dimensions`); what has no name is called after its argument.
    - `solver`: "presolved", or "cp-sat" for CP-SAT on the model as it is built: a reference for small functions and meshes.

    **Raises:** `TopologyError`, `TraceError`, `UnsupportedPrimitiveError`, `PinError` for pins that cannot hold, and
    `InfeasibleError` when no layout fits.
    """
    options = Options(
        donate_argnums, name, strict, reserve_bytes, time_limit, progress, pins, fold, memory_bytes, baselines, dims
    )
    if solver not in ("presolved", "cp-sat"):
        raise AutoshardError(f'`solver` must be "presolved" or "cp-sat", got {solver!r}.')
    options = replace(options, solver=solver)
    where = topology_of(topology)
    return planned(traced_for(fn, args, options), where, options)


@seldom_collected()
def traced_for(fn: Callable[..., Any], args: Sequence[Any], options: Options) -> Target:
    """The function as a program, traced with arguments of these shapes and types.

    **Raises:** `TraceError`, `UnsupportedPrimitiveError`; `AutoshardError` for a donated position that is none.
    """
    symbols = symbols_of(args)
    if symbols:
        raise AutoshardError(
            f"The arguments have symbolic dimensions ({', '.join(symbols)}), and a plan needs numbers:"
            f" autoshard.trace_symbolic(fn, ...).bind({symbols[0]}=...).search(topology) would do."
        )
    flat, donate = abstract(fn, args), _positions(options.donate_argnums, len(args))
    avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type) for leaf in flat]
    nested = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tuple(args)), avals)
    traced = trace(fn, *nested, donate_argnums=donate, name=options.name, strict=options.strict)
    weak = tuple(leaf.weak_type for leaf in flat)
    dimensions = named(traced.program, traced.argument_values, traced.paths, options.dims, options.shapes)
    return Target(
        traced, pytrees.describe(tuple(args)), donate, weak, fingerprint(traced.program), dimensions, tuple(avals)
    )


@seldom_collected()
def planned(target: Target, topology: Topology, options: Options) -> Plan:
    """Searches, and turns what was found into a plan in the user's words.

    **Raises:** `InfeasibleError`, `PinError`.
    """
    program, pinned = with_pins(target.traced.program, target.traced.paths, topology, options.pins)
    try:
        solution = solve(program, topology, options.limits(), options.progress or _LOG.info, fold=options.fold)
    except NoPlan as error:
        clash = conflict(program, pinned, topology, options.limits())
        raise (PinError(clash) if clash else explained(error)) from error
    plan = plan_of(replace(target, traced=replace(target.traced, program=program)), solution)
    if not options.baselines or solution.proof.stopped == "interrupted":
        return plan
    found = plain_layouts(unpinned(program, ()), topology, options.limits(), options.progress or _LOG.info)
    return replace(plan, baselines=tuple(found))


def _positions(donate_argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The positions of donated arguments in order; negative ones count from the end."""
    given = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    if any(not -count <= at < count for at in given):
        raise AutoshardError(
            f"donate_argnums is {donate_argnums}, but there are {count} arguments; 0 to {count - 1} would do."
        )
    return tuple(sorted({at % count for at in given}))


def plan_of(target: Target, solution: Solution) -> Plan:
    """A solution as a plan in the user's words."""
    traced = target.traced
    results = jax.tree_util.tree_unflatten(traced.out_tree, [0] * traced.out_tree.num_leaves)
    return Plan(
        name=traced.program.name,
        topology=solution.problem.topology,
        fingerprint=target.fingerprint,
        arguments=records_of.argument_plans(traced, solution, target.weak),
        constants=records_of.constant_plans(traced, solution),
        results=records_of.result_plans(traced, solution),
        in_tree=target.in_tree,
        out_tree=pytrees.describe(results),
        choice=solution.choice,
        estimate=records_of.estimate(solution),
        proof=solution.proof,
        operations=records_of.operation_plans(solution),
        donate_argnums=target.donate_argnums,
        warnings=records_of.warnings(traced, solution),
        jax_version=jax.__version__,
        program=traced.program,
        dimensions=target.dimensions,
        treedefs=(traced.in_tree, traced.out_tree),
    )
