"""The decorator `@autoshard.autoshard`: plans a function at its first call, caches the plan, and runs it sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh

from autoshard._util.elapsed import Say, elapsed
from autoshard._util.identity import IdentityMap
from autoshard.annotating.attached import topology_of, topology_of_mesh
from autoshard.emitting.padded_step import PaddedStep
from autoshard.emitting.sharding import mesh_in_context
from autoshard.errors import AutoshardError, TraceError
from autoshard.pipeline import annotated_function, plan_and_tune
from autoshard.plan import Plan
from autoshard.planning.files.multihost import agree_on_plan
from autoshard.planning.files.plan_cache import default_directory, forget, key_of, load_or_make
from autoshard.planning.options import Options
from autoshard.planning.records import PlanRecord
from autoshard.tracing.calls import Call, Calls, name_of
from autoshard.tracing.traced_function import abstract
from costmodels.machine.topology import Topology


def autoshard(
    fn: Callable[..., Any] | None = None,
    *,
    topology: str | PathLike[str] | Topology = "auto",
    cache_dir: str | PathLike[str] | None = None,
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    mesh: Mesh | None = None,
    axes: Mapping[str, str] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Any:
    """Runs a function sharded over a topology, with a plan searched for the arguments of its calls.

        @autoshard.autoshard(topology="v5e:4x4", donate_argnums=1)
        def decode(params, cache, tokens, position): ...

        logits, cache = decode(params, cache, tokens, position)      # searches, then runs
        decode.plan.explain()                                        # the plan of the last call
        decode.plan_for(params, cache, tokens, position)             # the plan for arguments, without running
        decode.lower(params, cache, tokens, position).compile()

    The first call with new shapes, types, nesting or static values searches, or finds the plan in `cache_dir`. Work of more
    than a second is shown on standard error. Arguments are placed as planned. With several processes the first one searches,
    and all use its plan; all must make the call (also that of `plan_for`). Within `jax.jit`, `jax.grad` or `jax.vmap` it runs
    as `plan.apply(fn)` does. Exceptions of the function pass through unchanged.

    Arguments and results have no padding. An argument whose dimensions the plan pads is padded once, and the copy is kept as
    long as the argument. A donated argument is padded and its result cut at each call, which the choice of padding counts.

    Arguments may be given by keyword. Omitted arguments with a default, static arguments, strings and functions are
    constants. Methods are decorated in a class whose instances are pytrees, or with `static_argnames="self"`. Flax NNX
    modules, optimizers and random streams get their new state, as under `nnx.jit`.

    **Arguments:**

    - `topology`: as for `autoshard.search`; by default the devices that JAX sees, or those of the mesh in its shape.
    - `cache_dir`: the folder of plans between runs; by default the user's cache directory.
    - `donate_argnums`, `donate_argnames`: arguments whose memory the results may take.
    - `static_argnums`, `static_argnames`: arguments that are constants; they must be hashable.
    - `mesh`, `axes`: the mesh to run on, and the names of its axes, as for `Plan.jit`; by default that of `jax.set_mesh`, or
      one in the order of the torus.
    - `quiet`: whether nothing is written to standard error.
    - further keywords: as for `autoshard.search`.

    **Returns:** a function of the same arguments, with `plan_for(*args)`, `plan`, `lower(*args)` and `clear_cache()`.
    """
    _check_options(options)
    if fn is None:
        return functools.partial(
            autoshard,
            topology=topology,
            cache_dir=cache_dir,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            mesh=mesh,
            axes=axes,
            quiet=quiet,
            **options,
        )
    directory = default_directory() if cache_dir is None else Path(cache_dir)
    calls = Calls(fn, static_argnums, static_argnames, donate_argnums, donate_argnames)
    return Sharded(fn, _Planner(calls, topology, directory, Options(**options), mesh, axes, quiet))


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises `TypeError` for an option that does not exist."""
    known = [each.name for each in fields(Options) if each.name not in ("donate_argnums", "shapes", "repeated")]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Options of the search are {', '.join(known)}."
            raise TypeError(f"autoshard has no option {name!r}. {hint}")


class Sharded:
    """A decorated function."""

    def __init__(self, fn: Callable[..., Any], planner: _Planner) -> None:
        self._planner = planner
        functools.update_wrapper(self, fn)
        self.__name__ = name_of(fn)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._planner.run(args, keywords)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else _Method(self, instance)

    def __repr__(self) -> str:
        return f"<autoshard of {self.__name__}, {len(self._planner.known)} plans>"

    def plan_for(self, *args: Any, **keywords: Any) -> Plan:
        """The plan for these arguments, which is searched if it is new; nothing is run."""
        _, bound = self._planner.bound(args, keywords)
        return bound.plan

    @property
    def plan(self) -> Plan:
        """The plan of the last call.

        **Raises:** `AutoshardError` before the first call.
        """
        if self._planner.last is None:
            raise AutoshardError(
                f"{self.__name__} has no plan before its first call; use {self.__name__}.plan_for(...)."
            )
        return self._planner.last.plan

    def lower(self, *args: Any, **keywords: Any) -> Any:
        """The planned program, lowered for these arguments, as `jax.jit(...).lower` returns it."""
        call, bound = self._planner.bound(args, keywords)
        return bound.jitted.lower(*call.args)

    def clear_cache(self, disk: bool = False) -> None:
        """Forgets the plans and the compiled programs of this process; with `disk` also the plans' files."""
        self._planner.clear(disk)


class _Method:
    """A decorated method of one object."""

    def __init__(self, sharded: Sharded, instance: Any) -> None:
        self.__self__, self.__func__ = instance, sharded
        functools.update_wrapper(self, sharded.__wrapped__)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.__func__(self.__self__, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__func__, name)
        return functools.partial(found, self.__self__) if name in ("plan_for", "lower") else found


@dataclass(frozen=True)
class _Bound:
    """A plan with its compiled function, the function that places its arguments, and its function for transformations."""

    plan: Plan
    function: Callable[..., Any]
    jitted: Callable[..., Any]
    place: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    applied: Callable[..., Any]
    cache_key: str


def _place(shardings: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.device_put(args, shardings)


@dataclass
class _Planner:
    """The plans of one function, by the shapes, types, nesting and static values of the arguments, and by the mesh."""

    calls: Calls
    topology: str | PathLike[str] | Topology
    directory: Path
    options: Options
    mesh: Mesh | None = None
    axes: Mapping[str, str] | None = None
    quiet: bool = False
    known: dict[Hashable, _Bound] = field(default_factory=dict)
    last: _Bound | None = None
    _ran: IdentityMap[None] = field(default_factory=IdentityMap)

    def run(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        call, bound = self.bound(args, keywords)
        self.last = bound
        if any(isinstance(leaf, Tracer) for leaf in jax.tree_util.tree_leaves(call.args)):
            return call.finish(bound.function, call.args, bound.applied(*call.args))
        placed = bound.place(call.args)
        with self._shown(bound):
            result = bound.jitted(*placed)
        return call.finish(bound.function, placed, result)

    def _shown(self, bound: _Bound) -> AbstractContextManager[Any]:
        """Shows the first run of a plan, which compiles it."""
        if bound in self._ran:
            return nullcontext()
        self._ran[bound] = None
        return self._elapsed(f"compiling {bound.plan.name} for {bound.plan.topology.name}", "compiled")

    def bound(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Call, _Bound]:
        call = self.calls.of(args, keywords)
        mesh = self.mesh or mesh_in_context()
        leaves = abstract(self.calls.fn, call.args)
        shapes = tuple((leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in leaves)
        key = call.key, jax.tree_util.tree_structure(call.args), shapes, mesh
        if key not in self.known:
            self.known[key] = self._bound(call, mesh)
        return call, self.known[key]

    def _bound(self, call: Call, mesh: Mesh | None) -> _Bound:
        again = f", plan {len(self.known) + 1}" if self.known else ""
        with self._elapsed(f"planning {name_of(self.calls.fn)}{again}", "planned") as say:
            function, plan, key = self._plan(call, mesh, say)
        on = mesh or plan.make_mesh()
        axes = self.axes if mesh is not None else None
        shardings, _ = plan.shardings(on, axes)
        jitted = plan.jit(function, on, axes=axes)
        if isinstance(jitted, PaddedStep):
            jitted = jitted.remembering()
        place = jitted.place_others if isinstance(jitted, PaddedStep) else functools.partial(_place, shardings)
        return _Bound(plan, function, jitted, place, plan.apply(function, self.mesh, axes=axes), key)

    def _plan(self, call: Call, mesh: Mesh | None, say: Say) -> tuple[Callable[..., Any], Plan, str]:
        from_mesh = mesh is not None and self.topology == "auto"
        topology = topology_of_mesh(mesh) if from_mesh else topology_of(self.topology)
        options = replace(self.options, donate_argnums=call.donated, repeated=True)
        say("tracing")
        try:
            function = call.function()
            target = annotated_function(function, call.args, options)
        except TraceError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from error.__cause__.__cause__
        key = key_of(target, topology, options)

        def find() -> PlanRecord:
            say(f"searching for the fastest layout on {topology.name}")
            return load_or_make(
                self.directory, key, lambda: plan_and_tune(target, topology, options, function, call.args)
            )

        found = agree_on_plan(target.program.name, key, find)
        return function, Plan.of(replace(found, in_tree=target.in_tree, out_tree=target.out_tree)), key

    def _elapsed(self, doing: str, ended: str) -> AbstractContextManager[Say]:
        if self.quiet or jax.process_index():
            return nullcontext(lambda _: None)
        return elapsed(f"autoshard: {doing}", ended=ended)

    def clear(self, disk: bool) -> None:
        if disk:
            forget(self.directory, [bound.cache_key for bound in self.known.values()])
        self.known.clear()
        self._ran.clear()
        self.last = None
