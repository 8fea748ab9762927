"""The FLOPs of matmuls and the bytes through HBM of a compiled program, read from its HLO text.

Loops multiply, which the compiler's own `cost_analysis` leaves out. A TPU runs its matmuls as convolutions. A
convolution counts the products that it really forms, without those with padding or with a planned program's rows of
zeros. A matmul of grouped rows is a custom call, and counts as the compiler estimates it. An instruction at the top of
a computation reads its operands and writes its results. If its layout says `S(1)` and the like, an array is in on-chip
memory and costs no traffic. A fusion that only takes a slice of an operand reads the slice, and one that updates a slice
in place writes it. So a scatter, which reads the rows too: the compiler keeps its array in place, and copies it before by an
instruction of its own if the old contents are used later. Reads and writes of collectives are left out, as in a plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.auditing.hlo_parser import (
    Instruction,
    Module,
    Scope,
    parse,
    shape_bytes,
    trip_count,
    tuple_parts,
)
from autoshard.emitting.tpu_workarounds.query_rows import ROWS_OF_ZEROS
from autoshard.emitting.tpu_workarounds.vector_matmul import ROW_OF_ZEROS

_ARRAY = re.compile(r"\b([a-z]\w*\[[\d,<= ]*\])(\{[^{}]*\})?")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_SOME_ROWS = re.compile("/" + ROWS_OF_ZEROS.format(r"(\d+)", r"(\d+)") + "/")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_STARTED_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "dynamic-update-slice-start": 1, "scatter": 2}
"""The instructions that write a part of their first operand in place, and which of their operands is written there."""
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier", "async-start", "async-done"),
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class CompiledCosts:
    """One run on one chip: FLOPs of matmuls, HBM bytes without collectives, whether all loops' lengths are known."""

    flops: float
    hbm_bytes: float
    counts_known: bool


def compiled_costs(text: str) -> CompiledCosts:
    """Costs of one run of a compiled program.

    **Arguments:**

    - `text`: `compiled.as_text()`.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    flops = moved = 0.0
    known = True
    for scope, inst, count, certain in executed_instructions(Scope(module.computations[module.entry]), module, 1, True):
        flops += count * sum(each for _, each in matmuls_in(inst, scope, module))
        moved += count * moved_bytes(inst, scope, module)
        known = known and certain
    return CompiledCosts(flops, moved, known)


def matmul_flops(text: str) -> dict[str, float]:
    """FLOPs of the matmuls of one run, loops multiplied, by the source line (`file.py:12`) that they stem from.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    found: dict[str, float] = {}
    for scope, inst, count, _ in executed_instructions(Scope(module.computations[module.entry]), module, 1, True):
        for matmul, flops in matmuls_in(inst, scope, module):
            source = module.source(matmul) or module.source(inst)
            found[source] = found.get(source, 0.0) + count * flops
    return found


def flops_formed_again(text: str) -> dict[str, float]:
    """FLOPs, by source line, of the matmuls that another instruction forms from the same operands, too.

    A compiler does so if it prefers to compute a matmul in each fusion that uses it over keeping its result.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    found: dict[str, float] = {}
    formed: set[tuple] = set()
    for scope, inst, count, _ in executed_instructions(Scope(module.computations[module.entry]), module, 1, True):
        for matmul, flops in matmuls_in(inst, scope, module):
            source = module.source(matmul) or module.source(inst)
            key = (scope.computation.name, source, matmul.shape, flops, _reads(inst, matmul, module))
            if key in formed:
                found[source] = found.get(source, 0.0) + count * flops
            formed.add(key)
    return found


def _reads(inst: Instruction, matmul: Instruction, module: Module) -> frozenset[str] | None:
    """The operands of an instruction on which a matmul in it depends, at any depth of fusions.

    None if it holds no matmul.
    """
    if inst is matmul:
        return frozenset(inst.operands)
    if inst.opcode != "fusion":
        return None
    inner = module.computations[inst.called()[0]].instructions
    first = next((read for each in inner.values() if (read := _reads(each, matmul, module)) is not None), None)
    if first is None:
        return None
    found, waiting = set[str](), list(first)
    while waiting:
        each = inner[waiting.pop()]
        if each.opcode == "parameter":
            found.add(inst.operands[int(each.arguments)])
        waiting += each.operands
    return frozenset(found)


def executed_instructions(
    scope: Scope, module: Module, count: int, known: bool
) -> Iterator[tuple[Scope, Instruction, int, bool]]:
    """Every instruction at the top of a computation that runs, with its executions; fusions are one instruction."""
    for inst in scope.computation.instructions.values():
        if inst.opcode == "while":
            rounds, certain = trip_count(inst, scope, module)
            body = Scope(module.computations[inst.attribute("body")], inst, scope)
            yield from executed_instructions(body, module, count * rounds, known and certain)
        elif inst.opcode in ("call", "conditional", "async-start", "call-start"):
            for name in module.runs(inst):
                yield from executed_instructions(Scope(module.computations[name], inst, scope), module, count, known)
        else:
            yield scope, inst, count, known


# --- FLOPs


def matmuls_in(inst: Instruction, scope: Scope, module: Module) -> Iterator[tuple[Instruction, float]]:
    """The matmuls that an instruction is or, as a fusion, holds, with their FLOPs."""
    if inst.opcode == "fusion":
        inner = Scope(module.computations[inst.called()[0]], inst, scope)
        for each in inner.computation.instructions.values():
            yield from matmuls_in(each, inner, module)
    elif inst.opcode == "dot":
        yield inst, _dot_flops(inst, scope)
    elif inst.opcode == "convolution":
        yield inst, _convolution_flops(inst, scope)
    elif inst.opcode == "custom-call" and "$gemm" in inst.structure:
        yield inst, _gemm_flops(inst, scope)
    elif inst.opcode == "custom-call" and "ragged_dot_tiling" in inst.attributes:
        yield inst, estimated_flops(inst)


def _dot_flops(inst: Instruction, scope: Scope) -> float:
    left = scope.operand(inst.operands[0])
    sizes, made = _sizes(left.shape) if left else [], math.prod(_sizes(inst.shape))
    summed, batch = (
        math.prod(sizes[i] for i in _numbers(re.search(rf"lhs_{dims}_dims=\{{([\d,]*)\}}", inst.structure)))
        for dims in ("contracting", "batch")
    )
    rows = math.prod(sizes) // max(summed * batch, 1)
    columns = made // max(rows * batch, 1)
    return 2.0 * made * summed * _needed_part(inst, min(rows, columns))


def _needed_part(inst: Instruction, rows: int) -> float:
    """The part of a matmul that its program needs, without rows of zeros, which a compiler may leave out."""
    if found := _SOME_ROWS.search(inst.attributes):
        needed, padded = (int(each) for each in found.groups())
        return needed / padded if rows == padded else 1.0
    return 0.5 if rows == 2 and f"/{ROW_OF_ZEROS}/" in inst.attributes else 1.0


def _gemm_flops(inst: Instruction, scope: Scope) -> float:
    """A GPU library's matmul: its result, or the first of its results, times what it sums over."""
    left = scope.operand(inst.operands[0])
    summed = _numbers(re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', inst.attributes))
    result = tuple_parts(inst.shape)[0] if inst.shape.startswith("(") else inst.shape
    sizes = _sizes(left.shape) if left else []
    return 2.0 * math.prod(_sizes(result)) * math.prod(sizes[i] for i in summed if i < len(sizes))


def estimated_flops(inst: Instruction) -> float:
    """The estimate that a kernel carries, 0 if it has none: a matmul of grouped rows, of all its rows with one matrix each."""
    found = _ESTIMATE.search(inst.attributes)
    return float(found[1]) if found else 0.0


def _convolution_flops(inst: Instruction, scope: Scope) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", inst.structure)
    operands = [scope.operand(name) for name in inst.operands]
    if labels is None or len(operands) != 2 or operands[0] is None or operands[1] is None:
        return 0.0
    image, kernel, result = _sizes(operands[0].shape), _sizes(operands[1].shape), _sizes(inst.shape)
    batch_and_features = math.prod(result[labels[3].index(label)] for label in "bf")
    total = 2.0 * batch_and_features * kernel[labels[2].index("i")]
    for at in (label for label in labels[3] if label.isdigit()):
        across = (image[labels[1].index(at)], kernel[labels[2].index(at)], result[labels[3].index(at)])
        total *= _products(*across, _window(inst, int(at)))
    return total * _needed_part(inst, min(result[labels[3].index(label)] for label in "bf"))


def _window(inst: Instruction, dimension: int) -> dict[str, list[int]]:
    found = _WINDOW.search(inst.structure)
    fields = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}
    each = {key: value.split("x")[dimension] for key, value in fields.items()}
    return {key: [int(number) for number in value.split("_")] for key, value in each.items()}


def _products(image: int, kernel: int, result: int, window: dict[str, list[int]]) -> int:
    """The number of meeting pairs of an image's and a kernel's elements along one dimension."""
    stride, low = window.get("stride", [1])[0], window.get("pad", [0, 0])[0]
    spread, apart = window.get("lhs_dilate", [1])[0], window.get("rhs_dilate", [1])[0]
    last, met = (image - 1) * spread, 0
    for k in range(kernel):
        first = k * apart - low
        met += sum(0 <= (at := first + out * stride) <= last and at % spread == 0 for out in range(result))
    return met


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,<= ]*)\]", shape)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _numbers(found: re.Match[str] | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


# --- Bytes


def hbm_shape_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape that are in HBM."""
    return sum(shape_bytes(array) for array, layout in _ARRAY.findall(shape) if "S(" not in layout)


def moved_bytes(inst: Instruction, scope: Scope, module: Module) -> float:
    """Bytes through HBM of one run of an instruction: its reads and its writes there."""
    return sum(read_bytes(inst, scope, module).values()) + _written_bytes(inst, scope, module)


def _moves_nothing(inst: Instruction) -> bool:
    """Whether an instruction has no traffic of its own; bytes of collectives count as communication."""
    opcode = inst.opcode
    return opcode in _FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in _COLLECTIVES


def read_bytes(inst: Instruction, scope: Scope, module: Module) -> dict[str, float]:
    """Bytes that one run of an instruction reads from HBM, by operand."""
    if _moves_nothing(inst):
        return {}
    operands = {name: found for name in inst.operands if (found := scope.operand(name)) is not None}
    if inst.opcode in _STARTED_COPIES:
        source = operands.get(inst.operands[0])
        return {source.name: shape_bytes(_copy_result(inst))} if source and hbm_shape_bytes(source.shape) else {}
    if inst.opcode == "fusion":
        return _fusion_reads(inst, scope, module)
    if inst.opcode in _SLICES:
        source = operands.get(inst.operands[0])
        return {source.name: float(shape_bytes(inst.shape))} if source and hbm_shape_bytes(source.shape) else {}
    if inst.opcode in _UPDATES:
        update = written_operand(inst, scope)
        given = {update.name: float(hbm_shape_bytes(update.shape))} if update else {}
        return given | ({inst.operands[0]: _read_rows(inst, scope)} if inst.opcode == "scatter" else {})
    return {name: float(hbm_shape_bytes(found.shape)) for name, found in operands.items()}


def _written_bytes(inst: Instruction, scope: Scope, module: Module) -> float:
    if _moves_nothing(inst):
        return 0.0
    if inst.opcode in _STARTED_COPIES:
        return hbm_shape_bytes(_copy_result(inst))
    if inst.opcode == "fusion":
        return _fusion_writes(inst, scope, module)
    if inst.opcode in _UPDATES:
        update = written_operand(inst, scope)
        target = scope.operand(inst.operands[0])
        return float(shape_bytes(update.shape)) if update and target and hbm_shape_bytes(target.shape) else 0.0
    return float(hbm_shape_bytes(inst.shape))


def _copy_result(inst: Instruction) -> str:
    """The result of an asynchronous copy: of `copy-start` (result, operand, ...), of the others ((operands), result, ...)."""
    return tuple_parts(inst.shape)[0 if inst.opcode == "copy-start" else 1]


def _fusion_reads(inst: Instruction, scope: Scope, module: Module) -> dict[str, float]:
    inner = module.computations[inst.called()[0]]
    found: dict[str, float] = {}
    for each in inner.instructions.values():
        if each.opcode == "parameter":
            name = inst.operands[int(each.arguments)]
            outer = scope.operand(name)
            if outer is not None and hbm_shape_bytes(outer.shape):
                found[name] = found.get(name, 0.0) + _fusion_read_bytes(each, Scope(inner, inst, scope), module)
    return found


def _fusion_writes(inst: Instruction, scope: Scope, module: Module) -> float:
    inner = module.computations[inst.called()[0]]
    roots = [inner.instructions[inner.root]]
    if roots[0].opcode == "tuple":
        roots = [inner.instructions[name] for name in roots[0].operands if name in inner.instructions]
    shapes = [array + layout for array, layout in _ARRAY.findall(inst.shape)]
    written = ((root, shape) for root, shape in zip(roots, shapes, strict=False) if hbm_shape_bytes(shape))
    return sum(_fusion_write_bytes(root, Scope(inner, inst, scope), module) for root, _ in written)


def _fusion_read_bytes(array: Instruction, scope: Scope, module: Module) -> float:
    """Bytes of an operand that a fusion reads: all, or the slices that it takes; none of an operand updated in place.

    Fusions hold fusions: an operand is followed into them, and out again if one only writes it in another shape.
    """
    total = 0.0
    for user in scope.computation.instructions.values():
        if array.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _fusion_read_bytes(user, scope, module)
        elif user.opcode == "fusion":
            within = Scope(module.computations[user.called()[0]], user, scope)
            mine = [i for i, name in enumerate(user.operands) if name == array.name]
            inside = [each for each in within.computation.instructions.values() if each.opcode == "parameter"]
            total += sum(_fusion_read_bytes(each, within, module) for each in inside if int(each.arguments) in mine)
        elif user.opcode in _SLICES and user.operands[0] == array.name:
            total += shape_bytes(user.shape)
        elif user.opcode not in _UPDATES or user.operands[0] != array.name:
            return shape_bytes(array.shape)
        elif user.opcode == "scatter":
            total += _read_rows(user, scope)
    if array.name == scope.computation.root:
        outer = scope.parent
        followed = outer is not None and outer.caller is not None and outer.caller.opcode == "fusion"
        total += (
            _fusion_read_bytes(scope.caller, outer, module)
            if followed and scope.caller and outer
            else shape_bytes(array.shape)
        )
    return min(total, shape_bytes(array.shape))


def _fusion_write_bytes(root: Instruction, scope: Scope, module: Module) -> float:
    while root.opcode == "bitcast" and (origin := scope.operand(root.operands[0])):
        root = origin
    if root.opcode == "fusion":
        within = module.computations[root.called()[0]]
        return _fusion_write_bytes(within.instructions[within.root], Scope(within, root, scope), module)
    update = written_operand(root, scope)
    return shape_bytes(update.shape) if update else shape_bytes(root.shape)


def written_operand(inst: Instruction, scope: Scope) -> Instruction | None:
    """The operand that an instruction writes into its first one, in place; None for instructions that do not."""
    at = _UPDATES.get(inst.opcode)
    if at is None or (inst.opcode == "scatter" and len(inst.operands) != 3):  # of several arrays at once
        return None
    return scope.operand(inst.operands[at])


def _read_rows(scatter: Instruction, scope: Scope) -> float:
    """Bytes of the rows that a scatter changes, which it reads before; at most those of the array."""
    update, target = written_operand(scatter, scope), scope.operand(scatter.operands[0])
    whole = float(hbm_shape_bytes(target.shape)) if target else 0.0
    return min(float(shape_bytes(update.shape)), whole) if update else whole
