"""The cost of one operation on one chip, as one symbolic expression per quantity.

With factor sizes $d_i$ and shard counts $s_i$ (the number of shards of factor $i$), the chip runs

$$\\text{flops} = c \\prod_i d_i / s_i, \\qquad \\text{bytes} = \\sum_{u} w_u \\prod_{i \\in u} d_i / s_i,$$

where $u$ ranges over the operands and results that pass through HBM and $w_u$ is their element size. One expression,
compiled once, costs all strategies of an operation at once as numpy arrays.

The time is the roofline $\\max(\\text{padded flops}/C, \\text{bytes}/W) + o$ (Pope et al. 2022 §2; "How To Scale Your
Model", "All About Rooflines"), where $C$ and $W$ are the achieved rates (the peak times an efficiency) and $o$
is the overhead of an operation on the matrix unit.

A matrix unit works in tiles of $t \\times t$. One matrix is loaded tile by tile; the other streams through it row by
row. Loading the next tile takes as long as streaming $t/2$ rows. A batch of $B$ products of $R \\times K$ with
$K \\times C$ therefore does

$$c B \\, \\lceil K \\rceil_t \\min(\\lceil C \\rceil_t \\max(R, t/2),\\; \\lceil R \\rceil_t \\max(C, t/2)),$$

where $\\lceil n \\rceil_t$ is the next multiple of $t$. The minimum is there because the compiler streams either matrix. This
matches libtpu's cycle estimates for products of 8 to 8192 rows on v4 to v6e: with few rows the time does not fall below that
of about $t/2$, and between multiples of $t$ it grows in proportion.

On chips with a large on-chip memory, a result of arithmetic of at most $m$ bytes that does not leave its region never touches
HBM. $k$ loop carries share the room: $k$ times the bytes of each must be at most $m$ (`costmodels.program.on_chip`). $m$ is
`on_chip_bytes`, 0 by default. The TPU compiler does so on v4, v5e and v6e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from costmodels.machine.chips import Chip
from costmodels.machine.lazy_sympy import sympy
from costmodels.program.on_chip import sharers
from costmodels.program.program import Operation, Program

Array = np.ndarray


@cache
def size_symbol(factor: int) -> sympy.Symbol:
    """$d_i$: the size of factor `i` in elements."""
    return sympy.Symbol(f"d{factor}", positive=True, integer=True)


@cache
def shards_symbol(factor: int) -> sympy.Symbol:
    """$s_i$: the number of shards of factor `i`."""
    return sympy.Symbol(f"s{factor}", positive=True, integer=True)


def _points(factors: Sequence[int]) -> sympy.Expr:
    return sympy.Mul(*(size_symbol(i) / shards_symbol(i) for i in factors))


def flops(operation: Operation) -> sympy.Expr:
    """Floating-point operations on one chip, in $d_i$ and $s_i$."""
    return _number(operation.flops_per_point) * _points(range(len(operation.factors)))


@cache
def tile_symbol() -> sympy.Symbol:
    """$t$: the side of the matrix unit's tile."""
    return sympy.Symbol("t", positive=True)


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
    left, right = (set(_flat(use.dims)) for use in operation.inputs)
    kept = {factor for use in operation.outputs for factor in _flat(use.dims)}
    groups: dict[str, list[int]] = {"batch": [], "rows": [], "columns": [], "contracted": []}
    for i in range(len(operation.factors)):
        side = "rows" if i in left - right else "columns" if i in right - left else "batch"
        groups[side if i in kept else "contracted"].append(i)
    return MatrixFactors(**{name: tuple(group) for name, group in groups.items()})


def padded_flops(operation: Operation) -> sympy.Expr:
    """The FLOPs of one chip for an operation, in whole tiles of the matrix unit; in $d_i$, $s_i$ and $t$."""
    found = matrix_factors(operation)
    if found is None:
        return flops(operation)
    rows, columns = found.rows, found.columns
    shape = sympy.Min(_streamed_rows(rows) * _tiles(columns), _streamed_rows(columns) * _tiles(rows), evaluate=False)
    return _number(operation.flops_per_point) * _points(found.batch) * _tiles(found.contracted) * shape


def _tiles(factors: Sequence[int]) -> sympy.Expr:
    return tile_symbol() * sympy.ceiling(_points(factors) / tile_symbol()) if factors else tile_symbol()


def _streamed_rows(factors: Sequence[int]) -> sympy.Expr:
    return sympy.Max(_points(factors), tile_symbol() / 2, evaluate=False) if factors else tile_symbol() / 2


@cache
def on_chip_symbol() -> sympy.Symbol:
    """$m$: the largest array, in bytes, that stays on the chip between two operations."""
    return sympy.Symbol("m", nonnegative=True)


def hbm_bytes(program: Program, operation: Operation, keeps: bool = False) -> sympy.Expr:
    """HBM bytes that one chip moves, in $d_i$ and $s_i$, and in $m$ if the chip `keeps` values on the chip."""
    terms = []
    for index in operation.traffic:
        use = operation.use(index)
        size = use.stored_itemsize or program.values[use.value].itemsize
        moved = _number(size) * _points(_flat(use.dims))
        if keeps and (count := sharers(program, use.value)):
            large = count * moved > on_chip_symbol()
            moved = sympy.Piecewise((moved, large), (sympy.Integer(0), True), evaluate=False)
        terms.append(moved)
    return sympy.Add(*terms)


def hbm_traffic(program: Program, operation: Operation) -> tuple[tuple[int, float, int], ...]:
    """Per use in `traffic` its index, the bytes of a stored element, and its `sharers`: all that copies may differ in."""
    uses = ((index, operation.use(index)) for index in operation.traffic)
    return tuple((index, use.stored_itemsize, sharers(program, use.value)) for index, use in uses)


def _flat(dims: Sequence[Sequence[int]]) -> list[int]:
    return [factor for dim in dims for factor in dim]


def _number(value: float) -> sympy.Expr:
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)


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

    `flops` are those of the program; `compute_seconds` includes those that padding adds.
    """

    flops: Array
    bytes: Array
    compute_seconds: Array
    memory_seconds: Array
    seconds: Array


def price(program: Program, operation: Operation, shards: Array, chip: Chip) -> OperationCost:
    """Costs every strategy of an operation.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of shards of each factor.

    **Returns:** an `OperationCost`; `seconds` is the roofline's maximum plus the chip's overhead per operation.
    """
    work = evaluate(flops(operation), operation, shards)
    kept = chip.on_chip_bytes
    moved = evaluate(hbm_bytes(program, operation, bool(kept)), operation, shards, on_chip_bytes=kept)
    if operation.op_class == "matmul":
        done = evaluate(padded_flops(operation), operation, shards, chip.matrix_tile)
        rate, overhead = chip.reached_matmul_flops_per_second(operation.dtype), chip.op_overhead_seconds
    else:
        done, rate, overhead = work, chip.vector_flops_per_second, 0.0
    compute, memory = done / rate, moved / chip.reached_hbm_bytes_per_second
    return OperationCost(work, moved, compute, memory, np.maximum(compute, memory) + overhead)
