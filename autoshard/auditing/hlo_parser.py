"""Compiled HLO text as computations of instructions, with the loops' trip counts.

The parser reads only the parts that an audit needs: names, shapes, opcodes, operands, and the rest of each
line as text. The grammar is XLA's `HloModule::ToString` as host, TPU and GPU compilers print it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autoshard.tracing.loops.trip_counts import MIRRORED, NEGATED, trips_until
from costmodels.program.grouped import OVERFLOW

# `%name = shape opcode(`: a shape holds no ` word(`, so the shortest match ends at the opcode.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_BARE_ENTRY = re.compile(r"(ENTRY )?%?([\w.\-]+) \{\s*$")
_OPERAND = re.compile(r"%?([A-Za-z_][\w.\-]*)\s*(?:,|$)")
_PARENTHESIS = re.compile(r"[()]")
_ANNOTATIONS = re.compile(r", (?:frontend_attributes|metadata|backend_config)=")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_UNKNOWN_CYCLES = 2**63 - 1
"""The cycles that libtpu 0.0.50 writes for a scatter on the sparse cores of a v5p, of which it has no estimate."""
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_TRIP_COUNT = re.compile(r"known_trip_count\W+n\W+(\d+)")
_TABLE_ROW = re.compile(r"(\d+) (.*)")

_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
"""The folder of autoshard's own code, which holds no user lines."""
_NARROW_BITS = {"pred": 8, "token": 0, "opaque": 0}
_TRANSPARENT = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "broadcast", "optimization-barrier"}
_CALLERS = {"call", "fusion", "conditional", "custom-call", "async-start", "call-start", "fusion-start"}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _OPERAND.findall(self.arguments)

    @property
    def structure(self) -> str:
        """The attributes of the instruction's operation, without its annotations."""
        cut = _ANNOTATIONS.search(self.attributes)
        return self.attributes[: cut.start()] if cut else self.attributes

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate of one run, in cycles of the core; None if it has none."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found and int(found[1]) != _UNKNOWN_CYCLES else None

    def attribute(self, key: str) -> str:
        """The word after `key=`, or "" if there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.structure)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """The computations that run once when this instruction runs (a loop's are not)."""
        if self.opcode not in _CALLERS:
            return []
        regions = " ".join(_CALLED.findall(self.structure))
        return re.findall(r"[\w.\-]+", regions.replace("%", " "))


@dataclass(frozen=True, slots=True, eq=False)
class Computation:
    """A named list of instructions; `root` is the name of the one whose value it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclass(frozen=True, slots=True)
class Module:
    """A compiled program. `sources` maps a stack frame to `file.py:12`."""

    computations: dict[str, Computation]
    entry: str
    sources: dict[str, str]

    def source(self, inst: Instruction) -> str:
        """The user's source line `file.py:12` that an instruction stems from, "" if the compiler kept none."""
        if frame := re.search(r"\bstack_frame_id=(\d+)", inst.attributes):
            return self.sources.get(frame[1], "")
        found = re.search(r'source_file="([^"]*)" source_line=(\d+)', inst.attributes)
        return f"{os.path.basename(found[1])}:{found[2]}" if found and not found[1].startswith(_OWN_FOLDER) else ""

    def runs(self, inst: Instruction) -> list[str]:
        """The computations that an instruction calls, without a branch for an overflow, which a planned step does not take."""
        found = [name for name in inst.called() if name in self.computations]
        if inst.opcode != "conditional":
            return found
        return [name for name in found if not self.is_for_overflow(name)]

    @property
    def overflow_paths(self) -> int:
        """The number of conditionals with a branch for an overflow."""
        instructions = (inst for each in self.computations.values() for inst in each.instructions.values())
        return sum(inst.opcode == "conditional" and self.runs(inst) != inst.called() for inst in instructions)

    def is_for_overflow(self, name: str) -> bool:
        """Whether a computation is the path for rows that do not fit into their buffers."""
        return any(OVERFLOW in inst.attributes for inst in self.computations[name].instructions.values())


@dataclass(frozen=True, slots=True)
class Scope:
    """A computation together with the instruction that runs it, and that instruction's own scope."""

    computation: Computation
    caller: Instruction | None = None
    parent: Scope | None = None

    def operand(self, name: str) -> Instruction | None:
        return self.computation.instructions.get(name)

    def enclosing(self) -> Iterator[Scope]:
        """This scope, its caller's, and so on outwards to the entry."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


def parse(text: str) -> Module:
    """Reads the text of a compiled program (`compiled.as_text()`).

    **Raises:** `ValueError` when the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[str, str]] = {}
    entry, root, table = "", "", {}
    body: dict[str, Instruction] | None = None
    name = last = ""
    for line in text.splitlines():
        if body is None:
            header = _COMPUTATION.match(line) or _BARE_ENTRY.match(line)
            if header:
                name, root, body = header[2], "", {}
                entry = name if header[1] else entry
            elif row := _TABLE_ROW.match(line):
                table[row[1]] = row[2]
            elif line and line[0].isalpha():
                table = tables.setdefault(line.strip(), {})
        elif line.startswith("}") and not line.startswith("}}"):
            computations[name] = Computation(name, body, root or next(reversed(body), ""))
            body = None
        elif found := _INSTRUCTION.match(line):
            end = _find_closing(line, found.end())
            last = found[2]
            body[last] = Instruction(last, found[3], found[4], line[found.end() : end], line[end + 1 :])
            root = last if found[1] else root
        elif last in body:  # the metadata of a kernel has lines of its own
            body[last] = dataclasses.replace(body[last], attributes=body[last].attributes + line)
    if entry not in computations:
        raise ValueError(
            "This is not the text of a compiled program: it holds no ENTRY computation. "
            "Pass what `jax.jit(fn).lower(*args).compile().as_text()` returns."
        )
    return Module(computations, entry, _sources(tables))


def _find_closing(line: str, start: int) -> int:
    depth = 1
    for found in _PARENTHESIS.finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(line)


def _sources(tables: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    paths = {key: row.strip('"') for key, row in tables.get("FileNames", {}).items()}
    files = {key: os.path.basename(path) for key, path in paths.items() if not path.startswith(_OWN_FOLDER)}
    places = {}
    for key, row in tables.get("FileLocations", {}).items():
        file, line = re.search(r"file_name_id=(\d+)", row), re.search(r"\bline=(\d+)", row)
        if file and line and file[1] in files:
            places[key] = f"{files[file[1]]}:{line[1]}"
    frames = {}
    for key, row in tables.get("StackFrames", {}).items():
        place = re.search(r"file_location_id=(\d+)", row)
        frames[key] = places.get(place[1], "") if place else ""
    return frames


@functools.lru_cache(maxsize=64)
def users(computation: Computation) -> dict[str, list[Instruction]]:
    """The instructions of a computation that use each of its values."""
    found: dict[str, list[Instruction]] = {}
    for inst in computation.instructions.values():
        for name in dict.fromkeys(inst.operands):
            found.setdefault(name, []).append(inst)
    return found


@functools.lru_cache(maxsize=4096)
def shape_bytes(shape: str) -> int:
    """Unpadded bytes of a shape: `bf16[4,8]{1,0:T(8,128)}` takes 64; a tuple's parts are added."""
    bits = 0
    for dtype, sizes in _ARRAY.findall(shape):
        elements = math.prod(int(size) for size in re.findall(r"\d+", sizes))
        bits += elements * _dtype_bits(dtype)
    return (bits + 7) // 8


def parts_bytes(shape: str) -> tuple[int, ...]:
    """The bytes of each array of a shape."""
    return tuple(shape_bytes(found[0]) for found in _ARRAY.finditer(shape))


def shape_dtype(shape: str) -> str:
    """The element type of an array shape, or of the first array of a tuple."""
    found = _ARRAY.search(shape)
    return found[1] if found else ""


def tuple_parts(shape: str) -> list[str]:
    """The shapes in a tuple's shape, `(f32[2], (s32[], u32[]))`, one level down."""
    inside, depth, start, parts = shape[1:-1], 0, 0, []
    for found in re.finditer(r"[(){}\[\],]", inside):
        if found[0] == "," and depth == 0:
            parts.append(inside[start : found.start()])
            start = found.end()
        depth += (found[0] in "({[") - (found[0] in ")}]")
    return [*parts, inside[start:]]


def _dtype_bits(dtype: str) -> int:
    if dtype in _NARROW_BITS:
        return _NARROW_BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)  # bf16, s4, f8e4m3fn, c64 (both parts together)
    return int(found[1]) if found else 0


def follow(
    name: str, scope: Scope, module: Module, index: int | None = None
) -> tuple[Instruction | None, int | None, Scope]:
    """The origin of a value, seen through copies, tuples, fusions and calls, up to the enclosing loop.

    **Returns:** (instruction, tuple index or None, scope). The instruction is a `parameter` when
    the value is carried by the loop whose region `scope` is; None if the name is not known.
    """
    while (found := scope.operand(name)) is not None:
        if found.opcode in _TRANSPARENT:
            name = found.operands[0]
        elif found.opcode in ("fusion", "call") and (called := found.called()):
            scope = Scope(module.computations[called[0]], found, scope)
            name = scope.computation.root
        elif found.opcode == "get-tuple-element" and index is None:
            name, index = found.operands[0], int(found.attribute("index"))
        elif found.opcode == "tuple" and index is not None:
            name, index = found.operands[index], None
        elif found.opcode == "parameter" and scope.parent and scope.caller and scope.caller.opcode != "while":
            name, scope = scope.caller.operands[_position(found, scope.caller, scope)], scope.parent
        else:
            break
    return found, index, scope


def _position(parameter: Instruction, caller: Instruction, scope: Scope) -> int:
    """The caller's operand that a parameter is.

    A conditional's first operand chooses, then comes one for each branch.
    """
    if caller.opcode == "conditional":
        return caller.called().index(scope.computation.name) + 1
    return int(parameter.arguments)


def _constant(name: str, scope: Scope, module: Module, index: int | None = None) -> int | None:
    """The integer that a value always is, also if an outer loop carries it unchanged."""
    found, index, scope = follow(name, scope, module, index)
    if found is None:
        return None
    if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.arguments):
        return int(found.arguments)
    if found.opcode == "parameter" and index is not None and scope.parent and scope.caller:
        body = Scope(module.computations[scope.caller.attribute("body")], scope.caller, scope.parent)
        kept, kept_index, _ = follow(body.computation.root, body, module, index)
        if kept is not None and kept.opcode == "parameter" and kept_index == index:
            return _constant(scope.caller.operands[0], scope.parent, module, index)
    return None


def _step(index: int, body: Scope, module: Module) -> int | None:
    """The increase of carried value `index` in one iteration of a loop."""
    found, _, scope = follow(body.computation.root, body, module, index)
    if found is None or found.opcode not in ("add", "subtract"):
        return None
    left, right = found.operands
    _, carried, _ = follow(left, scope, module)
    if carried != index:
        left, right = right, left
    change = _constant(right, scope, module)
    return -change if change is not None and found.opcode == "subtract" else change


def trip_count(loop: Instruction, scope: Scope, module: Module) -> tuple[int, bool]:
    """The trip count of a `while`, and whether it is certain.

    From `known_trip_count` if the compiler wrote it; else from a comparison in the condition of `i + c` with `n`, and
    the start and the step of `i`: for `<` $\\lceil (n - c - i_0) / \\mathrm{step} \\rceil$. With other conditions it
    is an upper bound.
    """
    if known := _TRIP_COUNT.search(loop.attributes):
        return int(known[1]), True
    condition = Scope(module.computations[loop.attribute("condition")], loop, scope)
    tests = list(_terms(condition.computation.root, condition, module, True))
    found = [_trip_count(*test, condition, loop, scope, module) for test in tests]
    known = [each for each in found if each is not None]
    rounds, certain = min(known, key=lambda each: (not each[1], each[0]), default=(1, False))
    return rounds, certain and len(tests) == 1


def _terms(name: str, scope: Scope, module: Module, holds: bool) -> Iterator[tuple[Instruction | None, Scope, bool]]:
    """The terms of a condition that must all hold for it to be `holds`, each with its scope and its required value."""
    test, _, where = follow(name, scope, module)
    if test is not None and test.opcode == ("and" if holds else "or"):
        for operand in test.operands:
            yield from _terms(operand, where, module, holds)
    elif test is not None and test.opcode == "not":
        yield from _terms(test.operands[0], where, module, not holds)
    else:
        yield test, where, holds


def _trip_count(
    test: Instruction | None,
    where: Scope,
    holds: bool,
    condition: Scope,
    loop: Instruction,
    scope: Scope,
    module: Module,
) -> tuple[int, bool] | None:
    """The number of iterations that a comparison of a counter with a constant allows, and whether it is certain."""
    if test is None or test.opcode != "compare":
        return None
    body = Scope(module.computations[loop.attribute("body")], loop, scope)
    how = test.attribute("direction").lower()
    how = how if holds else NEGATED[how]
    left, right = test.operands
    for side, end, way in ((left, right, how), (right, left, MIRRORED[how])):
        index, offset = _counter(side, where, condition, module)
        bound = _constant(end, where, module)
        if index is None or bound is None:
            continue
        bound -= offset
        start, step = _constant(loop.operands[0], scope, module, index), _step(index, body, module)
        if start is None or not step:
            return max(bound, 1), False
        count = trips_until(way, start, step, bound)
        return None if count is None else (count, True)
    return None


def _counter(name: str, scope: Scope, condition: Scope, module: Module) -> tuple[int | None, int]:
    """The carried value that a side of a comparison is (None if it is not one), and the constant added to it."""
    found, index, at = follow(name, scope, module)
    if found is None:
        return None, 0
    if found.opcode in ("add", "subtract"):
        for counter, other in (found.operands, found.operands[::-1]):
            change = _constant(other, at, module)
            index, offset = _counter(counter, at, condition, module) if change is not None else (None, 0)
            if change is not None and index is not None and (found.opcode == "add" or counter == found.operands[0]):
                return index, offset + (change if found.opcode == "add" else -change)
        return None, 0
    carried = found.opcode == "parameter" and at.computation is condition.computation
    return (index if carried else None), 0
