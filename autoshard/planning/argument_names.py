"""Names of the arguments of a plan."""

from __future__ import annotations

import re
from collections import Counter

from autoshard.errors import UnknownNameError
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees


def heads(plan: PlanRecord) -> list[str]:
    """The names of the arguments; those of `*args` are numbered, and one without arrays is named by its position."""
    found: dict[int, str] = {}
    for keys, array in zip(pytrees.paths(plan.in_tree.data), plan.arguments, strict=True):
        name = re.match(r"\w*", array.path)
        found.setdefault(int(keys[0]), name[0] if name and name[0] else "argument")
    count, shared, seen = len(plan.in_tree.data["tuple"]), Counter(found.values()), Counter[str]()
    names = []
    for at in range(count):
        name = found.get(at, f"argument{at}")
        names.append(f"{name}/{seen[name]}" if shared[name] > 1 else name)
        seen[name] += 1
    return names


def position(plan: PlanRecord, argument: str | int) -> int:
    """The position of the argument with a name or a position, which may be negative.

    **Raises:** `UnknownNameError`.
    """
    names = heads(plan)
    if isinstance(argument, str) and argument in names:
        return names.index(argument)
    if isinstance(argument, int) and -len(names) <= argument < len(names):
        return argument % len(names)
    raise UnknownNameError(f"The plan {plan.name!r} has no argument {argument!r}; it has {', '.join(names)}.")
