"""Ways to carry a plan, and how far each carries it: argument and result shardings, constraints, or manual collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from search.formulation.layouts import Layout

Carry = Literal["manual", "constraints", "specs"]
"""The way a compiled program gets the plan.

- "manual": one `shard_map` with the planned collectives.
- "constraints": shardings of arguments and results, and a few `with_sharding_constraint`s; the partitioner does the rest.
- "specs": shardings of arguments and results only, with no line of the function changed.
"""

WAYS: tuple[Carry, ...] = get_args(Carry)


@dataclass(frozen=True)
class Constraint:
    """Layouts that the values of one source line get by `with_sharding_constraint`, in this order.

    A value that is resharded gets the layout before and the one after it: with the latter alone, the partitioner prefers to
    reshard the operands of the operation that makes the value.

    **Attributes:**

    - `values`: their numbers in the program: one for each time that the line is traced, as in unrolled layers.
    - `layouts`: their layouts, without partial sums.
    - `source`: the line that makes or reads them, as `model.py:12`; `caller` the line that calls it, if it is another.
    - `made`: whether the line makes the values; else it reads them, and only what reads them there sees the constraint.
    - `name`: the argument that the values stem from, or the operation that makes them.
    - `path`, `line`, `variable`: the statement whose value they are, if there is one, and the variable that it assigns,
      "" for a `return`.
    """

    values: tuple[int, ...]
    layouts: tuple[Layout, ...]
    source: str
    caller: str = ""
    made: bool = True
    name: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    path: str = ""
    line: int = 0
    variable: str = ""


@dataclass(frozen=True)
class CarriedProgram:
    """The compiled program of one way to carry a plan, per chip and step.

    `step_seconds` is the replayed step on TPUs; elsewhere the planned operations with the compiled collectives and FLOPs.
    `cause` is its costliest difference from the plan, in words. If the compiler refused the program, `why`
    has the reason and the figures are infinite.
    """

    way: str
    step_seconds: float
    wire_bytes: float
    wire_seconds: float
    peak_bytes: float
    flops: float = 0.0
    cause: str = ""
    why: str = ""


@dataclass(frozen=True)
class Carriage:
    """The compiled programs of a plan in each way to carry it.

    **Attributes:**

    - `target`: "host", "tpu" or "gpu", and `compiler` its version.
    - `programs`: the compiled programs, one for each way.
    - `constraints`: the constraints that were chosen, the most useful first.
    - `within`: whether the program with these constraints is within the bounds of the manual one.
    - `compilations`: the number of programs compiled to choose them.
    """

    target: str
    compiler: str
    programs: tuple[CarriedProgram, ...]
    constraints: tuple[Constraint, ...] = ()
    within: bool = False
    compilations: int = 0

    def program(self, way: str) -> CarriedProgram | None:
        """The program of one way, if it was compiled."""
        return next((each for each in self.programs if each.way == way), None)

    @property
    def count(self) -> int:
        """The number of calls of `with_sharding_constraint` that carry the plan."""
        return sum(len(each.layouts) for each in self.constraints)

    @property
    def fastest(self) -> Carry:
        """The way whose program has the shortest step; the manual one of programs that are within a percent."""
        manual = self.program("manual")
        least = manual.step_seconds * (1 - _WORTH) if manual else float("inf")
        faster = [each for each in self.programs if each.step_seconds < least]
        chosen = min(faster, key=lambda each: each.step_seconds).way if faster else "manual"
        return next(way for way in WAYS if way == chosen)


_WORTH = 0.01
"""The part of a step that another way than the manual one must save to be the default."""
