"""The arguments and results of a compiled program on each chip: their bytes, shared memory, and the floor of a step.

The floor has the bytes of arguments that a run must read, and of results that it must write, each once. Loops carry
arguments, and update them in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.auditing.hlo_costs import executed_instructions, hbm_shape_bytes, read_bytes, written_operand
from autoshard.auditing.hlo_parser import Instruction, Module, Scope, follow, parse, shape_bytes, tuple_parts

_ALIASED = re.compile(r"\{([\d, ]*)\}: \((\d+), \{[^}]*\}, (?:may|must)-alias\)")


@dataclass(frozen=True)
class CompiledArguments:
    """Bytes of each argument and result on one chip, in order, without the padding of tiles.

    `aliased_bytes` are those of arguments that results overwrite.
    """

    argument_bytes: tuple[int, ...]
    result_bytes: tuple[int, ...]
    aliased_bytes: int


def read_arguments(text: str) -> CompiledArguments:
    """The arguments and results of a compiled program.

    **Arguments:**

    - `text`: `compiled.as_text()`.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    entry = module.computations[module.entry].instructions
    parameters = {int(each.arguments): shape_bytes(each.shape) for each in entry.values() if each.opcode == "parameter"}
    overwritten = set(_overwritten(text).values())
    return CompiledArguments(
        tuple(parameters[number] for number in sorted(parameters)),
        tuple(map(shape_bytes, _results(module))),
        sum(parameters[number] for number in overwritten if number in parameters),
    )


def _overwritten(text: str) -> dict[int, int]:
    """Per result the argument that it overwrites, by number."""
    found = _ALIASED.findall(text.partition("\n")[0])
    return {int(result or 0): int(argument) for result, argument in found if "," not in result}


def _results(module: Module) -> list[str]:
    """The shapes of the results."""
    entry = module.computations[module.entry]
    result = entry.instructions[entry.root].shape
    return ([] if result == "()" else tuple_parts(result)) if result.startswith("(") else [result]


# --- the floor


def floor_bytes(text: str, module: Module) -> float:
    """The bytes that one run moves through HBM at least: arguments that it reads and results that it writes, each once.

    Of an argument of which only slices are read (a row of an embedding, a layer of a stack), those slices count, up to
    the whole of it; of a result in the place of an argument, the slices that are updated. Results in place of which
    something else is written than slices count nothing.
    """
    entry = module.computations[module.entry]
    sizes = {each.name: shape_bytes(each.shape) for each in entry.instructions.values() if each.opcode == "parameter"}
    read: dict[str, float] = {}
    written: dict[str, float] = {}
    for scope, inst, count, _ in executed_instructions(Scope(entry), module, 1, True):
        for name, bytes in read_bytes(inst, scope, module).items():
            _add(read, _argument(name, scope, module), count * bytes)
        for target, bytes in _updates(inst, scope, module):
            _add(written, target, count * bytes)
    overwriting = _overwritten(text)
    taken = {name for name in sizes if int(entry.instructions[name].arguments) in overwriting.values()}
    moved = [*read.items(), *((name, bytes) for name, bytes in written.items() if name in taken)]
    whole = sum(hbm_shape_bytes(shape) for k, shape in enumerate(_results(module)) if k not in overwriting)
    return whole + sum(min(bytes, sizes[name]) for name, bytes in moved)


def _add(total: dict[str, float], name: str | None, bytes: float) -> None:
    if name is not None:
        total[name] = total.get(name, 0.0) + bytes


def _updates(inst: Instruction, scope: Scope, module: Module) -> Iterator[tuple[str | None, float]]:
    """The arguments that an instruction updates in place in HBM, and the bytes that it writes there."""
    if inst.opcode not in ("fusion", "dynamic-update-slice", "scatter"):
        return
    parts = tuple_parts(inst.shape) if inst.shape.startswith("(") else [inst.shape]
    for k, shape in enumerate(parts):
        found, _, where = follow(inst.name, scope, module, k if len(parts) > 1 else None)
        if found is not None and (update := written_operand(found, where)) and hbm_shape_bytes(shape):
            yield _argument(found.operands[0], where, module), shape_bytes(update.shape)


def _argument(name: str, scope: Scope, module: Module, index: int | None = None) -> str | None:
    """The program's argument that a value is or updates in place, through loops that carry it; None for all others."""
    found, index, scope = _stored(name, scope, module, index)
    if found is None or found.opcode != "parameter":
        return None
    if scope.parent is None or scope.caller is None:
        return found.name if index is None else None
    if index is None or scope.caller.opcode != "while" or not _is_kept(scope.caller, index, scope.parent, module):
        return None
    return _argument(scope.caller.operands[0], scope.parent, module, index)


def _stored(name: str, scope: Scope, module: Module, index: int | None) -> tuple[Instruction | None, int | None, Scope]:
    """`follow`, also through updates in place and out of the loops inside the scope that keep an array."""
    found, index, scope = follow(name, scope, module, index)
    if found is not None and written_operand(found, scope) is not None:
        return _stored(found.operands[0], scope, module, None)
    if found is not None and found.opcode == "while" and index is not None and _is_kept(found, index, scope, module):
        return _stored(found.operands[0], scope, module, index)
    return found, index, scope


def _is_kept(loop: Instruction, index: int, scope: Scope, module: Module) -> bool:
    """Whether a loop carries an array unchanged or updates it in place."""
    body = Scope(module.computations[loop.attribute("body")], loop, scope)
    kept, at, where = _stored(body.computation.root, body, module, index)
    inside = kept is not None and kept.opcode == "parameter" and at == index
    return inside and where.computation is body.computation
