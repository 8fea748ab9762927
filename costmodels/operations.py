"""The cost of one operation on one chip, as one symbolic expression per quantity.

With factor sizes $d_i$ and shard counts $s_i$ (the number of shards of factor $i$), the chip runs

$$\\text{flops} = c \\prod_i d_i / s_i, \\qquad \\text{bytes} = \\sum_{u} w_u \\prod_{i \\in u} d_i / s_i,$$

where $u$ ranges over the operands and results that pass through HBM and $w_u$ is their element size. One expression,
compiled once, costs all strategies of an operation at once as numpy arrays.

The time is the roofline $\\max(\\text{padded flops}/C, \\text{bytes}/W) + o$ (Pope et al. 2022 §2; "How To Scale Your
Model", "All About Rooflines"), where $C$ and $W$ are the achieved rates (the peak times an efficiency) and $o$
is the start-up time of an operation.

The vector unit loads and stores arrays at a rate $E$ of elements, in HBM or on the chip
(`costmodels.program.vector_passes`). An elementwise operation takes
$\\max(\\text{flops}/C, \\text{bytes}/W, n/E) + o$ for $n$ elements, and a reduction
$\\max(\\text{flops}/C, \\text{bytes}/W + n/E) + o$. The results of a matmul are stored after they are
computed. If HBM bounds the matmul, this adds to the time:
$\\max(\\text{padded flops}/C, \\text{bytes}/W + n/E) + o$, within 10 % of libtpu's cycles for products of 8 to 350 rows with
matrices of 1 to 64 Mi elements on v4 to v6e. Without a rate $E$ there is no such term.

Outside of loops the compiler copies weights into on-chip memory ahead, so they are read while the matmul, or the one before,
starts: $\\max(\\text{padded flops}/C + o, n/E + o, \\text{bytes}/W + n/E)$ on chips that have `prefetch_bytes`.

The elements $n_c$ of an operand that is stored in a narrower type are converted at a rate $E_c$, so the matmul takes at
least $n_c/E_c + o$.

A matrix unit works in tiles of $t \\times t$. One matrix is loaded tile by tile; the other streams through it row by
row. Loading the next tile takes as long as streaming $t/2$ rows (`weight_load_rows` of a chip, if it has them). A batch of
$B$ products of $R \\times K$ with $K \\times C$ therefore does

$$c B \\, \\lceil K \\rceil_t \\min(\\lceil C \\rceil_t \\max(R, t/2),\\; \\lceil R \\rceil_t \\max(C, t/2)),$$

where $\\lceil n \\rceil_t$ is the next multiple of $t$. The minimum is there because the compiler streams either matrix. This
matches libtpu's cycle estimates for products of 8 to 8192 rows on v4 to v6e: with few rows the time does not fall below that
of about $t/2$, and between multiples of $t$ it grows in proportion.

On chips with a large on-chip memory, a result of arithmetic of at most $m$ bytes that does not leave its region never touches
HBM. $k$ loop carries share the room: $k$ times the bytes of each must be at most $m$ (`costmodels.program.on_chip`). $m$ is
`on_chip_bytes`, 0 by default. The TPU compiler does so on v4, v5e and v6e.

Matmuls of grouped rows compute and read only the groups that have rows (`costmodels.program.grouped`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import numpy as np

from costmodels.factor_symbols import flatten, number, points, shards_symbol, size_symbol, tile_symbol, tiles
from costmodels.grouped_costs import (
    between_elements,
    counting_flops,
    grouped_flops,
    grouped_rows,
    hidden_bytes,
    hidden_elements,
    moved_points,
)
from costmodels.machine.chips import Chip
from costmodels.machine.conventions import EXPERT_LOAD
from costmodels.machine.lazy_sympy import sympy
from costmodels.program.asynchronous import (
    is_fetched_ahead,
    is_fused_into_reads,
    is_lender,
    lenders,
    static_operands,
)
from costmodels.program.grouped import grouped
from costmodels.program.on_chip import sharers
from costmodels.program.program import Operation, Program
from costmodels.program.vector_passes import (
    REGISTER,
    converted_operands,
    ends_pass,
    is_streamed,
    vector_uses,
    waits_for_reads,
)

Array = np.ndarray


def flops(operation: Operation, load: float = EXPERT_LOAD) -> sympy.Expr:
    """Floating-point operations on one chip, in $d_i$ and $s_i$; of split groups of rows, on that with the most.

    `load` is as for `padded_flops`.
    """
    most, counted = 1, 0
    if groups := grouped(operation):
        most = sympy.Min(shards_symbol(groups.groups), number(load), evaluate=False)
        if groups.hidden is not None:  # the rows of a chain's buffer
            split = [shards_symbol(f) for f in (groups.groups, groups.tokens) if f is not None]
            most = sympy.Mul(*split) * grouped_rows(groups, load) / points(groups.rows)
        counted = counting_flops(groups)
    return number(operation.flops_per_point) * points(range(len(operation.factors))) * most + counted


@dataclass(frozen=True)
class MatrixFactors:
    """The factors of a matmul: batch, rows, columns, and contracted factors."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    contracted: tuple[int, ...]


def matrix_factors(operation: Operation) -> MatrixFactors | None:
    """The factors of an operation as those of a matmul; None if it is not a matmul."""
    if operation.op_class != "matmul" or len(operation.inputs) != 2:
        return None
    left, right = (set(flatten(use.dims)) for use in operation.inputs)
    kept = {factor for use in operation.outputs for factor in flatten(use.dims)}
    groups: dict[str, list[int]] = {"batch": [], "rows": [], "columns": [], "contracted": []}
    for i in range(len(operation.factors)):
        side = "rows" if i in left - right else "columns" if i in right - left else "batch"
        groups[side if i in kept else "contracted"].append(i)
    return MatrixFactors(**{name: tuple(group) for name, group in groups.items()})


def padded_flops(operation: Operation, load_rows: float = 0.0, load: float = EXPERT_LOAD) -> sympy.Expr:
    """The FLOPs of one chip for an operation, in whole tiles of the matrix unit; in $d_i$, $s_i$ and $t$.

    **Arguments:**

    - `load_rows`: the rows that stream while a tile is loaded; $t/2$ if 0.
    - `load`: the rows of the chip with the most, over the mean, if groups of rows are split ($\\lambda$).
    """
    if groups := grouped(operation):
        return grouped_flops(groups, load_rows, load)
    found = matrix_factors(operation)
    if found is None:
        return flops(operation)
    given = {factor for use in operation.inputs for factor in flatten(use.dims)}
    placed = tuple(i for i in found.batch if i not in given)  # where a convolution's window stands: its rows
    batch, rows, columns = [i for i in found.batch if i in given], (*found.rows, *placed), found.columns
    least = number(load_rows) if load_rows else tile_symbol() / 2
    sides = (_streamed_rows(rows, least) * tiles(columns), _streamed_rows(columns, least) * tiles(rows))
    shape = sympy.Min(*sides, evaluate=False)
    return number(operation.flops_per_point) * points(batch) * tiles(found.contracted) * shape


def _streamed_rows(factors: Sequence[int], least: sympy.Expr) -> sympy.Expr:
    return sympy.Max(points(factors), least, evaluate=False) if factors else least


@cache
def on_chip_symbol() -> sympy.Symbol:
    """$m$: the largest array, in bytes, that stays on the chip between two operations."""
    return sympy.Symbol("m", nonnegative=True)


def hbm_bytes(program: Program, operation: Operation, keeps: bool = False, load: float = EXPERT_LOAD) -> sympy.Expr:
    """HBM bytes that one chip moves, in $d_i$ and $s_i$, and in $m$ if the chip `keeps` values on the chip.

    The matmuls of a chain write and read its hidden arrays; the elementwise work between them is in `between_elements`. `load`
    is as for `padded_flops`.
    """
    terms = [hidden_bytes(program, operation, load)]
    for index in operation.traffic:
        use = operation.use(index)
        size = use.stored_itemsize or program.values[use.value].itemsize
        moved = number(size) * moved_points(operation, index, load)
        if keeps and (count := sharers(program, use.value)):
            large = count * moved > on_chip_symbol()
            moved = sympy.Piecewise((moved, large), (sympy.Integer(0), True), evaluate=False)
        terms.append(moved)
    return sympy.Add(*terms)


def prefetched_bytes(program: Program, operation: Operation, load: float = EXPERT_LOAD) -> sympy.Expr:
    """HBM bytes of the operands that a compiler can read ahead, in $d_i$ and $s_i$: arguments, and work on arguments only."""
    found = []
    for index in set(operation.traffic) & set(static_operands(program, operation)):
        use = operation.use(index)
        size = use.stored_itemsize or program.values[use.value].itemsize
        found.append(number(size) * moved_points(operation, index, load))
    return sympy.Add(*found)


def arriving_bytes(program: Program, operation: Operation) -> sympy.Expr:
    """The bytes of all operands of elementwise work that runs as they are read (`is_fused_into_reads`), in $d_i$ and $s_i$."""
    uses = operation.inputs
    return sympy.Add(*(number(program.values[use.value].itemsize) * points(flatten(use.dims)) for use in uses))


def vector_elements(program: Program, operation: Operation, load: float = EXPERT_LOAD) -> sympy.Expr:
    """Elements that the vector unit of one chip loads and stores, in $d_i$ and $s_i$.

    The matmuls of a chain store all its hidden arrays but the last.
    """
    groups = grouped(operation)
    hidden = (groups.hidden_arrays - 1) * hidden_elements(groups, load) if groups and groups.hidden is not None else 0
    uses = (operation.use(index) for index in vector_uses(program, operation))
    return sympy.Add(hidden, *(points(flatten(use.dims)) for use in uses))


def between_seconds(program: Program, operation: Operation, shards: Array, chip: Chip, load: float) -> Array:
    """Seconds of the passes between the matmuls of a chain, and of the starts of all but the first matmul."""
    groups = grouped(operation)
    if groups is None or groups.hidden is None:
        return np.zeros(len(shards))
    size = program.values[operation.outputs[0].value].itemsize
    rate = chip.vector_elements_per_second
    slowest = max(size / chip.reached_hbm_bytes_per_second, 1 / rate if rate else 0.0)
    starts = (groups.hidden_arrays - 1) * chip.op_overhead_seconds + chip.vector_overhead_seconds
    return evaluate(between_elements(operation, load), operation, shards) * slowest + starts


def converted_elements(program: Program, operation: Operation) -> sympy.Expr:
    """$n_c$: elements that one chip converts for a matmul, in $d_i$ and $s_i$."""
    return sympy.Add(*(points(flatten(operation.use(k).dims)) for k in converted_operands(program, operation)))


def start_seconds(program: Program, operation: Operation, chip: Chip) -> float:
    """$o$: the start-up time of an operation on the matrix unit, or of a loop of the vector unit."""
    if operation.op_class == "matmul":
        return chip.op_overhead_seconds + is_streamed(program, operation) * chip.stream_overhead_seconds
    points = prod(factor.size for factor in operation.factors)
    return chip.vector_overhead_seconds if points >= REGISTER and ends_pass(program, operation) else 0.0


def reads_while_starting(program: Program, operation: Operation, chip: Chip) -> bool:
    """Whether the operands of a matmul are copied into on-chip memory while it, or the one before, starts."""
    return chip.prefetch_bytes > 0 and is_fetched_ahead(program, operation)


def cost_key(program: Program, operation: Operation) -> tuple[object, ...]:
    """All that the costs of operations with equal strategies may differ in.

    Per use in `traffic` its index, the bytes of a stored element, its `sharers`, and whether it can be read ahead; the uses
    and the start of a loop of the vector unit; whether operands are streamed, or fetched ahead.
    """
    uses = ((index, operation.use(index)) for index in operation.traffic)
    static = static_operands(program, operation)
    moved = tuple((index, use.stored_itemsize, sharers(program, use.value), index in static) for index, use in uses)
    passes = (vector_uses(program, operation), ends_pass(program, operation), waits_for_reads(program, operation))
    return (moved, passes, is_streamed(program, operation), is_fetched_ahead(program, operation))


def is_free(program: Program, operation: Operation) -> bool:
    """Whether an operation takes no time on a chip: it computes and moves nothing, and starts no loop of the vector unit."""
    return not operation.flops_per_point and not operation.traffic and not ends_pass(program, operation)


@lru_cache(maxsize=4096)
def _compile(expression: sympy.Expr, factors: int) -> Callable[..., Array]:
    symbols = [size_symbol(i) for i in range(factors)] + [shards_symbol(i) for i in range(factors)]
    return sympy.lambdify([*symbols, tile_symbol(), on_chip_symbol()], expression, "numpy")


def evaluate(
    expression: sympy.Expr, operation: Operation, shards: Array, tile: float = 1.0, on_chip_bytes: float = 0.0
) -> Array:
    """The expression at the operation's sizes and at each row of `shards` (`[strategies, factors]`)."""
    count, rows = len(operation.factors), len(shards)
    # All arguments as arrays of one length: the compiled maximum of several expressions requires it.
    sizes = [np.full(rows, float(factor.size)) for factor in operation.factors]
    columns = [shards[:, i] for i in range(count)]
    constants = (np.full(rows, float(tile)), np.full(rows, float(on_chip_bytes)))
    found = _compile(expression, count)(*sizes, *columns, *constants)
    return np.broadcast_to(found, (rows,)).astype(float)


@dataclass(frozen=True)
class OperationCost:
    """The costs of the strategies of one operation on one chip, as arrays over strategies; seconds are of one execution.

    `flops` are those of the program; `compute_seconds` includes those that padding adds. `vector_seconds` are those of loads
    and stores by the vector unit, or of conversions if they take longer, `overhead_seconds` the start-up time, and that of the
    passes between the matmuls of a chain.
    """

    flops: Array
    bytes: Array
    compute_seconds: Array
    memory_seconds: Array
    vector_seconds: Array
    overhead_seconds: Array
    seconds: Array


def price(
    program: Program,
    operation: Operation,
    shards: Array,
    chip: Chip,
    asynchronous: bool = False,
    load: float = EXPERT_LOAD,
) -> OperationCost:
    """Costs every strategy of an operation.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.
    - `asynchronous`: whether reads of arguments run beside the overhead of their matmul, and beside fused work on them.
    - `load`: as for `padded_flops`.

    **Returns:** an `OperationCost`; `seconds` is the roofline's maximum plus the start-up time.
    """
    work = evaluate(flops(operation, load), operation, shards)
    kept = chip.on_chip_bytes
    moved = evaluate(hbm_bytes(program, operation, bool(kept), load), operation, shards, on_chip_bytes=kept)
    matmul = operation.op_class == "matmul"
    done = work
    if matmul:
        done = evaluate(padded_flops(operation, chip.weight_load_rows, load), operation, shards, chip.matrix_tile)
    rate = chip.reached_matmul_flops_per_second(operation.dtype) if matmul else chip.vector_flops_per_second
    compute, memory = done / rate, moved / chip.reached_hbm_bytes_per_second
    between = between_seconds(program, operation, shards, chip, load)
    if asynchronous:
        seconds = _asynchronous_seconds(program, operation, shards, chip, compute, memory) + between
        overhead = np.maximum(seconds - np.maximum(compute, memory), 0.0)
        return OperationCost(work, moved, compute, memory, np.zeros(len(shards)), overhead, seconds)
    stored = evaluate(vector_elements(program, operation, load), operation, shards)
    converted = evaluate(converted_elements(program, operation), operation, shards)
    vector, conversion = (
        elements / rate if rate else np.zeros(len(shards))
        for elements, rate in (
            (stored, chip.vector_elements_per_second),
            (converted, chip.converted_elements_per_second),
        )
    )
    waits = matmul or waits_for_reads(program, operation)
    core, read = np.maximum(compute, conversion), memory + vector if waits else np.maximum(memory, vector)
    longest, start = np.maximum(core, read), start_seconds(program, operation, chip)
    if reads_while_starting(program, operation, chip):
        start = np.maximum(np.maximum(core, vector) + start, read) - longest
    overhead = start + between
    return OperationCost(work, moved, compute, memory, np.maximum(vector, conversion), overhead, longest + overhead)


def _asynchronous_seconds(
    program: Program, operation: Operation, shards: Array, chip: Chip, compute: Array, memory: Array
) -> Array:
    """Seconds of an operation under the overlap "async", without the vector unit's loops, as its constants were fitted."""
    overhead = chip.op_overhead_seconds if operation.op_class == "matmul" else 0.0
    if is_fused_into_reads(program, operation):
        arrives = evaluate(arriving_bytes(program, operation), operation, shards) / chip.reached_hbm_bytes_per_second
        return np.maximum(compute - arrives, 0.0)
    if static_operands(program, operation):
        return np.maximum(compute + overhead, memory)
    return np.maximum(compute, memory) + overhead


@dataclass(frozen=True)
class Windows:
    """Seconds of one run of a matmul, per strategy, behind which its communication is hidden under the overlap "async".

    - `chain`: HBM seconds beyond those of the core, of reads that can run ahead, with those of the `lenders`.
    - `beside`: the seconds of the matmul without its own part of `chain`, for transfers that nothing waits for.
    """

    chain: Array
    beside: Array


def windows(
    program: Program, operation: int, shards: Array, chip: Chip, chips: int, load: float = EXPERT_LOAD
) -> Windows:
    """The `Windows` of the strategies of a matmul (derived in `costmodels.machine.conventions.Pricing`).

    **Arguments:**

    - `chips`: the number of chips, over all of which the weights of lenders count as split.
    - `load`: as for `padded_flops`.
    """
    op = program.operations[operation]
    cost = price(program, op, shards, chip, True, load)
    ahead = np.minimum(evaluate(prefetched_bytes(program, op, load), op, shards), chip.prefetch_bytes)
    core = cost.compute_seconds + chip.op_overhead_seconds
    own = np.minimum(np.maximum(cost.memory_seconds - core, 0.0), ahead / chip.reached_hbm_bytes_per_second)
    lent = lent_seconds(program, operation, chip, chips) if is_lender(program, operation) else 0.0
    borrowed = sum(lent_seconds(program, i, chip, chips) for i in lenders(program, operation))
    room = chip.prefetch_bytes / chip.reached_hbm_bytes_per_second
    return Windows(np.minimum(np.maximum(own - lent, 0.0) + borrowed, room), cost.seconds - own)


def lent_seconds(program: Program, operation: int, chip: Chip, chips: int) -> float:
    """HBM seconds beyond those of the core that a matmul lends: those of a weight that is split over all chips.

    Its other operand counts as whole, so that the strategy of the lender does not enter.
    """
    op = program.operations[operation]
    whole = np.ones((1, len(op.factors)))
    read = float(evaluate(prefetched_bytes(program, op), op, whole)[0]) / chips
    work = float(evaluate(padded_flops(op, chip.weight_load_rows), op, whole, chip.matrix_tile)[0]) / chips
    core = work / chip.reached_matmul_flops_per_second(op.dtype) + chip.op_overhead_seconds
    return max(min(read, chip.prefetch_bytes) / chip.reached_hbm_bytes_per_second - core, 0.0)
