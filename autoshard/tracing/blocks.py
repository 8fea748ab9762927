"""The traced program as nested blocks of steps, for emission.

The search costs a `costmodels.program.Program`; emission runs a `Block`. The two share their numbering: a step names its
operations and values in the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoshard.rules import Rule
from costmodels.program.program import Program

Atom = int | Any
"""An operand: the index of a value, or a literal wrapped in `Literal`."""


@dataclass(frozen=True)
class Literal:
    """A constant scalar written into the program."""

    value: Any


@dataclass(frozen=True)
class OpStep:
    """One equation. `operands` are value indices or `Literal`s, in the equation's order; `results` value indices.

    `written` is the equation that the user wrote: the call, if the equation is inside a function of JAX.
    """

    operation: int
    eqn: Any
    rule: Rule
    operands: tuple[Atom, ...]
    results: tuple[int, ...]
    written: Any = None


@dataclass(frozen=True)
class Entry:
    """A constant of a region, or a slice of a stacked array: values outside and inside, and what owns their layout."""

    operation: int
    outer: int
    inner: int


@dataclass(frozen=True)
class LiteralEntry:
    """A literal that enters a region. It has no layout."""

    outer: Literal


@dataclass(frozen=True)
class Carry:
    """A loop carry: its values on entry outside and inside, after an iteration, and after the loop."""

    operation: int
    outer: Atom
    inner: int
    inner_next: Atom
    outer_result: int


@dataclass(frozen=True)
class StackedResult:
    """A result of each iteration, and all of them stacked."""

    operation: int
    inner_next: Atom
    outer_result: int


@dataclass(frozen=True)
class LoopStep:
    """A `scan` or `while`: loop constants, loop carries, stacked operands (`slices`) and stacked results (`stacks`)."""

    eqn: Any
    constants: tuple[Entry | LiteralEntry, ...]
    carries: tuple[Carry, ...]
    slices: tuple[Entry | LiteralEntry, ...]
    stacks: tuple[StackedResult, ...]
    body: Block
    condition: Block | None = None


@dataclass(frozen=True)
class BranchStep:
    """A `cond`: the operands and the block of each branch; `joins` merge the branches' results."""

    eqn: Any
    selector: Atom
    select_operation: int
    entries: tuple[tuple[Entry | LiteralEntry, ...], ...]
    blocks: tuple[Block, ...]
    joins: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BarrierStep:
    """An `optimization_barrier`: values computed from these after it must not be merged (CSE) with those before it."""

    eqn: Any
    values: tuple[int, ...]


Step = OpStep | LoopStep | BranchStep | BarrierStep


@dataclass(frozen=True)
class Block:
    """Steps in program order, and the values the block ends with."""

    steps: tuple[Step, ...]
    outputs: tuple[Atom, ...]


@dataclass(frozen=True)
class Traced:
    """A traced function: the program, how to run it, and how to get from pytrees to flat arrays and back.

    `paths` has every flat argument's path; `constants` are the arrays that the function closes over. `custom_vjp` is the
    source line of the first `custom_vjp` call, "" if there is none. `masks` has, per (operation, operand), the masks of padded
    elements, and `cuts`, per operation, the padded factors that it sees without padding (`autoshard.annotating.padding`).
    """

    program: Program
    block: Block
    argument_values: tuple[int, ...]
    constant_values: tuple[int, ...]
    constants: tuple[Any, ...]
    in_tree: Any
    out_tree: Any
    paths: tuple[str, ...]
    result_paths: tuple[str, ...]
    literal_results: tuple[Atom, ...]
    custom_vjp: str = ""
    masks: Mapping[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    cuts: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)
