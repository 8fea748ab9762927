"""Plans whose only collectives are sums of products: those that a partitioner finds from argument shardings alone.

A partitioner propagates the shardings of arguments from operation to operation. It sums the partial results of a product
at once. Every other reshard is its own decision, and often another one than the plan's. So the search is restricted to
sums (`search.restrictions`), and the best such plan is compiled. Where its program takes time that is not planned, such
as a cache that is copied because its positions are split, that split is forbidden to the operations of the costliest
source line, and the next plan is searched. This ends when no other plan is planned to be faster than the fastest program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from autoshard.comparing.other_plans import limits_of, program_of, relaid
from autoshard.plan import Plan
from costmodels.program.program import Operation, Program
from search.formulation.strategies import Strategy
from search.solve import NoPlan, search

Split = tuple[str, str, frozenset[int]]
"""A source line, a primitive, and the factors of it that are split."""
Compile = Callable[[str, Plan], tuple[float, Mapping[str, float]]]
"""Compiles a plan: the seconds of its step, and those that are not planned, by source line."""

NOTICEABLE = 0.02
"""The part of a planned step that the unplanned time of a source line must take to forbid its splits."""


def plans_by_sums(plan: Plan, compile: Compile, most: int, time_limit: float | None = None) -> Iterator[Plan]:
    """Plans without other reshards than sums, each compiled; later ones avoid what the earlier ones' programs lose.

    **Arguments:**

    - `most`: the number of plans to compile.

    **Raises:** `AutoshardError` for a plan whose file lacks the program.
    """
    program, topology, limits = program_of(plan), plan.topology, limits_of(plan, time_limit)
    forbidden: set[Split] = set()
    fastest = float("inf")

    def allow(operation: int, strategy: Strategy) -> bool:
        return _split(program.operations[operation], strategy) not in forbidden

    for place in range(most):
        try:
            found = search(program, topology, limits, allow=allow, symmetric=True, cutoff=fastest, reshards="sums")
        except NoPlan:
            return
        each = relaid(plan, found)
        seconds, costs = compile(f"sums alone, {place + 1}" if place else "sums alone", each)
        yield each
        fastest = min(fastest, seconds)
        more = _costliest(each, program, costs) - forbidden
        if not more:
            return
        forbidden |= more


def _costliest(plan: Plan, program: Program, costs: Mapping[str, float]) -> set[Split]:
    """The splits of the operations, other than products, of the line that takes the most unplanned time."""
    for line, seconds in sorted(costs.items(), key=lambda pair: -pair[1]):
        if seconds < NOTICEABLE * plan.estimate.seconds:
            break
        pairs = zip(program.operations, plan.choice.strategies, strict=True)
        found = {_split(op, strategy) for op, strategy in pairs if op.source == line and op.op_class != "matmul"}
        found = {each for each in found if each[2]}
        if found:
            return found
    return set()


def _split(op: Operation, strategy: Strategy) -> Split:
    return op.source, op.primitive, frozenset(k for k, axes in enumerate(strategy.splits) if axes)
