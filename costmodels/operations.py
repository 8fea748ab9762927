"""What one operation costs on one chip, as one symbolic expression per quantity.

With factor sizes $d_i$ and shard counts $s_i$ (into how many pieces factor $i$ is cut), the chip runs

$$\\text{flops} = c \\prod_i d_i / s_i, \\qquad \\text{bytes} = \\sum_{u} w_u \\prod_{i \\in u} d_i / s_i,$$

where $u$ ranges over the operands and results that pass through HBM and $w_u$ is their element size. One expression,
compiled once, prices all strategies of an operation at once as numpy arrays.

The time is the roofline $\\max(\\text{flops}/C, \\text{bytes}/W)$ (Pope et al. 2022 §2; "How To Scale Your Model",
"All About Rooflines").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from costmodels.chips import Chip
from costmodels.program import Operation, Program
from costmodels.symbolic import sympy

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


def hbm_bytes(program: Program, operation: Operation) -> sympy.Expr:
    """Bytes that one chip moves between HBM and its compute units, in $d_i$ and $s_i$."""
    uses = [operation.use(index) for index in operation.traffic]
    terms = [_number(program.values[use.value].itemsize) * _points(_flat(use.dims)) for use in uses]
    return sympy.Add(*terms)


def _flat(dims: Sequence[Sequence[int]]) -> list[int]:
    return [factor for dim in dims for factor in dim]


def _number(value: float) -> sympy.Expr:
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Float(value)


@lru_cache(maxsize=4096)
def _compiled(expression: sympy.Expr, factors: int) -> Callable[..., Array]:
    symbols = [size_symbol(i) for i in range(factors)] + [shards_symbol(i) for i in range(factors)]
    return sympy.lambdify(symbols, expression, "numpy")


def evaluate(expression: sympy.Expr, operation: Operation, shards: Array) -> Array:
    """The expression at the operation's sizes and at each row of `shards` (`[strategies, factors]`)."""
    count = len(operation.factors)
    sizes = [float(factor.size) for factor in operation.factors]
    columns = [shards[:, i] for i in range(count)]
    return np.broadcast_to(_compiled(expression, count)(*sizes, *columns), (len(shards),)).astype(float)


@dataclass(frozen=True)
class OperationCost:
    """What the strategies of one operation cost on one chip, each an array over strategies; seconds for one execution."""

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
    moved = evaluate(hbm_bytes(program, operation), operation, shards)
    if operation.op_class == "matmul":
        rate = chip.matmul_flops_per_second(operation.dtype)
        overhead = chip.op_overhead_seconds
    else:
        rate, overhead = chip.vector_flops_per_second, 0.0
    compute, memory = work / rate, moved / chip.hbm_bytes_per_second
    return OperationCost(work, moved, compute, memory, np.maximum(compute, memory) + overhead)
