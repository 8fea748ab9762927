"""The places at which a constraint can hold the partitioner to the plan.

| place | layout |
|---|---|
| a loop carry | the planned one, in the loop |
| the result of a matmul, a gather or another operation with HBM traffic | the planned one, after its reduction |
| a value that the plan reshards | the ones before and after the reshard, where it is made or read |
| ... by several collectives | also those between them: the partitioner may gather the whole array to reshard it at once |

All values of one source line with one planned layout are one place, such as those of unrolled layers: a line of source
constrains them all. Elementwise operations are left out: the partitioner, too, gives them the layouts of their operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from os.path import basename

from autoshard._util.paths import star_numbers
from autoshard.carrying.statements import Frames, Line
from autoshard.planning.carriage import Constraint
from autoshard.tracing.blocks import Traced
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice, kept_layout, moves, produced_layout
from search.formulation.layouts import Layout
from search.formulation.reshard import reshard_table


@dataclass(frozen=True)
class Place:
    """A possible constraint, the lines of its operation's frames, and the source lines that read its values."""

    constraint: Constraint
    lines: tuple[Line, ...]
    readers: tuple[str, ...]


def places(traced: Traced, choice: Choice, topology: Topology) -> tuple[Place, ...]:
    """All places of a program, in its order."""
    frames = Frames(traced.program, traced.block)
    groups: dict[object, list[Place]] = {}
    for place in _places(traced.program, choice, topology, frames):
        given = place.constraint
        key = (place.lines, given.layouts, given.made, star_numbers(given.name), given.shape, given.dtype)
        groups.setdefault(key, []).append(place)
    return tuple(_together(alike, frames) for alike in groups.values())


def _together(alike: Sequence[Place], frames: Frames) -> Place:
    """The places of one line as one, with the statement whose value it is."""
    values = tuple(dict.fromkeys(value for each in alike for value in each.constraint.values))
    readers = tuple(reader for each in alike for reader in each.readers)
    constraint = replace(alike[0].constraint, values=values)
    found = frames.statement(values) if constraint.made else None
    if found is not None:
        (path, _), statement = found
        constraint = replace(constraint, path=path, line=statement.first, variable=statement.variable)
    return replace(alike[0], constraint=constraint, readers=readers)


def _places(program: Program, choice: Choice, topology: Topology, frames: Frames) -> Iterator[Place]:
    moved: dict[int, dict[Layout, list[int]]] = {}
    for move in moves(program, choice):
        if not move.target.partial and move.operation is not None:
            moved.setdefault(move.value, {}).setdefault(move.target, []).append(move.operation)
    for value, (operation, _) in sorted(program.producers.items()):
        made, home = (layout(program, choice, value) for layout in (produced_layout, kept_layout))
        op = program.operations[operation]
        readers = tuple(at for at, _ in program.consumers.get(value, ()))
        if prod(program.values[value].shape) < _LEAST or not readers:
            continue
        carried = op.primitive == "loop_carry" and program.values[value].region != op.region
        if not home.partial and (carried or op.op_class in ("matmul", "memory") or made != home):
            layouts = (made, *between(program, topology, value, made, home), home)
            yield _place(program, frames, value, layouts, operation, True, readers)
        for target, uses in moved.get(value, {}).items():
            if home.partial:
                yield _place(program, frames, value, (target,), operation, True, readers)
            else:
                layouts = (home, *between(program, topology, value, home, target), target)
                for use in dict.fromkeys(uses):
                    yield _place(program, frames, value, layouts, use, False, (use,))


def between(program: Program, topology: Topology, value: int, source: Layout, target: Layout) -> list[Layout]:
    """The layouts between the collectives of a reshard, without partial sums; none if it is one collective or a slice."""
    array = program.values[value]
    if source == target or 0 in array.shape:
        return []
    table = reshard_table(array.shape, array.itemsize, topology, bool(source.partial or target.partial))
    steps = table.path(source, target)
    pairs = pairwise(steps)
    return [one.target for one, other in pairs if "slice" not in (one.kind, other.kind) and not one.target.partial]


_LEAST = 2
"""The least number of elements of an array that is worth a constraint."""


def _place(
    program: Program,
    frames: Frames,
    value: int,
    layouts: Sequence[Layout],
    operation: int,
    made: bool,
    readers: Sequence[int],
) -> Place:
    array, op = program.values[value], program.operations[operation]
    lines = frames.lines.get(operation, ())
    source = op.source or _of_region(program, value)
    callers = (f"{basename(path)}:{line}" for path, line in lines)
    caller = next((line for line in callers if line != source), "")
    name = array.name.partition(" (")[0] if array.origin is None else program.values[array.origin].name
    whole = tuple(dict.fromkeys(each for each in layouts if not each.partial))
    constraint = Constraint((value,), whole, source, caller, made, name, array.shape, array.dtype)
    return Place(constraint, lines, tuple(dict.fromkeys(program.operations[at].source for at in readers)))


def _of_region(program: Program, value: int) -> str:
    """The line of the loop that carries a value, or of the first operation that reads it."""
    region = program.regions[program.values[value].region].name
    if "(" in region:
        return region.rpartition("(")[2].rstrip(")")
    sources = (program.operations[at].source for at, _ in program.consumers.get(value, ()))
    return next((source for source in sources if source), "")
