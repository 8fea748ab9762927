"""The plan: what every array and operation does on the mesh, what it costs, and how far that is proven.

A `Plan` is plain frozen data that a file can hold. It names operations by their position in the traced program and carries
the program's fingerprint; to run, it is bound to the function again, which is traced anew and must have the same
fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from costmodels.topology import Topology
from search.layouts import Layout
from search.solution import Choice
from search.solve import Proof


@dataclass(frozen=True)
class ArrayPlan:
    """One argument, closed-over constant or result: its path in the user's words, its layout, and its bytes on one chip."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    bytes_per_chip: float
    donated: bool = False


@dataclass(frozen=True)
class PlannedCollective:
    """One collective of the plan.

    `bytes` is the payload per chip: the gathered result of an all-gather, the local operand otherwise. `count` executions
    in one step take `seconds` together. `where` says which array changes layout for which operation, in the user's words.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: int
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

    `einsum` writes the factors, `splits` the mesh axes of each factor in the same order. `seconds` is all its runs;
    `collective_seconds` the changes of layout of its operands. `regime` is what bounds it. `runner_up` describes the
    cheapest other strategy, with what the step would cost more under it (at least).
    """

    name: str
    primitive: str
    source: str
    einsum: str
    splits: tuple[tuple[str, ...], ...]
    strategy: str
    count: int
    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float
    seconds: float
    collective_seconds: float
    regime: str
    runner_up: str = ""
    matmul: bool = False


@dataclass(frozen=True)
class Plan:
    """A layout of a function over a topology, with its cost and its proof; made by `autoshard.search`.

    **Attributes:**

    - `arguments`, `constants`, `results`: an `ArrayPlan` each, flat, in order.
    - `in_tree`, `out_tree`: how flat arguments and results nest, as `autoshard.trees` writes it to files.
    - `choice`: the strategies and layouts by operation and value number, for emission.
    - `warnings`: everything the plan does not vouch for, in sentences.
    """

    name: str
    topology: Topology
    fingerprint: str
    arguments: tuple[ArrayPlan, ...]
    constants: tuple[ArrayPlan, ...]
    results: tuple[ArrayPlan, ...]
    in_tree: Any
    out_tree: Any
    choice: Choice
    estimate: Estimate
    proof: Proof
    operations: tuple[OperationPlan, ...]
    donate_argnums: tuple[int, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    jax_version: str = ""
