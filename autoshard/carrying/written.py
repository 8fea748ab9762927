"""Constraints as source: the lines to add, in words and as a patch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import unified_diff
from os.path import basename, relpath
from pathlib import Path

from autoshard.carrying.statements import Statement, statement_at
from autoshard.planning.carriage import Constraint
from search.formulation.layouts import Layout

CALL = "jax.lax.with_sharding_constraint"


def spec_source(layout: Layout, name: str = "P") -> str:
    """A layout as the source of a `PartitionSpec`."""
    entries = [None if not axes else axes[0] if len(axes) == 1 else axes for axes in layout.dims]
    while entries and entries[-1] is None:
        entries.pop()
    return f"{name}({', '.join('None' if each is None else _quoted(each) for each in entries)})"


def _quoted(axes: str | tuple[str, ...]) -> str:
    return f'"{axes}"' if isinstance(axes, str) else f"({', '.join(map(_quoted, axes))})"


def line_of(constraint: Constraint) -> str:
    """Where a constraint belongs: `model.py:12, x`, or the value in words if no statement has it."""
    array = f"{constraint.dtype}[{','.join(map(str, constraint.shape))}]"
    if constraint.line:
        what = constraint.variable or "the returned value"
        return f"{basename(constraint.path)}:{constraint.line}, {what}: {array}"
    where = constraint.source + (f", called from {constraint.caller}" if constraint.caller else "")
    read = "the result of" if constraint.made else "where it reads"
    return f"{where}, {read} {constraint.name}: {array}"


def calls_of(constraint: Constraint, value: str, spec: str = "P") -> str:
    """A value within the calls that constrain it, the innermost call first to run."""
    for layout in constraint.layouts:
        value = f"{CALL}({value}, {spec_source(layout, spec)})"
    return value


def patch(constraints: Iterable[Constraint], root: Path) -> str:
    """The constraints whose value a statement has, as a patch of their files for `git apply` in `root`.

    Assignments get a line after them, returned expressions are wrapped. A bare `PartitionSpec` needs a mesh in context:
    run the function under `jax.set_mesh(plan.make_mesh())`.
    """
    files: dict[str, list[Constraint]] = {}
    for each in constraints:
        if each.line:
            files.setdefault(each.path, []).append(each)
    return "".join(_of_file(path, each, root) for path, each in sorted(files.items()))


def _of_file(path: str, constraints: Sequence[Constraint], root: Path) -> str:
    before = Path(path).read_text("utf-8").splitlines(keepends=True)
    after = list(before)
    for each in sorted(constraints, key=lambda each: -each.line):
        found = statement_at(path, each.line)
        if found is not None:
            _edit(after, found, each)
    if not any(line.split("#")[0].strip() == "import jax" for line in after):
        at = next(
            (i for i, line in enumerate(after) if line.startswith(("import ", "from ")) and "__future__" not in line), 0
        )
        after.insert(at, "import jax\n")
    name = Path(relpath(path, root)).as_posix()
    return "".join(unified_diff(before, after, f"a/{name}", f"b/{name}"))


def _edit(lines: list[str], statement: Statement, constraint: Constraint) -> None:
    """Adds a constraint to the lines of a file."""
    indent, spec = " " * statement.indent, "jax.sharding.PartitionSpec"
    if statement.variable:
        lines.insert(
            statement.last, f"{indent}{statement.variable} = {calls_of(constraint, statement.variable, spec)}\n"
        )
        return
    first, last = statement.first - 1, statement.last - 1
    whole = "".join(lines[first : last + 1]).strip()
    value = whole.removeprefix("return").strip()
    lines[first : last + 1] = [f"{indent}value = {value}\n", f"{indent}return {calls_of(constraint, 'value', spec)}\n"]
