"""What-if analysis of a plan: changes of its program or its topology, with their step times.

Each remedy has two numbers. *Kept*: the same layout at the new costs, if it still runs and fits. *Re-solved*: the proven best
layout of the changed problem. Nothing is traced again: `costmodels.program.what_if` changes the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autoshard._util.tables import WIDTH, item, size, table, time
from autoshard.emitting.bind import trace_as_planned
from autoshard.explaining.bottlenecks import sum_equal_operations
from autoshard.naming.weights import is_product, weight_operand, weight_sources
from autoshard.plan import Plan
from autoshard.planning.infeasibility import double as doubled_topology
from autoshard.planning.records_of import reprice_operations
from costmodels.bottlenecks import Work
from costmodels.machine.conventions import LOOPED
from costmodels.machine.interconnects import Torus
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from costmodels.program.what_if import NotDoubled, double_dimension, views_of, with_itemsize
from search.answer.assignment import Choice, loop_best
from search.answer.check import check
from search.solve import Limits, NoPlan
from search.solve import search as solve

_NARROW = 1.0
"""Bytes of an int8 element."""
_LISTED = 8
"""The number of operations that are listed with their own remedies."""
_HELPS = 0.01
"""The part of an operation's time above which a remedy is named for it."""


@dataclass(frozen=True)
class Change:
    """A what-if: the changed program and topology, and the factor on the sequences per step."""

    name: str
    what: str
    program: Program
    topology: Topology
    sequences: float = 1.0


@dataclass(frozen=True)
class Remedy:
    """A what-if with its step times in seconds; None, with the reason in `why`, if it does not run or fit.

    - `sequences`, `chips`: the factors on the plan's sequences and chips.
    - `proven`: whether the re-solved plan is proven optimal.
    """

    name: str
    what: str
    before_seconds: float
    kept_seconds: float | None
    resolved_seconds: float | None
    sequences: float
    chips: float
    proven: bool = False
    why: str = ""

    @property
    def seconds(self) -> float | None:
        """The re-solved seconds if there are any, else the kept ones."""
        return self.kept_seconds if self.resolved_seconds is None else self.resolved_seconds

    @property
    def cost(self) -> float | None:
        """Chip-seconds per sequence, as a multiple of the plan's."""
        return None if self.seconds is None else self.seconds * self.chips / self.sequences / self.before_seconds


@dataclass(frozen=True)
class Remedies:
    """The remedies of a plan, and their effect on its longest operations with the layout kept.

    `operations` pairs an operation as planned with the names of remedies and its seconds under them, collectives included.
    """

    name: str
    topology: str
    seconds: float
    remedies: tuple[Remedy, ...]
    operations: tuple[tuple[Work, tuple[tuple[str, float], ...]], ...]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        rows = [asdict(each) | {"seconds": each.seconds, "cost": each.cost} for each in self.remedies]
        operations = [
            {"operation": work.name, "regime": work.regime, "seconds": work.total_seconds, "under": dict(under)}
            for work, under in self.operations
        ]
        head = {"name": self.name, "topology": self.topology, "seconds": self.seconds}
        return head | {"remedies": rows, "operations": operations, "left_out": list(self.left_out)}

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = WIDTH) -> str:
        """The remedies as plain text tables."""
        return "\n".join(_lines(self, width)) + "\n"


def remedies(
    plan: Plan,
    fn: Callable[..., Any],
    *args: Any,
    resolve: bool = True,
    time_limit: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Remedies:
    """The effect on a plan of int8 weights, an int8 cache, twice the batch, twice the chips, and faster chips.

        print(autoshard.remedies(plan, decode, params, cache, tokens, position))

    **Arguments:**

    - `fn`, `args`: the plan's function and arguments; traced, not run.
    - `resolve`: whether to search the best layout for each; otherwise only the plan's own layout is costed.
    - `time_limit`: seconds for each search.

    **Raises:** `PlanMismatchError` if the plan is for another function or other arguments.
    """
    program, topology = trace_as_planned(plan, fn, args).program, plan.topology
    before = check(program, topology, plan.choice).seconds
    works = _works(program, topology, plan, plan.choice)
    found, left_out, under = [], [], {}
    for change in _changes(program, topology):
        if isinstance(change, str):
            left_out.append(change)
            continue
        progress(change.name)
        choice = _choice(change, plan)
        kept = _seconds_kept(change, plan, choice)
        if isinstance(kept, float) and change.sequences == 1:
            under[change.name] = _works(change.program, change.topology, plan, choice)
        found.append(
            _remedy(change, plan, before, kept, _limits(plan, change, time_limit) if resolve else None, choice)
        )
    longest = sorted(works, key=lambda key: -works[key].total_seconds)[:_LISTED]
    operations = tuple(
        (
            works[key],
            tuple(_helpful_remedies(works[key], {name: each[key] for name, each in under.items() if key in each})),
        )
        for key in longest
    )
    return Remedies(plan.name, topology.name, before, tuple(found), operations, tuple(left_out))


def _works(program: Program, topology: Topology, plan: Plan, choice: Choice) -> dict[tuple, Work]:
    """Operations with the costs of a what-if; equal operations in one layout are one."""
    return sum_equal_operations(reprice_operations(program, topology, choice, plan.operations))


def _helpful_remedies(work: Work, under: dict[str, Work]) -> Iterator[tuple[str, float]]:
    """The remedies that shorten an operation, the best first."""
    shorter = {name: each.total_seconds for name, each in under.items()}
    named = set[float]()
    for name in sorted(shorter, key=lambda name: (shorter[name], len(name))):
        if shorter[name] < (1 - _HELPS) * work.total_seconds and shorter[name] not in named:
            named.add(shorter[name])  # of two with the same effect, the smaller change
            yield name, shorter[name]


def _limits(plan: Plan, change: Change, time_limit: float | None) -> Limits:
    """The limits of the plan's search, with the same part of memory reserved."""
    part = 1 - plan.estimate.budget_bytes / plan.topology.chip.usable_hbm_bytes
    limits = Limits(reserve_bytes=max(part, 0.0) * change.topology.chip.usable_hbm_bytes)
    return limits if time_limit is None else replace(limits, wall_seconds=time_limit)


def _choice(change: Change, plan: Plan) -> Choice:
    """The plan's own layout; if a change loops collectives, each matmul loops the one it hides most of."""
    loops = change.topology.pricing.looped and not plan.topology.pricing.looped
    return loop_best(change.program, change.topology, plan.choice) if loops else plan.choice


def _seconds_kept(change: Change, plan: Plan, choice: Choice) -> float | str:
    """Seconds of the plan's own layout under a change, or the reason why there are none; "" for other chips."""
    if change.topology.axis_sizes != plan.topology.axis_sizes:
        return ""
    found = check(change.program, change.topology, choice)
    if found.faults:
        return found.faults[0]
    over = found.peak_bytes - plan.estimate.budget_bytes
    return f"the kept layout is {size(over)} too large" if over > 0 else found.seconds


def _remedy(
    change: Change, plan: Plan, before: float, kept: float | str, limits: Limits | None, start: Choice
) -> Remedy:
    known, why = (None, kept) if isinstance(kept, str) else (kept, "")
    chips = change.topology.size / plan.topology.size
    resolved, proven = None, False
    if limits is not None:
        try:
            solution = solve(change.program, change.topology, limits, start=start)
            resolved, proven = solution.check.seconds, solution.proof.status == "OPTIMAL"
            if known is not None and known < resolved:  # the search was stopped early
                resolved = known
        except NoPlan:
            why = "no layout fits"
    return Remedy(change.name, change.what, before, known, resolved, change.sequences, chips, proven, why)


# --- the changes


def _changes(program: Program, topology: Topology) -> Iterator[Change | str]:
    """Every applicable what-if, and a sentence for each inapplicable one."""
    weights, state = weight_values(program), state_values(program)
    yield from _narrow_change(program, topology, "int8 weights", weights)
    yield from _narrow_change(program, topology, "int8 cache", state - weights)
    if weights and state - weights:
        yield from _narrow_change(program, topology, "int8 weights and cache", weights | state)
    yield _double_batch(program, topology)
    wider = doubled_topology(topology)
    if wider is None:
        yield "twice the chips: the topology has no axis that can be doubled"
    else:
        yield Change("twice the chips", wider.name, program, wider)
    yield from _faster(program, topology)
    if topology.size > 1 and not topology.pricing.looped:
        looping = replace(topology.pricing, overlap=LOOPED)
        what = "each matmul hides one collective, with overlap looped"
        yield Change("looped collective einsums", what, program, replace(topology, pricing=looping))


def weight_values(program: Program) -> frozenset[int]:
    """The arguments and constants that matmuls use as weights, with all views, casts and layers of them."""
    origins = set()
    for i, op in program.matmuls():
        operand = weight_operand(program, i) if is_product(op) else None
        if operand is not None:
            sources = weight_sources(program, op.inputs[operand].value)
            origins.update(program.values[program.operations[at].outputs[0].value].origin for at in sources)
    return frozenset(i for i, value in enumerate(program.values) if value.origin in origins - {None})


def state_values(program: Program) -> frozenset[int]:
    """Arguments other than weights that reach a matmul without arithmetic, such as a key-value cache."""
    weights, found = weight_values(program), set[int]()
    for at in program.arguments:
        value = program.operations[at].outputs[0].value
        if value in weights:
            continue
        views = views_of(program, value)
        if any(
            program.operations[user].op_class == "matmul" for v in views for user, _ in program.consumers.get(v, ())
        ):
            found |= views
    return frozenset(found)


def _narrow_change(program: Program, topology: Topology, name: str, values: frozenset[int]) -> Iterator[Change | str]:
    arguments = [program.operations[at].outputs[0].value for at in (*program.arguments, *program.constants)]
    wide = [value for value in arguments if value in values and program.values[value].itemsize > _NARROW]
    if not wide:
        yield f"{name}: there is none, or it has 8 bits already"
        return
    before = sum(program.values[value].bytes for value in wide)
    changed = with_itemsize(program, values, _NARROW)
    after = sum(changed.values[value].bytes for value in wide)
    yield Change(name, f"{size(before)} → {size(after)}", changed, topology)


def batch_of(program: Program) -> tuple[int, int] | None:
    """The (value, position) of the batch: the first dimension in the largest matmul by a weight that is not the weight's."""
    best, most = None, 0.0
    for i, op in program.matmuls():
        operand = weight_operand(program, i) if is_product(op) else None
        if operand is None:
            continue
        work = program.multiplicity(op.region) * float(np.prod([float(factor.size) for factor in op.factors]))
        own = {f for dim in op.inputs[operand].dims for f in dim}
        other = op.inputs[1 - operand]
        at = next((d for d, dim in enumerate(other.dims) if dim and not own & set(dim)), None)
        if at is not None and work > most:
            best, most = (other.value, at), work
    return best


def _double_batch(program: Program, topology: Topology) -> Change | str:
    batch = batch_of(program)
    if batch is None:
        return "twice the batch: no matmul by a weight has one"
    n = program.values[batch[0]].shape[batch[1]]
    try:
        changed = double_dimension(program, *batch)
    except NotDoubled as error:
        return f"twice the batch: {error} Trace with the larger batch instead."
    grown = [at for at in program.arguments if _shape(program, at) != _shape(changed, at)]
    weights = weight_values(program)
    tied = [
        program.operations[at].outputs[0].value for at in grown if program.operations[at].outputs[0].value in weights
    ]
    if tied:
        name = program.values[tied[0]].name
        return f"twice the batch: the dimension of {n} is also one of the weight {name}. Trace with the larger batch."
    names = ", ".join(program.values[program.operations[at].outputs[0].value].name for at in grown)
    return Change("twice the batch", f"{n} → {2 * n} in {names}", changed, topology, sequences=2.0)


def _shape(program: Program, at: int) -> tuple[int, ...]:
    return program.values[program.operations[at].outputs[0].value].shape


def _faster(program: Program, topology: Topology) -> Iterator[Change]:
    """Chips with one rate doubled."""
    chip = topology.chip
    memory = {"hbm_bytes_per_second": 2 * chip.hbm_bytes_per_second}
    yield Change("twice the HBM bandwidth", _rate(memory), program, _with_constants(topology, memory))
    compute = {f"flops_per_second.{dtype}": 2 * rate for dtype, rate in chip.flops_per_second.items()}
    matmuls = {op.dtype for _, op in program.matmuls()}
    what = ", ".join(
        f"{chip.matmul_flops_per_second(dtype) * 2 / 1e12:g} TFLOP/s in {dtype}" for dtype in sorted(matmuls)
    )
    yield Change("twice the FLOP/s", what, program, _with_constants(topology, compute))
    if topology.size > 1:
        links = {
            name: 2 * c.value for name, c in chip.constants.items() if "." in name and name.endswith("bytes_per_second")
        }
        kind = "a link" if isinstance(chip.interconnect, Torus) else "a chip"
        what = f"{2 * max(axis.bytes_per_second for axis in topology.axes) / 1e9:g} GB/s {kind}, same latency"
        faster = _with_constants(topology, links)
        axes = tuple(replace(a, bytes_per_second=2 * a.bytes_per_second) for a in topology.axes)
        yield Change("twice the bandwidth between chips", what, program, replace(faster, axes=axes))


def _rate(numbers: dict[str, float]) -> str:
    return f"{next(iter(numbers.values())) / 1e9:g} GB/s"


def _with_constants(topology: Topology, numbers: dict[str, float]) -> Topology:
    """The topology with other constants of its chip, and the same axes."""
    return replace(topology, chip=topology.chip.override(numbers, "what if"))


# --- the report


def _lines(found: Remedies, width: int) -> Iterator[str]:
    yield f"Remedies for {found.name} on {found.topology}, {time(found.seconds)} a step"
    rows = [_row(each) for each in found.remedies]
    headers = ("what if", "", "layout kept", "re-solved", "per sequence", "chip-seconds")
    yield from (f"  {line}" for line in table(headers, rows, "<~>>>>", width - 2))
    yield "  layout kept: the plan's own layout at the new costs; re-solved: the best layout of a new search"
    yield "  per sequence: step time, and chip-seconds (step time × chips), as multiples of the plan's"
    if any(each.name.startswith("int8") for each in found.remedies):
        yield "  int8: storage only, computed as before; scales and the effect on results are not counted"
    notes = [f"{each.name}: {each.why}" for each in found.remedies if each.why]
    unproven = [each.name for each in found.remedies if each.resolved_seconds is not None and not each.proven]
    notes += [f"not proven best: {', '.join(unproven)}"] if unproven else []
    for note in (*notes, *found.left_out):
        yield from item(note, width)
    if found.operations:
        yield from ("", "By operation, with the layout kept")
        rows = [
            (
                work.name,
                work.regime,
                time(work.total_seconds),
                "; ".join(f"{time(s)}: {name}" for name, s in under[:2]) or "-",
            )
            for work, under in found.operations
        ]
        yield from (
            f"  {line}" for line in table(("operation", "bound by", "takes", "would take"), rows, "/<>~", width - 2)
        )


def _row(each: Remedy) -> tuple[str, ...]:
    def seconds_text(seconds: float | None) -> str:
        return "-" if seconds is None else time(seconds)

    per = "-" if each.seconds is None else f"× {each.seconds / each.sequences / each.before_seconds:.2f}"
    cost = "-" if each.cost is None else f"× {each.cost:.2f}"
    return (each.name, each.what, seconds_text(each.kept_seconds), seconds_text(each.resolved_seconds), per, cost)
