"""Statements of source files whose value is one value of the program, so that a line after them can constrain it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from autoshard.tracing.blocks import Block, BranchStep, LoopStep, OpStep
from autoshard.tracing.source_lines import lines_of
from costmodels.program.program import Program

Line = tuple[str, int]
"""A file and a line of it."""


@dataclass(frozen=True)
class Statement:
    """A statement `variable = ...`, or `return ...` with no variable: its first and last line, from 1, and indentation."""

    variable: str
    first: int
    last: int
    indent: int


def statement_at(path: str, line: int) -> Statement | None:
    """The assignment to one name, or the return, that spans a line; None for any other statement and unreadable files."""
    return _statements(path).get(line)


@lru_cache(maxsize=64)
def _statements(path: str) -> Mapping[int, Statement]:
    try:
        tree = ast.parse(Path(path).read_text("utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[int, Statement] = {}
    for node in ast.walk(tree):
        variable = _variable(node)
        if variable is not None and isinstance(node, ast.stmt):
            last = node.end_lineno or node.lineno
            statement = Statement(variable, node.lineno, last, node.col_offset)
            found |= dict.fromkeys(range(node.lineno, last + 1), statement)
    return found


def _variable(node: ast.AST) -> str | None:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return name
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Tuple | ast.Constant):
            return ""
    return None


class Frames:
    """The operations below every line of the user's source, to tell which values a line's statement has."""

    def __init__(self, program: Program, block: Block) -> None:
        self.program = program
        self.lines: dict[int, tuple[Line, ...]] = {}
        self.below: dict[Line, set[int]] = {}
        for step in operations(block):
            self.lines[step.operation] = tuple(lines_of(step.written))
            for line in self.lines[step.operation]:
                self.below.setdefault(line, set()).add(step.operation)

    def statement(self, values: Sequence[int]) -> tuple[Line, Statement] | None:
        """The innermost statement that has these values and no others; None if there is none."""
        first = self.program.producers[values[0]][0]
        for line in self.lines.get(first, ()):
            found = statement_at(*line)
            if found is not None and self.leaving(line) == set(values):
                return line, found
        return None

    def leaving(self, line: Line) -> set[int]:
        """The values that operations below a line make and others read."""
        inside, program = self.below[line], self.program
        made = {use.value for at in inside for use in program.operations[at].outputs}
        return {value for value in made if any(at not in inside for at, _ in program.consumers.get(value, ()))}


def operations(block: Block) -> Iterator[OpStep]:
    """The operations of a block, at any depth."""
    for step in block.steps:
        if isinstance(step, OpStep):
            yield step
        elif isinstance(step, LoopStep):
            for inner in (step.condition, step.body):
                yield from operations(inner) if inner else ()
        elif isinstance(step, BranchStep):
            for inner in step.blocks:
                yield from operations(inner)
