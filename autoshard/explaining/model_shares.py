"""Shares of parameters, FLOPs and activation bytes by kind of operation, in closed form.

The breakdown of Ouyang 2023 ("Understanding the Performance of Transformer Inference", MIT), for any traced function. All
numbers are of one step of the whole program, summed over chips.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from autoshard.explaining.formulas import array_bytes
from autoshard.naming.strategy_names import attention_part
from autoshard.naming.weights import is_product, weight_name, weight_operand, weight_sources
from costmodels.dimensions import Dimensions
from costmodels.machine.lazy_sympy import sympy
from costmodels.operations import flops, shards_symbol, size_symbol
from costmodels.program.program import Operation, Program, Use
from costmodels.symbols import Expr, substitute

_LOOKUPS = ("gather",)


class Share(NamedTuple):
    """One kind of operation: its parameters, its FLOPs, the bytes of its results."""

    kind: str
    parameters: Expr
    flops: Expr
    activation_bytes: Expr


def breakdown(program: Program, dimensions: Dimensions) -> tuple[Share, ...]:
    """The shares of every kind of operation, in program order.

    A matmul by a weight is a kind of its own, named by the weight's path. Matmuls of activations are attention scores and
    attention values. The rest is elementwise work (with reductions), and lookups and updates. Parameters are the
    floating-point arguments that are weights of matmuls, lookup tables, or inputs of elementwise work. Each counts once, with
    the first matmul that uses it, or else with its first reader. Views and loop boundaries are not activations.
    """
    held = _holders(program)
    groups: dict[str, list[Share]] = {}
    for i in range(len(program.operations)):
        kind = kind_of(program, i)
        if kind:
            groups.setdefault(kind, []).append(_share(program, dimensions, i, kind, held.get(i, [])))
    return tuple(
        Share(kind, *(sympy.Add(*column) for column in list(zip(*shares, strict=True))[1:]))
        for kind, shares in groups.items()
    )


def kind_of(program: Program, i: int) -> str:
    """The kind of an operation; "" if it computes and moves nothing."""
    op = program.operations[i]
    if op.op_class == "matmul":
        weight = weight_operand(program, i) if is_product(op) else None
        return attention_part(program, i) if weight is None and is_product(op) else _name(program, op, weight)
    if op.op_class == "fused" and op.flops_per_point:
        return "elementwise"
    return "lookups and updates" if op.op_class == "memory" else ""


def _name(program: Program, op: Operation, weight: int | None) -> str:
    return op.primitive if weight is None else weight_name(program, op.inputs[weight].value)


def _share(program: Program, dimensions: Dimensions, i: int, kind: str, held: list[int]) -> Share:
    op, runs = program.operations[i], dimensions.runs(program, program.operations[i].region)
    table = {size_symbol(f): dimensions.factor(i, f) for f in range(len(op.factors))}
    table |= {shards_symbol(f): sympy.Integer(1) for f in range(len(op.factors))}
    made = [array_bytes(program, dimensions, use.value) for use in op.outputs if not _is_in_place(program, op, use)]
    parameters = sympy.Add(*(dimensions.elements(value) for value in held))
    return Share(kind, parameters, runs * substitute(flops(op), table), runs * sympy.Add(*made))


def _is_in_place(program: Program, op: Operation, use: Use) -> bool:
    """Whether a result overwrites an operand, as an update of a cache does."""
    shape = program.values[use.value].shape
    return op.op_class == "memory" and any(
        program.values[each.value].shape == shape and each.dims == use.dims for each in op.inputs
    )


def _holders(program: Program) -> dict[int, list[int]]:
    """Operation to the arguments that are its parameters."""
    found: dict[int | None, int] = {}
    for i, op in program.matmuls():
        weight = weight_operand(program, i) if is_product(op) else None
        if weight is not None:
            for at in weight_sources(program, op.inputs[weight].value):
                found.setdefault(program.operations[at].outputs[0].value, i)
    for i, op in enumerate(program.operations):
        elementwise = op.op_class == "fused" and op.flops_per_point
        if elementwise or op.primitive in _LOOKUPS:
            read = op.inputs if elementwise else op.inputs[:1]
            for use in read:
                found.setdefault(program.values[use.value].origin, i)
    held: dict[int, list[int]] = {}
    sources = set(_sources(program))
    for origin, i in found.items():
        if origin is not None and origin in sources:
            held.setdefault(i, []).append(origin)
    return held


def _sources(program: Program) -> Iterator[int]:
    """Arguments and closed-over arrays of floating-point numbers, or of quantised ones (8 bits or fewer)."""
    for at in (*program.arguments, *program.constants):
        value = program.operations[at].outputs[0].value
        array = program.values[value]
        if array.dtype.startswith(("float", "bfloat")) or (
            array.shape and array.itemsize <= 1 and array.dtype != "bool"
        ):
            yield value
