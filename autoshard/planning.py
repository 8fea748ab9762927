"""From a function to its plan: trace, annotate and search, then an account of what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import jax

from autoshard import accounts, trees
from autoshard.blocks import Traced
from autoshard.devices import topology_of
from autoshard.errors import AutoshardError
from autoshard.infeasible import explained
from autoshard.plan import Plan, abstract
from autoshard.trace import fingerprint, trace
from costmodels.topology import Topology
from search.solve import Limits, NoPlan, Solution
from search.solve import search as solve


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
    - `reserve_bytes`: memory of each chip to leave free.
    - `time_limit`: seconds after which the best plan so far is returned, with the gap that is left.
    - `progress`: called with a line of text now and then.

    **Raises:** `TopologyError`, `TraceError`, `UnsupportedPrimitiveError`, and `InfeasibleError` when no layout fits.
    """
    where = topology_of(topology)
    traced, weak = _traced(fn, args, donated(donate_argnums, len(args)), name, strict)
    solution = _solved(traced, where, reserve_bytes or 0.0, time_limit, progress)
    return _plan(traced, solution, args, donated(donate_argnums, len(args)), weak)


def donated(donate_argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The positions of donated arguments in order; negative ones count from the end.

    **Raises:** `AutoshardError` for a position that is none.
    """
    given = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    if any(not -count <= at < count for at in given):
        raise AutoshardError(f"donate_argnums is {donate_argnums}; the function has {count} arguments, so 0 to {count - 1} would do.")
    return tuple(sorted({at % count for at in given}))


def _traced(fn: Callable[..., Any], args: Sequence[Any], donate: tuple[int, ...], name: str, strict: bool) -> tuple[Traced, list[bool]]:
    """The program, and which flat arguments are Python scalars."""
    flat = abstract(fn, args)
    avals = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type) for leaf in flat]
    structure = jax.tree_util.tree_structure(tuple(args))
    found = trace(fn, *jax.tree_util.tree_unflatten(structure, avals), donate_argnums=donate, name=name, strict=strict)
    return found, [leaf.weak_type for leaf in flat]


def _solved(traced: Traced, topology: Topology, reserve_bytes: float, time_limit: float | None, progress) -> Solution:
    limits = Limits(reserve_bytes=reserve_bytes)
    if time_limit is not None:
        limits = Limits(reserve_bytes=reserve_bytes, wall_seconds=time_limit)
    try:
        return solve(traced.program, topology, limits, progress or (lambda _: None))
    except NoPlan as error:
        raise explained(error, reserve_bytes) from error


def _plan(traced: Traced, solution: Solution, args: Sequence[Any], donate: tuple[int, ...], weak: list[bool]) -> Plan:
    nothing = [0] * traced.out_tree.num_leaves
    return Plan(
        name=traced.program.name,
        topology=solution.problem.topology,
        fingerprint=fingerprint(traced.program),
        arguments=accounts.argument_plans(traced, solution, weak),
        constants=accounts.constant_plans(traced, solution),
        results=accounts.result_plans(traced, solution),
        in_tree=trees.describe(tuple(args)),
        out_tree=trees.describe(jax.tree_util.tree_unflatten(traced.out_tree, nothing)),
        choice=solution.choice,
        estimate=accounts.estimate(solution),
        proof=solution.proof,
        operations=accounts.operation_plans(solution),
        donate_argnums=donate,
        warnings=accounts.warnings(traced, solution),
        jax_version=jax.__version__,
        treedefs=(traced.in_tree, traced.out_tree),
    )
