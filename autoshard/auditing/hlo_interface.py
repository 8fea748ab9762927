"""The arguments and results of a compiled program on each chip, and those that share memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoshard.auditing.hlo_parser import parse, shape_bytes, tuple_parts

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
    result = entry[module.computations[module.entry].root].shape
    parts = tuple_parts(result) if result.startswith("(") else [result]
    overwritten = {int(number) for _, number in _ALIASED.findall(text.partition("\n")[0])}
    return CompiledArguments(
        tuple(parameters[number] for number in sorted(parameters)),
        tuple(map(shape_bytes, parts)) if result != "()" else (),
        sum(parameters[number] for number in overwritten if number in parameters),
    )
