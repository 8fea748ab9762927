"""The program as it is costed: values, operations over factors, and the regions that repeat them.

A *factor* is a dimension of an operation, as in an einsum. `[b,i,k],[b,k,j] -> [b,i,j]` has four factors; splitting
`k` over a mesh axis leaves a partial sum, splitting `b`, `i` or `j` leaves whole results in pieces. Each dimension of an
operand or result is a tuple of factors, major to minor: a reshape that merges heads and head size has the compound
dimension `(h, d)`.

Everything here is plain frozen data: no JAX, no solver.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

FactorKind = Literal["parallel", "sum", "max", "min", "and", "or", "gathered", "exchanged", "whole"]
"""What splitting a factor does.

`parallel` splits the result; `sum` leaves a partial sum; `max`, `min`, `and`, `or` are reduced across the split within the
operation, by an all-reduce; `gathered` splits the result, if that has the factor, and what chips must know of one another's
pieces is all-gathered within the operation; `exchanged` splits the result, whose pieces lie on other chips than the
operand's: permutations within the operation move them; `whole` cannot be split.
"""

OpClass = Literal["matmul", "fused", "memory", "boundary", "source", "sink"]
"""What an operation costs.

`matmul` runs on the matrix unit and moves its operands and results through HBM; `fused` runs on the vector unit inside
its neighbours' kernels; `memory` moves data through HBM; `boundary` enters, leaves or goes round a loop; `source` and
`sink` are the program's arguments and results.
"""

Pinned = tuple[tuple[str, ...] | None, ...]
"""Per dimension the mesh axes that split it, because the user says so; `None` where the dimension is free."""

REDUCED_INSIDE = ("max", "min", "and", "or")
CLOSED_INSIDE = (*REDUCED_INSIDE, "gathered", "exchanged")


@dataclass(frozen=True)
class Factor:
    """One dimension of an operation: its size in elements and what splitting it does."""

    size: int
    kind: FactorKind = "parallel"


@dataclass(frozen=True)
class Value:
    """An array of the program.

    `name` is in the user's words (an argument path, or the operation and source line that made it); `region` is the region
    that the array is defined in; `origin` is the argument path that the array is a mere view or cast of, if there is one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: float
    region: int = 0
    origin: str = ""

    @property
    def bytes(self) -> float:
        """Bytes of the whole array."""
        return self.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Use:
    """An operand or a result of an operation: the value, its dimensions as factors, where its change of layout runs.

    `stored_itemsize` is what an element takes in HBM where a cast on the way there or from there makes that another size
    than the value's own, and 0 where it does not.
    """

    value: int
    dims: tuple[tuple[int, ...], ...]
    region: int = 0
    stored_itemsize: float = 0.0


@dataclass(frozen=True)
class Operation:
    """One operation over factors.

    **Arguments:**

    - `linear`: the sets of operands through which a partial sum may travel, e.g. `({0, 1},)` for an addition (both
      are partial) and `({0}, {1})` for a product (either is).
    - `traffic`: the operands (0, 1, ...) and results (-1, -2, ...) that are read from or written to HBM.
    - `flops_per_point`: floating-point operations per point of the product of all factors.
    - `pinned`: the layout that the first result must come in, where the user decided it.
    """

    name: str
    primitive: str
    factors: tuple[Factor, ...]
    inputs: tuple[Use, ...]
    outputs: tuple[Use, ...]
    region: int = 0
    op_class: OpClass = "fused"
    linear: tuple[frozenset[int], ...] = ()
    traffic: tuple[int, ...] = ()
    flops_per_point: float = 0.0
    dtype: str = "bfloat16"
    source: str = ""
    exact: bool = True
    pinned: Pinned | None = None

    def use(self, index: int) -> Use:
        """The operand (0, 1, ...) or result (-1, -2, ...) that `traffic` names."""
        return self.inputs[index] if index >= 0 else self.outputs[-1 - index]

    @property
    def signature(self) -> tuple[object, ...]:
        """What the strategies of the operation depend on: factors, dimensions and linearity; neither names nor values."""
        return (
            self.factors,
            tuple(use.dims for use in self.inputs),
            tuple(use.dims for use in self.outputs),
            self.linear,
            self.op_class == "source",
        )


@dataclass(frozen=True)
class Region:
    """A piece of the program that runs `count` times each time its parent runs once.

    A `phase` is one of several programs joined into one; its count is the phase's weight, which need not be whole.
    """

    kind: Literal["main", "loop", "branch", "phase"]
    parent: int = -1
    count: float = 1
    name: str = ""


@dataclass(frozen=True)
class Program:
    """A traced program: what is costed and searched.

    `arguments` and `results` hold, per flat argument and result of the function, the index of its source and sink
    operation; `constants` the sources of arrays the function closes over; `donated` pairs a donated argument's position
    with the position of the result that takes its memory.

    Several programs joined into one (`costmodels.phases.join`) have one phase each: `phases` holds the first operation of each.
    `handoffs` pairs a result's position in one phase with the argument's in another that takes it over.
    """

    name: str
    values: tuple[Value, ...]
    operations: tuple[Operation, ...]
    regions: tuple[Region, ...] = (Region("main"),)
    arguments: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    donated: tuple[tuple[int, int], ...] = ()
    warnings: tuple[str, ...] = field(default=())
    phases: tuple[int, ...] = (0,)
    handoffs: tuple[tuple[int, int], ...] = ()

    def multiplicity(self, region: int) -> float:
        """How many times a region runs in one step of the program."""
        count: float = 1
        while region >= 0:
            count *= self.regions[region].count
            region = self.regions[region].parent
        return count

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was worked out about it, by whoever did; a program never changes."""
        return {}

    @cached_property
    def producers(self) -> dict[int, tuple[int, int]]:
        """Value to (operation, position among its results)."""
        return {use.value: (i, k) for i, op in enumerate(self.operations) for k, use in enumerate(op.outputs)}

    @cached_property
    def consumers(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """Value to its uses: (operation, position among its operands)."""
        found: dict[int, list[tuple[int, int]]] = {}
        for i, op in enumerate(self.operations):
            for k, use in enumerate(op.inputs):
                found.setdefault(use.value, []).append((i, k))
        return {value: tuple(uses) for value, uses in found.items()}

    @cached_property
    def reads(self) -> dict[str, int]:
        """Argument path to how often operations read the argument or a view of it, but for those that make further views."""
        found: Counter[str] = Counter()
        for op in self.operations:
            made = {self.values[use.value].origin for use in op.outputs}
            found.update(
                origin for use in op.inputs if (origin := self.values[use.value].origin) and origin not in made
            )
        return dict(found)

    @cached_property
    def matmul_before(self) -> tuple[int, ...]:
        """Per operation the matmul before it in its region; -1 where there is none."""
        last: dict[int, int] = {}
        found = []
        for i, op in enumerate(self.operations):
            found.append(last.get(op.region, -1))
            if op.op_class == "matmul":
                last[op.region] = i
        return tuple(found)

    def phase_of(self, operation: int) -> tuple[int, int]:
        """The first and the last operation of the phase that an operation belongs to."""
        phase = bisect_right(self.phases, operation) - 1
        after = self.phases[phase + 1] if phase + 1 < len(self.phases) else len(self.operations)
        return self.phases[phase], after - 1

    def matmuls(self) -> Iterator[tuple[int, Operation]]:
        """The matrix multiplications, in program order."""
        return ((i, op) for i, op in enumerate(self.operations) if op.op_class == "matmul")
