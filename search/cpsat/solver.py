"""The CP-SAT solver on a model, with one worker, so that the answer is reproducible on every machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import ortools
from ortools.sat.python import cp_model

from search.answer.solution import Answer
from search.cpsat.model import Model
from search.memory.constraints import Row
from search.presolve.dual import Dual

NAME = f"CP-SAT {ortools.__version__}"
_PARAMETERS = {
    "num_workers": 1,
    "random_seed": 1,
    "linearization_level": 2,
    "cp_model_probing_level": 0,
    "symmetry_level": 0,
}
"""One worker, and all constraints in the linear relaxation: the model is nearly integral, and clauses alone do not see it.

A branch of a Mamba block's gradient, of 7,442 booleans, is closed in 1.2 s of a processor and 6 conflicts, instead of not
in 21 s and 17,521 conflicts; one of 3,292 booleans in 0.4 s instead of 9.2. Probing and symmetry, which presolve has
used up, double the time.
"""
_MEGABYTES = 1500
"""The memory that CP-SAT may take."""
_GRACE_SECONDS = 2.0
"""The grace beyond its limit that CP-SAT gets, as its presolve overruns, before its answer is abandoned."""


def solve(
    dual: Dual,
    rows: Sequence[Row],
    hint: np.ndarray | None,
    slack: float,
    deterministic_seconds: float,
    wall_seconds: float,
    lower: float = -np.inf,
) -> Answer:
    """Solves the part of a problem that a dual has left.

    **Arguments:**

    - `rows`: memory at every point; no point may overflow.
    - `hint`: the states of the best plan known.
    - `slack`: seconds by which it exceeds the dual's bound; costlier plans cannot improve it.
    - `deterministic_seconds`, `wall_seconds`: the solver's limits. The second is hard: an overdue answer is abandoned.
    - `lower`: seconds, a proven lower bound; if the hint reaches it, there is nothing to search.
    """
    started = time.monotonic()
    built = Model(dual, rows, hint, slack, max(lower, -1e300))
    solver = cp_model.CpSolver()
    for name, value in _PARAMETERS.items():
        setattr(solver.parameters, name, value)
    solver.parameters.max_deterministic_time = deterministic_seconds
    solver.parameters.max_time_in_seconds = wall_seconds
    solver.parameters.max_memory_in_mb = _MEGABYTES
    solver.parameters.catch_sigint_signal = False
    solver.parameters.relative_gap_limit = 0.0
    solver.parameters.absolute_gap_limit = max(built.enough, 1e-4)
    problem = built.model.validate()
    if problem:
        raise ValueError(f"the CP-SAT model is invalid: {problem}")
    status = _status(solver, built.model, wall_seconds)
    size = built.booleans, built.constraints
    if status is None:
        return Answer("OVERDUE", None, np.inf, max(built.constant, lower), *size, time.monotonic() - started)
    states = _states(dual, built, solver) if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None
    bound = max(built.constant + built.unit * max(solver.best_objective_bound, 0.0), lower)
    if status == cp_model.INFEASIBLE:
        bound = np.inf
    value = dual.problem.objective(states) if states is not None else np.inf
    return Answer(solver.status_name(status), states, value, bound, *size, time.monotonic() - started)


def _states(dual: Dual, built: Model, solver: cp_model.CpSolver) -> np.ndarray:
    """The chosen state of every node."""
    chosen = [next(s for s, x in enumerate(found) if solver.boolean_value(x)) for found in built.states]
    return np.array([keep[s] for keep, s in zip(dual.keep, chosen, strict=True)])


def _status(solver: cp_model.CpSolver, model: cp_model.CpModel, wall_seconds: float):
    """The solver's status, or `None` if it does not end in time. An interruption (Ctrl-C) stops it and propagates."""
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
