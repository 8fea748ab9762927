"""Why no layout fits: which arrays take the memory, what is missing, and on how many chips it would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from autoshard.errors import InfeasibleError
from costmodels.chips import Switch
from costmodels.program import Program
from costmodels.topology import Topology, TopologyFormatError, parse_topology
from search.incumbent import improve, overflow
from search.memory import Row, rows
from search.problem import FORBIDDEN, Problem, build
from search.solve import NoPlan

_LISTED = 8
"""How many arrays the message names."""
_MOST_CHIPS = 4096
"""The largest topology that is tried."""
_GIB = 2**30


def explained(error: NoPlan, reserve_bytes: float = 0.0) -> InfeasibleError:
    """The error that a user reads, for a search that found no plan."""
    problem = error.problem
    fullest = max(rows(problem), key=lambda row: row.bytes(problem, error.states))
    held = fullest.bytes(problem, error.states)
    budget, chip = problem.budget_bytes, problem.topology.chip
    parts = sorted(_held(problem, fullest, error.states), key=lambda part: -part[1])
    listed = "".join(f"\n  {_size(size):>12}  {name}" for name, size in parts[:_LISTED])
    if len(parts) > _LISTED:
        listed += f"\n  {_size(sum(size for _, size in parts[_LISTED:])):>12}  {len(parts) - _LISTED} smaller ones"
    reserve = f" ({_size(reserve_bytes)} of it reserved)" if reserve_bytes else ""
    found = "The best layout needs" if error.proven else "The leanest layout found needs"
    return InfeasibleError(
        f"{problem.program.name} does not fit {problem.topology.name}. {found} {_size(held)} on each chip at"
        f" {problem.program.operations[fullest.point].name}; a {chip.name} holds {_size(chip.usable_hbm_bytes)}{reserve}:"
        f" {_size(held - budget)} too little. There it holds:{listed}\n{_advice(problem.program, problem.topology, reserve_bytes)}"
    )


def _size(count: float) -> str:
    """Bytes as a person reads them: GiB, or smaller units where those would read 0.00."""
    for unit, name in ((_GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:.0f} bytes"


def _held(problem: Problem, row: Row, states: np.ndarray) -> Iterator[tuple[str, float]]:
    """What lives at one point: names in the user's words, and bytes on one chip."""
    for i, vector in row.nodes:
        yield problem.nodes[i].name, float(vector[states[i]])
    for k, table in row.edges:
        edge = problem.edges[k]
        size = float(table[edge.rows[states[edge.a]], edge.columns[states[edge.b]]])
        if size:
            yield f"{problem.program.values[edge.value].name}, once more in the layout of its use", size


def _advice(program: Program, topology: Topology, reserve_bytes: float) -> str:
    """The first topology that would do, of those with one axis after the other doubled."""
    tried = topology
    while (wider := _doubled(tried)) is not None and wider.size <= _MOST_CHIPS:
        tried = wider
        if fits(program, tried, reserve_bytes):
            return f"It would fit {tried.name}, {tried.size} chips."
    return f"It would fit none of the topologies up to {tried.name}, {tried.size} chips: what must be whole on a chip is too large."


def fits(program: Program, topology: Topology, reserve_bytes: float = 0.0) -> bool:
    """Whether a plan that fits is found by looking at memory alone; a quick look that may miss one."""
    problem = build(program, topology, topology.chip.usable_hbm_bytes - reserve_bytes)
    limits = rows(problem)
    if any(_least(row) > problem.budget_bytes for row in limits):
        return False
    states = np.array([int(np.argmin(vector)) for vector in _bytes_of_nodes(problem, limits)])
    for price in (1e-3, 1e-6):  # seconds per byte: memory counts for everything but what is forbidden
        states = improve(problem, limits, states, np.full(len(limits), price))
        if problem.objective(states) < FORBIDDEN / 2 and float(overflow(problem, limits, states).max(initial=-1.0)) <= 0:
            return True
    return False


def _least(row: Row) -> float:
    """A lower bound on the bytes alive: every array by itself as small as it can be, nothing held twice."""
    return sum(float(vector.min()) for _, vector in row.nodes)


def _bytes_of_nodes(problem: Problem, limits: tuple[Row, ...]) -> list[np.ndarray]:
    held = [node.cost * 0.0 for node in problem.nodes]
    for row in limits:
        for i, vector in row.nodes:
            held[i] = held[i] + vector
    return [np.where(node.cost < FORBIDDEN, bytes_, np.inf) for node, bytes_ in zip(problem.nodes, held, strict=True)]


def _doubled(topology: Topology) -> Topology | None:
    """The topology with its smallest axis doubled; of equal ones the last. A full node of GPUs has its nodes doubled."""
    sizes = list(topology.shape)
    switch = topology.chip.interconnect
    if isinstance(switch, Switch):
        at = len(sizes) - 1
        if sizes[at] * 2 > switch.chips_per_node:
            sizes, at = ([1, *sizes] if len(sizes) == 1 else sizes), 0
    else:
        at = max(range(len(sizes)), key=lambda i: (-sizes[i], i))
    sizes[at] *= 2
    name = f"{topology.chip.name}:{'x'.join(map(str, sizes))}"
    try:
        wider = parse_topology(name)
    except (TopologyFormatError, ValueError):
        wider = replace(topology, axes=tuple(replace(axis, size=size) for axis, size in zip(topology.axes, sizes, strict=True)))
    return replace(wider, chip=topology.chip)
