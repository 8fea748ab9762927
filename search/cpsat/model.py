"""The CP-SAT model of what the bound could not decide.

One boolean per surviving state, exactly one per node; per edge one boolean per surviving pair of layouts, whose marginals
are the ends' booleans (the local polytope). The objective is the excess over the lower bound, taken from the
reparametrised costs: its coefficients are at most the gap, so that integers resolve it finely although no linear's coefficients
may sum past $2^{30}$ (CP-SAT 9.15 has certified wrong optima above: google/or-tools#5293).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from search.memory.constraints import Row
from search.presolve.dual import Dual

COEFFICIENT_SUM = 2**29
"""The most that the coefficients of one linear may sum to."""
_MEGABYTES = 1500
"""The memory that CP-SAT may take."""
_GRACE_SECONDS = 2.0
"""How much longer than its limit CP-SAT may take (its presolve does) before its answer is no longer waited for."""


@dataclass(frozen=True)
class Answer:
    """What CP-SAT found: its status, the states (or `None`) and their cost, and a bound in seconds despite rounding."""

    status: str
    states: np.ndarray | None
    value: float
    bound_seconds: float
    booleans: int


class _Model:
    def __init__(self, dual: Dual, rows: tuple[Row, ...], slack: float) -> None:
        self.dual, self.problem, self.slack = dual, dual.problem, slack
        self.model = cp_model.CpModel()
        self.costs: list[tuple[cp_model.IntVar, float]] = []
        self.constant = dual.bound()
        self.states = [self._one_hot(i) for i in range(len(self.problem.nodes))]
        self.pairs = [self._pairs(k) for k in range(len(self.problem.edges))]
        for row in rows:
            self._row(row)

    def _one_hot(self, i: int) -> list[cp_model.IntVar]:
        theta = self.dual.theta[i]
        found = [self.model.new_bool_var("") for _ in theta]
        self.model.add_exactly_one(found)
        self._price(found, theta - theta.min())
        return found

    def _price(self, found: list[cp_model.IntVar], costs: np.ndarray) -> None:
        self.costs += [(var, float(cost)) for var, cost in zip(found, costs, strict=True) if cost > 0]

    def _pairs(self, k: int) -> dict[tuple[int, int], cp_model.IntVar]:
        """Pair booleans over layout groups; the messages, which differ within a group, go back to the states."""
        edge = self.dual.edges[k]
        left, right = edge.rows.minimum(-edge.left), edge.columns.minimum(-edge.right)
        self._price(self.states[edge.a], -edge.left - left[edge.rows.group])
        self._price(self.states[edge.b], -edge.right - right[edge.columns.group])
        excess = self.dual.pair_excess(k)
        rows = [self._group(self.states[edge.a], edge.rows.group, p) for p in range(excess.shape[0])]
        columns = [self._group(self.states[edge.b], edge.columns.group, q) for q in range(excess.shape[1])]
        if excess.shape[1] == 1:
            pairs = {(p, 0): row for p, row in enumerate(rows)}
        elif excess.shape[0] == 1:
            pairs = {(0, q): column for q, column in enumerate(columns)}
        else:
            pairs = self._linked(excess, rows, columns)
        for (p, q), var in pairs.items():
            if excess[p, q] > self.slack:
                self.model.add(var == 0)
            elif excess[p, q] > 0:
                self.costs.append((var, float(excess[p, q])))
        return pairs

    def _group(self, states: list[cp_model.IntVar], group: np.ndarray, p: int) -> cp_model.IntVar:
        members = [states[s] for s in np.flatnonzero(group == p)]
        if len(members) == 1:
            return members[0]
        var = self.model.new_bool_var("")
        self.model.add(sum(members) == var)
        return var

    def _linked(self, excess, rows, columns) -> dict[tuple[int, int], cp_model.IntVar]:
        pairs = {
            (p, q): self.model.new_bool_var("")
            for p in range(len(rows))
            for q in range(len(columns))
            if excess[p, q] <= self.slack
        }
        for p, row in enumerate(rows):
            self.model.add(sum(var for (a, _), var in pairs.items() if a == p) == row)
        for q, column in enumerate(columns):
            self.model.add(sum(var for (_, b), var in pairs.items() if b == q) == column)
        return pairs

    def _row(self, row: Row) -> None:
        """Bytes at one point, in units that keep the coefficients' sum small; rounded up, so that no plan overflows."""
        terms: list[tuple[cp_model.IntVar, float]] = []
        fixed = 0.0
        for i, vector in row.nodes:
            held = vector[self.dual.keep[i]]
            fixed += float(held.min())
            terms += [(v, b) for v, b in zip(self.states[i], held - held.min(), strict=True) if b > 0]
        for k, table in row.edges:
            edge = self.dual.edges[k]
            held = table[np.ix_(edge.rows.unique, edge.columns.unique)]
            terms += [(v, float(held[pair])) for pair, v in self.pairs[k].items() if held[pair] > 0]
        room = self.problem.budget_bytes - fixed
        if sum(b for _, b in terms) <= room:
            return
        unit = max(sum(b for _, b in terms) / COEFFICIENT_SUM, 1.0)
        self.model.add(sum(int(np.ceil(b / unit)) * v for v, b in terms) <= int(np.floor(room / unit)))

    def objective(self) -> float:
        """Minimises the excess; returns the seconds of one unit."""
        total = sum(cost for _, cost in self.costs)
        unit = max(total / COEFFICIENT_SUM, 1e-18)
        self.model.minimize(sum(int(cost / unit) * var for var, cost in self.costs if cost >= unit))
        return unit


def solve(
    dual: Dual,
    rows: tuple[Row, ...],
    incumbent: np.ndarray | None,
    slack: float,
    deterministic_seconds: float,
    wall_seconds: float,
    gap: float = 0.0,
) -> Answer:
    """Closes what is left of the problem with one deterministic worker.

    **Arguments:**

    - `slack`: seconds by which the best known solution exceeds the bound; what lies above cannot improve it.
    - `deterministic_seconds`, `wall_seconds`: the solver's limits. The second is hard: an answer that is overdue is left.
    - `gap`: the part of the excess over the bound within which a plan is good enough.
    """
    built = _Model(dual, rows, slack)
    unit = built.objective()
    if incumbent is not None:
        for i, found in enumerate(built.states):
            for var, state in zip(found, dual.keep[i], strict=True):
                built.model.add_hint(var, int(state == incumbent[i]))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = deterministic_seconds
    solver.parameters.max_time_in_seconds = wall_seconds
    solver.parameters.max_memory_in_mb = _MEGABYTES
    solver.parameters.catch_sigint_signal = False
    solver.parameters.relative_gap_limit = gap
    problem = built.model.validate()
    if problem:
        raise ValueError(f"the CP-SAT model is invalid: {problem}")
    status = _status(solver, built.model, wall_seconds)
    if status is None:
        return Answer("OVERDUE", None, np.inf, built.constant, len(built.model.proto.variables))
    states = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        states = np.array(
            [
                dual.keep[i][next(k for k, v in enumerate(found) if solver.boolean_value(v))]
                for i, found in enumerate(built.states)
            ]
        )
    bound = built.constant + unit * max(solver.best_objective_bound, 0.0) if status != cp_model.INFEASIBLE else np.inf
    value = dual.problem.objective(states) if states is not None else np.inf
    return Answer(solver.status_name(status), states, value, bound, len(built.model.proto.variables))


def _status(solver: cp_model.CpSolver, model: cp_model.CpModel, wall_seconds: float):
    """How the solver ends, or `None` if it does not end in time; an interruption (Ctrl-C) stops it and goes on its way."""
    answers: list = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(solver.solve(model))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(min(wall_seconds + _GRACE_SECONDS, threading.TIMEOUT_MAX))
    except BaseException:
        solver.stop_search()
        raise
    if thread.is_alive():
        solver.stop_search()
    if errors:
        raise errors[0]
    return answers[0] if answers else None
