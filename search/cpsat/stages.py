"""The stages of a search: eliminate, ascend, decide, branch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from search.answer.assignment import Choice, choice_of
from search.answer.check import Check, check
from search.answer.solution import Answer, Limits, NoPlan, Proof, Solution
from search.cpsat.branching import Branching
from search.cpsat.decision import Domains, answer_on, domains, single_states
from search.formulation.problem import FORBIDDEN, Problem
from search.memory.constraints import Rows
from search.memory.constraints import rows as memory_rows
from search.presolve.ascent import Ascent
from search.presolve.axis_orders import in_order
from search.presolve.dual import Snapshot
from search.presolve.elimination import Reduction, eliminate
from search.presolve.limits import PRECISION, TOLERANCE, Say
from search.presolve.merged_orders import remove_by_merged_orders
from search.presolve.policy import POLICY
from search.presolve.primal import overflow
from search.presolve.symmetry import canonicalise_axes, possible_states
from search.presolve.warm_start import starting_states

_AGREEMENT = 1e-6
"""The relative difference allowed between checker and solver, which sum the same terms in another order."""


@dataclass(frozen=True)
class Found:
    """The progress of a search: presolve's state, and CP-SAT's answer on the whole problem.

    `root` is the dual before branching, `presolve_bound` its bound at that time, `parts` the number of parts decided
    separately, and `left` the number of states that CP-SAT saw in the end.
    """

    presolved: Reduction
    ascent: Ascent
    root: Snapshot | None = None
    presolve_bound: float = -np.inf
    stopped: str = ""
    parts: int = 0
    nothing_fits: bool = False
    answer: Answer | None = None
    left: int = 0

    @property
    def decided(self) -> bool:
        """Whether the answer has a plan, or there is none to find."""
        return self.ascent.best is None or (self.answer is not None and self.answer.states is not None)

    @property
    def ended(self) -> str:
        """The reason for which the search ended early."""
        return self.stopped or ("time limit" if self.ascent.late else "")

    @cached_property
    def states(self) -> np.ndarray:
        """The best states of the whole problem; the leanest if none fits.

        CP-SAT's plans have states of their own for what is eliminated, since its best ones may not fit.
        """
        if self.ascent.whole is not None:
            return self.ascent.whole
        found = self.ascent.leanest[1] if self.ascent.best is None else self.ascent.best
        return self.presolved.expand(np.zeros(len(self.presolved.kept), dtype=int) if found is None else found)


@dataclass(frozen=True)
class Task:
    """The input of one search: the problem, limits, whether axes are interchangeable, and the cutoff.

    `started` is the start, on the monotonic clock.
    """

    problem: Problem
    limits: Limits
    say: Say
    symmetric: bool
    cutoff: float
    start: Choice | None
    started: float

    @cached_property
    def memory(self) -> Rows:
        """Memory at every point that can bind."""
        return memory_rows(self.problem)

    @property
    def deadline(self) -> float:
        """The deadline."""
        return self.started + self.limits.wall_seconds

    def eliminate(self, parts: tuple[float, float] | None) -> Reduction:
        """The problem without the nodes that hold less than a part of a chip's memory in the fullest part of the rows.

        Without `parts`, it is all of the problem.
        """
        problem = self.narrowed
        return eliminate(problem, self.memory, *parts) if parts else Reduction.none(problem, self.memory)

    @cached_property
    def narrowed(self) -> Problem:
        """The problem without the states that a coarser one fixes to 0; unchanged if it is small."""
        if sum(edge.matrix.size for edge in self.problem.edges) < POLICY.merged_pairs:
            return self.problem
        keep = possible_states(self.problem, self.symmetric)
        return remove_by_merged_orders(self.problem, self.memory, keep, self.cutoff, self.say)

    def ascend(self, presolved: Reduction, before: Found | None = None) -> Found:
        """Lifts the bound and improves the best plan until they meet or stall; an interruption ends with those found.

        `before` is a relaxation: its bound holds here, too, and its plans may fit.
        """
        self.say(f"{len(self.problem.nodes)} nodes, {len(presolved.problem.nodes)} after elimination")
        ascent = self._ascent(presolved)
        kept = list(presolved.kept)
        states = None if self.start is None else starting_states(self.problem, self.start)
        if states is not None:
            ascent.begin_with(states[kept])
        try:
            if before is not None:
                ascent.effort, ascent.bound = before.ascent.effort, before.ascent.bound
                for seen in before.ascent.pool.states:
                    ascent.look(before.presolved.expand(seen)[kept])
                ascent.attempt(before.states[kept])
            ascent.run(None if before is None else before.ascent.prices)
            if ascent.dual.multipliers.any():
                ascent.lift(POLICY.last_rounds)
        except KeyboardInterrupt:
            if ascent.best is None:
                raise
            return Found(presolved, ascent, None, ascent.bound, "interrupted")
        return Found(presolved, ascent, ascent.dual.snapshot(), ascent.bound, nothing_fits=not ascent.fits)

    def _ascent(self, presolved: Reduction) -> Ascent:
        rounds, rows = self.limits.rounds, presolved.rows
        symmetric = self.symmetric and self.narrowed is self.problem  # else an orbit is fixed already
        return Ascent(presolved.problem, rows, rounds, self.say, symmetric, self.deadline, self.cutoff)

    def branch(self, found: Found) -> Found:
        """Divides a problem too large for one CP-SAT call, and lifts the bound to what all parts prove."""
        if found.ended or not found.ascent.fits or found.root is None:
            return found
        found.ascent.dual.load(found.root)
        branching = Branching(found.ascent, partial(self.decide_part, found))
        try:
            branching.run()
        except KeyboardInterrupt:
            if found.ascent.best is None:
                raise
            found = replace(found, stopped="interrupted")
        nothing = found.ascent.best is None and branching.unproven == np.inf
        return replace(found, parts=branching.branches, nothing_fits=nothing)

    def decide_part(self, found: Found, lower: float, seconds: float) -> float:
        """CP-SAT on the states that the dual has left of a branch; returns the proven bound.

        **Arguments:**

        - `seconds`: CP-SAT's time limit, on its own clock.
        """
        ascent, proven = found.ascent, lower
        for _ in range(POLICY.refinements):
            keep = self._surviving(found)
            if not all(map(len, keep)):
                return ascent.objective
            before = ascent.objective
            answer = self._answer_on_part(found, keep, lower, seconds)
            if answer.states is not None:
                value = self.problem.objective(answer.states)
                ascent.offer(answer.states[list(found.presolved.kept)], value, answer.states)
            proven = max(proven, min(answer.bound_seconds, ascent.objective))
            if answer.status != "OPTIMAL" or _is_precise(ascent.objective, proven) or ascent.objective == before:
                break  # only a better plan makes the unit finer: without one, the same model would follow
        return proven

    def _answer_on_part(self, found: Found, keep: Sequence[np.ndarray], lower: float, seconds: float) -> Answer:
        """CP-SAT's answer on a branch of the smaller problem, or of the whole one if the smaller one's plan does not fit.

        The smaller problem is a relaxation, so its bound holds. Of training's branches its models have a fifth of the
        booleans: CP-SAT then closes all within its limit, and half of them otherwise. The states are those of the whole
        problem, or none.
        """
        presolved = found.presolved
        answer = self._ask_cp_sat(Domains(tuple(keep), True), None, found.ascent, lower, seconds, presolved)
        if answer.states is None:
            return answer
        states = presolved.expand(answer.states)
        if not (overflow(self.problem, self.memory, states) > 0).any():
            return replace(answer, states=states)
        left = self._domains(found, None, POLICY.part_pairs) if answer.status == "OPTIMAL" else None
        if left is None:
            return replace(answer, states=None, status="UNKNOWN")
        return self._ask_cp_sat(left, None, found.ascent, lower, seconds)

    def decide(self, found: Found, last: bool = False) -> Found:
        """CP-SAT on the whole problem: its answer, or none if that is too large and this is not the `last` call.

        When interrupted, it confirms the best plan; without one, the interruption propagates.
        """
        try:
            return self._decide(found, last)
        except KeyboardInterrupt:
            if found.ascent.best is None:
                raise
            return self._decide(replace(found, stopped="interrupted"), last=True)

    def _decide(self, found: Found, last: bool) -> Found:
        ascent, states = found.ascent, found.states
        settled = last or ascent.closed or bool(found.ended) or not ascent.fits
        if ascent.best is None:
            return (
                replace(found, answer=Answer.none()) if settled else self._apply_answer(found, None, POLICY.open_pairs)
            )
        if (overflow(self.problem, self.memory, states) > 0).any():
            found = self._apply_answer(found, None, POLICY.tied_pairs)
            return found if found.answer is not None else replace(found, answer=Answer.none())
        if settled:
            return self._apply_answer(found, states, POLICY.tied_pairs, settled=True)
        return self._apply_answer(found, states, POLICY.open_pairs)

    def _apply_answer(
        self, found: Found, incumbent: np.ndarray | None, most_pairs: int, settled: bool = False
    ) -> Found:
        """Applies CP-SAT's answer on the surviving states: its plan and its bound go to the ascent.

        Unless this is all that remains open, there is no answer if too much is left, or if CP-SAT does not finish.
        """
        ascent = found.ascent
        for _ in range(POLICY.refinements):
            left = self._surviving_states(found, incumbent, most_pairs)
            if left is None or not (settled or left.complete):
                return found
            seconds = self.limits.deterministic_seconds if settled else POLICY.part_seconds
            answer = self._ask_cp_sat(left, incumbent, ascent, ascent.bound, seconds)
            if left.complete:
                ascent.bound = max(ascent.bound, min(answer.bound_seconds, ascent.objective))
            if answer.states is not None:
                ascent.offer(answer.states[list(found.presolved.kept)], answer.value, answer.states)
            if answer.status == "INFEASIBLE" and incumbent is None:
                nothing = ascent.best is None and left.complete
                return replace(found, answer=answer, left=left.count, nothing_fits=nothing)
            if settled or _is_precise(answer.value, ascent.bound):
                return replace(found, answer=answer, left=left.count)
            if answer.status != "OPTIMAL":
                return found
            incumbent = answer.states
        return found

    def _ask_cp_sat(
        self,
        left: Domains,
        incumbent: np.ndarray | None,
        ascent: Ascent,
        lower: float,
        seconds: float = np.inf,
        on: Reduction | None = None,
    ) -> Answer:
        """CP-SAT's answer on the whole problem, or `on` a smaller one; the incumbent if it finds nothing better in time."""
        problem, memory = (on.problem, on.rows) if on else (self.problem, self.memory)
        seconds = min(seconds, self.limits.deterministic_seconds)
        wall = max(self.deadline - time.monotonic(), POLICY.least_wall_seconds)
        proven, best = min(lower, ascent.objective), ascent.objective
        answer = answer_on(problem, memory, left, incumbent, proven, best, seconds, wall)
        ascent.effort.add(answer)
        self.say(
            f"CP-SAT: {answer.status}, {left.count} states left of {_states(problem)}, {answer.booleans} booleans,"
            f" {answer.seconds:.2f} s"
        )
        if incumbent is not None:
            value = problem.objective(incumbent)
            if answer.states is None or value <= answer.value:
                return replace(answer, states=incumbent, value=value)
        return answer

    def _surviving_states(self, found: Found, incumbent: np.ndarray | None, most_pairs: int) -> Domains | None:
        """The states that presolve leaves of the whole problem; the incumbent alone if time is up."""
        if found.root is None or found.ended:
            return None if incumbent is None else single_states(incumbent)
        found.ascent.dual.load(found.root)
        return self._domains(found, incumbent, most_pairs)

    def _surviving(self, found: Found) -> list[np.ndarray]:
        """The states of the smaller problem that a plan as good as the best may have.

        A node without such states has an empty array.
        """
        return found.ascent.dual.within(self._width(found.ascent))

    def _width(self, ascent: Ascent) -> float:
        if not np.isfinite(ascent.objective):
            return np.inf
        return max(ascent.objective - ascent.dual.bound(), 0.0) + TOLERANCE * abs(ascent.objective)

    def _domains(self, found: Found, incumbent: np.ndarray | None, most_pairs: int) -> Domains | None:
        """The states that the dual leaves of the whole problem; `None` if there are none, or too many."""
        keep = self._surviving(found)
        if not all(map(len, keep)):  # no plan is better than the incumbent
            return None if incumbent is None else single_states(incumbent)
        left = found.presolved.surviving(keep, self._width(found.ascent))
        return domains(self.problem, left, incumbent, most_pairs)

    def decide_unaided(self) -> Found:
        """CP-SAT on the unreduced problem: the reference for presolve."""
        whole = Reduction.none(self.problem, self.memory)
        found = Found(whole, self._ascent(whole))
        left = Domains(tuple(np.flatnonzero(node.cost < FORBIDDEN / 2) for node in self.problem.nodes), True)
        if not all(map(len, left.keep)):
            return replace(found, nothing_fits=True, answer=Answer.none())
        answer = self._ask_cp_sat(left, None, found.ascent, -np.inf)
        for _ in range(POLICY.refinements):
            if answer.states is None or answer.status != "OPTIMAL" or _is_precise(answer.value, answer.bound_seconds):
                break
            found.ascent.offer(answer.states, answer.value)
            answer = self._ask_cp_sat(left, answer.states, found.ascent, -np.inf)
        found.ascent.bound = answer.bound_seconds
        return replace(found, answer=answer, left=left.count, nothing_fits=answer.status == "INFEASIBLE")

    def check_found(self, found: Found) -> Solution:
        """The plan with its proof and the checker's recomputation.

        **Raises:** `NoPlan`.
        """
        ascent, answer = found.ascent, found.answer
        if answer is None or answer.states is None:
            least = self.problem.budget_bytes + ascent.leanest[0]
            raise NoPlan(self.problem, found.states, least, found.nothing_fits or ascent.closed)
        choice = choice_of(self.problem, answer.states)
        if self.symmetric:
            choice = canonicalise_axes(self.problem, choice)
        choice, account = self._in_order(choice, check(self.problem.program, self.problem.topology, choice))
        faults = (*account.faults, *self._disagreements(account, answer.value))
        return Solution(self.problem, choice, self._proof(found, answer), replace(account, faults=faults))

    def _in_order(self, choice: Choice, account: Check) -> tuple[Choice, Check]:
        """The plan with its axes in one order, if the checker finds that it costs the same and fits."""
        ordered = in_order(self.problem, choice)
        if ordered == choice:
            return choice, account
        other = check(self.problem.program, self.problem.topology, ordered)
        same = abs(other.seconds - account.seconds) <= _AGREEMENT * account.seconds
        fits = other.peak_bytes <= max(account.peak_bytes, self.problem.budget_bytes)
        return (ordered, other) if same and fits and not other.faults else (choice, account)

    def _disagreements(self, account: Check, seconds: float) -> Iterator[str]:
        """The differences between the independent checker and the solver."""
        if abs(account.seconds - seconds) > _AGREEMENT * seconds:
            yield f"the plan takes {account.seconds} s, but the solver says {seconds} s"
        budget = self.problem.budget_bytes
        if account.peak_bytes > budget * (1 + _AGREEMENT):
            yield f"the plan takes {account.peak_bytes:.0f} bytes of a chip, more than the budget of {budget:.0f}"

    def _proof(self, found: Found, answer: Answer) -> Proof:
        """The proof of the answer's plan, and its source."""
        from search.cpsat.solver import NAME

        ascent, wall = found.ascent, time.monotonic() - self.started
        bound = min(ascent.bound, answer.value)
        apart, proven = answer.value - bound, _is_precise(answer.value, bound)
        if self.limits.solver == "cp-sat":
            proven = answer.status == "OPTIMAL"  # except for rounding, which presolve makes finer
        states = _states(self.problem)
        return Proof(
            status="OPTIMAL" if proven else "FEASIBLE",
            objective_seconds=answer.value,
            bound_seconds=bound,
            gap=0.0 if proven else apart / answer.value,
            wall_seconds=wall,
            rounding_seconds=apart if proven and apart > TOLERANCE * answer.value else 0.0,
            booleans=ascent.effort.booleans,
            states=states,
            branches=found.parts if found.parts > 1 else 0,
            stopped="" if proven else found.ended,
            memory_seconds_per_byte=float(ascent.prices.sum()),
            solver=NAME,
            solver_status=answer.status if proven or answer.status != "OPTIMAL" else "FEASIBLE",
            constraints=ascent.effort.constraints,
            fixed_by_presolve=states - found.left,
            presolve_bound_seconds=min(max(found.presolve_bound, 0.0), answer.value),
            presolve_seconds=wall - ascent.effort.seconds,
            solver_seconds=ascent.effort.seconds,
        )


def _states(problem: Problem) -> int:
    return sum(len(node.states) for node in problem.nodes)


def _is_precise(value: float, bound: float) -> bool:
    """Whether a plan exceeds the proven bound by rounding at most."""
    return bool(np.isfinite(value)) and value - bound <= PRECISION * abs(value)
