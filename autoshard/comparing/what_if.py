"""What would make a planned step faster, as numbers: the plan's program or its topology changed, priced and searched again.

Two numbers for each remedy. *Kept*: the same layout at the new prices, where it still runs and fits. *Re-solved*: the proven
best layout of the changed problem. Nothing is traced again: programs are changed by `costmodels.transformations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autoshard._util.tables import WIDTH, item, size, table, time
from autoshard.emitting.bind import traced_as
from autoshard.explaining.bottlenecks import alike_summed
from autoshard.naming.strategy_names import is_product, weight_operand
from autoshard.plan import Plan
from autoshard.planning.infeasibility import doubled as doubled_topology
from autoshard.planning.records_of import repriced
from costmodels.bottlenecks import Work
from costmodels.machine.chips import Torus
from costmodels.machine.conventions import LOOPED
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from costmodels.program.what_if import NotDoubled, doubled, views_of, with_itemsize
from search.answer.assignment import Choice, looped
from search.answer.check import check
from search.solve import Limits, NoPlan
from search.solve import search as solve

_NARROW = 1.0
"""Bytes of an int8 element."""
_LISTED = 8
"""How many operations are listed with their own remedies."""
_HELPS = 0.01
"""The part of an operation's time from which on a remedy is worth naming for it."""


@dataclass(frozen=True)
class Change:
    """A what-if: the program, the topology, and how many times the sequences of the plan one step then serves."""

    name: str
    what: str
    program: Program
    topology: Topology
    sequences: float = 1.0


@dataclass(frozen=True)
class Remedy:
    """A what-if with its prices in seconds of one step; None for what does not run or fit, with `why`.

    - `sequences`: how many times the sequences of the plan the step serves; `chips`: how many times its chips it takes.
    - `proven`: whether the re-solved plan is proven best.
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
        """Re-solved if it was, else kept."""
        return self.kept_seconds if self.resolved_seconds is None else self.resolved_seconds

    @property
    def cost(self) -> float | None:
        """Chip-seconds for a sequence, as a multiple of the plan's."""
        return None if self.seconds is None else self.seconds * self.chips / self.sequences / self.before_seconds


@dataclass(frozen=True)
class Remedies:
    """The remedies of a plan, and for its longest operations the seconds that each leaves, the layout kept.

    `operations` pairs an operation as planned with remedy names and its seconds under them, collectives included.
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
        return "\n".join(_rendered(self, width)) + "\n"


def remedies(
    plan: Plan,
    fn: Callable[..., Any],
    *args: Any,
    resolve: bool = True,
    time_limit: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Remedies:
    """What int8 weights, an int8 cache, twice the batch, twice the chips and faster chips would give a plan.

        print(autoshard.remedies(plan, decode, params, cache, tokens, position))

    **Arguments:**

    - `fn`, `args`: what the plan was searched for; traced, not run.
    - `resolve`: search the best layout for each, too; otherwise only the plan's own layout is priced.
    - `time_limit`: seconds for each search.

    **Raises:** `PlanMismatchError` if the plan is for another function or other arguments.
    """
    program, topology = traced_as(plan, fn, args).program, plan.topology
    before = check(program, topology, plan.choice).seconds
    works = _works(program, topology, plan, plan.choice)
    found, left_out, under = [], [], {}
    for change in _changes(program, topology):
        if isinstance(change, str):
            left_out.append(change)
            continue
        progress(change.name)
        choice = _choice(change, plan)
        kept = _kept(change, plan, choice)
        if isinstance(kept, float) and change.sequences == 1:
            under[change.name] = _works(change.program, change.topology, plan, choice)
        found.append(
            _remedy(change, plan, before, kept, _limits(plan, change, time_limit) if resolve else None, choice)
        )
    longest = sorted(works, key=lambda key: -works[key].total_seconds)[:_LISTED]
    operations = tuple(
        (works[key], tuple(_helping(works[key], {name: each[key] for name, each in under.items() if key in each})))
        for key in longest
    )
    return Remedies(plan.name, topology.name, before, tuple(found), operations, tuple(left_out))


def _works(program: Program, topology: Topology, plan: Plan, choice: Choice) -> dict[tuple, Work]:
    """Operations that do the same in the same layout as one, at the prices of a what-if."""
    return alike_summed(repriced(program, topology, choice, plan.operations))


def _helping(work: Work, under: dict[str, Work]) -> Iterator[tuple[str, float]]:
    """The remedies that shorten an operation, the best first."""
    shorter = {name: each.total_seconds for name, each in under.items()}
    named = set[float]()
    for name in sorted(shorter, key=lambda name: (shorter[name], len(name))):
        if shorter[name] < (1 - _HELPS) * work.total_seconds and shorter[name] not in named:
            named.add(shorter[name])  # of two that do the same for it, the one that changes less
            yield name, shorter[name]


def _limits(plan: Plan, change: Change, time_limit: float | None) -> Limits:
    """As the plan was searched: with the same part of memory left free."""
    part = 1 - plan.estimate.budget_bytes / plan.topology.chip.usable_hbm_bytes
    limits = Limits(reserve_bytes=max(part, 0.0) * change.topology.chip.usable_hbm_bytes)
    return limits if time_limit is None else replace(limits, wall_seconds=time_limit)


def _choice(change: Change, plan: Plan) -> Choice:
    """The plan's own layout; where a change loops collectives, each matmul loops the one of which it hides the most."""
    loops = change.topology.pricing.looped and not plan.topology.pricing.looped
    return looped(change.program, change.topology, plan.choice) if loops else plan.choice


def _kept(change: Change, plan: Plan, choice: Choice) -> float | str:
    """Seconds of the plan's own layout under a change, or why it has none: no word where it is for other chips."""
    if change.topology.axis_sizes != plan.topology.axis_sizes:
        return ""
    found = check(change.program, change.topology, choice)
    if found.faults:
        return found.faults[0]
    over = found.peak_bytes - plan.estimate.budget_bytes
    return f"the layout kept is {size(over)} too large" if over > 0 else found.seconds


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
            if known is not None and known < resolved:  # a search cut short
                resolved = known
        except NoPlan:
            why = "no layout fits"
    return Remedy(change.name, change.what, before, known, resolved, change.sequences, chips, proven, why)


# --- the changes


def _changes(program: Program, topology: Topology) -> Iterator[Change | str]:
    """Every what-if that this program and this topology have, and a sentence for each that they have not."""
    weights, state = weight_values(program), state_values(program)
    yield from _narrowed(program, topology, "int8 weights", weights)
    yield from _narrowed(program, topology, "int8 cache", state - weights)
    if weights and state - weights:
        yield from _narrowed(program, topology, "int8 weights and cache", weights | state)
    yield _twice_the_batch(program, topology)
    wider = doubled_topology(topology)
    if wider is None:
        yield "twice the chips: the topology has no axis that can be doubled"
    else:
        yield Change("twice the chips", wider.name, program, wider)
    yield from _faster(program, topology)
    if topology.size > 1 and not topology.pricing.looped:
        looping = replace(topology.pricing, overlap=LOOPED)
        what = "each matmul hides one collective; the program has to loop itself"
        yield Change("looped collective einsums", what, program, replace(topology, pricing=looping))


def weight_values(program: Program) -> frozenset[int]:
    """The arguments and constants that matmuls use as weights, with all views, casts and layers of them."""
    origins = set()
    for i, op in program.matmuls():
        operand = weight_operand(program, i) if is_product(op) else None
        if operand is not None:
            origins.add(program.values[op.inputs[operand].value].origin)
    return frozenset(i for i, value in enumerate(program.values) if value.origin and value.origin in origins)


def state_values(program: Program) -> frozenset[int]:
    """Arguments that are no weights and reach a matmul without arithmetic on the way, such as a key-value cache."""
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


def _narrowed(program: Program, topology: Topology, name: str, values: frozenset[int]) -> Iterator[Change | str]:
    arguments = [program.operations[at].outputs[0].value for at in (*program.arguments, *program.constants)]
    wide = [value for value in arguments if value in values and program.values[value].itemsize > _NARROW]
    if not wide:
        yield f"{name}: no argument is one, or it is 8 bits wide already"
        return
    before = sum(program.values[value].bytes for value in wide)
    changed = with_itemsize(program, values, _NARROW)
    after = sum(changed.values[value].bytes for value in wide)
    yield Change(name, f"{size(before)} → {size(after)}", changed, topology)


def batch_of(program: Program) -> tuple[int, int] | None:
    """The dimension (value, position) that is the batch: the first that is not the weight's, in the largest matmul by one."""
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


def _twice_the_batch(program: Program, topology: Topology) -> Change | str:
    batch = batch_of(program)
    if batch is None:
        return "twice the batch: no matmul by a weight has one"
    n = program.values[batch[0]].shape[batch[1]]
    try:
        changed = doubled(program, *batch)
    except NotDoubled as error:
        return f"twice the batch: {error} Trace it with the larger batch instead."
    grown = [at for at in program.arguments if _shape(program, at) != _shape(changed, at)]
    weights = weight_values(program)
    tied = [
        program.operations[at].outputs[0].value for at in grown if program.operations[at].outputs[0].value in weights
    ]
    if tied:
        name = program.values[tied[0]].name
        return f"twice the batch: the dimension of {n} is one of the weight {name} too. Trace it with the larger batch."
    names = ", ".join(program.values[program.operations[at].outputs[0].value].name for at in grown)
    return Change("twice the batch", f"{n} → {2 * n} in {names}", changed, topology, sequences=2.0)


def _shape(program: Program, at: int) -> tuple[int, ...]:
    return program.values[program.operations[at].outputs[0].value].shape


def _faster(program: Program, topology: Topology) -> Iterator[Change]:
    """A chip with twice of one rate, whatever that would be called."""
    chip = topology.chip
    memory = {"hbm_bytes_per_second": 2 * chip.hbm_bytes_per_second}
    yield Change("twice the HBM bandwidth", _rate(memory), program, _with(topology, memory))
    compute = {f"flops_per_second.{dtype}": 2 * rate for dtype, rate in chip.flops_per_second.items()}
    matmuls = {op.dtype for _, op in program.matmuls()}
    what = ", ".join(
        f"{chip.matmul_flops_per_second(dtype) * 2 / 1e12:g} TFLOP/s in {dtype}" for dtype in sorted(matmuls)
    )
    yield Change("twice the FLOP/s", what, program, _with(topology, compute))
    if topology.size > 1:
        links = {
            name: 2 * c.value for name, c in chip.constants.items() if "." in name and name.endswith("bytes_per_second")
        }
        kind = "a link" if isinstance(chip.interconnect, Torus) else "a chip"
        what = f"{2 * max(axis.bytes_per_second for axis in topology.axes) / 1e9:g} GB/s {kind}, latency as it is"
        faster = _with(topology, links)
        axes = tuple(replace(a, bytes_per_second=2 * a.bytes_per_second) for a in topology.axes)
        yield Change("twice the bandwidth between chips", what, program, replace(faster, axes=axes))


def _rate(numbers: dict[str, float]) -> str:
    return f"{next(iter(numbers.values())) / 1e9:g} GB/s"


def _with(topology: Topology, numbers: dict[str, float]) -> Topology:
    """The topology with other constants of its chip; its axes as they were set."""
    return replace(topology, chip=topology.chip.override(numbers, "what if"))


# --- the report


def _rendered(found: Remedies, width: int) -> Iterator[str]:
    yield f"Remedies for {found.name} on {found.topology}, {time(found.seconds)} a step"
    rows = [_row(each) for each in found.remedies]
    headers = ("what if", "", "layout kept", "re-solved", "per sequence", "chip-seconds")
    yield from (f"  {line}" for line in table(headers, rows, "<~>>>>", width - 2))
    yield "  layout kept: the plan's own layout at the new prices; re-solved: the best one, searched anew"
    yield "  per sequence: the last step time, and chip-seconds: that times the chips, as multiples of the plan's"
    if any(each.name.startswith("int8") for each in found.remedies):
        yield "  int8: stored so, computed as before; the scales, and what it does to the results, are not counted"
    notes = [f"{each.name}: {each.why}" for each in found.remedies if each.why]
    unproven = [each.name for each in found.remedies if each.resolved_seconds is not None and not each.proven]
    notes += [f"not proven best: {', '.join(unproven)}"] if unproven else []
    for note in (*notes, *found.left_out):
        yield from item(note, width)
    if found.operations:
        yield from ("", "By operation, the layout kept")
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
    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else time(seconds)

    per = "-" if each.seconds is None else f"× {each.seconds / each.sequences / each.before_seconds:.2f}"
    cost = "-" if each.cost is None else f"× {each.cost:.2f}"
    return (each.name, each.what, shown(each.kept_seconds), shown(each.resolved_seconds), per, cost)
