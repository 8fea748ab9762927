"""The plan as plain frozen data: layouts, costs and proof of every array and operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autoshard.errors import MissingProgramError
from autoshard.planning.emission import BY_DEFAULT, Emission
from autoshard.tracing.pytrees import Nesting
from costmodels.dimensions import Dimensions
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice
from search.formulation.layouts import Layout
from search.solve import Proof


@dataclass(frozen=True)
class ArrayPlan:
    """One argument, closed-over constant or result: its path in the user's words, its layout, and its bytes on one chip.

    `weak` marks a Python scalar, whose type gives way to the types it meets. `order` has the dimensions from major to minor in
    memory; it is empty where they lie as the device lays out arrays by default.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    bytes_per_chip: float
    donated: bool = False
    weak: bool = False
    order: tuple[int, ...] = ()


def with_orders(arrays: Sequence[ArrayPlan], orders: Sequence[tuple[int, ...]]) -> tuple[ArrayPlan, ...]:
    """The arrays with these orders of dimensions in memory."""
    return tuple(replace(array, order=tuple(order)) for array, order in zip(arrays, orders, strict=True))


def predecessors(
    arguments: Sequence[ArrayPlan], results: Sequence[ArrayPlan], donated: Sequence[tuple[int, int]]
) -> dict[int, int]:
    """By result the donated argument that it takes the place of in the next step, and so has the order of.

    That is the one whose memory it takes; for other results the first donated one of their shape, type and layout, which may be
    what the function returns for it: JAX pairs memory by shapes alone.
    """

    def kind(array: ArrayPlan) -> object:
        return array.shape, array.dtype, array.layout

    first = {kind(arguments[at]): at for at, _ in reversed(donated)}
    alike = {k: first[kind(result)] for k, result in enumerate(results) if kind(result) in first}
    return alike | {result: at for at, result in donated}


@dataclass(frozen=True)
class PlannedCollective:
    """One collective of the plan.

    `bytes` is the payload per chip: the gathered result of an all-gather, the local operand otherwise. `count` executions
    in one step take `seconds` together. `where` says which array changes layout for which operation, in the user's words.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float
    seconds: float
    where: str


@dataclass(frozen=True)
class Estimate:
    """What one step costs under the cost model; seconds, and bytes per chip.

    `compute_seconds` and `memory_seconds` are the two sides of the operations' rooflines, each summed over operations as
    if it were alone; `seconds` sums the larger of the two per operation and all collectives.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    peak_bytes: float
    peak_where: str
    budget_bytes: float
    collectives: tuple[PlannedCollective, ...]


@dataclass(frozen=True)
class OperationPlan:
    """One operation: its strategy by name and per factor, and its cost in one step of the program.

    `einsum` writes the factors as letters (factor 0 is `a`, and so on), `sizes` their sizes and `splits` their mesh axes, in
    that order. `seconds` is all its runs; `collective_seconds` the changes of layout of its operands, and the reductions
    inside it. `regime` is what takes longest: "compute", "HBM", "communication" or "overhead". `runner_up` describes the
    cheapest other strategy, with what the step would cost more if this operation alone changed.
    """

    name: str
    primitive: str
    source: str
    einsum: str
    splits: tuple[tuple[str, ...], ...]
    strategy: str
    count: float
    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float
    seconds: float
    collective_seconds: float
    regime: str
    runner_up: str = ""
    matmul: bool = False
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """A plain layout, such as "Megatron 1D": the seconds of its best plan, and a bound that no plan of its kind is below.

    Where it has no plan, the seconds are infinite, and `why` says why.
    """

    name: str
    seconds: float
    bound_seconds: float
    why: str = ""


NOISE_PART = 0.03
"""Margins below this part of a step are within what the cost model can tell apart."""


@dataclass(frozen=True)
class PlanRecord:
    """A layout of a function over a topology, with its cost and its proof, as data that a file can hold.

    It names operations by their position in the annotated program and carries that program's fingerprint. To run, it is bound
    to the function again, which must trace to a program with the same fingerprint.

    **Attributes:**

    - `arguments`, `constants`, `results`: an `ArrayPlan` each, flat, in order.
    - `in_tree`, `out_tree`: how flat arguments and results nest.
    - `operations`: an `OperationPlan` per operation of the traced program, in its numbering; those that only bring arrays in,
      out or round a loop cost nothing.
    - `choice`: the strategies and layouts by operation and value number, for emission.
    - `warnings`: everything the plan does not vouch for, in sentences.
    - `program`, `dimensions`: the program that was costed, and its sizes by name: what formulas are made of. Plans of
      older files have none.
    - `baselines`: what plain layouts would take, if that was asked for.
    - `emission`: how the plan is emitted where no rule decides, as `choose_formats` and `verify` found it best.
    """

    name: str
    topology: Topology
    fingerprint: str
    arguments: tuple[ArrayPlan, ...]
    constants: tuple[ArrayPlan, ...]
    results: tuple[ArrayPlan, ...]
    in_tree: Nesting
    out_tree: Nesting
    choice: Choice
    estimate: Estimate
    proof: Proof
    operations: tuple[OperationPlan, ...]
    donate_argnums: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    jax_version: str = ""
    program: Program | None = field(default=None, repr=False)
    dimensions: Dimensions | None = field(default=None, repr=False)
    baselines: tuple[Baseline, ...] = ()
    emission: Emission = BY_DEFAULT

    def require_program(self) -> Program:
        """The program that was costed.

        **Raises:** `MissingProgramError` for a plan from an older file, which does not hold it.
        """
        if self.program is None:
            raise MissingProgramError(
                f"The plan {self.name!r} comes from an older file that does not hold its program. Search it again."
            )
        return self.program
