"""The traced program as nested blocks of steps: what emission walks.

`costmodels.program.Program` says what is costed and searched; a `Block` says how to run it. The two share their
numbering: a step names the operations and values of the program that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """One equation. `operands` are value indices or `Literal`s, in the equation's order; `results` value indices."""

    operation: int
    eqn: Any
    rule: Rule
    operands: tuple[Atom, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Boundary:
    """A value that crosses into, out of or round a region: the operation that owns its layout, outside and inside values.

    `outer` and `inner` are what goes in, `inner_next` and `outer_result` what comes back; `None` or -1 where there is none.
    """

    operation: int
    outer: Atom | None = None
    inner: int = -1
    inner_next: Atom | None = None
    outer_result: int = -1


@dataclass(frozen=True)
class LoopStep:
    """A `scan` or `while`: `constants` are fixed, `carries` go round, `slices` are cut from and `stacks` piled up."""

    eqn: Any
    constants: tuple[Boundary, ...]
    carries: tuple[Boundary, ...]
    slices: tuple[Boundary, ...]
    stacks: tuple[Boundary, ...]
    body: Block
    condition: Block | None = None


@dataclass(frozen=True)
class BranchStep:
    """A `cond`: per branch the operands that enter it and its block; `joins` bring the branches' results together."""

    eqn: Any
    selector: Atom
    select_operation: int
    entries: tuple[tuple[Boundary, ...], ...]
    blocks: tuple[Block, ...]
    joins: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BarrierStep:
    """What is made of these values from here on is not what was made of them before: an `optimization_barrier`."""

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

    `paths` names every flat argument in the user's words; `constants` are the arrays the function closes over. `custom_vjp` is
    the source line of the first `custom_vjp` call, "" if there is none.
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
