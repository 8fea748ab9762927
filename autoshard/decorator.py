"""The decorator `@autoshard.autoshard`: plans a function at its first call, caches the plan, and runs it sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from jax.core import Tracer

from autoshard.emitting.attached import topology_of
from autoshard.pipeline import annotated_function, plan_function
from autoshard.plan import Plan
from autoshard.planning.multihost import agreed
from autoshard.planning.options import Options
from autoshard.planning.plan_cache import cached, default_directory, key_of
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees
from autoshard.tracing.arguments import abstract
from costmodels.machine.topology import Topology


def autoshard(
    fn: Callable[..., Any] | None = None,
    *,
    topology: str | PathLike[str] | Topology = "auto",
    cache_dir: str | PathLike[str] | None = None,
    donate_argnums: int | Sequence[int] = (),
    **options: Any,
) -> Any:
    """Runs a function sharded over a topology, with a plan searched for the arguments of its calls.

        @autoshard.autoshard(topology="v5e:4x4", donate_argnums=1)
        def decode(params, cache, tokens, position): ...

        logits, cache = decode(params, cache, tokens, position)      # searches, then runs
        decode.plan_for(params, cache, tokens, position).explain()

    The first call with new shapes, types or nesting searches, or finds the plan in `cache_dir`. Arguments are placed as
    planned, as by `jax.jit`. With several processes the first one searches, and all use its plan; all must make the call
    (also that of `plan_for`). Within `jax.jit`, `jax.grad` or `jax.vmap` it runs as `plan.apply(fn)` does.

    **Arguments:**

    - `topology`: as for `autoshard.search`; by default the devices that JAX sees.
    - `cache_dir`: the folder of plans between runs; by default the user's cache directory.
    - `donate_argnums`, and further keywords: as for `autoshard.search`.

    **Returns:** a function of the same arguments, with `plan_for(*args) -> Plan`.
    """
    if fn is None:
        return functools.partial(
            autoshard, topology=topology, cache_dir=cache_dir, donate_argnums=donate_argnums, **options
        )
    directory = default_directory() if cache_dir is None else Path(cache_dir)
    planner = _Planner(fn, topology, directory, Options(donate_argnums=donate_argnums, **options))

    @functools.wraps(fn)
    def sharded(*args: Any, **keywords: Any) -> Any:
        return planner.run(pytrees.positional(fn, args, keywords))

    def plan_for(*args: Any, **keywords: Any) -> Plan:
        return planner.bound(pytrees.positional(fn, args, keywords)).plan

    sharded.plan_for = plan_for  # pyright: ignore[reportAttributeAccessIssue]
    return sharded


@dataclass(frozen=True)
class _Bound:
    """A plan with its compiled function, the placement of its arguments, and its function for transformations."""

    plan: Plan
    jitted: Callable[..., Any]
    shardings: tuple[Any, ...]
    applied: Callable[..., Any]


@dataclass
class _Planner:
    """The plans of one function, by the shapes, types and nesting of the arguments."""

    fn: Callable[..., Any]
    topology: str | PathLike[str] | Topology
    directory: Path
    options: Options
    known: dict[Any, _Bound] = field(default_factory=dict)

    def run(self, args: tuple[Any, ...]) -> Any:
        bound = self.bound(args)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree_util.tree_leaves(args)):
            return bound.applied(*args)
        return bound.jitted(*jax.device_put(args, bound.shardings))

    def bound(self, args: tuple[Any, ...]) -> _Bound:
        shapes = tuple((leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in abstract(self.fn, args))
        key = jax.tree_util.tree_structure(args), shapes
        if key not in self.known:
            plan = self.plan(args)
            mesh = plan.make_mesh()
            shardings, _ = plan.shardings(mesh)
            self.known[key] = _Bound(plan, plan.jit(self.fn, mesh), shardings, plan.apply(self.fn))
        return self.known[key]

    def plan(self, args: tuple[Any, ...]) -> Plan:
        topology = topology_of(self.topology)
        target = annotated_function(self.fn, args, self.options)
        key = key_of(target, topology, self.options)

        def find() -> PlanRecord:
            return cached(self.directory, key, lambda: plan_function(target, topology, self.options))

        plan = agreed(target.program.name, key, find)
        return Plan.of(replace(plan, in_tree=target.in_tree, out_tree=target.out_tree))
