"""The best plan that one way of carrying can carry, among a few that are compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from autoshard._util.tables import WIDTH, table, time
from autoshard.auditing.findings import CompileTarget
from autoshard.carrying.carry import Carrier, compiler_of
from autoshard.comparing.other_plans import best_plans, plain_plans
from autoshard.errors import AutoshardError
from autoshard.plan import Plan
from autoshard.planning.carriage import Carriage, CarriedProgram, Carry

NEAR = 0.5
"""The relative difference in modelled step time within which a plain layout is compiled as well."""


@dataclass(frozen=True)
class CarriedPlans:
    """The compiled plans, with the name of each and its program carried in one way, the fastest first."""

    way: Carry
    plans: tuple[tuple[str, Plan, CarriedProgram], ...]

    @property
    def best(self) -> Plan:
        """The plan with the fastest program; a warning says how many were compiled."""
        name, plan, program = self.plans[0]
        if not isfinite(program.step_seconds):
            raise AutoshardError(
                f"None of the {len(self.plans)} compiled plans can be carried by {self.way}: {program.why}"
            )
        words = f"Of {len(self.plans)} compiled plans, this one ({name}) has the fastest step carried by {self.way}."
        return replace(plan, warnings=(*plan.warnings, words))

    def __str__(self) -> str:
        rows = [
            (name, time(plan.estimate.seconds), time(program.step_seconds), time(program.wire_seconds), program.why)
            for name, plan, program in self.plans
        ]
        headers = ("plan", "planned", f"carried by {self.way}", "collectives", "")
        return "\n".join(table(headers, rows, "<>>>~", WIDTH)) + "\n"


def best_carried(
    plan: Plan,
    fn: Callable[..., Any],
    *args: Any,
    way: Carry = "specs",
    target: CompileTarget = "tpu",
    k: int = 4,
    time_limit: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> CarriedPlans:
    """Compiles the k best plans and the plain layouts near them, carried in one way, and ranks them by their programs.

    **Arguments:**

    - `args`: the arguments that the plan was searched for.
    - `k`: the number of best plans that are compiled; plain layouts come on top.

    **Raises:** `AutoshardError` for a plan whose file lacks the program, or for constraints, which each plan has its own of.
    """
    if way == "constraints":
        raise AutoshardError("way must be 'specs' or 'manual', got 'constraints': use autoshard.carry for one plan.")
    others = list(best_plans(plan, k, time_limit, progress))
    named = [("the best plan" if i == 0 else f"place {i + 1}", each) for i, each in enumerate(others)]
    named += [(name, each) for name, each in plain_plans(plan, NEAR, time_limit)]
    distinct = {each.choice.strategies: (name, each) for name, each in reversed(named)}
    found = []
    for name, each in reversed(list(distinct.values())):
        program, _ = Carrier(each, fn, args, target, progress).try_way(way)
        carriage = Carriage(target, compiler_of(target), (program,))
        found.append((name, replace(each, carriage=carriage), program))
    return CarriedPlans(way, tuple(sorted(found, key=lambda item: item[2].step_seconds)))
