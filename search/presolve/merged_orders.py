"""States removed by a coarser problem, in which states that differ only in the order of mesh axes are one.

With four mesh axes an array of five dimensions has 2,697 layouts, most of which differ from others only in the order of
the axes that split a dimension. In the coarser problem such states are merged, with the least cost of any of them and
of any pair of them. So it is a relaxation: its bound holds, and a merged state that its reduced costs fix to 0 has no
member that a better plan could use.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from search.formulation.layouts import Axes, Layout
from search.formulation.problem import FORBIDDEN, Edge, Node, Problem
from search.formulation.strategies import Strategy
from search.memory.constraints import NodeBytes, Row, Rows, sum_rows
from search.presolve.dual import Dual
from search.presolve.elimination import RELAXATIONS, eliminate
from search.presolve.limits import TOLERANCE, Say
from search.presolve.policy import POLICY
from search.presolve.primal import decode, improve, overflow
from search.presolve.symmetry import possible_states


def remove_by_merged_orders(
    problem: Problem, rows: Rows, keep: Sequence[np.ndarray], cutoff: float, say: Say
) -> Problem:
    """The problem with every state forbidden that no plan better than one found, or than the cutoff, can use.

    **Arguments:**

    - `keep`: per node the possible states; all others are forbidden, too.
    - `cutoff`: seconds; slower plans are not searched.
    """
    merged = _merge_states(problem, keep)
    coarse = _coarse_problem(problem, keep, merged)
    reduced = eliminate(coarse, _coarse_rows(rows, keep, merged), *RELAXATIONS[0])
    dual = Dual(reduced.problem, reduced.rows, possible_states(reduced.problem, symmetric=False))
    dual.propagate()
    best, lower = cutoff, -np.inf
    while dual.fits:
        for _ in range(3):
            dual.sweep()
        before, lower = lower, dual.bound()
        states = reduced.expand(decode(dual, thorough=False))
        inside = [some[group == s] for some, group, s in zip(keep, merged, states, strict=True)]
        best = min(best, _seconds(problem, rows, inside))
        struck = dual.exclude(best) if np.isfinite(best) else 0
        say(f"orders merged: bound {lower:.6e} s, best {best:.6e} s, fixed {struck}")
        if dual.emptied or lower - before <= POLICY.merged_flat_part * max(best - lower, TOLERANCE * best):
            break
    if not np.isfinite(best) or dual.emptied:
        return _forbid(problem, keep)
    width = max(best - dual.bound(), 0.0) + TOLERANCE * best
    left = reduced.surviving(dual.within(width), width)
    return _forbid(problem, [some[np.isin(group, at)] for some, group, at in zip(keep, merged, left, strict=True)])


def _forbid(problem: Problem, keep: Sequence[np.ndarray]) -> Problem:
    """The problem with all other states forbidden."""

    def restricted(node: Node, states: np.ndarray) -> Node:
        cost = np.full(len(node.cost), FORBIDDEN)
        cost[states] = node.cost[states]
        return replace(node, cost=cost)

    return replace(problem, nodes=tuple(map(restricted, problem.nodes, keep)))


def _seconds(problem: Problem, rows: Rows, keep: Sequence[np.ndarray]) -> float:
    """Seconds of a plan of these states, improved with any; infinite if it does not fit."""
    dual = Dual(problem, rows, keep)
    dual.sweep()
    dual.sweep()
    states = decode(dual, thorough=False)
    steep = np.array([10 * problem.objective(states) / problem.budget_bytes])
    for limits, price in ((rows, np.zeros(len(rows))), ((sum_rows(rows),), steep)):
        states = improve(problem, limits, states, price)
        if (overflow(problem, rows, states) <= 0).all():
            return problem.objective(states)
    return np.inf


def _merge_states(problem: Problem, keep: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per node, for each of some states, the number of its class: the states with the same axes in every dimension."""
    known: dict[tuple, np.ndarray] = {}
    merged: list[np.ndarray] = []
    for node, states in zip(problem.nodes, keep, strict=True):
        key = (id(node.states), states.tobytes())
        if key not in known:
            number: dict[Hashable, int] = {}
            found = [number.setdefault(_unordered(node.states[s]), len(number)) for s in states.tolist()]
            known[key] = np.array(found, dtype=np.intp)
        merged.append(known[key])
    return merged


def _unordered(state: Strategy | Layout) -> Hashable:
    axes = state[0]
    return (tuple(map(_sorted, axes)), *state[1:])


def _sorted(axes: Axes) -> Axes:
    return axes if len(axes) < 2 else tuple(sorted(axes))


def _coarse_problem(problem: Problem, keep: Sequence[np.ndarray], merged: Sequence[np.ndarray]) -> Problem:
    nodes = tuple(
        replace(node, states=tuple(range(count)), cost=_least(node.cost[states], group, count))
        for node, states, group in zip(problem.nodes, keep, merged, strict=True)
        for count in [int(group.max()) + 1]
    )
    tables: dict[tuple, np.ndarray] = {}

    def coarse(edge: Edge) -> Edge:
        rows, row_of = _classes(edge.rows[keep[edge.a]], merged[edge.a])
        columns, column_of = _classes(edge.columns[keep[edge.b]], merged[edge.b])
        key = (id(edge.matrix), rows.tobytes(), columns.tobytes())
        if key not in tables:
            tables[key] = _least_pairs(edge.matrix, rows, columns)
        return replace(edge, rows=row_of, columns=column_of, matrix=tables[key], layouts=None)

    return replace(problem, nodes=nodes, edges=tuple(map(coarse, problem.edges)), loops=())


def _least(values: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    found = np.full(count, np.inf)
    np.minimum.at(found, group, values)
    return found


def _classes(layouts_of: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The merged layouts at an end of an edge: `[2, layouts]`, each layout with its class; and that of each merged state.

    Layouts of one merged state are in one class.
    """
    used, at = np.unique(layouts_of, return_inverse=True)
    label = np.arange(int(group.max()) + 1)
    while True:
        of_layout = _least(label[group], at, len(used))
        new = _least(of_layout[at], group, len(label))
        if (new == label).all():
            break
        label = new
    names, of_state = np.unique(label, return_inverse=True)
    return np.stack([used, np.searchsorted(names, of_layout)]).astype(np.intp), of_state


def _least_pairs(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The least entry of a matrix for each pair of classes."""
    return np.ascontiguousarray(_least_rows(np.ascontiguousarray(_least_rows(matrix, rows).T), columns).T)


def _least_rows(matrix: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Per class the least entries of its rows of a matrix."""
    order = np.argsort(classes[1], kind="stable")
    starts = np.searchsorted(classes[1][order], np.arange(int(classes[1].max()) + 1))
    return np.minimum.reduceat(matrix[classes[0][order]], starts, axis=0)


def _coarse_rows(rows: Rows, keep: Sequence[np.ndarray], merged: Sequence[np.ndarray]) -> Rows:
    """The least bytes of merged states; reshards count with none."""
    made: dict[NodeBytes, NodeBytes] = {}
    for row in rows:
        for item in row.nodes:
            if item not in made:
                group = merged[item.node]
                made[item] = NodeBytes(item.node, _least(item.bytes[keep[item.node]], group, int(group.max()) + 1))
    return Rows(Row(row.point, tuple(made[item] for item in row.nodes), ()) for row in rows)
