"""Explanation of an infeasible search: the largest arrays, the missing bytes, and a topology that is large enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from autoshard._util.tables import size
from autoshard.annotating.pins import Pin, keep_pins
from autoshard.errors import InfeasibleError
from autoshard.rules.pin import PinError
from costmodels.machine.interconnects import Switch
from costmodels.machine.topology import Topology, TopologyFormatError, complete_axes, parse_topology
from costmodels.program.program import Program
from search.formulation.layer_folding import classes as folded
from search.formulation.problem import FORBIDDEN, Problem, build
from search.memory.constraints import Row, rows
from search.presolve.dual import Dual
from search.presolve.primal import decode, improve, overflow
from search.solve import Limits, NoPlan, search

_LISTED = 8
"""The number of arrays that the message names."""
_MOST_CHIPS = 4096
"""The number of chips of the largest topology that is tried."""
_FULL_SECONDS = 1e3
"""The cost of the whole budget, used at every point: above any step time, and below the cost of forbidden states."""
_SWEEPS = 8
"""The number of passes of the relaxation over the program."""


def explain_infeasible(error: NoPlan) -> InfeasibleError:
    """The user's error for a search that found no plan."""
    problem = error.problem
    chip, limits = problem.topology.chip, rows(problem)
    states = min((error.states, _leanest(problem, limits)), key=lambda states: _overflow(problem, limits, states))
    fullest = max(limits, key=lambda row: row.bytes(problem, states))
    held = fullest.bytes(problem, states)
    parts = sorted(_largest_arrays(problem, fullest, states), key=lambda part: -part[1])
    listed = "".join(f"\n  {size(count):>12}  {name}" for name, count in parts[:_LISTED])
    if len(parts) > _LISTED:
        listed += f"\n  {size(sum(count for _, count in parts[_LISTED:])):>12}  {len(parts) - _LISTED} smaller ones"
    kept_free = chip.usable_hbm_bytes - problem.budget_bytes
    reserve = f", {size(kept_free)} reserved" if kept_free else ""
    program = problem.program
    return InfeasibleError(
        f"{program.name} does not fit on {problem.topology.name}. The smallest layout found needs {size(held)} per chip,"
        f" {size(held - problem.budget_bytes)} more than the {size(problem.budget_bytes)} available on a {chip.name}"
        f" ({size(chip.usable_hbm_bytes)} usable{reserve})."
        f" The live arrays at the peak, in {program.operations[fullest.point].name}, are:{listed}\n"
        f"{_advice(program, problem.topology, problem.budget_bytes)}"
    )


def refusal(
    error: NoPlan, program: Program, pinned: Sequence[Pin], topology: Topology, limits: Limits
) -> InfeasibleError | PinError:
    """The user's error for a search that found no plan, with the pins if they contradict each other."""
    clash = conflict(program, pinned, topology, limits)
    return PinError(clash) if clash else explain_infeasible(error)


def conflict(program: Program, pinned: Sequence[Pin], topology: Topology, limits: Limits) -> str:
    """A minimal set of pins without a common layout, as a sentence; empty if the pins are not the cause."""

    def is_feasible(kept: Sequence[Pin]) -> bool:
        try:
            search(keep_pins(program, kept), topology, limits)
        except NoPlan:
            return False
        return True

    if not pinned or not is_feasible(()):
        return ""
    kept = list(pinned)
    for each in pinned:
        fewer = [other for other in kept if other is not each]
        if not is_feasible(fewer):
            kept = fewer
    words = list(dict.fromkeys(pin.words for pin in kept))
    together = f"{words[0]} cannot hold" if len(words) == 1 else f"{' and '.join(words)} cannot hold together"
    return f"{together} on {topology.name}: a plan exists without {'it' if len(words) == 1 else 'any one of them'}."


def _largest_arrays(problem: Problem, row: Row, states: np.ndarray) -> Iterator[tuple[str, float]]:
    """The live arrays at one point of the program: names, and bytes on one chip."""
    for i, vector in row.nodes:
        yield problem.nodes[i].name, float(vector[states[i]])
    for k, table in row.edges:
        edge = problem.edges[k]
        held = float(table[edge.rows[states[edge.a]], edge.columns[states[edge.b]]])
        if held:
            yield f"{problem.program.values[edge.value].name}, a copy in the layout of its use", held


def _advice(program: Program, topology: Topology, budget_bytes: float) -> str:
    """A sentence with the first topology that is large enough, doubling the smallest axis again and again."""
    tried = topology
    given = [program.operations[at].outputs[0].value for at in (*program.arguments, *program.constants)]
    whole = sum(program.values[value].bytes for value in given)
    while (wider := double(tried)) is not None and wider.size <= _MOST_CHIPS:
        tried = wider
        if whole / tried.size <= budget_bytes and fits(program, tried, budget_bytes):
            return f"It fits on {tried.name}, {tried.size} chips."
    return (
        f"No topology up to {tried.name}, {tried.size} chips, was found on which it fits: some arrays cannot be split far"
        " enough."
    )


def fits(program: Program, topology: Topology, budget_bytes: float) -> bool:
    """Whether a quick heuristic that only minimises memory finds a layout that fits; it may miss one."""
    problem = build(program, topology, budget_bytes, folded(program))
    limits = rows(problem)
    if any(_least(row) > problem.budget_bytes for row in limits):
        return False
    return _overflow(problem, limits, _leanest(problem, limits)) <= 0


def _leanest(problem: Problem, limits: tuple[Row, ...]) -> np.ndarray:
    """A choice of states with little memory, decoded from a relaxation with a multiplier on every byte at every point."""
    dual = Dual(problem, limits)
    dual.reprice(np.full(len(limits), _FULL_SECONDS / (problem.budget_bytes * max(len(limits), 1))))
    for _ in range(_SWEEPS):
        dual.sweep()
    return improve(problem, limits, decode(dual), dual.multipliers)


def _overflow(problem: Problem, limits: tuple[Row, ...], states: np.ndarray) -> float:
    """Bytes over the budget; infinite for a choice with forbidden states."""
    if problem.objective(states) >= FORBIDDEN / 2:
        return np.inf
    return float(overflow(problem, limits, states).max(initial=-np.inf))


def _least(row: Row) -> float:
    """A lower bound on the live bytes: every array in its smallest state, without copies."""
    return sum(float(vector.min()) for _, vector in row.nodes)


def double(topology: Topology) -> Topology | None:
    """The topology with its smallest axis doubled; of equal axes the last. For full GPU nodes the number of nodes doubles."""
    sizes = list(topology.shape)
    switch = topology.chip.interconnect
    if isinstance(switch, Switch):
        at = len(sizes) - 1
        if sizes[at] * 2 > switch.chips_per_node:
            sizes, at = ([1, *sizes] if len(sizes) == 1 else sizes), 0
    else:
        at = max(range(len(sizes)), key=lambda i: (-sizes[i], i))
    sizes[at] *= 2
    name = _topology_text(topology, sizes)
    try:
        wider = parse_topology(name)
    except (TopologyFormatError, ValueError):
        wider = replace(
            topology, axes=tuple(replace(axis, size=size) for axis, size in zip(topology.axes, sizes, strict=True))
        )
    return _with_own_rates(wider, topology)


def _topology_text(topology: Topology, sizes: list[int]) -> str:
    """The topology string of the same chips with axes of these sizes, such as `2xv4:4x4x8`."""
    slices, within = ("", sizes) if topology.slices == 1 else (f"{sizes[0]}x", sizes[1:])
    return f"{slices}{topology.chip.name}:{'x'.join(map(str, within))}"


def _with_own_rates(wider: Topology, topology: Topology) -> Topology:
    """The wider topology with the given topology's chip and constants, including those set for single axes."""
    wider = complete_axes(replace(topology, name=wider.name, axes=wider.axes))
    if len(wider.axes) != len(topology.axes):
        return wider
    plain = complete_axes(topology).axes
    axes = zip(wider.axes, topology.axes, plain, strict=True)
    return replace(wider, axes=tuple(new if own == was else replace(own, size=new.size) for new, own, was in axes))
