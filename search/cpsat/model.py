"""The CP-SAT model: one strategy per operation that minimises the step time within each chip's memory.

It is built from the whole problem, or from the reduced problem that presolve leaves (`search.presolve`): fewer states,
and costs moved between nodes and edges, which changes no plan's cost.

Sets
    $i$     nodes: an operation, or an array with several uses (a *hub*: the layout in which it is kept)
    $S_i$   the states of a node: an operation's strategies, a hub's layouts
    $ij$    edges: an array that node $i$ produces in one layout and node $j$ needs in one
    $P_{ij}, Q_{ij}$   those layouts, at either end
    $r$     points of the program at which memory may be full

Variables, all boolean
    $x_{is}$     node $i$ takes state $s$
    $u_{ijp}$    the array of edge $ij$ is left in layout $p$; $v_{ijq}$: it is needed in layout $q$
    $y_{ijpq}$   it is resharded from $p$ to $q$ (from $p$ to $p$, it stays)

Objective: seconds of one step; a loop's body counts once for each iteration
    $\\min \\sum_{is} \\theta_i(s)\\, x_{is} + \\sum_{ijpq} \\theta_{ij}(p, q)\\, y_{ijpq}$
    implemented in `_price`

Constraints
 1. Every operation takes exactly one strategy, every hub one layout.
    $\\sum_s x_{is} = 1$
    implemented in `_choose_one`
 2. The layouts at an edge's ends are those that the chosen strategies leave and need.
    $u_{ijp} = \\sum_{s:\\, \\mathrm{out}(s) = p} x_{is}$, and $v_{ijq}$ likewise
    implemented in `_link_layouts`
 3. Every edge makes one reshard, between the layouts at its ends (the local polytope).
    $\\sum_q y_{ijpq} = u_{ijp}$, $\\sum_p y_{ijpq} = v_{ijq}$
    implemented in `_link_reshards`
 4. At every point of the program, the live arrays fit a chip, including the copies that reshards make.
    $\\sum_{is} b_{ri}(s)\\, x_{is} + \\sum_{ijpq} b_{rij}(p, q)\\, y_{ijpq} \\le M$
    implemented in `_bound_memory`
 5. Pinned layouts are kept, and only dimensions that divide are split: $x_{is} = 0$ for all other states.
    Such states are left out of $S_i$; implemented in `search.formulation.problem` (`build`, `forbid_strategies`)
 6. A donated argument and the result in its memory have one layout: $y_{ijpq} = 0$ for $p \\ne q$.
    Such pairs are left out; implemented in `_link_reshards`
 7. Folded layers, and the arguments that phases share, have one layout: one node stands for all copies.
    Implemented in `search.formulation.layer_folding` and `search.phases`; so is a loop's body, for all iterations
 8. Phases: each costs its weight, has its own points, and hands arrays over along edges like any others.
    Implemented in `search.phases`
 9. No plan is faster than presolve has proven.
    $\\sum \\theta x + \\sum \\theta y \\ge L$
    implemented in `_cut_at_bound`

Numbers: a linear's coefficients are integers that sum to at most $2^{29}$ (CP-SAT 9.15 has certified wrong optima above
$2^{30}$: google/or-tools#5293). Seconds are rounded down, so that the proven bound holds. Bytes are rounded up, so
that no plan overflows, and counted from those of the hint, so that a hint that fits stays feasible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, floor
from typing import NamedTuple

import numpy as np
from ortools.sat.python import cp_model

from search.formulation.problem import FORBIDDEN
from search.memory.constraints import NodeBytes, Row
from search.memory.reshard_buffers import Copies
from search.presolve.dual import Dual
from search.presolve.limits import TOLERANCE

COEFFICIENT_SUM = 2**29
"""The most that the coefficients of one linear may sum to."""
_LEAST_BYTES = 0.125
"""The finest unit of memory: one bit."""

Literal = cp_model.IntVar


class _Part(NamedTuple):
    """Bytes above the `least`, of literals of which a plan takes one, and the `most` by which it may exceed the least."""

    literals: list[Literal]
    above: list[float]
    least: float
    most: float


class Model:
    """The model of a problem, restricted to the surviving states of a dual, with costs as the dual has moved them.

    **Arguments:**

    - `dual`: surviving states and moved costs; its multipliers are 0, as memory has rows of its own.
    - `rows`: memory at every point.
    - `hint`: states of a plan, if one is known.
    - `slack`: seconds above the dual's bound; slower plans are not of interest.
    - `lower`: seconds, a proven lower bound.

    `unit` is the objective's unit, in seconds. Rounding hides at most `rounding` units of a plan's cost. A plan within
    `enough` units of the proven bound counts as best.
    """

    def __init__(self, dual: Dual, rows: Sequence[Row], hint: np.ndarray | None, slack: float, lower: float) -> None:
        self.dual, self.problem = dual, dual.problem
        self.model = cp_model.CpModel()
        self.constant = dual.bound()
        self._costs: list[tuple[Literal, float]] = []
        self._terms = 0  # one plan pays at most this many of the costs
        self.hint = self._places(hint)
        self._excess = [dual.pair_excess(k) for k in range(len(dual.edges))]
        slack += TOLERANCE * (slack + abs(self.constant))
        self.slack = min(max(slack, *self._hint_excess(), 0.0), FORBIDDEN / 2)
        self.states = [self._choose_one(theta) for theta in dual.theta]
        self.reshards = [self._link_layouts(k) for k in range(len(dual.edges))]
        self._parts: dict[NodeBytes | tuple[int, Copies], _Part] = {}
        for row in rows:
            self._bound_memory(row)
        self.unit = self._price()
        self.rounding = self._terms
        self.enough = self._cut_at_bound(lower)
        self._give_hint()

    @property
    def booleans(self) -> int:
        """The number of variables."""
        return len(self.model.proto.variables)

    @property
    def constraints(self) -> int:
        """The number of constraints."""
        return len(self.model.proto.constraints)

    def _places(self, hint: np.ndarray | None) -> list[int] | None:
        """Per node the index of the hint's state among the surviving states."""
        if hint is None:
            return None
        found = [np.flatnonzero(keep == state) for keep, state in zip(self.dual.keep, hint, strict=True)]
        return [int(at[0]) for at in found] if all(map(len, found)) else None

    def _hint_excess(self) -> Iterator[float]:
        """The cost of the hint's states and pairs above the least, inexact beside forbidden pairs."""
        if self.hint is not None:
            yield from (float(theta[at] - theta.min()) for theta, at in zip(self.dual.theta, self.hint, strict=True))
            for edge, excess in zip(self.dual.edges, self._excess, strict=True):
                yield float(excess[edge.rows.group[self.hint[edge.a]], edge.columns.group[self.hint[edge.b]]])

    def _choose_one(self, theta: np.ndarray) -> list[Literal]:
        """1. Exactly one state of a node."""
        if len(theta) == 1:
            return [self.model.new_constant(1)]
        found = [self.model.new_bool_var("") for _ in theta]
        self.model.add_exactly_one(found)
        excess = theta - theta.min()
        self._exclude([x for x, above in zip(found, excess, strict=True) if above > self.slack])
        self._pay(found, np.where(excess > self.slack, 0.0, excess))
        return found

    def _exclude(self, found: Sequence[Literal]) -> None:
        """Fixes to 0 the literals that cost too much on their own."""
        for literal in found:
            self.model.add(literal == 0)

    def _pay(self, found: Sequence[Literal], costs: np.ndarray) -> None:
        """Seconds of literals of which a plan takes one."""
        paid = [(literal, cost) for literal, cost in zip(found, costs.tolist(), strict=True) if cost > 0]
        self._costs += paid
        self._terms += bool(paid)

    def _link_layouts(self, k: int) -> dict[tuple[int, int], Literal]:
        """2. The layouts at an edge's ends, then its reshards. Costs that differ within a layout move to the states."""
        edge, excess = self.dual.edges[k], self._excess[k]
        for end, group, given in ((edge.a, edge.rows, edge.left), (edge.b, edge.columns, edge.right)):
            self._pay(self.states[end], -given - group.minimum(-given)[group.group])
        left = [self._layout(edge.a, members) for members in _members(edge.rows.group, excess.shape[0])]
        right = [self._layout(edge.b, members) for members in _members(edge.columns.group, excess.shape[1])]
        return self._link_reshards(excess, left, right)

    def _layout(self, node: int, members: np.ndarray) -> Literal:
        states = [self.states[node][s] for s in members]
        if len(states) == 1:
            return states[0]
        if len(states) == len(self.states[node]):
            return self.model.new_constant(1)
        literal = self.model.new_bool_var("")
        self.model.add(cp_model.LinearExpr.sum(states) == literal)
        return literal

    def _link_reshards(
        self, excess: np.ndarray, left: list[Literal], right: list[Literal]
    ) -> dict[tuple[int, int], Literal]:
        """3. One reshard of an edge, between the layouts at its ends; 6. none that is forbidden or too costly."""
        possible = excess <= self.slack
        if len(right) == 1:
            reshards = {(p, 0): literal for p, literal in enumerate(left)}
        elif len(left) == 1:
            reshards = {(0, q): literal for q, literal in enumerate(right)}
        else:
            pairs = [(int(p), int(q)) for p, q in np.argwhere(possible)]
            reshards = {pair: self.model.new_bool_var("") for pair in pairs}
            for literals, side in ((left, 0), (right, 1)):
                of: list[list[Literal]] = [[] for _ in literals]
                for pair in pairs:
                    of[pair[side]].append(reshards[pair])
                for literal, found in zip(literals, of, strict=True):
                    self.model.add(cp_model.LinearExpr.sum(found) == literal)
        self._exclude([literal for pair, literal in reshards.items() if not possible[pair]])
        kept = [pair for pair in reshards if possible[pair]]
        self._pay([reshards[pair] for pair in kept], np.array([excess[pair] for pair in kept]))
        return reshards

    def _bound_memory(self, row: Row) -> None:
        """4. Bytes at one point, counted from those of the hint, or else from the least of each node."""
        room = self.problem.budget_bytes
        parts = [self._above_least(item) for item in (*row.nodes, *row.edges)]
        for part in parts:
            room -= part.least
        if abs(room) <= TOLERANCE * self.problem.budget_bytes:
            room = 0.0  # a plan that fills the chip to the last byte, summed in another order
        if sum(part.most for part in parts) <= room:
            return
        above = [more for part in parts for more in part.above]
        unit = max(sum(map(abs, above)) / COEFFICIENT_SUM, _LEAST_BYTES)
        coefficients = [ceil(more / unit) for more in above]
        literals = [x for part in parts for x in part.literals]
        self.model.add(cp_model.LinearExpr.weighted_sum(literals, coefficients) <= floor(room / unit))

    def _above_least(self, item: NodeBytes | tuple[int, Copies]) -> _Part:
        """The bytes of a node or an edge; many rows have the same."""
        if item not in self._parts:
            literals, held, at = self._node_bytes(item) if isinstance(item, NodeBytes) else self._edge_bytes(*item)
            least = float(held.min() if at is None else held[at]) if len(held) else 0.0
            terms = [(x, b - least) for x, b in zip(literals, held.tolist(), strict=True) if b != least]
            above = [more for _, more in terms]
            self._parts[item] = _Part([x for x, _ in terms], above, least, sum(max(more, 0.0) for more in above))
        return self._parts[item]

    def _node_bytes(self, item: NodeBytes) -> tuple[list[Literal], np.ndarray, int | None]:
        """The literals of which a plan takes one, the bytes of each, and the hint's choice."""
        i = item.node
        return self.states[i], item.bytes[self.dual.keep[i]], None if self.hint is None else self.hint[i]

    def _edge_bytes(self, k: int, table: Copies) -> tuple[list[Literal], np.ndarray, int | None]:
        """The same of an edge; no literals where no pair is possible, which makes the model infeasible."""
        edge, pairs = self.dual.edges[k], list(self.reshards[k])
        if not pairs:
            return [], np.zeros(0), None
        held, at = table[edge.window][tuple(np.array(pairs).T)], None
        if self.hint is not None:
            hinted = int(edge.rows.group[self.hint[edge.a]]), int(edge.columns.group[self.hint[edge.b]])
            at = pairs.index(hinted) if hinted in self.reshards[k] else None
        return list(self.reshards[k].values()), held, at

    def _price(self) -> float:
        """The objective, above the dual's bound; returns the seconds of one unit."""
        total = sum(cost for _, cost in self._costs)
        unit = max(total / COEFFICIENT_SUM, 1e-18)
        paid = [(literal, int(cost / unit)) for literal, cost in self._costs if cost >= unit]
        self._objective = cp_model.LinearExpr.weighted_sum([x for x, _ in paid], [cost for _, cost in paid])
        self.model.minimize(self._objective)
        return unit

    def _cut_at_bound(self, lower: float) -> float:
        """9. The bound, minus the rounding of a plan's cost.

        Returns the number of units within which a plan counts as best.
        """
        proven = max(lower, self.constant)
        enough = TOLERANCE * abs(proven) / self.unit
        least = floor((proven - self.constant) / self.unit - enough)
        if least <= 0:
            return enough
        if least - self.rounding > COEFFICIENT_SUM:
            self.model.add_bool_or([])  # no plan costs this much
        elif least > self.rounding:
            self.model.add(self._objective >= least - self.rounding)
        return enough + min(least, self.rounding)

    def _give_hint(self) -> None:
        if self.hint is None:
            return
        for literals, at in zip(self.states, self.hint, strict=True):
            for s, literal in enumerate(literals if len(literals) > 1 else ()):
                self.model.add_hint(literal, int(s == at))


def _members(group: np.ndarray, count: int) -> list[np.ndarray]:
    """The states of each layout."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group[order], np.arange(1, count)))
