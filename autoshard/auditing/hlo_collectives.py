"""The collectives of a compiled program, read from its HLO text.

Every spelling of a collective becomes one `CompiledCollective`: the plain instruction, the `-start` of an asynchronous
pair (its `-done` is not counted again), a combined instruction with a tuple of operands, the TPU's fusions that hold
an all-reduce and the slice that makes it a reduce-scatter, the TPU's chains of fusions that spread one collective over
several matmuls, and calls handed to another core. Loops multiply: `count` is the executions of the collective in one
run of the program.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoshard.auditing.hlo_parser import (
    Instruction,
    Module,
    Scope,
    follow,
    parse,
    parts_bytes,
    shape_bytes,
    shape_dtype,
    trip_count,
    tuple_parts,
    users,
)

COLLECTIVE_KINDS = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
}
_REDUCTIONS = {"maximum": "max", "minimum": "min"}
_RESHAPING = {"bitcast", "copy", "pad", "reshape", "slice", "transpose"}
_VIEWS = (_RESHAPING - {"pad"}) | {"convert"}
_GROUPS = re.compile(
    r"\b(replica_groups|source_target_pairs)="
    r"(\{(?:\{[\d,\s]*\},?\s*)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|@?mesh[\[<].*?\{[^}]*\})"
)
_MESH = re.compile(r"@?mesh[\[<](?P<axes>[^\]>]*)[\]>](?:, device_ids=\((?P<ids>.*)\))? ?\{(?P<grouped>[^}]*)\}$")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclass(frozen=True)
class CompiledCollective:
    """One collective of a compiled program.

    `bytes` is per chip and per execution, of unpadded arrays: the gathered result of an all-gather, the un-reduced
    operand of a reduce-scatter or all-reduce, the local operand of an all-to-all or collective-permute. It is in the
    type that is sent (`dtype`), which need not be the type that was written: the host compiler reduces bf16 as f32.

    - `kind`: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "collective-permute".
    - `axes`: the mesh axes it runs over, in mesh order; None if its `groups` are not a set of axes.
    - `count`: executions in one run. All branches of a conditional count, but not one for an overflow.
    - `op_name`, `source`: the JAX operation and `file.py:12` that it stems from, "" if the compiler kept neither.
    - `spelling`: its form in the program: the opcode, e.g. "all-gather-start", or "combined 2" (one instruction for
      two arrays), "tuple" (an all-to-all in pieces), "all-reduce-scatter fusion", "async collective fusion",
      "reduce-scatter realignment" (a permute of the rows that padding left with a neighbour), "gather by all-reduce",
      "scatter by all-reduce", "windowed einsum".
    - `reduction`: "add", "max", ... of a reduce-scatter or all-reduce.
    - `count_known`: False if a loop's length could not be read, and `count` is a guess: its bound, or once.
    - `groups`: the replica groups or source-target pairs as the program spells them.
    - `parts`: the bytes of each array if it combines several.
    - `only_sliced`: an all-gather of which the program uses only slices: a reshard for which the partitioner
      has no other way (it warns of an "involuntary full rematerialization").
    """

    kind: str
    axes: tuple[str, ...] | None
    bytes: int
    count: int
    op_name: str
    source: str
    asynchronous: bool
    spelling: str
    reduction: str = ""
    count_known: bool = True
    dtype: str = ""
    groups: str = ""
    only_sliced: bool = False
    parts: tuple[int, ...] = ()


def collectives(text: str, mesh_axes: Mapping[str, int]) -> tuple[CompiledCollective, ...]:
    """The collectives of a compiled program, in program order.

    **Arguments:**

    - `text`: `compiled.as_text()`.
    - `mesh_axes`: axis name to size, in the order of the mesh; device numbers in the text are positions in
      `mesh.devices.flat`.

    **Raises:** `ValueError` when the text is not a compiled program.
    """
    module = parse(text)
    mesh = tuple(mesh_axes.items())
    found: list[CompiledCollective] = []
    started: set[tuple[str, ...]] = set()
    continued: dict[tuple[str, ...], CompiledCollective] = {}
    for site in _executed_sites(module):
        read = read_collective(site, module, mesh)
        if (chain := chain_of(site)) is None:
            found.append(read)
            continue
        read = dataclasses.replace(read, asynchronous=True, spelling="async collective fusion")
        if starts_chain(site):
            started.add(chain)
            found.append(read)
        else:
            continued.setdefault(chain, read)
    return (*found, *(read for chain, read in continued.items() if chain not in started))


def estimated_cycles(text: str) -> int | None:
    """Core cycles of one run by the TPU compiler's own estimates, loops multiplied; None if there are none.

    Collectives carry no estimate, nor does what the compiler cannot estimate. Of a conditional the costliest branch is counted.
    """
    if '"estimated_cycles"' not in text:
        return None
    module = parse(text)
    return _cycles(Scope(module.computations[module.entry]), module)


def _cycles(scope: Scope, module: Module) -> int:
    total = 0
    for inst in scope.computation.instructions.values():
        total += inst.cycles or 0
        if inst.opcode == "while":
            rounds, _ = trip_count(inst, scope, module)
            total += rounds * sum(_cycles(inner, module) for inner in _regions(inst, scope, module))
        elif inst.opcode != "fusion":
            inner = [_cycles(inner, module) for inner in _regions(inst, scope, module)]
            total += max(inner, default=0) if inst.opcode == "conditional" else sum(inner)
    return total


def _regions(inst: Instruction, scope: Scope, module: Module) -> list[Scope]:
    names = [inst.attribute("body"), inst.attribute("condition")] if inst.opcode == "while" else module.runs(inst)
    return [Scope(module.computations[name], inst, scope) for name in names if name in module.computations]


@dataclass(frozen=True, slots=True)
class Site:
    """An instruction at its place in the program."""

    instruction: Instruction
    scope: Scope
    count: int
    count_known: bool


def _executed_sites(module: Module) -> Iterator[Site]:
    """Every collective that a run executes, once per place."""

    def walk(scope: Scope, count: int, known: bool) -> Iterator[Site]:
        for inst in scope.computation.instructions.values():
            if inst.opcode.removesuffix("-start") in COLLECTIVE_KINDS:
                yield Site(inst, scope, count, known)
            elif regions := _regions(inst, scope, module):
                rounds, certain = trip_count(inst, scope, module) if inst.opcode == "while" else (1, True)
                for region in regions:
                    yield from walk(region, count * rounds, known and certain)

    return walk(Scope(module.computations[module.entry]), 1, True)


def read_collective(site: Site, module: Module, mesh: tuple[tuple[str, int], ...]) -> CompiledCollective:
    inst, scope = site.instruction, site.scope
    written = inst.opcode.removesuffix("-start")
    kind = "reduce-scatter" if _is_scatter_fusion(scope) and written == "all-reduce" else COLLECTIVE_KINDS[written]
    groups = found[2] if (found := _GROUPS.search(inst.structure)) else "{}"
    shape, spelling = _measured_shape(inst, scope, kind), _lowering(site, kind, module)
    return CompiledCollective(
        kind=kind,
        axes=_axes(groups, kind == "collective-permute", mesh),
        bytes=shape_bytes(shape),
        count=site.count,
        op_name=_annotation(site, module, op_name_of),
        source=_annotation(site, module, module.source),
        asynchronous=any(each.endswith("-start") for each in _opcodes(site)),
        spelling=spelling,
        reduction=_reduction(inst, module),
        count_known=site.count_known,
        dtype=shape_dtype(shape),
        groups=groups,
        only_sliced=kind == "all-gather" and _is_only_sliced(inst.name, scope, module),
        parts=parts_bytes(shape) if spelling.startswith("combined") else (),
    )


def _opcodes(site: Site) -> list[str]:
    """The collective's own opcode and those of the instructions that run it, innermost first."""
    callers = (scope.caller.opcode for scope in site.scope.enclosing() if scope.caller)
    return [site.instruction.opcode, *callers]


def _is_scatter_fusion(scope: Scope) -> bool:
    """Whether this is the TPU's reduce-scatter: a custom fusion of an all-reduce and the slice that a chip keeps."""
    caller = scope.caller
    if caller is None or caller.opcode != "fusion" or "kind=kCustom" not in caller.attributes:
        return False
    return "all-reduce-scatter" in scope.computation.name or "AllReduceScatter" in caller.attributes


def _measured_shape(inst: Instruction, scope: Scope, kind: str) -> str:
    """The shapes whose bytes are counted: of the result of a gather, of the operands of all others."""
    if kind == "all-gather":
        return tuple_parts(inst.shape)[1] if inst.opcode.endswith("-start") else inst.shape
    operands = [
        _operand_before_padding(name, scope) if kind == "reduce-scatter" else scope.operand(name)
        for name in inst.operands
    ]
    return " ".join(operand.shape for operand in operands if operand)


def _operand_before_padding(name: str, scope: Scope) -> Instruction | None:
    """The operand before padding; a fusion pads the array that it scatters to whole tiles."""
    inst = scope.operand(name)
    while inst and inst.opcode in ("bitcast", "copy", "pad") and (origin := scope.operand(inst.operands[0])):
        inst = origin
    return inst


def _is_only_sliced(name: str, scope: Scope, module: Module) -> bool:
    """Whether only slices of a value are used, seen through views, fusions and asynchronous pairs."""
    found = users(scope.computation).get(name, [])
    return bool(found) and all(_slices(each, name, scope, module) for each in found)


def _slices(user: Instruction, name: str, scope: Scope, module: Module) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode in _VIEWS or user.opcode.endswith("-done"):
        return _is_only_sliced(user.name, scope, module)
    if user.opcode == "fusion":
        inner = Scope(module.computations[user.called()[0]], user, scope)
        taken = (inst for inst in inner.computation.instructions.values() if inst.opcode == "parameter")
        return all(
            _is_only_sliced(inst.name, inner, module) for inst in taken if user.operands[int(inst.arguments)] == name
        )
    return False


def _lowering(site: Site, kind: str, module: Module) -> str:
    inst, scope = site.instruction, site.scope
    if any("windowed_dot_general" in each.computation.name for each in scope.enclosing()):
        return "windowed einsum"
    if kind == "reduce-scatter" and inst.opcode == "all-reduce":
        return "all-reduce-scatter fusion"
    if kind == "collective-permute" and _realigns(inst, scope, module):
        return "reduce-scatter realignment"
    if kind == "all-reduce" and len(inst.operands) == 1 and (disguised := _disguise(site, module)):
        return disguised
    if len(inst.operands) > 1 and inst.opcode != "ragged-all-to-all":
        return "tuple" if kind == "all-to-all" else f"combined {len(inst.operands)}"
    return next((each for each in _opcodes(site) if each.endswith("-start")), inst.opcode)


def _disguise(site: Site, module: Module) -> str:
    """The collective for which an all-reduce stands: a gather of blocks among zeros, or a scatter that is sliced later."""
    inst, scope = site.instruction, site.scope
    written, _, where = follow(inst.operands[0], scope, module)
    if written and written.opcode == "dynamic-update-slice":
        ground, _, _ = follow(written.operands[0], where, module)
        if ground and ground.opcode == "constant" and re.fullmatch(r"-?0(\.0*)?|false", ground.arguments):
            return "gather by all-reduce"
    return "scatter by all-reduce" if _annotation(site, module, op_name_of).endswith("reduce_scatter") else ""


def _realigns(inst: Instruction, scope: Scope, module: Module) -> bool:
    """Whether a permute only moves rows that a padded all-reduce-scatter fusion left with the neighbour."""
    origin = scope.operand(inst.operands[0]) if inst.operands else None
    while origin and origin.opcode in _RESHAPING:
        origin = scope.operand(origin.operands[0])
    return origin is not None and any(_is_scatter_fusion(inner) for inner in _regions(origin, scope, module))


def chain_of(site: Site) -> tuple[str, ...] | None:
    """The key of a collective that is spread over a chain of fusions; None for all others."""
    if '"async_collective_fusion_config"' not in site.instruction.attributes or site.scope.parent is None:
        return None
    labels = re.findall(r'\b(?:channel_id=\d+|chain_id="[^"]*")', site.instruction.attributes)
    return (site.scope.parent.computation.name, *labels)


def starts_chain(site: Site) -> bool:
    """Whether this part of such a chain starts it."""
    others = site.scope.computation.instructions.values()
    return any("AsyncCollectiveStart" in each.attributes and site.instruction.name in each.operands for each in others)


def _reduction(inst: Instruction, module: Module) -> str:
    reducer = module.computations.get(inst.attribute("to_apply"))
    root = reducer.instructions.get(reducer.root) if reducer else None
    while reducer and root and root.opcode in ("bitcast", "convert", "copy"):
        root = reducer.instructions.get(root.operands[0])
    return _REDUCTIONS.get(root.opcode, root.opcode) if root else ""


def _annotation(site: Site, module: Module, of: Callable[[Instruction], str]) -> str:
    """The collective's own metadata, else that of the fusion or call around it, else that of its reducer."""
    reducer = module.computations.get(site.instruction.attribute("to_apply"))
    caller = site.scope.caller if site.scope.caller and site.scope.caller.opcode != "while" else None
    candidates = (site.instruction, caller, *(reducer.instructions.values() if reducer else ()))
    return next((text for each in candidates if each and (text := of(each))), "")


def op_name_of(inst: Instruction) -> str:
    found = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', inst.attributes)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else ""


# Replica groups. With the mesh row-major over its axes, a device number is a coordinate on each axis. A collective
# over some axes has one group for every choice of the other coordinates, and in it all devices that share that choice.


@functools.lru_cache(maxsize=4096)
def _axes(groups: str, pairs: bool, mesh: tuple[tuple[str, int], ...]) -> tuple[str, ...] | None:
    """The axes whose coordinates vary in a group, when each group holds all of their combinations (or is a pair)."""
    sizes = [size for _, size in mesh]
    coordinates = list(itertools.product(*(range(size) for size in sizes)))
    members = groups_of(groups, len(coordinates))
    if any(not 0 <= device < len(coordinates) for group in members for device in group):
        return None
    varying = [
        any(len({coordinates[device][axis] for device in group}) > 1 for group in members) for axis in range(len(sizes))
    ]
    together = math.prod(itertools.compress(sizes, varying))
    if not pairs and any(len(set(group)) != together for group in members):
        return None
    return tuple(name for (name, _), varies in zip(mesh, varying, strict=True) if varies)


@functools.lru_cache(maxsize=4096)
def groups_of(groups: str, devices: int) -> list[list[int]]:
    """Replica groups, or source and target pairs, as lists of device numbers, from any of their spellings.

    **Arguments:**

    - `groups`: as in `CompiledCollective.groups`; `{}` is one group of all devices.
    - `devices`: the number of devices of the program.
    """
    if named := _MESH.match(groups):
        return _mesh_groups(named["axes"], named["ids"], named["grouped"])
    if (iota := _IOTA.fullmatch(groups)) and iota[2]:
        return _chunks(_iota(iota[2], iota[3]), _numbers(iota[1])[-1])
    listed = [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", groups)]
    return listed or [list(range(devices))]


def _mesh_groups(axes: str, ids: str | None, grouped: str) -> list[list[int]]:
    """`mesh['a'=4,'b'=2] {'a':(2)2,'b'}`: each axis is cut where a sub-axis `(before)size` begins and ends."""
    sub_axes = re.findall(r"([^',:\s]+)'?(?::\((\d+)\)(\d+))?(?=,|$)", grouped)
    sizes: list[int] = []
    inside: list[bool] = []
    for name, size in re.findall(r"([^',=\s]+)'?=(\d+)", axes):
        spans = [
            (int(before or 1), int(before or 1) * int(part or size)) for each, before, part in sub_axes if each == name
        ]
        cuts = sorted({1, int(size), *itertools.chain.from_iterable(spans)})
        for low, high in itertools.pairwise(cuts):
            sizes.append(high // low)
            inside.append(any(first <= low and high <= last for first, last in spans))
    order = sorted(range(len(sizes)), key=lambda axis: inside[axis])
    devices = _transpose_sizes(sizes, order)
    if ids:
        numbering = _iota(iota[1], iota[3]) if (iota := _IOTA.fullmatch(ids)) else _numbers(ids)
        devices = [numbering[device] for device in devices]
    return _chunks(devices, math.prod(itertools.compress(sizes, inside)))


def _iota(sizes: str, order: str | None) -> list[int]:
    """`[4,16]T(1,0)`: 0, 1, 2, ... in this shape, transposed, then read out."""
    shape = _numbers(sizes)
    return _transpose_sizes(shape, _numbers(order) if order else range(len(shape)))


def _transpose_sizes(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    steps = [range(0, sizes[axis] * strides[axis], strides[axis]) for axis in order]
    return [sum(offsets) for offsets in itertools.product(*steps)]


def _chunks(devices: list[int], size: int) -> list[list[int]]:
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
