"""The plan as plain frozen data: the layouts of all arrays, the strategies of all operations, the cost and the proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autoshard.annotating.padding import Padding, unpadded_shape
from autoshard.errors import MissingProgramError
from autoshard.planning.carriage import Carriage
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
    """One argument, closed-over constant or result: its path, its layout, and its bytes on one chip.

    `weak` marks a Python scalar, which has JAX's weak type. `order` has the dimensions from major to minor in memory; it
    is empty for the device's default order. `shape` includes the `padding` of its dimensions.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    bytes_per_chip: float
    donated: bool = False
    weak: bool = False
    order: tuple[int, ...] = ()
    padding: tuple[Padding, ...] = ()

    @property
    def unpadded_shape(self) -> tuple[int, ...]:
        """The shape of the array as the function has it."""
        return unpadded_shape(self.shape, self.padding)


def with_orders(arrays: Sequence[ArrayPlan], orders: Sequence[tuple[int, ...]]) -> tuple[ArrayPlan, ...]:
    """The arrays with these orders of dimensions in memory."""
    return tuple(replace(array, order=tuple(order)) for array, order in zip(arrays, orders, strict=True))


def predecessors(
    arguments: Sequence[ArrayPlan], results: Sequence[ArrayPlan], donated: Sequence[tuple[int, int]]
) -> dict[int, int]:
    """Per result, the donated argument that it replaces in the next step, and whose order it has.

    This is the argument whose memory the result takes. For any other result it is the first donated argument of the same
    shape, type and layout, because JAX pairs memory by shapes alone.
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
    in one step take `seconds` together, without the `hidden_seconds` that computation hides. `where` names the array, and the
    operation for which it is resharded.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float
    seconds: float
    where: str
    hidden_seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """The cost of one step under the cost model, in seconds and bytes per chip.

    `compute_seconds` and `memory_seconds` are the two terms of the operations' rooflines, each summed over all operations.
    `seconds` is the sum over operations of the larger term, plus all collectives. `collective_seconds` includes the local
    slices of reshards, which `slices` lists: they send nothing, but read and write HBM.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    peak_bytes: float
    peak_where: str
    budget_bytes: float
    collectives: tuple[PlannedCollective, ...]
    slices: tuple[PlannedCollective, ...] = ()

    @property
    def slice_seconds(self) -> float:
        """Seconds of all local slices."""
        return sum(each.seconds for each in self.slices)


@dataclass(frozen=True)
class OperationPlan:
    """One operation: its strategy by name and per factor, and its cost in one step of the program.

    `einsum` writes the factors as letters (factor 0 is `a`, and so on), `sizes` their sizes and `splits` their mesh axes, in
    that order. `seconds` covers all its runs. `collective_seconds` covers the reshards of its operands and the reductions
    inside it. `vector_seconds` is the time of loads and stores by the vector unit, `overhead_seconds` that of all starts.
    `regime` is the largest term: "compute", "HBM", "vector unit", "communication" or "overhead". `runner_up` describes
    the cheapest other strategy, with an upper bound on the extra step time.
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
    vector_seconds: float = 0.0
    overhead_seconds: float = 0.0


@dataclass(frozen=True)
class Baseline:
    """A baseline, such as "Megatron 1D": the seconds of its best plan, and a lower bound on all plans of its family.

    If it has no plan, the seconds are infinite, and `why` has the reason.
    """

    name: str
    seconds: float
    bound_seconds: float
    why: str = ""


NOISE_PART = 0.03
"""The fraction of a step below which the cost model cannot distinguish two plans."""


@dataclass(frozen=True)
class PlanRecord:
    """A layout of a function over a topology, with its cost and its proof, as data for a file.

    It names operations by their position in the annotated program, and has that program's fingerprint. To run, it is bound
    to the function, which must trace to a program with the same fingerprint.

    **Attributes:**

    - `arguments`, `constants`, `results`: an `ArrayPlan` each, flat, in order.
    - `in_tree`, `out_tree`: the structures of the arguments and of the results.
    - `operations`: an `OperationPlan` per operation of the traced program, in its numbering; boundary operations, such as
      arguments and loop carries, cost nothing.
    - `choice`: the strategies and layouts by operation and value number, for emission.
    - `warnings`: assumptions and limitations of the plan, as sentences.
    - `program`, `dimensions`: the costed program, and its sizes by name, for formulas; `None` in plans from older files.
    - `baselines`: the baselines, if they were requested.
    - `padding`: the padded dimensions of the function, each named by one of its occurrences.
    - `handed_results`: the results that keep their padding, because another phase takes them over with it.
    - `emission`: the emission choices that no rule decides, as `choose_formats` and `verify` found them best.
    - `carriage`: what a compiler makes of the plan in each way to carry it, as `autoshard.carry` found it.
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
    padding: tuple[Padding, ...] = ()
    carriage: Carriage | None = None
    handed_results: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[ArrayPlan, ...]:
        """The arguments and the constants, in order."""
        return (*self.arguments, *self.constants)

    def require_program(self) -> Program:
        """The costed program.

        **Raises:** `MissingProgramError` for a plan from an older file, which lacks it.
        """
        if self.program is None:
            raise MissingProgramError(
                f"The plan {self.name!r} is from an older file, which lacks its program. Search again."
            )
        return self.program
