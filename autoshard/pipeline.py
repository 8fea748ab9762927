"""The pipeline: trace, annotate, search, and record the plan; `Plan.jit` emits and `autoshard.audit` audits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, get_args

from autoshard.annotating.annotated_function import AnnotatedFunction, annotate
from autoshard.annotating.attached import topology_of
from autoshard.annotating.dimension_names import Names, symbols_of
from autoshard.errors import AutoshardError
from autoshard.plan import Plan
from autoshard.planning.chains import choose_chains
from autoshard.planning.options import Options
from autoshard.planning.padding import choose_padding
from autoshard.planning.recording import record
from autoshard.planning.solving import LOG
from autoshard.rules.pin import Pins
from autoshard.tracing.traced_function import trace_function
from costmodels.machine.conventions import PricingError
from costmodels.machine.topology import Topology
from costmodels.program.grouped import CHAIN, grouped
from search.answer.solution import Solver
from search.collector import seldom_collected
from search.cpsat.background import begin_import


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
    padding: bool = True,
    tune: bool = False,
    capacity: float | None = None,
) -> Plan:
    """Searches for the layout of every array and operation of a function with the least step time on a topology.

        plan = autoshard.search(decode, params, cache, tokens, position, topology="v4:4x4x4", donate_argnums=1)
        plan.proof.status, plan.estimate.seconds

    **Arguments:**

    - `fn`: a function of pytrees of arrays.
    - `args`: its arguments, arrays or `jax.ShapeDtypeStruct`s; only shapes and types are used, and nothing is allocated.
    - `topology`: `CHIP:AxBxC`, the path of a TOML file, a `Topology`, or "auto" for the devices that JAX sees.
    - `donate_argnums`: positions of arguments whose memory the results may take, as for `jax.jit`.
    - `name`: the name of the plan; the function's name by default.
    - `strict`: raise for primitives without a sharding rule, instead of replicating their arrays.
    - `reserve_bytes`: memory of each chip to leave free; by default a twentieth, for the compiler's own needs.
    - `time_limit`: seconds after which the best plan so far is returned, with the remaining gap.
    - `progress`: called with a line of text now and then; by default the lines go to the log "autoshard".
    - `pins`: layouts to fix: `{"params.*.wq": P(None, "x", ("y", "z"))}`, patterns over dotted argument paths, or a tree of
      specs per argument with `None` for free arrays. `autoshard.pin` pins intermediates.
    - `fold`: whether identical layers of an unrolled Python loop have the same layouts, so the search time does not depend
      on their number. Without it layers may differ, and the search time is proportional to their number.
    - `memory_bytes`: the memory of each chip that the plan may use; by default all but the reserve.
    - `baselines`: whether baselines (data parallel, Megatron 1D, ...) are searched too, to compare with.
    - `dims`: names of dimensions for formulas, such as `{"tokens": "B", "layers.wi_gate": "N E F"}` or `{"B": 64}`
      (`autoshard.annotating.dimension_names`); a dimension without a name is named after its argument.
    - `padding`: whether dimensions that the mesh axes do not divide may be padded, where that makes the step faster and does
      not add work on the chip. Such a function is searched once per padding that is tried, and each plan is proven on its
      own. `plan.place` pads arguments once; arguments without padding are padded at each call.
    - `tune`: whether to compile the plan for its chips, search again within less memory if the compiler refuses it, and
      keep the fastest way to emit it (`autoshard.verify` with `k=1`, without baselines). `plan.warnings` say what was gained.
    - `capacity`: the rows of the buffers of a mixture of experts over the balanced rows, at least 1 (`expert_load` of the
      topology's pricing, 1.5 by default). The number of chips that split the experts is the worst case. A router that needs
      more takes longer; the results are the same. With 0 no rows are sent to the chips of their experts: tokens are gathered.
    - `solver`: "presolved", or "cp-sat" for CP-SAT on the original model: a reference for small functions and meshes.

    **Raises:** `TopologyError`, `TraceError`, `UnsupportedPrimitiveError`, `PinError` for pins that cannot hold, and
    `InfeasibleError` if no layout fits; with `tune`, `AuditError` if the compiler refuses every plan.
    """
    if solver not in get_args(Solver):
        raise AutoshardError(f'`solver` must be "presolved" or "cp-sat", got {solver!r}.')
    options = Options(
        donate_argnums=donate_argnums,
        name=name,
        strict=strict,
        reserve_bytes=reserve_bytes,
        time_limit=time_limit,
        progress=progress,
        pins=pins,
        fold=fold,
        memory_bytes=memory_bytes,
        baselines=baselines,
        dims=dims,
        solver=solver,
        padding=padding,
        tune=tune,
        sends_rows=capacity != 0,
    )
    begin_import()  # of OR-Tools, while the function is traced
    where = _with_capacity(topology_of(topology), capacity)
    return plan_and_tune(annotated_function(fn, args, options), where, options, fn, args)


def _with_capacity(topology: Topology, capacity: float | None) -> Topology:
    """The topology with another `expert_load`.

    **Raises:** `AutoshardError` if the capacity is not a number of at least 1, or 0, which leaves the topology as it is.
    """
    if not capacity:
        return topology
    try:
        return replace(topology, pricing=replace(topology.pricing, expert_load=capacity))
    except PricingError as error:
        raise AutoshardError(f"`capacity` must be 0 or a finite number of at least 1, got {capacity!r}.") from error


@seldom_collected()
def annotated_function(fn: Callable[..., Any], args: Sequence[Any], options: Options) -> AnnotatedFunction:
    """A function, traced with arguments of these shapes and types, and annotated, without the pins.

    **Raises:** `TraceError`, `UnsupportedPrimitiveError`; `AutoshardError` for symbolic dimensions.
    """
    _refuse_symbols(args)
    given = (fn, args, options.donate_argnums, options.name, options.strict)
    function = annotate(trace_function(*given), options.dims, options.shapes)
    if all(grouped(op) is None for op in function.program.operations):
        return function
    chained = annotate(trace_function(*given, chains=True), options.dims, options.shapes)
    has_chains = any(op.primitive == CHAIN for op in chained.program.operations)
    return replace(function, chained=chained) if has_chains else function


def plan_and_tune(
    function: AnnotatedFunction, topology: Topology, options: Options, fn: Callable[..., Any], args: Sequence[Any]
) -> Plan:
    """The plan of `plan_function`, compiled and tuned if the options say so.

    **Raises:** as `plan_function`; `AuditError` if the compiler refuses every plan.
    """
    plan = plan_function(function, topology, options)
    if not options.tune:
        return plan
    from autoshard.candidates import tune_plan

    def again(limit: float) -> Plan:
        return plan_function(function, topology, replace(options, memory_bytes=limit))

    return tune_plan(plan, again, fn, args, options.progress or LOG.info)


@seldom_collected()
def plan_function(function: AnnotatedFunction, topology: Topology, options: Options) -> Plan:
    """Searches for the layout of an annotated function on a topology, and records it as a plan.

    **Raises:** `InfeasibleError`, `PinError`.
    """
    choose = choose_padding if options.padding else choose_chains
    choice = choose(function, topology, options)
    return Plan.of(record(choice.function, choice.solution, options, choice.notes))


def _refuse_symbols(args: Sequence[Any]) -> None:
    symbols = symbols_of(args)
    if symbols:
        raise AutoshardError(
            f"The arguments must not have symbolic dimensions, got {', '.join(symbols)}:"
            f" use autoshard.trace_symbolic(fn, ...).bind({symbols[0]}=...).search(topology)."
        )
