"""Formulas in named dimensions, axis sizes X, Y, Z and hardware rates, as SymPy expressions.

Rates are achieved rates: the peak times the chip's efficiency.

| symbol | meaning | unit |
|---|---|---|
| $B, L, E, F, ...$ | dimensions of the program, by their names in `costmodels.dimensions` | elements |
| $X, Y, Z, W$ | sizes of the mesh axes | chips |
| $C_{bfloat16}, ..., C_{vector}$ | rate of matrix products in a dtype, of the vector unit | FLOP/s |
| $t_{tile}$ | side of the matrix unit | elements |
| $W_{hbm}$ | HBM bandwidth | bytes/s |
| $m_{chip}$ | the largest array that stays on the chip between two operations | bytes |
| $m_{ahead}$ | the room for weights that are copied into on-chip memory ahead, under the overlap "async" | bytes |
| $W_{ici}$, or $W_x, W_y, ...$ if axes differ | one-way bandwidth of a link | bytes/s |
| $W_{total}$ | bandwidth of all links of a chip together, under the convention "total" | bytes/s |
| $f_{overlap}$ | the part of the bandwidth time that computation hides | 1 |
| $E_{vector}$, $E_{convert}$ | rate at which the vector unit loads and stores arrays, converts operands | elements/s |
| $α_{ici}$, or $α_x, ...$ | latency of a hop | s |
| $o_{op}$, $o_{stream}$, $o_{vector}$, $o_{coll}$ | start of a matmul, its stream, a vector loop, a collective | s |

Expressions are written to files as text and read back by `parse_expression`, which accepts arithmetic only.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from costmodels.machine.collectives import expression
from costmodels.machine.lazy_sympy import sympy
from costmodels.machine.rings import longest_way
from costmodels.machine.topology import Axis, Topology

Expr = Any
"""A SymPy expression, whose own type is narrower than what its arithmetic returns."""


@cache
def dimension(name: str) -> sympy.Symbol:
    """The symbol of a named dimension."""
    return sympy.Symbol(name, positive=True, integer=True)


# --- Text


_ARITHMETIC: Mapping[type, Callable[[Expr, Expr], Expr]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: sympy.floor(a / b),
}
_FUNCTIONS = ("floor", "ceiling", "Max", "Min", "Mod")
_SPELT = {"max": "Max", "min": "Min", "mod": "Mod"}
_LONGEST = 1000
"""The maximum number of characters of one dimension's text."""
_GREATEST_POWER = 16


@lru_cache(maxsize=4096)
def parse_expression(text: str) -> Expr:
    """The expression of a text such as `2*F` or `H*D/(X*Y)`; the text is never executed.

    **Raises:** `ValueError` for anything but names, whole numbers, arithmetic and `floor`, `ceiling`, `max`, `min`, `mod`.
    """
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text)} characters")
        return _expression(ast.parse(text.strip().replace("^", "**"), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"Invalid size {text[:60]!r}: expected names, whole numbers and + - * / ({error})") from error


def _expression(node: ast.AST) -> Expr:
    match node:
        case ast.Name(id=name):
            return dimension(name)
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return sympy.Integer(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_expression(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))) if power <= _GREATEST_POWER:
            return _expression(left) ** power
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_expression(left), _expression(right))
        case ast.Call(func=ast.Name(id="floordiv"), args=[left, right], keywords=[]):
            return sympy.floor(_expression(left) / _expression(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if _SPELT.get(name, name) in _FUNCTIONS:
            return getattr(sympy, _SPELT.get(name, name))(*map(_expression, args))
    raise ValueError(f"it contains {type(node).__name__}")


def text(expression: Expr) -> str:
    """An expression as readable text: `2·B·E·F/(X·Y)`."""
    return str(expression).replace("**", "^").replace("*", "·")


# --- Numbers


def evaluate(expression: Expr, numbers: Mapping[str, float]) -> float:
    """The value of an expression, with numbers by the names of its symbols.

    **Raises:** `KeyError`, with the names of symbols without a number.
    """
    symbols = sorted(expression.free_symbols, key=str)
    missing = [str(symbol) for symbol in symbols if str(symbol) not in numbers]
    if missing:
        raise KeyError(f"{', '.join(missing)} in {text(expression)[:80]} have no number")
    return float(_compile(expression, tuple(symbols))(*(numbers[str(symbol)] for symbol in symbols)))


@lru_cache(maxsize=4096)
def _compile(expression: Expr, symbols: tuple[sympy.Symbol, ...]) -> Callable[..., float]:
    return sympy.lambdify(symbols, expression, "math")


def substitute(expression: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """`xreplace` without evaluation of maxima and minima: SymPy would compare their terms pair by pair, for seconds."""
    if expression in table:
        return table[expression]
    if not expression.args or not expression.free_symbols & table.keys():
        return expression
    args = [substitute(arg, table) for arg in expression.args]
    if isinstance(expression, (sympy.Max, sympy.Min, sympy.Piecewise)):
        return expression.func(*args, evaluate=False)
    return expression.func(*args)


# --- Axes and rates


def axis_size(name: str) -> sympy.Symbol:
    """The symbol of a mesh axis' size: X of the axis x."""
    return dimension(name.upper())


def pieces(axes: Iterable[str]) -> Expr:
    """The number of shards into which these axes split a dimension."""
    return sympy.Mul(*map(axis_size, axes))


def matmul_rate(dtype: str) -> sympy.Symbol:
    """$C$: FLOP/s of matmuls in a dtype."""
    return rate(f"C_{dtype}")


@cache
def rate(name: str) -> sympy.Symbol:
    """The symbol of a rate or an overhead: `C_vector`, `W_hbm`, `W_total`, `o_op`, `E_vector`, `f_overlap`, `t_tile`, ..."""
    return sympy.Symbol(name, nonnegative=True) if name[0] in "oafm" else sympy.Symbol(name, positive=True)


def rates(topology: Topology, dtypes: Iterable[str]) -> dict[str, float]:
    """The values of the symbols of rates, overheads and axis sizes on a topology, for matmuls in these dtypes."""
    chip, links = topology.chip, _link_symbols(topology.axes)
    launches = [axis.launch_seconds for axis in topology.axes if axis.size > 1]
    found = {str(axis_size(name)): float(size) for name, size in topology.axis_sizes.items()}
    found |= {str(matmul_rate(dtype)): chip.reached_matmul_flops_per_second(dtype) for dtype in dtypes}
    found |= {
        "C_vector": chip.vector_flops_per_second,
        "E_vector": chip.vector_elements_per_second,
        "E_convert": chip.converted_elements_per_second,
        "W_hbm": chip.reached_hbm_bytes_per_second,
        "t_tile": chip.matrix_tile,
        "m_chip": chip.on_chip_bytes,
        "m_ahead": chip.prefetch_bytes,
        "o_op": chip.op_overhead_seconds,
        "o_stream": chip.stream_overhead_seconds,
        "o_vector": chip.vector_overhead_seconds,
        "o_coll": max(launches, default=0.0),
        "W_total": topology.total_bytes_per_second,
        "f_overlap": topology.pricing.hidden_part,
    }
    for axis in topology.axes:
        bandwidth, hop = links[axis.name]
        found |= {str(bandwidth): axis.bytes_per_second, str(hop): axis.hop_seconds}
    return found


def _link_symbols(axes: Sequence[Axis]) -> dict[str, tuple[sympy.Symbol, sympy.Symbol]]:
    """Bandwidth and latency of each axis; equal axes share one symbol."""
    taking_part = [axis for axis in axes if axis.size > 1]
    alike = len({(axis.bytes_per_second, axis.hop_seconds) for axis in taking_part}) <= 1

    def symbols(axis: Axis) -> tuple[sympy.Symbol, sympy.Symbol]:
        of = "ici" if alike and axis.size > 1 else axis.name
        return rate(f"W_{of}"), rate(f"alpha_{of}")

    return {axis.name: symbols(axis) for axis in axes}


# --- Time


def asynchronous_seconds(done: Expr, moved: Expr, matmul: bool, dtype: str, beside: bool) -> Expr:
    """Seconds of one run of an operation under the overlap "async": `costmodels.operations.price` as a formula.

    **Arguments:**

    - `done`: FLOPs, in whole tiles on a matrix unit.
    - `moved`: HBM bytes.
    - `beside`: whether the overhead runs beside HBM.
    """
    compute, memory = done / (matmul_rate(dtype) if matmul else rate("C_vector")), moved / rate("W_hbm")
    overhead = rate("o_op") if matmul else sympy.Integer(0)
    if beside:
        compute, overhead = compute + overhead, sympy.Integer(0)
    sides = [side for side in (compute, memory) if side != 0]
    longest = sympy.Max(*sides, evaluate=False) if len(sides) > 1 else sympy.Add(*sides)
    return longest + overhead


def operation_seconds(
    done: Expr,
    moved: Expr,
    elements: Expr,
    converted: Expr,
    matmul: bool,
    dtype: str,
    beside: Expr | int = 0,
    waits: bool = False,
) -> Expr:
    """Seconds of one run of an operation without its start: `costmodels.operations.price` as a formula.

    **Arguments:**

    - `done`: FLOPs, in whole tiles on a matrix unit.
    - `moved`: HBM bytes.
    - `elements`, `converted`: elements that the vector unit loads and stores, and that it converts for a matmul.
    - `beside`: the start of a matmul whose operands are read meanwhile.
    - `waits`: whether reads from HBM add to the time of the vector unit, as in reductions.
    """
    compute, memory = done / (matmul_rate(dtype) if matmul else rate("C_vector")), moved / rate("W_hbm")
    vector, conversion = elements / rate("E_vector"), converted / rate("E_convert")
    core = [side + beside for side in (compute, conversion, vector if beside else 0) if side != 0]
    terms = (*core, memory + vector) if matmul or waits else (*core, memory, vector)
    sides = [side for side in terms if side != 0]
    return sympy.Max(*sides, evaluate=False) if len(sides) > 1 else sympy.Add(*sides)


def spare_seconds(done: Expr, moved: Expr, ahead: Expr, dtype: str) -> Expr:
    """HBM seconds of a matmul beyond those of its arithmetic, of reads that can run ahead (`costmodels.operations.windows`).

    **Arguments:**

    - `ahead`: HBM bytes that can be read before the matmul begins.
    """
    spare = moved / rate("W_hbm") - done / matmul_rate(dtype) - rate("o_op")
    room = sympy.Min(ahead, rate("m_ahead"), evaluate=False) / rate("W_hbm")
    return sympy.Min(sympy.Max(spare, 0, evaluate=False), room, evaluate=False)


def collective_seconds(kind: str, axes: Sequence[str], payload: Expr, topology: Topology) -> Expr:
    """Seconds of a collective, or of a local slice, for a payload by the convention of `costmodels.machine.collectives`."""
    if kind == "slice":
        return 2 * payload / rate("W_hbm")
    return substitute(_collective(kind, tuple(sorted(axes)), topology), {_payload(): payload})


def hop_seconds(name: str, sent: Expr, topology: Topology) -> Expr:
    """Seconds of one hop of a ring over an axis: `costmodels.machine.rings.hop_seconds` as a formula."""
    axis, (bandwidth, hop) = topology.axis(name), _link_symbols(topology.axes)[name]
    return sent / bandwidth + hop * longest_way(axis, axis_size(name)) + rate("o_coll")


@cache
def _payload() -> sympy.Symbol:
    return sympy.Dummy("payload", nonnegative=True)


@lru_cache(maxsize=1024)
def _collective(kind: str, axes: tuple[str, ...], topology: Topology) -> Expr:
    """`costmodels.machine.collectives.expression` in the symbols of this module."""
    links, taking_part = _link_symbols(topology.axes), [topology.axis(name) for name in axes]
    known = {"V": _payload(), "o": rate("o_coll"), "B": rate("W_total"), "f": rate("f_overlap")}
    for axis in taking_part:
        bandwidth, hop = links[axis.name]
        known |= {f"n_{axis.name}": axis_size(axis.name), f"W_{axis.name}": bandwidth, f"alpha_{axis.name}": hop}
    found = expression(kind, taking_part, topology.pricing)
    return substitute(found, {symbol: known[str(symbol)] for symbol in found.free_symbols})


# --- Volume


def volume(kind: str, axes: Sequence[str], payload: Expr, exact: bool = True) -> Expr:
    """The volume that one chip sends in a collective, in the payload's unit: `costmodels.machine.collectives.wire_bytes` as a
    formula.

    **Arguments:**

    - `exact`: whether to include the factor $(N-1)/N$ of $N$ chips, which Pope et al. 2022, appendix A.1, omit.
    """
    if kind == "slice" or not axes:
        return sympy.Integer(0)
    chips = pieces(axes)
    if kind == "collective-permute":
        return payload
    share = (chips - 1) / chips if exact else sympy.Integer(1)
    return (2 if kind == "all-reduce" else 1) * share * payload


# --- Crossovers


def crossover(below: Expr, above: Expr, tokens: sympy.Symbol) -> Expr | None:
    """The number of tokens above which `above` costs less than `below`; None if they never meet.

    Both must be linear in `tokens`, as volumes of weights and activations are.

    **Raises:** `ValueError` if one is not.
    """
    difference = sympy.expand(below - above)
    rate, rest = difference.coeff(tokens, 1), difference.coeff(tokens, 0)
    if sympy.expand(rate * tokens + rest - difference) != 0:
        raise ValueError(f"{text(difference)} is not linear in {tokens}")
    return None if rate == 0 else sympy.simplify(-rest / rate)


# --- Simplification


def specialize(expression: Expr, numbers: Mapping[str, float]) -> Expr:
    """The expression that holds at these numbers and near them.

    Maxima become their larger side, piecewise expressions their active case, and floors and ceilings are dropped.
    """
    if not expression.has(sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.Piecewise):
        return expression
    if isinstance(expression, sympy.Piecewise):
        cases: Any = expression.args
        return specialize(next(case for case, where in cases if _holds(where, numbers)), numbers)
    if isinstance(expression, (sympy.Max, sympy.Min)):
        choose = max if isinstance(expression, sympy.Max) else min
        return specialize(choose(expression.args, key=lambda side: evaluate(side, numbers)), numbers)
    args = [specialize(arg, numbers) for arg in expression.args]
    if isinstance(expression, (sympy.floor, sympy.ceiling)) and evaluate(args[0], numbers).is_integer():
        return args[0]
    return expression.func(*args)


def _holds(condition: Any, numbers: Mapping[str, float]) -> bool:
    return bool(condition.subs({symbol: numbers[str(symbol)] for symbol in condition.free_symbols}))


def largest_terms(expression: Expr, numbers: Mapping[str, float], part: float) -> tuple[list[Expr], list[Expr]]:
    """The terms of a sum, largest first at these numbers: those that make up at least 1 - `part` of it, and the rest.

    Products are multiplied out, except factors such as $XYZ - 1$.
    """
    kept: dict[Expr, Expr] = {}

    def close_sum(sum_: Expr) -> Expr:
        return kept.setdefault(sum_, sympy.Dummy(positive=True))

    opened = expression.replace(_is_chips_but_one, close_sum)
    back = {dummy: sum_ for sum_, dummy in kept.items()}
    terms = [term.xreplace(back) for term in sympy.Add.make_args(sympy.expand(opened)) if term != 0]
    values = {term: abs(evaluate(term, numbers)) for term in terms}
    terms.sort(key=lambda term: (-values[term], str(term)))
    total, rest = sum(values.values()), 0.0
    count = len(terms)
    while count > 1 and rest + values[terms[count - 1]] <= part * total:
        rest += values[terms[count - 1]]
        count -= 1
    return terms[:count], terms[count:]


def _is_chips_but_one(expression: Expr) -> bool:
    return bool(expression.is_Add and len(expression.args) == 2 and sympy.S.NegativeOne in expression.args)
