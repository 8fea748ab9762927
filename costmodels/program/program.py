"""The program that is costed: values, operations over factors, and the regions that repeat them.

A *factor* is a dimension of an operation, as in an einsum. `[b,i,k],[b,k,j] -> [b,i,j]` has four factors; splitting
`k` over a mesh axis leaves a partial sum, splitting `b`, `i` or `j` leaves shards of the result. Each dimension of an
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
from typing import Literal

FactorKind = Literal["parallel", "sum", "max", "min", "and", "or", "gathered", "exchanged", "dispatched", "whole"]
"""The effect of splitting a factor.

- `parallel`: splits the result.
- `sum`: leaves a partial sum.
- `max`, `min`, `and`, `or`: an all-reduce within the operation.
- `gathered`: splits the result if it has the factor; the operation all-gathers what chips need of each other's shards.
- `exchanged`: splits the result, whose shards are on other chips than the operand's; the operation permutes them.
- `dispatched`: splits the result; groups of rows may be split over the same axes, and the operation sends rows to the chips of
  their groups, and back.
- `whole`: cannot be split.
"""

OpClass = Literal["matmul", "fused", "memory", "boundary", "source", "sink"]
"""The cost class of an operation.

`matmul` runs on the matrix unit and moves its operands and results through HBM; `fused` runs on the vector unit inside
its neighbours' kernels; `memory` moves data through HBM; `boundary` is a loop's input, result or carry; `source` and
`sink` are the program's arguments and results.
"""

Pinned = tuple[tuple[str, ...] | None, ...]
"""Per dimension the mesh axes that the user pinned; `None` for a free dimension."""

REDUCED_INSIDE = ("max", "min", "and", "or")
CLOSED_INSIDE = (*REDUCED_INSIDE, "gathered", "exchanged", "dispatched")


@dataclass(frozen=True)
class Factor:
    """One dimension of an operation: its size in elements, and the effect of splitting it."""

    size: int
    kind: FactorKind = "parallel"


@dataclass(frozen=True)
class Value:
    """An array of the program.

    `name` is an argument path, or the operation and source line that produced the array; `region` is the region that
    defines it; `origin` is the value of the argument or constant that it is a view or a cast of, if any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: float
    region: int = 0
    origin: int | None = None

    @property
    def bytes(self) -> float:
        """Bytes of the whole array."""
        return self.itemsize * prod(self.shape)


@dataclass(frozen=True)
class Use:
    """An operand or a result of an operation: the value, its dimensions as factors, and the region of its reshard.

    `stored_itemsize` is the size of an element in HBM if a fused cast makes it differ from the value's own, and 0
    otherwise.
    """

    value: int
    dims: tuple[tuple[int, ...], ...]
    region: int = 0
    stored_itemsize: float = 0.0


@dataclass(frozen=True)
class Output:
    """A result of an operation by its position. Operands are named by their positions alone."""

    index: int = 0


@dataclass(frozen=True)
class Operation:
    """One operation over factors.

    **Arguments:**

    - `linear`: the sets of operands that may be partial sums together, e.g. `({0, 1},)` for an addition (both) and
      `({0}, {1})` for a product (either one).
    - `traffic`: the operands (0, 1, ...) and results (`Output(0)`, ...) that are read from or written to HBM.
    - `flops_per_point`: floating-point operations per point of the product of all factors.
    - `pinned`: the layout of the first result, if the user pinned it.
    - `masked`: the operands whose padding is masked before the operation reads them, once per mask.
    - `rounded`: the float32 operands that a matrix unit may read as bfloat16.
    """

    name: str
    primitive: str
    factors: tuple[Factor, ...]
    inputs: tuple[Use, ...]
    outputs: tuple[Use, ...]
    region: int = 0
    op_class: OpClass = "fused"
    linear: tuple[frozenset[int], ...] = ()
    traffic: tuple[int | Output, ...] = ()
    flops_per_point: float = 0.0
    dtype: str = "bfloat16"
    source: str = ""
    exact: bool = True
    pinned: Pinned | None = None
    masked: tuple[int, ...] = ()
    rounded: tuple[int, ...] = ()

    def use(self, place: int | Output) -> Use:
        """The operand or the result at a place of `traffic`."""
        return self.outputs[place.index] if isinstance(place, Output) else self.inputs[place]

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """The properties that determine the strategies: factors, dimensions and linearity, without names and values."""
        return (
            self.factors,
            tuple(use.dims for use in self.inputs),
            tuple(use.dims for use in self.outputs),
            self.linear,
            self.op_class == "source",
        )


@dataclass(frozen=True)
class Region:
    """A part of the program that runs `count` times per run of its parent.

    A `phase` is one of several joined programs; its count is the phase's weight, which may be a fraction.
    """

    kind: Literal["main", "loop", "branch", "phase"]
    parent: int | None = None
    count: float = 1
    name: str = ""


@dataclass(frozen=True)
class Program:
    """A traced program, to be costed and searched.

    `arguments` and `results` hold, per flat argument and result of the function, the index of its source and sink
    operation; `constants` the sources of arrays the function closes over; `donated` pairs a donated argument's position
    with the position of the result that takes its memory.

    Joined programs (`costmodels.program.joined.join`) have one phase each: `phases` holds the first operation of each.
    `handoffs` pairs a result's position in one phase with the position of the argument in another phase that takes it.
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

    def enclosing(self, region: int) -> Iterator[int]:
        """A region, its parent, and so on outwards to the main one."""
        around: int | None = region
        while around is not None:
            yield around
            around = self.regions[around].parent

    def multiplicity(self, region: int) -> float:
        """The number of runs of a region in one step of the program."""
        return self._multiplicities[region]

    @cached_property
    def _multiplicities(self) -> tuple[float, ...]:
        regions = range(len(self.regions))
        return tuple(prod(self.regions[each].count for each in self.enclosing(region)) for region in regions)

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
    def reads(self) -> dict[int, int]:
        """An argument's value to the number of operations that read it or a view of it, without those that make views."""
        found: Counter[int] = Counter()
        for op in self.operations:
            made = {self.values[use.value].origin for use in op.outputs}
            read = (self.values[use.value].origin for use in op.inputs)
            found.update(origin for origin in read if origin is not None and origin not in made)
        return dict(found)

    def source_name(self, value: int) -> str:
        """The path of the argument that a value is a view of; the value's own name if it is none."""
        origin = self.values[value].origin
        return self.values[value if origin is None else origin].name

    @cached_property
    def matmul_before(self) -> tuple[int | None, ...]:
        """Per operation the previous matmul in its region, if there is one."""
        last: dict[int, int] = {}
        found = []
        for i, op in enumerate(self.operations):
            found.append(last.get(op.region))
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
