"""Joint plans of several phases of one model: one layout of the weights, and hand-overs of the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from autoshard._util.paths import dotted
from autoshard._util.tables import time
from autoshard.annotating.annotated_function import AnnotatedFunction
from autoshard.annotating.attached import topology_of
from autoshard.errors import AutoshardError
from autoshard.phase_padding import PhaseChoice, Sharing, choose_joint_padding
from autoshard.pipeline import annotated_function
from autoshard.plan import Plan
from autoshard.planning.infeasibility import explain_infeasible
from autoshard.planning.options import Options
from autoshard.planning.recording import apply_orders, record
from autoshard.planning.records import PlanRecord, predecessors
from autoshard.workload import Workload
from costmodels.machine.topology import Topology
from search.answer.orders import demand, itemsize, order_of, stored_shape
from search.collector import seldom_collected
from search.phases import Phases, Place, TooSlow
from search.phases import search_phases as solve
from search.solve import NoPlan, Proof

Handoff = tuple[str, str]
"""`("prefill.result[1]", "decode.cache")`: a result of one phase, and the argument of another phase that takes it."""


@dataclass(frozen=True)
class PhasePlans(Mapping[str, Plan]):
    """The plans of several phases that share layouts, by the phases' names.

    - `weights`: the number of runs of each phase; `proof` is of the weighted sum of the phases' times.
    - `alone_seconds`: the step time of each phase planned alone.
    - `handoff_seconds`: the time of one reshard of the handed-over arrays; `handed` names them.
    """

    plans: Mapping[str, Plan]
    weights: Mapping[str, float]
    alone_seconds: Mapping[str, float]
    proof: Proof
    handoff_seconds: float
    handed: tuple[Handoff, ...]

    def __getitem__(self, name: str) -> Plan:
        return self.plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def explain(self) -> str:
        """The cost of sharing for each phase, as text."""
        width = max(map(len, self.plans))
        lines = [f"{'phase':{width}}  weight      alone     shared   sharing costs"]
        for name, plan in self.plans.items():
            alone, here = self.alone_seconds[name], plan.estimate.seconds
            cost = f"{time(here - alone)} ({here / alone - 1:.1%})" if here > alone * (1 + 1e-9) else "nothing"
            lines.append(f"{name:{width}}  {self.weights[name]:6g} {time(alone):>10} {time(here):>10}   {cost}")
        for result, argument in self.handed:
            lines.append(f"{result} becomes {argument}.")
        kept = [f"{name}.{plan.results[k].path}" for name, plan in self.plans.items() for k in plan.handed_results]
        if kept:
            lines.append(f"These results keep their padding: {', '.join(kept)}.")
        if self.handed:
            lines.append(f"Each hand-over takes {time(self.handoff_seconds)}.")
        proof = self.proof
        lines.append(
            f"Weighted sum {time(proof.objective_seconds)}: {proof.status}, gap {proof.gap:.2%},"
            f" found in {proof.wall_seconds:.1f} s."
        )
        if proof.solver:
            left = f"{proof.states - proof.fixed_by_presolve:,} of {proof.states:,} strategies and layouts"
            lines.append(f"{proof.solver}: {proof.solver_status} on {proof.booleans:,} booleans; presolve left {left}.")
        return "\n".join(lines) + "\n"


@seldom_collected()
def search_phases(
    workloads: Mapping[str, Workload],
    *,
    shared: str | Mapping[str, str],
    topology: str | PathLike[str] | Topology,
    weights: Mapping[str, float] | None = None,
    handoffs: Sequence[Handoff] | None = None,
    at_most: Mapping[str, float] | None = None,
    reserve_bytes: float | None = None,
    time_limit: float | None = None,
    progress: Callable[[str], None] | None = None,
    padding: bool = True,
) -> PhasePlans:
    """Searches the layout of shared arrays that is fastest for several phases together.

        plans = autoshard.search_phases(
            {"prefill": prefill(batch=64), "decode": decode(batch=64)},
            shared="params", weights={"prefill": 1, "decode": 64}, topology="v4:4x4x4",
        )
        plans["decode"].in_specs; print(plans.explain())

    **Arguments:**

    - `shared`: the argument whose arrays all phases share, by name; a mapping from phase to name if the names differ.
    - `weights`: the number of runs of each phase; 1 by default.
    - `handoffs`: pairs like `("prefill.result[1]", "decode.cache")`. By default every donated argument takes over the result
      of an earlier phase with the same end of its path (`['k']`), the same dtype, and the same shape up to one dimension.
    - `at_most`: a limit on the seconds of a phase, such as `{"decode": 0.030}`: the sum is minimal under that limit.
    - `padding`: whether dimensions that the mesh axes do not divide may be padded, in all phases alike. A handed-over result
      keeps the padding that the next phase's argument has too, if it is zero there.
    - The others as for `autoshard.search`.

    **Raises:** `AutoshardError` for phases that share nothing, handoffs that do not fit, or a limit that no layout
    meets; `InfeasibleError`.
    """
    where = topology_of(topology)
    options = Options(reserve_bytes=reserve_bytes, time_limit=time_limit, progress=progress, padding=padding)
    targets = {
        name: annotated_function(work.fn, work.args, Options(work.donate_argnums, work.name or name))
        for name, work in workloads.items()
    }
    rates = [float((weights or {}).get(name, 1.0)) for name in targets]
    if unknown := set(weights or ()) - set(targets):
        raise AutoshardError(f"The phases of weights must be among {', '.join(targets)}, got {sorted(unknown)[0]!r}.")
    pairs, common = _find_handovers(targets, handoffs), _shared_pairs(targets, shared)
    handed, limit = [(a, b) for a, b, _ in pairs], _limit(targets, at_most)

    def joint(functions: Sequence[AnnotatedFunction], cutoff: float, left: float | None) -> Phases:
        limits, programs = replace(options, time_limit=left).limits(), [each.program for each in functions]
        return solve(programs, rates, where, common, handed, limits, progress or (lambda _: None), limit, cutoff)

    try:
        sharing = Sharing(common, handed)
        choice = choose_joint_padding([*targets.values()], sharing, where, joint, rates, options)
    except TooSlow as error:
        name, least = list(targets)[error.phase], time(error.least_seconds)
        raise AutoshardError(
            f"No layout meets the limit {time((at_most or {})[name])} of {name} on {where.name}:"
            f" the fastest found takes {least}."
        ) from error
    except NoPlan as error:
        raise explain_infeasible(error) from error
    plans = _share_orders(_records(choice), choice.found.weights, common, handed)
    words = tuple(dict.fromkeys(words for _, _, words in pairs))
    return _plans(targets, choice.found, dict(zip(targets, map(Plan.of, plans), strict=True)), words)


def _records(choice: PhaseChoice) -> list[PlanRecord]:
    parts = zip(choice.functions, choice.found.solutions, choice.handed_results, strict=True)
    return [record(function, part, notes=choice.notes, handed_results=kept) for function, part, kept in parts]


def _limit(targets: Mapping[str, AnnotatedFunction], at_most: Mapping[str, float] | None) -> tuple[int, float] | None:
    """The phase with a limit, and the limit."""
    if not at_most:
        return None
    if len(at_most) > 1 or next(iter(at_most)) not in targets:
        raise AutoshardError(f"at_most must be a limit for one of {', '.join(targets)}, got {dict(at_most)}.")
    name, seconds = next(iter(at_most.items()))
    return list(targets).index(name), float(seconds)


def _plans(
    targets: Mapping[str, AnnotatedFunction], found: Phases, plans: Mapping[str, Plan], handed: tuple[Handoff, ...]
) -> PhasePlans:
    names = list(targets)
    return PhasePlans(
        plans,
        dict(zip(names, found.weights, strict=True)),
        {name: alone.check.seconds for name, alone in zip(names, found.alone, strict=True)},
        found.proof,
        found.handoff_seconds,
        handed,
    )


def _share_orders(
    plans: Sequence[PlanRecord],
    weights: Sequence[float],
    shared: Sequence[tuple[Place, Place]],
    handed: Sequence[tuple[Place, Place]],
) -> list[PlanRecord]:
    """The plans with orders of dimensions that are the same in all phases for one array.

    Arguments that are one array, shared or handed over in the place of a donated one, have the order that most of their
    readers need, weighted by the runs of their phases. A result that becomes an argument has the argument's order.
    """
    over = [predecessors(plan.arguments, plan.results, plan.require_program().donated) for plan in plans]
    same = list(shared)
    same += [((phase, over[phase][k]), argument) for (phase, k), argument in handed if k in over[phase]]
    orders: dict[Place, tuple[int, ...]] = {}
    for group in _groups([(phase, at) for phase, plan in enumerate(plans) for at in range(len(plan.arguments))], same):
        wanted = Counter[Any]()
        for phase, at in group:
            program = plans[phase].require_program()
            found = demand(program, plans[phase].choice, plans[phase].topology, program.arguments[at])
            wanted.update({order: bytes * weights[phase] for order, bytes in found.items()})
        phase, at = group[0]
        program, choice, topology = plans[phase].require_program(), plans[phase].choice, plans[phase].topology
        sizes = stored_shape(program, choice, topology, program.arguments[at])
        orders |= dict.fromkeys(group, order_of(wanted, sizes, itemsize(program, program.arguments[at])))
    placed = [
        apply_orders(plan, [orders[phase, at] for at in range(len(plan.arguments))]) for phase, plan in enumerate(plans)
    ]
    for (phase, k), argument in handed:
        if k not in over[phase] and orders[argument]:
            results = list(placed[phase].results)
            results[k] = replace(results[k], order=orders[argument])
            emission = replace(placed[phase].emission, formats="rule")
            placed[phase] = replace(placed[phase], results=tuple(results), emission=emission)
    return placed


def _groups(places: Sequence[Place], same: Sequence[tuple[Place, Place]]) -> list[list[Place]]:
    """The places that are one array."""
    root = {place: place for place in places}

    def find(place: Place) -> Place:
        while root[place] != place:
            place = root[place]
        return place

    for one, other in same:
        one, other = sorted((find(one), find(other)))
        root[other] = one
    groups: dict[Place, list[Place]] = {}
    for place in places:
        groups.setdefault(find(place), []).append(place)
    return list(groups.values())


def _shared_pairs(
    targets: Mapping[str, AnnotatedFunction], shared: str | Mapping[str, str]
) -> list[tuple[Place, Place]]:
    """Pairs of the first phase's shared arguments with those of every other, by the path inside the argument."""
    heads = {name: shared if isinstance(shared, str) else shared.get(name, "") for name in targets}
    each = [_arguments_inside(target, heads[name]) for name, target in targets.items()]
    for name, found in zip(targets, each, strict=True):
        if not found:
            raise AutoshardError(f"Phase {name!r} has no argument {heads[name]!r} to share.")
    pairs = []
    for phase, found in enumerate(each[1:], 1):
        for path, position in found.items():
            if path not in each[0]:
                raise AutoshardError(
                    f"Phase {list(targets)[phase]!r} shares {path or 'an array'}, which the first phase lacks."
                )
            first = each[0][path]
            arrays = [_argument(target, at) for target, at in _two_phases(targets, phase, first, position)]
            if len(set(arrays)) > 1:
                raise AutoshardError(f"The shared {path} is {arrays[0]} in one phase and {arrays[1]} in another.")
            pairs.append(((0, first), (phase, position)))
    return pairs


def _two_phases(
    targets: Mapping[str, AnnotatedFunction], phase: int, first: int, position: int
) -> list[tuple[AnnotatedFunction, int]]:
    each = list(targets.values())
    return [(each[0], first), (each[phase], position)]


def _arguments_inside(target: AnnotatedFunction, head: str) -> dict[str, int]:
    """The arguments below a name: the path inside it to the position."""
    return {
        path[len(head) :]: at
        for at, path in enumerate(target.traced.paths)
        if path == head or path.startswith((head + "[", head + "."))
    }


def _argument(target: AnnotatedFunction, position: int) -> tuple[tuple[int, ...], str]:
    program = target.program
    value = program.values[program.operations[program.arguments[position]].outputs[0].value]
    return value.shape, value.dtype


def _result(target: AnnotatedFunction, position: int) -> tuple[tuple[int, ...], str] | None:
    program = target.program
    uses = program.operations[program.results[position]].inputs
    return (program.values[uses[0].value].shape, program.values[uses[0].value].dtype) if uses else None


def _find_handovers(
    targets: Mapping[str, AnnotatedFunction], handoffs: Sequence[Handoff] | None
) -> list[tuple[Place, Place, Handoff]]:
    """The handed-over arrays, leaf by leaf, with their names."""
    return (
        _match_shapes(targets)
        if handoffs is None
        else [pair for each in handoffs for pair in _match_names(targets, each)]
    )


def _match_shapes(targets: Mapping[str, AnnotatedFunction]) -> list[tuple[Place, Place, Handoff]]:
    """Donated arguments, each with the only earlier result that fits."""
    names, found = list(targets), []
    for phase, target in enumerate(targets.values()):
        for argument, _ in target.program.donated:
            path = target.traced.paths[argument]
            fits = [
                (before, at)
                for before in range(phase)
                for at, result in enumerate(targets[names[before]].traced.result_paths)
                if _last_component(result) == _last_component(path)
                and _mismatch_text(_result(targets[names[before]], at), _argument(target, argument))
            ]
            if len(fits) == 1:
                (before, at) = fits[0]
                words = f"{names[before]}.{targets[names[before]].traced.result_paths[at]}", f"{names[phase]}.{path}"
                found.append((fits[0], (phase, argument), words))
    return found


def _last_component(path: str) -> str:
    return dotted(path).rpartition(".")[2]


def _mismatch_text(result: tuple[tuple[int, ...], str] | None, argument: tuple[tuple[int, ...], str]) -> bool:
    """Whether a result could be an argument: the same type, and the same shape but for one dimension."""
    if result is None or result[1] != argument[1] or len(result[0]) != len(argument[0]):
        return False
    return sum(n != m for n, m in zip(result[0], argument[0], strict=True)) <= 1


def _match_names(targets: Mapping[str, AnnotatedFunction], handoff: Handoff) -> Iterator[tuple[Place, Place, Handoff]]:
    """The leaves of a handoff that the user named."""
    sides = []
    for text, kind in zip(handoff, ("result", "argument"), strict=True):
        name, _, head = text.partition(".")
        if name not in targets:
            raise AutoshardError(f"The handoff {text!r} names no phase; there are {', '.join(targets)}.")
        traced = targets[name].traced
        paths = traced.result_paths if kind == "result" else traced.paths
        below = {
            p[len(head) :]: at for at, p in enumerate(paths) if p == head or p.startswith((head + "[", head + "."))
        }
        if not below:
            raise AutoshardError(f"The handoff {text!r} names no {kind} of {name}; there are {', '.join(paths[:4])}.")
        sides.append((list(targets).index(name), below))
    (before, given), (after, taken) = sides
    if given.keys() != taken.keys():
        raise AutoshardError(f"{handoff[0]} and {handoff[1]} nest differently: {sorted(given)} and {sorted(taken)}.")
    each = list(targets.values())
    for path, at in given.items():
        if not _mismatch_text(_result(each[before], at), _argument(each[after], taken[path])):
            raise AutoshardError(
                f"{handoff[0]}{path} and {handoff[1]}{path} differ in type, or in more than one dimension."
            )
        yield (before, at), (after, taken[path]), handoff
