"""The search: bound, incumbent, exclusion, CP-SAT, proof.

    build ──► sweep the dual ──► decode and improve ──► strike out states ──► CP-SAT on the rest ──► checker
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from costmodels.program import Program
from costmodels.topology import Topology
from search.bound import Dual, Snapshot
from search.check import Check, check
from search.incumbent import decode, improve, overflow
from search.memory import Row, rows
from search.model import Answer, solve
from search.problem import FORBIDDEN, Problem, build
from search.solution import Choice, choice_of
from search.symmetry import representatives, surroundings

_FIRST_WINDOW = 1e-6
"""The first window that CP-SAT searches, as a part of the bound."""
_WINDOW_GROWTH = 30.0
"""How much wider each further window is."""
_PRICED_ROWS = 3
"""How many memory rows are priced, one after the other."""
_BISECTIONS = 14
"""Trials for one row's price."""
_WIDEST = FORBIDDEN / 100
"""The widest window, in seconds: what lies beyond costs as much as the impossible."""
_SMALL = 20_000
"""Pairs of layouts below which a branch goes to CP-SAT."""
_TOLERANCE = 1e-9
"""Relative difference between bound and plan that counts as none."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """When to stop.

    `rounds` bounds the dual's improvement; `deterministic_seconds` is CP-SAT's own clock, which makes the answer the same on
    every machine; `wall_seconds` is a hard stop. `reserve_bytes` of each chip are left free.
    """

    rounds: int = 60
    deterministic_seconds: float = 120.0
    wall_seconds: float = 600.0
    reserve_bytes: float = 0.0


@dataclass(frozen=True)
class Proof:
    """How good the plan is known to be, relative to the cost model.

    `gap` is $(\\text{objective} - \\text{bound}) / \\text{objective}$, 0 when the plan is proven best; `rounding_seconds`
    bounds what integer rounding inside CP-SAT may have hidden.
    """

    status: str
    objective_seconds: float
    bound_seconds: float
    gap: float
    wall_seconds: float
    rounding_seconds: float = 0.0
    booleans: int = 0
    states: int = 0
    branches: int = 0


@dataclass(frozen=True)
class Solution:
    """A plan with its proof and the independent checker's account of it."""

    problem: Problem
    choice: Choice
    proof: Proof
    check: Check


class NoPlan(Exception):
    """No choice fits the memory: `least_bytes` is the smallest peak that the search could reach, `proven` if by proof."""

    def __init__(self, problem: Problem, states: np.ndarray, least_bytes: float, proven: bool) -> None:
        super().__init__(f"at least {least_bytes:.0f} bytes are needed, {problem.budget_bytes:.0f} are there")
        self.problem, self.states, self.least_bytes, self.proven = problem, states, least_bytes, proven


def search(program: Program, topology: Topology, limits: Limits = Limits(), say: Say = lambda _: None) -> Solution:
    """Finds the fastest plan that fits, and proves it.

    **Raises:** `NoPlan` when no plan fits the chips' memory.
    """
    started = time.monotonic()
    budget = topology.chip.usable_hbm_bytes - limits.reserve_bytes
    problem = build(program, topology, budget)
    states = sum(len(node.states) for node in problem.nodes)
    say(f"{len(problem.nodes)} nodes, {len(problem.edges)} edges, {states} states")
    found = _Search(problem, limits, say)
    found.run()
    if found.best is None:
        raise found.no_plan()
    choice = choice_of(problem, found.best)
    proof = found.proof(time.monotonic() - started, states)
    return Solution(problem, choice, proof, check(program, topology, choice))


class _Search:
    """The state of one search: the dual, the best solution so far, and what is proven."""

    def __init__(self, problem: Problem, limits: Limits, say: Say) -> None:
        self.problem, self.limits, self.say = problem, limits, say
        self.rows: tuple[Row, ...] = rows(problem)
        self.dual = Dual(problem, self.rows)
        self.best: np.ndarray | None = None
        self.objective = np.inf
        self.bound = -np.inf
        self.booleans = self.branches = 0
        self.rounding = 0.0
        self._weights = [surroundings(problem, i) for i in range(len(problem.nodes))]
        self.exhausted = False
        self.leanest: tuple[float, np.ndarray] | None = None
        self._hold_symmetry()

    def _hold_symmetry(self) -> None:
        held = representatives(self.problem)
        if held is not None:
            node, kept = held
            keep = list(self.dual.keep)
            keep[node] = kept
            self.dual.restrict(keep)

    def run(self) -> None:
        self._ascend()
        if not self._closed() and not self.exhausted:
            self._close()

    def _closed(self) -> bool:
        return self._reached(self.bound)

    def _ascend(self) -> None:
        """Lifts the bound until it stalls, first without memory, then with a price on the rows that overflow."""
        self.dual.propagate()
        if not self.dual.fits:
            self.exhausted = True
            return
        over = self._lift()
        for _ in range(_PRICED_ROWS):
            if self._closed() or not len(over) or float(over.max()) <= 0:
                return
            over = self._price_row(int(np.argmax(over)))

    def _lift(self, rounds: int | None = None) -> np.ndarray:
        """Alternates sweeps, incumbents and exclusion; returns by how much the last relaxed solution overflows each row."""
        stalled, lower = 0, -np.inf
        over = np.zeros(0)
        for turn in range(rounds or self.limits.rounds):
            for _ in range(3):
                self.dual.sweep()
            before, lower = lower, self.dual.bound()
            self.bound = max(self.bound, lower)
            over = self._try(decode(self.dual))
            struck = self.dual.exclude(self.objective) if self.best is not None else 0
            self.say(f"turn {turn}: bound {lower:.6e} s, best {self.objective:.6e} s, struck {struck}")
            stalled = stalled + 1 if lower - before < 1e-5 * abs(lower) and not struck else 0
            if self._closed() or stalled >= 2:
                break
        return over

    def _price_row(self, row: int) -> np.ndarray:
        """Finds the multiplier of one row at which the relaxed solution begins to fit, by bisection on a concave dual."""
        low, high = 0.0, np.inf
        base = self.dual.multipliers.copy()
        best = (self.dual.bound(), base)
        trial = 1.0 / min(axis.bytes_per_second for axis in self.problem.topology.axes)
        over = np.zeros(len(self.rows))
        for _ in range(_BISECTIONS):
            multipliers = base.copy()
            multipliers[row] = trial
            self.dual.reprice(multipliers)
            over = self._lift(rounds=4)
            if self._closed():
                return over
            best = max(best, (self.dual.bound(), multipliers), key=lambda pair: pair[0])
            low, high = (trial, high) if over[row] > 0 else (low, trial)
            trial = 4 * low if not np.isfinite(high) else high / 8 if low == 0 else float(np.sqrt(low * high))
            if low > 0 and high < 1.1 * low:
                break
        self.dual.reprice(best[1])
        return self._lift(rounds=4)

    def _try(self, states: np.ndarray) -> np.ndarray:
        """Improves a solution and keeps the best that fits; returns the bytes by which the relaxed one overflows each row.

        A solution that does not fit is improved again with a steep price on memory.
        """
        steep = np.full(len(self.rows), 10 * max(abs(self.bound), 1e-9) / self.problem.budget_bytes)
        relaxed = None
        for penalty in (self.dual.multipliers, steep):
            improved = improve(self.problem, self.rows, states, penalty)
            over = overflow(self.problem, self.rows, improved)
            relaxed = over if relaxed is None else relaxed
            worst = float(over.max(initial=-np.inf))
            if self.leanest is None or worst < self.leanest[0]:
                self.leanest = worst, improved
            value = self.problem.objective(improved)
            if worst <= 0 and value < min(self.objective, FORBIDDEN / 2):
                self.best, self.objective = improved, value
            if worst <= 0:
                break
        return relaxed

    def _close(self) -> None:
        """Branches until what is left is small, and hands that to CP-SAT.

        A branch holds one heavily used layout to its likeliest state, or to all others; each side is swept anew, and dropped
        when its bound reaches the best plan known. Depth first, the likeliest side first.
        """
        self._stop = time.monotonic() + self.limits.wall_seconds
        open_: list[Snapshot] = [self.dual.snapshot()]
        unproven = np.inf
        while open_:
            if time.monotonic() > self._stop:
                unproven = min(unproven, *(self._bound_of(snapshot) for snapshot in open_))
                break
            self.dual.load(open_.pop())
            self.branches += 1
            lower = self._refine()
            if self._reached(lower):
                continue
            if self.dual.pairs() <= _SMALL or (node := self._branching_node()) is None:
                unproven = min(unproven, self._finish(lower))
            else:
                open_ += self._split(node)
        self.bound = max(self.bound, min(self.objective, unproven))

    def _bound_of(self, snapshot: Snapshot) -> float:
        self.dual.load(snapshot)
        return self.dual.bound()

    def _reached(self, lower: float) -> bool:
        return self.best is not None and lower >= self.objective * (1 - _TOLERANCE)

    def _refine(self) -> float:
        """Sweeps one branch until its bound stalls or reaches the best plan; returns the bound."""
        lower = self.dual.bound()
        while not self._reached(lower):
            self.dual.sweep()
            self.dual.sweep()
            before, lower = lower, self.dual.bound()
            if self._reached(lower):
                break
            self._try(decode(self.dual))
            struck = self.dual.exclude(self.objective) if self.best is not None else 0
            if lower - before < 1e-4 * abs(lower) and not struck:
                break
        return lower

    def _branching_node(self) -> int | None:
        """The undecided node with the most bytes around it."""
        undecided = [i for i, keep in enumerate(self.dual.keep) if len(keep) > 1]
        return max(undecided, key=lambda i: (self._weights[i], -i), default=None)

    def _split(self, node: int) -> list[Snapshot]:
        """Two branches, the one to look at first last."""
        likeliest = decode(self.dual)[node]
        keep = self.dual.keep[node]
        found = []
        for side in (keep[keep != likeliest], keep[keep == likeliest]):
            snapshot = self.dual.snapshot()
            snapshot.keep[node] = side
            found.append(snapshot)
        return found

    def _finish(self, lower: float) -> float:
        """CP-SAT on one branch, the likeliest states first; returns the bound that is proven for it.

        A window of width $\\delta$ keeps the states whose choice alone lifts the bound $L$ by at most $\\delta$. No other
        state occurs in a plan of cost at most $L + \\delta$: a best plan of the window that costs no more is best of all,
        and otherwise $L + \\delta$ is a bound.
        """
        width = max(abs(lower), 1e-12) * _FIRST_WINDOW
        if self.dual.multipliers.any():
            lower = self._unpriced()
            width = 10 * abs(lower)
        every = list(self.dual.keep)
        while not self._reached(lower):
            width = min(width, max(self.objective - lower, 0.0), _WIDEST)
            self.dual.restrict(every)
            self.dual.restrict(self.dual.within(width))
            answer = self._window(width)
            if answer.status == "INFEASIBLE" and width >= _WIDEST:
                self.exhausted = True
                return np.inf
            if answer.status not in ("INFEASIBLE", "OPTIMAL"):
                return min(answer.bound_seconds, lower + width)
            if answer.status == "OPTIMAL" and answer.value <= lower + width:
                return answer.value
            if width >= self.objective - lower:
                return self.objective
            width *= _WINDOW_GROWTH
        return lower

    def _unpriced(self) -> float:
        """Takes the price off memory (CP-SAT has the rows themselves) and lifts the bound again."""
        self.dual.reprice(np.zeros(len(self.rows)))
        for _ in range(6):
            self.dual.sweep()
        return self.dual.bound()

    def _window(self, width: float) -> Answer:
        left = sum(len(keep) for keep in self.dual.keep)
        wall = max(self._stop - time.monotonic(), 0.1)
        answer = solve(self.dual, self.rows, self.best, width, self.limits.deterministic_seconds, wall)
        self.booleans = max(self.booleans, answer.booleans)
        self.rounding = max(self.rounding, answer.rounding_seconds)
        self.say(f"CP-SAT within {width:.2e} s: {left} states, {answer.booleans} booleans, {answer.status}")
        if answer.states is not None and answer.value < min(self.objective, FORBIDDEN / 2):
            self.best, self.objective = answer.states, answer.value
        return answer

    def proof(self, wall: float, states: int) -> Proof:
        """What is proven of the best solution."""
        apart = max(self.objective - self.bound, 0.0)
        proven = apart <= max(self.rounding, _TOLERANCE * self.objective)
        return Proof(
            "OPTIMAL" if proven else "FEASIBLE",
            self.objective,
            self.objective if proven else self.bound,
            0.0 if proven else apart / self.objective,
            wall,
            self.rounding,
            self.booleans,
            states,
            self.branches,
        )

    def no_plan(self) -> NoPlan:
        """Why there is no plan."""
        worst, states = self.leanest or (np.inf, np.zeros(len(self.problem.nodes), dtype=int))
        proven = self.exhausted
        return NoPlan(self.problem, states, self.problem.budget_bytes + worst, proven)
