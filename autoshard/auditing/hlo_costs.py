"""What a compiled program computes and moves, read from its HLO text: FLOPs of matmuls, bytes through HBM.

Loops multiply, which the compiler's own `cost_analysis` leaves out. A convolution, as which a TPU runs its matmuls, counts
the products that it really forms, without those with padding or with a planned program's rows of zeros. An instruction at
the top of a computation reads its operands and writes its results; where its layout says `S(1)` and the like, an array lies
in on-chip memory and costs no traffic. A fusion that only takes a slice of an operand reads the slice, and one that updates
a slice in place writes it. What collectives read and write is left out, as it is in a plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.auditing.hlo_parser import Instruction, Module, Scope, parse, shape_bytes, trip_count, tuple_parts
from autoshard.emitting.tpu_workarounds.vector_matmul import ROW_OF_ZEROS

_ARRAY = re.compile(r"\b([a-z]\w*\[[\d,<= ]*\])(\{[^{}]*\})?")
_ARRAY_AND_LAYOUT = re.compile(r"\b[a-z]\w*\[[\d,<= ]*\](?:\{[^{}]*\})?")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_SLICES = ("dynamic-slice", "slice", "gather")
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "optimization-barrier", "async-start", "async-done"),
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class CompiledCosts:
    """One run on one chip: FLOPs of matmuls, bytes through HBM without what collectives move, and whether every loop's
    length is known."""

    flops: float
    hbm_bytes: float
    counts_known: bool


def compiled_costs(text: str) -> CompiledCosts:
    """What one run of a compiled program costs.

    **Arguments:**

    - `text`: `compiled.as_text()`.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    flops = moved = 0.0
    known = True
    for scope, inst, count, certain in _executed(Scope(module.computations[module.entry]), module, 1, True):
        flops += count * sum(each for _, each in _matmuls(inst, scope, module))
        moved += count * _moved(inst, scope, module)
        known = known and certain
    return CompiledCosts(flops, moved, known)


def matmul_flops(text: str) -> dict[str, float]:
    """FLOPs of the matmuls of one run, loops multiplied, by the line of the user's code (`file.py:12`) they stem from.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    found: dict[str, float] = {}
    for scope, inst, count, _ in _executed(Scope(module.computations[module.entry]), module, 1, True):
        for matmul, flops in _matmuls(inst, scope, module):
            source = module.source(matmul) or module.source(inst)
            found[source] = found.get(source, 0.0) + count * flops
    return found


def flops_formed_again(text: str) -> dict[str, float]:
    """FLOPs, by source line, of the matmuls that another instruction forms from the same operands as well.

    A compiler does so where it would rather compute a matmul in each fusion that uses it than keep its result.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    found: dict[str, float] = {}
    formed: set[tuple] = set()
    for scope, inst, count, _ in _executed(Scope(module.computations[module.entry]), module, 1, True):
        for matmul, flops in _matmuls(inst, scope, module):
            source = module.source(matmul) or module.source(inst)
            key = (id(scope.computation), source, matmul.shape, flops, _reads(inst, matmul, module))
            if key in formed:
                found[source] = found.get(source, 0.0) + count * flops
            formed.add(key)
    return found


def _reads(inst: Instruction, matmul: Instruction, module: Module) -> frozenset[str] | None:
    """The operands of an instruction that a matmul in it, however deep in fusions, depends on; None if it holds no such."""
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


def _executed(scope: Scope, module: Module, count: int, known: bool) -> Iterator[tuple[Scope, Instruction, int, bool]]:
    """Every instruction at the top of a computation that runs, with how often; fusions are one instruction."""
    for inst in scope.computation.instructions.values():
        if inst.opcode == "while":
            rounds, certain = trip_count(inst, scope, module)
            body = Scope(module.computations[inst.attribute("body")], inst, scope)
            yield from _executed(body, module, count * rounds, known and certain)
        elif inst.opcode in ("call", "conditional", "async-start", "call-start"):
            for name in inst.called():
                if name in module.computations:
                    yield from _executed(Scope(module.computations[name], inst, scope), module, count, known)
        else:
            yield scope, inst, count, known


# --- FLOPs


def _matmuls(inst: Instruction, scope: Scope, module: Module) -> Iterator[tuple[Instruction, float]]:
    """The matmuls that an instruction is or, as a fusion, holds, with their FLOPs."""
    if inst.opcode == "fusion":
        inner = Scope(module.computations[inst.called()[0]], inst, scope)
        for each in inner.computation.instructions.values():
            yield from _matmuls(each, inner, module)
    elif inst.opcode == "dot":
        yield inst, _dot_flops(inst, scope)
    elif inst.opcode == "convolution":
        yield inst, _convolution_flops(inst, scope)
    elif inst.opcode == "custom-call" and "$gemm" in inst.structure:
        yield inst, _gemm_flops(inst, scope)


def _dot_flops(inst: Instruction, scope: Scope) -> float:
    left = scope.operand(inst.operands[0])
    sizes, made = _sizes(left.shape) if left else [], math.prod(_sizes(inst.shape))
    summed, batch = (
        math.prod(sizes[i] for i in _numbers(re.search(rf"lhs_{dims}_dims=\{{([\d,]*)\}}", inst.structure)))
        for dims in ("contracting", "batch")
    )
    rows = math.prod(sizes) // max(summed * batch, 1)
    columns = made // max(rows * batch, 1)
    return 2.0 * made * summed * _needed(inst, min(rows, columns))


def _needed(inst: Instruction, rows: int) -> float:
    """The part of a matmul that its program needs: half where one of two rows is of zeros, which a compiler may leave out."""
    return 0.5 if rows == 2 and f"/{ROW_OF_ZEROS}/" in inst.attributes else 1.0


def _gemm_flops(inst: Instruction, scope: Scope) -> float:
    """A GPU library's matmul: its result, or the first of its results, times what it sums over."""
    left = scope.operand(inst.operands[0])
    summed = _numbers(re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', inst.attributes))
    result = tuple_parts(inst.shape)[0] if inst.shape.startswith("(") else inst.shape
    sizes = _sizes(left.shape) if left else []
    return 2.0 * math.prod(_sizes(result)) * math.prod(sizes[i] for i in summed if i < len(sizes))


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
    return total * _needed(inst, min(result[labels[3].index(label)] for label in "bf"))


def _window(inst: Instruction, dimension: int) -> dict[str, list[int]]:
    found = _WINDOW.search(inst.structure)
    fields = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}
    each = {key: value.split("x")[dimension] for key, value in fields.items()}
    return {key: [int(number) for number in value.split("_")] for key, value in each.items()}


def _products(image: int, kernel: int, result: int, window: dict[str, list[int]]) -> int:
    """How many pairs of an image's and a kernel's element along one dimension meet."""
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


def _in_hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in HBM."""
    return sum(shape_bytes(array) for array, layout in _ARRAY.findall(shape) if "S(" not in layout)


def _moved(inst: Instruction, scope: Scope, module: Module) -> float:
    opcode = inst.opcode
    if opcode in _FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in _COLLECTIVES:
        return 0.0
    if opcode in ("copy-start", "slice-start"):
        # `copy-start` gives (result, operand, context), `slice-start` ((operand), result, context).
        written = _ARRAY_AND_LAYOUT.findall(inst.shape)[1 if opcode == "slice-start" else 0]
        source = scope.operand(inst.operands[0])
        read = shape_bytes(written) if source is not None and _in_hbm(source.shape) else 0
        return _in_hbm(written) + read
    if opcode == "fusion":
        return _fusion_bytes(inst, scope, module)
    operands = [scope.operand(name) for name in inst.operands]
    if opcode in _SLICES:
        return 2.0 * _in_hbm(inst.shape)
    if opcode == "dynamic-update-slice":
        return 2.0 * (_in_hbm(operands[1].shape) if operands[1] else 0)
    return _in_hbm(inst.shape) + sum(_in_hbm(each.shape) for each in operands if each)


def _fusion_bytes(inst: Instruction, scope: Scope, module: Module) -> float:
    inner = module.computations[inst.called()[0]]
    total = 0.0
    for each in inner.instructions.values():
        if each.opcode == "parameter":
            outer = scope.operand(inst.operands[int(each.arguments)])
            if outer is not None and _in_hbm(outer.shape):
                total += _read(each, Scope(inner, inst, scope), module)
    roots = [inner.instructions[inner.root]]
    if roots[0].opcode == "tuple":
        roots = [inner.instructions[name] for name in roots[0].operands if name in inner.instructions]
    shapes = [array + layout for array, layout in _ARRAY.findall(inst.shape)]
    for root, shape in zip(roots, shapes, strict=False):
        if _in_hbm(shape):
            total += _written(root, Scope(inner, inst, scope), module)
    return total


def _read(array: Instruction, scope: Scope, module: Module) -> float:
    """Bytes of an operand of a fusion that are read: all, or the slices that are taken; none of what is updated in place.

    Fusions hold fusions: an operand is followed into them, and out again where one only writes it in another shape.
    """
    total = 0.0
    for user in scope.computation.instructions.values():
        if array.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(user, scope, module)
        elif user.opcode == "fusion":
            within = Scope(module.computations[user.called()[0]], user, scope)
            mine = [i for i, name in enumerate(user.operands) if name == array.name]
            inside = [each for each in within.computation.instructions.values() if each.opcode == "parameter"]
            total += sum(_read(each, within, module) for each in inside if int(each.arguments) in mine)
        elif user.opcode in _SLICES and user.operands[0] == array.name:
            total += shape_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != array.name:
            return shape_bytes(array.shape)
    if array.name == scope.computation.root:
        outer = scope.parent
        followed = outer is not None and outer.caller is not None and outer.caller.opcode == "fusion"
        total += _read(scope.caller, outer, module) if followed and scope.caller and outer else shape_bytes(array.shape)
    return min(total, shape_bytes(array.shape))


def _written(root: Instruction, scope: Scope, module: Module) -> float:
    while root.opcode == "bitcast" and (origin := scope.operand(root.operands[0])):
        root = origin
    if root.opcode == "fusion":
        within = module.computations[root.called()[0]]
        return _written(within.instructions[within.root], Scope(within, root, scope), module)
    update = scope.operand(root.operands[1]) if root.opcode == "dynamic-update-slice" else None
    return shape_bytes(update.shape) if update else shape_bytes(root.shape)
