"""Crossovers between weight-stationary and weight-gathered layouts, solved for the number of tokens: Pope et al. 2022, §3.2.

A block is a feed-forward network: matmuls by weights that widen the tokens (one, or a gate and another), elementwise work,
and a matmul by a weight that narrows them again. It is extracted from the traced program and pinned to each of the layouts
of `named_layouts`. A crossover is where the communicated volumes of two layouts are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from autoshard.explaining.named_layouts import Family, Split, families, find_collectives, pin_by_name, total_volume
from autoshard.naming.weights import is_product, weight_name, weight_operand
from costmodels.dimensions import Dimensions
from costmodels.machine.lazy_sympy import sympy
from costmodels.machine.topology import Topology
from costmodels.program.program import Factor, Operation, Program, Region, Use
from costmodels.symbols import Expr, crossover, dimension, evaluate, text


@dataclass(frozen=True)
class Block:
    """A block of matmuls by weights, as a program of its own.

    `contracted`, `output` and `tokens` are the dimensions E, F and BL by name; `weights` the weights' names.
    """

    program: Program
    dimensions: Dimensions
    contracted: tuple[str, ...]
    output: tuple[str, ...]
    tokens: tuple[str, ...]
    weights: tuple[str, ...]


class Crossover(NamedTuple):
    """The number of tokens above which `above` sends less than `below`; `number` is its value at the program's sizes."""

    below: str
    above: str
    tokens: Expr
    number: float


# --- Blocks


def blocks(program: Program, dimensions: Dimensions) -> tuple[Block, ...]:
    """The blocks of a program; identical layers are one block."""
    found: dict[tuple[object, ...], Block] = {}
    for i, op in program.matmuls():
        block = _block(program, dimensions, i) if is_product(op) else None
        if block is not None:
            shape = tuple(
                (o.primitive, names)
                for o, names in zip(block.program.operations, block.dimensions.factors, strict=True)
            )
            found.setdefault(shape, block)
    return tuple(found.values())


def _block(program: Program, dimensions: Dimensions, last: int) -> Block | None:
    """The block that ends in a matmul, if there is one."""
    weight = weight_operand(program, last)
    if weight is None:
        return None
    first, between = _matmuls_before(program, last, weight)
    if not first:
        return None
    roles = {_roles(program, dimensions, i) for i in first}
    contracted, output, tokens = roles.pop()
    end = _roles(program, dimensions, last)
    if roles or end[0] != output or end[1] != contracted or end[2] != tokens:
        return None
    if not (contracted and output and tokens) or any(name.isdigit() for name in (*contracted, *output)):
        return None
    casts = [at for i in (*first, last) for at in _casts(program, i)]
    part, sizes = _extract(program, dimensions, sorted({*first, *between, *casts, last}))
    weights = dict.fromkeys(_weight_name(program, i) for i in (*first, last))
    return Block(part, sizes, contracted, output, tokens, tuple(weights))


def _matmuls_before(program: Program, last: int, weight: int) -> tuple[list[int], list[int]]:
    """The matmuls by weights that lead to a matmul's activation, and the operations between; empty if others do too."""
    first, between, waiting = [], [], [program.operations[last].inputs[1 - weight].value]
    while waiting:
        value = waiting.pop()
        if value not in program.producers:
            return [], []
        i = program.producers[value][0]
        op = program.operations[i]
        if i in first or i in between:
            continue
        if op.op_class == "matmul":
            if weight_operand(program, i) is None or op.region != program.operations[last].region:
                return [], []
            first.append(i)
        elif op.op_class == "fused":
            between.append(i)
            waiting += [use.value for use in op.inputs]
        elif program.values[value].origin is None:
            return [], []
    return sorted(first), sorted(between)


def _roles(program: Program, dimensions: Dimensions, i: int) -> tuple[tuple[str, ...], ...]:
    """The names of a matmul's contracted, output and token dimensions, each sorted."""
    op, weight = program.operations[i], weight_operand(program, i)
    own = [factor for dim in op.inputs[weight or 0].dims for factor in dim]
    contracted = [f for f in own if op.factors[f].kind == "sum"]
    output = [f for f in own if op.factors[f].kind != "sum"]
    tokens = [f for f in range(len(op.factors)) if f not in own]
    return tuple(tuple(dimensions.factors[i][f] for f in some) for some in (contracted, output, tokens))


def _casts(program: Program, i: int) -> Iterator[int]:
    """The casts and views of a weight before a matmul, back to its source."""
    value = program.operations[i].inputs[weight_operand(program, i) or 0].value
    while program.operations[at := program.producers[value][0]].op_class == "fused":
        yield at
        value = program.operations[at].inputs[0].value


def _weight_name(program: Program, i: int) -> str:
    return weight_name(program, program.operations[i].inputs[weight_operand(program, i) or 0].value)


def _extract(program: Program, dimensions: Dimensions, kept: Sequence[int]) -> tuple[Program, Dimensions]:
    """Some operations as a program that runs once: their inputs are arguments, and values that others use are results."""
    operations = [program.operations[i] for i in kept]
    made = {use.value for op in operations for use in op.outputs}
    used = dict.fromkeys(use.value for op in operations for use in op.inputs if use.value not in made)
    outside = {value for value in made if {at for at, _ in program.consumers.get(value, ())} - set(kept)}
    inside = {use.value for op in operations for use in op.inputs}
    results = [value for value in made if value in outside or value not in inside]
    sources = [_end(program, value, "argument") for value in used]
    sinks = [_end(program, value, "result") for value in results]
    plain = [
        replace(op, region=0, inputs=_renumber_uses(op.inputs), outputs=_renumber_uses(op.outputs)) for op in operations
    ]
    part = Program(
        f"a block of {program.name}",
        tuple(replace(value, region=0) for value in program.values),
        (*sources, *plain, *sinks),
        (Region("main"),),
        tuple(range(len(sources))),
        (),
        tuple(range(len(sources) + len(plain), len(sources) + len(plain) + len(sinks))),
    )
    factors = (
        *(dimensions.shapes[value] for value in used),
        *(dimensions.factors[i] for i in kept),
        *(dimensions.shapes[value] for value in results),
    )
    return part, replace(dimensions, factors=factors, counts=("1",))


def _end(program: Program, value: int, primitive: str) -> Operation:
    array = program.values[value]
    use = (Use(value, tuple((at,) for at in range(len(array.shape)))),)
    factors = tuple(Factor(n) for n in array.shape)
    if primitive == "argument":
        return Operation(array.name, primitive, factors, (), use, op_class="source")
    return Operation(array.name, primitive, factors, use, (), op_class="sink")


def _renumber_uses(uses: Sequence[Use]) -> tuple[Use, ...]:
    return tuple(replace(use, region=0) for use in uses)


# --- Volumes and crossovers


def volume_sent(block: Block, family: Family, topology: Topology, exact: bool = False) -> Expr:
    """The bytes that one chip sends in a block under a named layout.

    **Arguments:**

    - `exact`: with $(N-1)/N$; otherwise by the convention of Pope et al., in which any axes use all links of a chip.
    """
    sizes = {name: size for name, size in topology.axis_sizes.items() if size > 1}
    roles = {block.contracted[0]: "contracted", block.output[0]: "output", block.tokens[0]: "tokens"}

    def splits(i: int, op: Operation) -> Split:
        names = block.dimensions.factors[i]
        if op.op_class == "matmul":
            by_role = family.used
        elif {block.contracted[0], block.output[0]} <= set(names):
            by_role = family.stored if op.op_class == "source" else family.used
        else:
            by_role = family.hidden if set(block.output) & set(names) else family.outside
        return {name: by_role.get(role, ()) for name, role in roles.items()}

    choice = pin_by_name(block.program, block.dimensions, splits, list(sizes))
    return total_volume(find_collectives(block.program, block.dimensions, sizes, choice), exact)


def volumes(block: Block, topology: Topology, exact: bool = False) -> dict[str, Expr]:
    """Named layout to the bytes that one chip sends in a block, in the order of the family."""
    axes = [axis.name for axis in topology.axes if axis.size > 1]
    return {family.name: volume_sent(block, family, topology, exact) for family in families(axes)} if axes else {}


def crossovers(block: Block, topology: Topology, exact: bool = False) -> tuple[Crossover, ...]:
    """The crossovers from the layout that sends least with few tokens to the one that sends least with many.

    The numbers of tokens are solved symbolically; their order is that at the program's sizes.
    """
    by_name, numbers = _linear(block, topology, exact), numbers_of(block, topology)
    if not by_name:
        return ()
    slope = {name: evaluate(rate, numbers) for name, (rate, _) in by_name.items()}
    found: list[Crossover] = []
    at, best = 0.0, cheapest_start(block, topology, exact)
    while True:
        cheaper = [name for name in by_name if slope[name] < slope[best]]
        later = [Crossover(best, name, *_solve(by_name[best], by_name[name], numbers)) for name in cheaper]
        later = [each for each in later if each.number >= at]
        if not later:
            return tuple(found)
        found.append(min(later, key=lambda each: (each.number, slope[each.above])))
        at, best = found[-1].number, found[-1].above


def cheapest_start(block: Block, topology: Topology, exact: bool = False) -> str:
    """The layout that sends least with few tokens; "" on one chip."""
    numbers = numbers_of(block, topology)
    order = {
        name: (evaluate(start, numbers), evaluate(rate, numbers))
        for name, (rate, start) in _linear(block, topology, exact).items()
    }
    return min(order, key=lambda name: order[name], default="")


def _linear(block: Block, topology: Topology, exact: bool) -> dict[str, tuple[Expr, Expr]]:
    """Per layout the bytes per token, and those independent of tokens (gathered weights)."""
    tokens = dimension("N_tokens")
    by_name = {name: substitute_tokens(block, each, tokens) for name, each in volumes(block, topology, exact).items()}
    return {name: (each.coeff(tokens, 1), each.coeff(tokens, 0)) for name, each in by_name.items()}


def _solve(below: tuple[Expr, Expr], above: tuple[Expr, Expr], numbers: Mapping[str, float]) -> tuple[Expr, float]:
    tokens = dimension("N_tokens")
    solved = crossover(below[0] * tokens + below[1], above[0] * tokens + above[1], tokens)
    return solved, evaluate(solved, numbers)


def substitute_tokens(block: Block, expression: Expr, tokens: sympy.Symbol) -> Expr:
    """An expression with the number of tokens in place of their dimensions: N for B·L."""
    first, *others = (dimension(name) for name in block.tokens)
    return sympy.expand(expression.subs(first, tokens / sympy.Mul(*others)))


def numbers_of(block: Block, topology: Topology) -> dict[str, float]:
    """Sizes of dimensions and axes by name."""
    axes = {name.upper(): float(size) for name, size in topology.axis_sizes.items()}
    return {**{name: float(n) for name, n in block.dimensions.sizes.items()}, **axes}


def crossover_text(each: Crossover, block: Block) -> str:
    """A crossover as text: `WG-X sends less than WS-2D from B·L = E (18,432) on`."""
    tokens = text(sympy.Mul(*map(dimension, block.tokens)))
    return f"{each.above} sends less than {each.below} from {tokens} = {text(each.tokens)} ({each.number:,.0f}) on"
