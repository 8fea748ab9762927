"""The checker's own account of arrays that a TPU makes beside operands and results (measured, `search.memory.tpu_temporaries`).

A sort of one array holds a copy of it and an index per element, a selection and a running sum hold a copy. So does what picks
or writes columns by several indices, beside a slice of a stack. What a
concatenation joins is an array until the kernel that joins it ends, unless reductions alone use the concatenation. What a
loop reads in a narrower type, but does not pile up, is converted whole before the outermost loop that does not change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod

from costmodels.machine.topology import Topology
from costmodels.operations import matrix_factors
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, kept_layout, needed_layout
from search.formulation.layouts import shards
from search.formulation.tpu_tiles import argument_tile

Holds = Iterator[tuple[int, int, float]]
"""The first and the last operation of an array's life, and its bytes on one chip."""


def temporaries(
    program: Program,
    topology: Topology,
    choice: Choice,
    maker: Mapping[int, int],
    readers: Mapping[int, Sequence[int]],
    is_fused: Callable[[int], bool],
    views: Collection[int],
    formed: Collection[int],
) -> Holds:
    """All arrays that a TPU makes beside operands and results, but for scores."""
    if topology.chip.kind == "tpu":
        yield from returning(program, topology, choice, maker)
        yield from sorting(program, topology, choice)
        yield from indexing(program, topology, choice, maker, readers)
        yield from stacking(program, topology, choice, maker, readers, is_fused, views)
        yield from converting(program, topology, choice, readers)
        yield from joining(program, topology, choice, readers, is_fused, formed)


def sorting(program: Program, topology: Topology, choice: Choice) -> Holds:
    """The arrays that sorts, selections and running sums make."""
    for at, op in enumerate(program.operations):
        alone = op.primitive == "sort" and len(op.inputs) == 1
        if alone or op.primitive == "top_k" or op.primitive[:3] == "cum":
            array = program.values[op.inputs[0].value]
            pieces = shards(needed_layout(program, choice, at, 0), topology.axis_sizes)
            held, elements = array.bytes / pieces, prod(array.shape) / pieces
            if held > topology.chip.on_chip_bytes:
                yield at, at, held + (4 * elements if alone else 0)


def indexing(
    program: Program,
    topology: Topology,
    choice: Choice,
    maker: Mapping[int, int],
    readers: Mapping[int, Sequence[int]],
) -> Holds:
    """The copies of arrays of which an operation picks or writes columns, in an order in which columns are together."""
    for at, op in enumerate(program.operations):
        if op.primitive != "gather" and not op.primitive.startswith("scatter"):
            continue
        picks = op.primitive == "gather"
        array, places, parts = op.inputs[0], op.inputs[1], (op.outputs[0] if picks else op.inputs[2])
        indices = {i for dim in places.dims[:-1] for i in dim}
        shown = {i for dim in parts.dims for i in dim}
        uncut = [k for k, dim in enumerate(array.dims) if dim and shown.issuperset(dim) and indices.isdisjoint(dim)]
        batched = any(not indices.isdisjoint(dim) for dim in array.dims)
        by_column = bool(array.dims and array.dims[-1]) and shown.isdisjoint(array.dims[-1])
        if not uncut or batched or not by_column or all(op.factors[i].size == 1 for i in indices):
            continue
        made_by = program.operations[maker[array.value]]
        own = made_by.op_class in ("matmul", "fused", "memory") and len(readers[array.value]) == 1
        value = program.values[array.value]
        cuts = needed_layout(program, choice, at, 0)
        held = value.bytes / shards(cuts, topology.axis_sizes)
        if held > topology.chip.on_chip_bytes and not (picks and own):
            lanes = -(-value.shape[uncut[-1]] // prod(topology.axis_sizes[axis] for axis in cuts.dims[uncut[-1]]))
            padded = -(-lanes // 128) * 128 / lanes
            yield at, at, held * (padded + 1 if made_by.primitive == "loop_slice" else padded)


def stacking(
    program: Program,
    topology: Topology,
    choice: Choice,
    maker: Mapping[int, int],
    readers: Mapping[int, Sequence[int]],
    is_fused: Callable[[int], bool],
    views: Collection[int],
) -> Holds:
    """The arrays that loops make of what they write into stacks in another memory order."""
    totals = _totals_of_rows(program)
    seen: set[tuple[int, int, int, int]] = set()
    for op in program.operations:
        piles = op.primitive == "loop_stack"
        writes = op.primitive == "dynamic_update_slice" or op.primitive in _SCATTERS
        in_loop = "loop" in {program.regions[each].kind for each in program.enclosing(op.region)}
        if not op.inputs or not (piles or (writes and in_loop)):
            continue
        part = op.inputs[0 if piles else 1 if op.primitive == "dynamic_update_slice" else 2].value
        at = maker[part]
        read = _read_by_kernel(program, maker, is_fused, part)
        turns = any(each for each in read.values())
        for value, order in read.items():
            made_by = program.operations[maker[value]]
            cut = made_by.primitive == "loop_slice" or _cuts_stack(program, made_by)
            alone = made_by.op_class == "matmul" and len(readers[value]) == 1
            copy = order == 2 or (order == 1 and not cut)
            arrays = int(copy and not alone and (piles or at in views)) + int(turns and cut)
            held, first = value, at
            if not arrays and piles and made_by.op_class == "matmul" and value in totals:
                stacked = all(program.operations[each].primitive == "loop_stack" for each in readers[part])
                arrays = 1 if stacked or program.values[part].bytes >= program.values[value].bytes else 2
                held, first = part, min(at, max(readers[value]))
            size = program.values[held].bytes / shards(kept_layout(program, choice, held), topology.axis_sizes)
            if arrays and size > topology.chip.on_chip_bytes and (held, arrays, first, at) not in seen:
                seen.add((held, arrays, first, at))
                yield first, at, arrays * size


_SCATTERS = ("scatter", *(f"scatter-{how}" for how in ("add", "sub", "mul", "min", "max")))


def _read_by_kernel(
    program: Program, maker: Mapping[int, int], is_fused: Callable[[int], bool], part: int
) -> dict[int, int]:
    """The arrays of a value's size of which a kernel makes it: 0 in their order, 1 with the last dimension last, else 2."""
    found: dict[int, int] = {}
    behind, known = [(part, 0)], {(part, 0)}
    while behind:
        value, order = behind.pop()
        op = program.operations[maker[value]]
        reduces = op.primitive.startswith(("reduce_", "arg"))
        if op.primitive == "loop_slice" or _cuts_stack(program, op) or reduces or not is_fused(maker[value]):
            found[value] = max(order, found.get(value, 0))
            continue
        if op.primitive == "transpose":
            before, after = (
                [i for dim in use.dims for i in dim if op.factors[i].size > 1] for use in (op.inputs[0], op.outputs[0])
            )
            ends = op.inputs[0].dims[-1] == op.outputs[0].dims[-1]
            order = max(order, 0 if before == after else 1 if ends else 2)
        for use in op.inputs:
            if (use.value, order) not in known and _count(program, use.value) == _count(program, value):
                known.add((use.value, order))
                behind.append((use.value, order))
    return found


def _totals_of_rows(program: Program) -> set[int]:
    """The values of whose last dimension alone a kernel makes one number."""
    found: set[int] = set()
    for op in reversed(program.operations):
        if op.op_class != "fused" or not op.inputs:
            continue
        made, given = op.outputs[0], op.inputs[0]
        if not op.primitive.startswith(("reduce_", "arg")):
            same = {use.value for use in op.inputs if _count(program, use.value) == _count(program, made.value)}
            found |= same if made.value in found else set()
            continue
        left = {i for dim in made.dims for i in dim}
        if [k for k, dim in enumerate(given.dims) if not left.issuperset(dim)] == [len(given.dims) - 1]:
            found.add(given.value)
    return found


def _count(program: Program, value: int) -> int:
    return prod(program.values[value].shape)


def returning(program: Program, topology: Topology, choice: Choice, maker: Mapping[int, int]) -> Holds:
    """The second arrays of results: products that a TPU writes in other tiles than those of an argument of their shape."""
    for at in program.results:
        for value in (use.value for use in program.operations[at].inputs):
            array, made_by = program.values[value], program.operations[maker[value]]
            groups = matrix_factors(made_by)
            if groups is None or groups.batch:
                continue
            dims = next(use.dims for use in made_by.outputs if use.value == value)
            cuts = needed_layout(program, choice, at, 0).dims
            pieces = [prod(topology.axis_sizes[axis] for axis in axes) for axes in cuts]
            local = [size // count for size, count in zip(array.shape, pieces, strict=True)]
            sides = [
                [i for i, dim in enumerate(dims) if set(dim) <= set(side)] for side in (groups.rows, groups.columns)
            ]
            held = array.itemsize * prod(local)
            if all(sides) and held > topology.chip.on_chip_bytes:
                tiles = {max(side, key=lambda i: (local[i], i)) for side in sides}
                if set(argument_tile(tuple(local), array.itemsize)) != tiles:
                    yield at, at, held


def joining(
    program: Program,
    topology: Topology,
    choice: Choice,
    readers: Mapping[int, Sequence[int]],
    is_fused: Callable[[int], bool],
    formed: Collection[int],
) -> Holds:
    """The operands of concatenations, where they are not arrays already, and products do not form them."""
    maker = {use.value: i for i, op in enumerate(program.operations) for use in op.outputs}
    ends = _kernel_ends(program, readers, is_fused)
    for at, op in enumerate(program.operations):
        pads = op.primitive == "pad" and is_fused(maker[op.inputs[0].value]) and _scatters(program, maker, op)
        joins = pads or op.primitive in ("concatenate", "stack")
        if not joins or not ends.get(at) or op.outputs[0].value in formed:
            continue
        if _turned(program, maker, is_fused, op):
            continue
        for value in {use.value for use in op.inputs}:
            made, last = maker[value], max(ends[at])
            fused = is_fused(made) and all(map(is_fused, readers[value]))
            if program.operations[made].op_class != "source" and (fused or last > at):
                held = program.values[value].bytes / shards(kept_layout(program, choice, value), topology.axis_sizes)
                yield (made if fused else at + 1), last, held


def _scatters(program: Program, maker: Mapping[int, int], op: Operation) -> bool:
    """Whether a scatter makes an operation's first operand."""
    return program.operations[maker[op.inputs[0].value]].primitive.startswith("scatter")


def _turned(program: Program, maker: Mapping[int, int], is_fused: Callable[[int], bool], join: Operation) -> bool:
    """Whether a join puts the two parts of one array together again, in either order; the array is in memory."""
    parts = {use.value: program.operations[maker[use.value]] for use in join.inputs}
    if len(join.inputs) != 2 or len(parts) != 2 or {op.primitive for op in parts.values()} != {"slice"}:
        return False
    first, second = (op.inputs[0].value for op in parts.values())
    if first != second or is_fused(maker[first]):
        return False
    return program.values[first].bytes == sum(program.values[part].bytes for part in parts)


def _kernel_ends(
    program: Program, readers: Mapping[int, Sequence[int]], is_fused: Callable[[int], bool]
) -> dict[int, set[int]]:
    """Each operation to the operations that end the kernels of which it is part; none if all of these are reductions."""
    found: dict[int, set[int]] = {}
    for at in reversed(range(len(program.operations))):
        op = program.operations[at]
        after = {each for use in op.outputs for each in readers.get(use.value, ())}
        if op.op_class == "fused" and op.primitive.startswith(("reduce_", "arg")):
            found[at] = set()
        elif not after or not is_fused(at) or not all(map(is_fused, after)):
            found[at] = {at}
        else:
            found[at] = set().union(*(found[each] or {each} for each in after))
            if all(not found[each] for each in after):
                found[at] = set()
    return found


def converting(program: Program, topology: Topology, choice: Choice, readers: Mapping[int, Sequence[int]]) -> Holds:
    """The arrays that are converted before the loops that use them, or slices of them."""
    maker = {use.value: op for op in program.operations for use in op.outputs}
    seen: set[tuple[int, int, float]] = set()
    for value, itemsize in _narrowed(program, readers):
        crossed = _crossings(program, maker, value)
        if not crossed:
            continue
        part, array = crossed[-1]
        loop = program.values[part].region
        key = program.values[array].origin or array, loop, itemsize
        if key not in seen:
            seen.add(key)
            during = [i for i, each in enumerate(program.operations) if loop in program.enclosing(each.region)]
            pieces = shards(kept_layout(program, choice, part), topology.axis_sizes)
            yield min(during), max(during), itemsize * prod(program.values[array].shape) / pieces


def converted_before(program: Program, readers: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Each array that is converted before loops to the first operation of the first of them."""
    maker = {use.value: op for op in program.operations for use in op.outputs}
    found: dict[int, int] = {}
    for value, _ in _narrowed(program, readers):
        crossed = _crossings(program, maker, value)
        for part, array in crossed[-1:]:
            loop = program.values[part].region
            begins = next(i for i, op in enumerate(program.operations) if loop in program.enclosing(op.region))
            found[array] = min(begins, found.get(array, begins))
    return found


def _narrowed(program: Program, readers: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, float]]:
    """The values that loops cast to a narrower type or multiply in bfloat16, and the bytes of an element then."""
    exact = _read_exactly(program, readers)
    for op in program.operations:
        if "loop" in {program.regions[region].kind for region in program.enclosing(op.region)}:
            for k, use in enumerate(op.inputs):
                if _narrows(program, readers, op, k) and use.value not in exact:
                    yield use.value, 2.0 if k in op.rounded else program.values[op.outputs[0].value].itemsize


def _narrows(program: Program, readers: Mapping[int, Sequence[int]], op: Operation, operand: int) -> bool:
    """Whether an operation reads an operand in a narrower type, and does not pile it up."""
    if operand in op.rounded or op.primitive != "convert_element_type":
        return operand in op.rounded
    before, after = op.inputs[0].value, op.outputs[0].value
    piled = any(program.operations[at].primitive == "loop_stack" for at in readers.get(after, ()))
    return not piled and program.values[after].itemsize < program.values[before].itemsize


def _read_exactly(program: Program, readers: Mapping[int, Sequence[int]]) -> set[int]:
    """The values of which something reads them, or a view of them, in their own type."""
    found: set[int] = set()
    for op in reversed(program.operations):
        if op.primitive in _RENAMED and op.outputs[0].value not in found:
            continue
        found |= {use.value for k, use in enumerate(op.inputs) if not _narrows(program, readers, op, k)}
    for op in program.operations:  # views of an array that is read exactly
        if op.primitive in _RENAMED and op.inputs and op.inputs[0].value in found:
            found.add(op.outputs[0].value)
    return found


def _crossings(program: Program, maker: Mapping[int, Operation], value: int) -> list[tuple[int, int]]:
    """The values inside and outside of each loop in which a value, or what it is a part or a view of, does not change."""
    found: list[tuple[int, int]] = []
    while True:
        op = maker[value]
        if op.primitive in ("loop_slice", "loop_constant"):
            found.append((value, op.inputs[0].value))
        elif not (op.primitive in _RENAMED and op.inputs) and not _cuts_constant(program, maker, op):
            return found
        value = op.inputs[0].value


_RENAMED = ("reshape", "squeeze", "expand_dims", "transpose")


def _cuts_constant(program: Program, maker: Mapping[int, Operation], op: Operation) -> bool:
    """Whether an operation takes one index of an array that a loop does not change."""
    return _cuts_stack(program, op) and maker[op.inputs[0].value].primitive == "loop_constant"


def _cuts_stack(program: Program, op: Operation) -> bool:
    """Whether an operation takes one index of an array's leading dimensions."""
    if op.primitive != "dynamic_slice" or op.op_class != "fused":
        return False
    whole, piece = (program.values[use.value].shape for use in (op.inputs[0], op.outputs[0]))
    return any(whole[k:] == piece[k:] and prod(piece[:k]) == 1 for k in range(len(whole) + 1))


def second_scores(
    program: Program, topology: Topology, choice: Choice, maker: Mapping[int, int], at: int
) -> tuple[int, float]:
    """The bytes of a second array of scores, and the product that forms them.

    A TPU holds it for a maximum over more than 2,048 float32 columns of a batched product with one dimension of rows, or
    with two, transposed or not, if one chip has several elements of two dimensions of the batch.
    """
    op = program.operations[at]
    made, order = _product_behind(program, maker, op.inputs[0].value, list(range(len(op.inputs[0].dims))))
    across = [order[i] for i, dim in enumerate(op.inputs[0].dims) if dim not in op.outputs[0].dims]
    if made is None or len(across) != 1 or topology.chip.kind != "tpu":
        return at, 0.0
    array, made_by = program.values[made], program.operations[maker[made]]
    groups, dims = matrix_factors(made_by), next(use.dims for use in made_by.outputs if use.value == made)
    if groups is None or not groups.batch or array.dtype != "float32":
        return at, 0.0
    own = groups.columns if set(dims[across[0]]) <= set(groups.columns) else groups.rows
    others = [dim for dim, n in zip(dims, array.shape, strict=True) if n > 1 and not set(dim) & {*groups.batch, *own}]
    cuts = kept_layout(program, choice, made)
    chips = [prod(topology.axis_sizes[axis] for axis in cut) for cut in cuts.dims]
    local = [-(-n // k) for n, k in zip(array.shape, chips, strict=True)]
    crowded = sum(n > 1 and bool(set(dim) & set(groups.batch)) for dim, n in zip(dims, local, strict=True)) > 1
    is_long = local[across[0]] > 2048 and not set(dims[across[0]]) & set(groups.batch)
    in_order = order == sorted(order)
    twice = is_long and ((len(others) == 1 and in_order) or (len(others) == 2 and crowded))
    return maker[made], array.bytes / shards(cuts, topology.axis_sizes) if twice else 0.0


def _product_behind(
    program: Program, maker: Mapping[int, int], value: int, order: list[int]
) -> tuple[int | None, list[int]]:
    """The matmul's result from which elementwise operations and transpositions form a value.

    `order` has for each dimension asked for its place in the value, and in the result its place in the product.
    """
    behind, known = [(value, order)], {value}
    while behind:
        value, order = behind.pop()
        op = program.operations[maker[value]]
        if op.op_class == "matmul":
            return value, order
        shaped = next(use.dims for use in op.outputs if use.value == value)
        for use in op.inputs[::-1] if op.op_class == "fused" else ():
            same = use.dims == shaped
            if use.value not in known and (same or (all(shaped) and Counter(use.dims) == Counter(shaped))):
                known.add(use.value)
                behind.append((use.value, order if same else [use.dims.index(shaped[i]) for i in order]))
    return None, order
