"""What one operation costs on one chip, as one symbolic expression per quantity.

With factor sizes $d_i$ and shard counts $s_i$ (into how many pieces factor $i$ is cut), the chip runs

$$\\text{flops} = c \\prod_i d_i / s_i, \\qquad \\text{bytes} = \\sum_{u} w_u \\prod_{i \\in u} d_i / s_i,$$

where $u$ ranges over the operands and results that pass through HBM and $w_u$ is their element size. One expression,
compiled once, prices all strategies of an operation at once as numpy arrays.

The time is the roofline $\\max(\\text{padded flops}/C, \\text{bytes}/W) + o$ (Pope et al. 2022 §2; "How To Scale Your
Model", "All About Rooflines"), where $C$ and $W$ are the rates that are reached, the peak times an efficiency, and $o$
is the overhead of an operation on the matrix unit.

A matrix unit works in tiles of $t \\times t$. One matrix is held in it tile by tile, the other streams through, row by
row; taking in the next tile meanwhile takes as long as $t/2$ rows. Of a product of $R \\times K$ with $K \\times C$ it
therefore does

$$c B \\, \\lceil K \\rceil_t \\min(\\lceil C \\rceil_t \\max(R, t/2),\\; \\lceil R \\rceil_t \\max(C, t/2)),$$

where $B$ counts the products of a batch and $\\lceil n \\rceil_t$ is the next multiple of $t$: the compiler has either
matrix stream. (That is what the cycles say which libtpu estimates for products of 8 to 8192 rows on v4 to v6e: with few
rows the time does not fall below that of about $t/2$, and between multiples of $t$ it grows in proportion.)

A chip with a large memory of its own keeps in it what one operation makes and the next uses: an array of at most $m$ bytes
that is the result of arithmetic, and does not leave its region, passes through no HBM; $k$ arrays that go round a loop share
the room, $k$ times the bytes of each are then at most $m$ (`costmodels.on_chip`). ($m$ is `on_chip_bytes`, 0 unless the chip
says otherwise. The TPU compiler does so on v4, v5e and v6e.)
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
    """$s_i$: the number of pieces that factor `i` is cut into."""
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
    """The factors of a product of two operands: of the batch, the rows, the columns, and what is summed."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    contracted: tuple[int, ...]


def matrix_factors(operation: Operation) -> MatrixFactors | None:
    """How the factors of an operation make a product of matrices; None when it is none."""
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
    """What the compute units of one chip do for an operation, whole tiles of a matrix unit, in $d_i$, $s_i$ and $t$."""
    found = matrix_factors(operation)
    if found is None:
        return flops(operation)
    rows, columns = found.rows, found.columns
    shape = sympy.Min(_streamed(rows) * _tiled(columns), _streamed(columns) * _tiled(rows), evaluate=False)
    return _number(operation.flops_per_point) * _points(found.batch) * _tiled(found.contracted) * shape


def _tiled(factors: Sequence[int]) -> sympy.Expr:
    return tile_symbol() * sympy.ceiling(_points(factors) / tile_symbol()) if factors else tile_symbol()


def _streamed(factors: Sequence[int]) -> sympy.Expr:
    return sympy.Max(_points(factors), tile_symbol() / 2, evaluate=False) if factors else tile_symbol() / 2


@cache
def on_chip_symbol() -> sympy.Symbol:
    """$m$: the largest array, in bytes, that stays on the chip between two operations."""
    return sympy.Symbol("m", nonnegative=True)


def hbm_bytes(program: Program, operation: Operation, keeps: bool = False) -> sympy.Expr:
    """Bytes that one chip moves between HBM and its compute units, in $d_i$ and $s_i$; in $m$ too where the chip `keeps`."""
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
    """What copies of an operation may differ in: per use in `traffic` the bytes of a stored element, and its `sharers`."""
    uses = ((index, operation.use(index)) for index in operation.traffic)
    return tuple((index, use.stored_itemsize, sharers(program, use.value)) for index, use in uses)


def _flat(dims: Sequence[Sequence[int]]) -> list[int]:
    return [factor for dim in dims for factor in dim]


def _number(value: float) -> sympy.Expr:
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)


@lru_cache(maxsize=4096)
def _compiled(expression: sympy.Expr, factors: int) -> Callable[..., Array]:
    symbols = [size_symbol(i) for i in range(factors)] + [shards_symbol(i) for i in range(factors)]
    return sympy.lambdify([*symbols, tile_symbol(), on_chip_symbol()], expression, "numpy")


def evaluate(
    expression: sympy.Expr, operation: Operation, shards: Array, tile: float = 1.0, on_chip_bytes: float = 0.0
) -> Array:
    """The expression at the operation's sizes and at each row of `shards` (`[strategies, factors]`)."""
    count, rows = len(operation.factors), len(shards)
    # All as arrays of one length: what NumPy's maximum of several expressions is compiled to takes no others.
    sizes = [np.full(rows, float(factor.size)) for factor in operation.factors]
    columns = [shards[:, i] for i in range(count)]
    constants = (np.full(rows, float(tile)), np.full(rows, float(on_chip_bytes)))
    found = _compiled(expression, count)(*sizes, *columns, *constants)
    return np.broadcast_to(found, (rows,)).astype(float)


@dataclass(frozen=True)
class OperationCost:
    """What the strategies of one operation cost on one chip, each an array over strategies; seconds for one execution.

    `flops` are those that the program asks for; `compute_seconds` has those that padding adds.
    """

    flops: Array
    bytes: Array
    compute_seconds: Array
    memory_seconds: Array
    seconds: Array


def price(program: Program, operation: Operation, shards: Array, chip: Chip) -> OperationCost:
    """Prices every strategy of an operation.

    **Arguments:**

    - `shards`: `[strategies, factors]`, the number of pieces of each factor.

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
